"""Bytes of an HL7 v2 message to text: MSH-18 decides, what contradicts it is decoded all the same and said.

Source: HL7 v2.5.1 table 0211; ../shared/STANDARDS.md (undeclared: UTF-8, else cp1252 with a warning).
"""

import re
from collections.abc import Iterable

_CODECS = {
    "ASCII": "ascii",
    "US-ASCII": "ascii",
    "ISO IR6": "ascii",
    "UNICODE": "utf-8",
    "UNICODE UTF-8": "utf-8",
    "UTF-8": "utf-8",
    "UTF8": "utf-8",
    "GB 18030-2000": "gb18030",
    "GB18030": "gb18030",
    "KS X 1001": "euc_kr",
    "BIG-5": "big5",
    "ISO IR13": "shift_jis",
    "CP1252": "cp1252",
    "WINDOWS-1252": "cp1252",
}
_JAPANESE = frozenset({"ISO IR14", "ISO IR87", "ISO IR159"})
"""Reached by ISO 2022 escape sequences; one codec reads all three."""

_ISO_8859 = re.compile(r"(?:ISO[ _-]?)?8859[/-](\d{1,2})")
_ISO_8859_PARTS = frozenset(range(1, 17)) - {12}
_SHORT_NAME = re.compile(r"[A-Z0-9 ./_-]{1,24}")
_C1 = re.compile(rb"[\x80-\x9f]")


def find_codec(names: Iterable[str]) -> str:
    """The Python codec of MSH-18's repetitions, empty if the first is not known. Of several the first is the
    message's own; Japanese sets are switched to inside the text, so any of them decides."""
    wanted = [name.strip().upper() for name in names]
    if not _JAPANESE.isdisjoint(wanted):
        return "iso2022_jp_ext"
    first = next((name for name in wanted if name), "")
    part = _ISO_8859.fullmatch(first)
    if part and int(part[1]) in _ISO_8859_PARTS:
        return f"iso8859-{int(part[1])}"
    return _CODECS.get(first, "")


def decode_text(raw: bytes, declared: list[str], default_codec: str) -> tuple[str, str, tuple[str, ...]]:
    """The text, the codec for hexadecimal escapes and for the answer (MSH's own), and what was odd.

    `declared` are MSH-18's repetitions, empty where it says nothing: then `default_codec` is tried first.
    """
    stated = any(name.strip() for name in declared)
    codec, warnings = default_codec, []
    if stated:
        codec = find_codec(declared)
        if not codec:
            codec = default_codec
            warnings.append(f"MSH-18 names a character set that is not known here{_quote(declared)}; {codec} was tried")
    if codec == "iso8859-1" and _C1.search(raw):
        codec = "cp1252"
        warnings.append("MSH-18 says 8859/1 but the bytes 80-9F are in use; cp1252 was tried")
    try:
        return raw.decode(codec), codec, tuple(warnings)
    except UnicodeError:
        lines = [_decode_line(line, codec) for line in _split_lines(raw)]
    said = f"MSH-18 says {codec}" if stated else f"MSH-18 is empty and {codec} was tried"
    warnings.append(f"{said}, but not all bytes are; those lines were read as UTF-8 or else cp1252")
    return "\n".join(text for text, _ in lines), lines[0][1], tuple(warnings)


def _quote(declared: list[str]) -> str:
    name = next((name.strip().upper() for name in declared if name.strip()), "")
    return f" ({name})" if _SHORT_NAME.fullmatch(name) else ""


def _split_lines(raw: bytes) -> list[bytes]:
    return raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")


def _decode_line(line: bytes, codec: str) -> tuple[str, str]:
    """A line's text and codec. Each by itself, so that one wrong byte does not garble every other name."""
    for name in (codec, "utf-8", "cp1252"):
        try:
            return line.decode(name), name
        except UnicodeError:
            continue
    return line.decode("latin-1"), "latin-1"

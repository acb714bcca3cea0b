"""HL7 v2 bytes to a message: the separators, the character set, the segments and a header that can be answered.

Sources: HL7 v2.5.1 chapter 2; ../shared/STANDARDS.md. Tolerant where the meaning is certain (any line end,
a byte order mark, bare line breaks inside a text), and refusing where it is not (separators that separate
nothing, two messages in one, no control id to answer to).
"""

import codecs
import hashlib
import re
from dataclasses import replace
from functools import lru_cache

from mappings.inputs.er7_characters import decode_text
from mappings.model.message import (
    Encoding,
    Header,
    Message,
    Segment,
    find_separators_fault,
    holds_controls,
    segment_to_header,
    sketch_header,
)

MAX_BYTES = 32 * 1024 * 1024
"""Longest message taken; report texts and embedded documents stay far below."""

MAX_CONTROL_ID_LENGTH = 199
"""MSH-10 of v2.7 and later; 20 before, which many senders exceed."""

_BEFORE = b"\x00\t\n\v\r\x1c "
_AFTER = b"\x00\n\v\r\x1c"
_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"\x00\x00\xfe\xff")
_WIDE_STARTS = (b"M\x00S\x00H\x00", b"\x00M\x00S\x00H")
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_VERSION = re.compile(r"2\.(\d)(?:\.\d{1,2})?")
_TEXT_SEGMENTS = ("OBX", "NTE")


class UnreadableMessage(Exception):
    """These bytes are no message that can be taken. `reason` is a sentence without patient data, `header`
    what could be read of MSH (for the answer), `error_code` the one of HL7 table 0357."""

    def __init__(self, reason: str, *, header: Header | None = None, error_code: str = "207") -> None:
        super().__init__(reason)
        self.reason = reason
        self.header = header or Header()
        self.error_code = error_code

    @property
    def control_id(self) -> str:
        """MSH-10 if it can be found, else empty."""
        return self.header.control_id


def read_message(raw: bytes, *, default_charset: str = "utf-8", max_bytes: int = MAX_BYTES) -> Message:
    """The message in `raw` (without MLLP framing); nothing is split beyond its header.

    `default_charset` is the Python codec where MSH-18 says nothing. Raises UnreadableMessage, and nothing else.
    """
    if len(raw) > max_bytes:
        reason = f"the message has {len(raw)} bytes; at most {max_bytes} are taken"
        raise UnreadableMessage(reason, header=sketch_header(raw))
    body, warnings = _trim(raw)
    encoding = _read_encoding(body)
    text, codec, odd = decode_text(body, _declared_charset(body, encoding), default_charset)
    lines, broken = _split_segments(text, encoding)
    if "\n" in lines[0]:
        raise UnreadableMessage("the line after MSH is no segment", header=sketch_header(body), error_code="100")
    if broken:
        warnings.append(f"{broken} lines are no segments; each was taken as text that belongs to the line before it")
    if _CONTROLS.search(text):
        warnings.append("control characters in the text")
    msh = Segment("MSH", lines[0], replace(encoding, codec=codec))
    header = segment_to_header(msh)
    _check_header(header, lines)
    warnings.extend(odd)
    warnings.extend(_judge_version(header))
    return Message(header, lines, hashlib.sha256(raw).hexdigest(), tuple(warnings))


def _trim(raw: bytes) -> tuple[bytes, list[str]]:
    """The bytes from MSH on, without byte order mark, left-over framing and blank lines around them."""
    if raw.startswith(_WIDE_MARKS) or raw.startswith(_WIDE_STARTS):
        reason = "the message is UTF-16 or UTF-32, which MLLP cannot carry; send UTF-8"
        raise UnreadableMessage(reason, error_code="102")
    body = raw.lstrip(_BEFORE).rstrip(_AFTER)
    warnings = []
    if body.startswith(codecs.BOM_UTF8):
        body = body[len(codecs.BOM_UTF8) :].lstrip(_BEFORE)
        warnings.append("a byte order mark stands before MSH")
    if body.startswith(b"MSH"):
        return body, warnings
    raise UnreadableMessage(_name_beginning(body), header=sketch_header(body), error_code="100")


def _name_beginning(body: bytes) -> str:
    if not body:
        return "the message is empty"
    if body.startswith((b"FHS", b"BHS")):
        return "this is a batch (FHS or BHS); send each message by itself"
    return "the message does not begin with MSH"


def _read_encoding(body: bytes) -> Encoding:
    """The separators that MSH-1 and MSH-2 state."""
    start = body[3:64].decode("latin-1")
    separator, rest = start[:1], re.split(r"[\r\n]", start[1:], maxsplit=1)[0]
    if not separator or separator in "\r\n":
        raise UnreadableMessage("the message ends after MSH: no separators, no MSH-10", error_code="101")
    msh_2 = rest.split(separator, 1)[0]
    fault = find_separators_fault(separator, msh_2)
    if fault:
        raise UnreadableMessage(fault, header=sketch_header(body), error_code="102")
    return Encoding(separator, *msh_2)


def _declared_charset(body: bytes, encoding: Encoding) -> list[str]:
    fields = re.split(rb"[\r\n]", body, maxsplit=1)[0].decode("latin-1").split(encoding.field, 18)
    return fields[17].split(encoding.repetition) if len(fields) > 17 else []


@lru_cache(maxsize=16)
def _segment_pattern(field: str) -> re.Pattern[str]:
    return re.compile(rf"[A-Z][A-Z0-9]{{2}}{re.escape(field)}")


def _split_segments(text: str, encoding: Encoding) -> tuple[tuple[str, ...], int]:
    """Segment lines, and how many lines were none. A line that does not begin like a segment is what a bare
    line break cut off a text: it goes back to where it was, so the fields after it are again in place."""
    lines = text.replace("\r\n", "\r").replace("\n", "\r").split("\r")
    begins = _segment_pattern(encoding.field).match
    if all(map(begins, filter(None, lines))):
        return tuple(filter(None, lines)), 0
    segments: list[list[str]] = []
    broken = blank = 0
    for line in lines:
        if begins(line) or (line and not segments) or _is_bare_segment(line, segments):
            segments.append([line])
            blank = 0
        elif line.strip():
            segments[-1].extend([*[""] * blank, line])
            broken += 1
            blank = 0
        else:
            blank += 1
    return tuple("\n".join(parts) for parts in segments), broken


def _is_bare_segment(line: str, segments: list[list[str]]) -> bool:
    """A name without any field; after a text it is more likely a word of it, such as MRI."""
    is_name = len(line) == 3 and line.isascii() and line.isalnum() and line.isupper() and line[0].isalpha()
    return is_name and segments[-1][0][:3] not in _TEXT_SEGMENTS


def _check_header(header: Header, lines: tuple[str, ...]) -> None:
    """Raise where the message cannot be told from others, answered or understood."""
    fault, code = "", "101"
    if not header.control_id.strip():
        fault = "MSH-10 (message control id) is empty"
    elif len(header.control_id) > MAX_CONTROL_ID_LENGTH or holds_controls(header.control_id):
        fault, code = f"MSH-10 is longer than {MAX_CONTROL_ID_LENGTH} characters or holds control characters", "102"
    elif not header.message_type:
        fault = "MSH-9 (message type) is empty"
    elif any(line.startswith("MSH") for line in lines[1:]):
        fault, code = "a second MSH follows in the same frame: two messages in one", "100"
    if fault:
        raise UnreadableMessage(fault, header=header, error_code=code)


def _judge_version(header: Header) -> tuple[str, ...]:
    """Warnings about MSH-12; raises where the version is older than 2.3 or none at all."""
    if not header.version:
        return ("MSH-12 (version) is empty; read as 2.5.1",)
    version = _VERSION.fullmatch(header.version)
    if not version or int(version[1]) < 3:
        reason = "MSH-12 states no version that is understood here: 2.3 to 2.5.1"
        raise UnreadableMessage(reason, header=header, error_code="203")
    return () if int(version[1]) < 6 else (f"version {version[0]} is newer than 2.5.1; read as 2.5.1",)

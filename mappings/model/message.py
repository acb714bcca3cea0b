"""An HL7 v2 message as read: separators, segments, header. Nothing is split before it is asked for.

Source: HL7 v2.5.1 chapter 2 (2.5 delimiters, 2.7 escape sequences, 2.14.9 MSH). Fields, components,
subcomponents and repetitions are counted from 1, as the standard counts them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

NULL = '""'
"""A value the sender deletes, unlike one it does not mention (2.5.1 2.5.3)."""

MAX_BLANKS = 80
"""Most lines or spaces that one `\\.sp n\\` or `\\.sk n\\` may ask for."""

_SKETCH_BYTES = 4096
_BREAKING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


@dataclass(frozen=True)
class Encoding:
    """How a message is written: its separators (MSH-1, MSH-2) and the Python codec of its character set."""

    field: str = "|"
    component: str = "^"
    repetition: str = "~"
    escape: str = "\\"
    subcomponent: str = "&"
    truncation: str = ""
    codec: str = "utf-8"

    @property
    def msh_2(self) -> str:
        """The encoding characters as MSH-2 states them."""
        return f"{self.component}{self.repetition}{self.escape}{self.subcomponent}{self.truncation}"


def find_separators_fault(field: str, msh_2: str) -> str:
    """Why MSH-1 and MSH-2 cannot separate anything, in words; empty where they can."""
    if field not in _PUNCTUATION:
        return "MSH-1 (the field separator) is no punctuation character"
    if len(msh_2) not in (4, 5):
        return f"MSH-2 holds {len(msh_2)} encoding characters, expected 4 such as ^~\\&"
    if any(character.isspace() for character in msh_2):
        return "MSH-2 holds white space among the encoding characters"
    if not _PUNCTUATION.issuperset(msh_2):
        return "MSH-2 holds a letter, digit or non-ASCII character among the encoding characters"
    if len({field, *msh_2}) != 1 + len(msh_2):
        return "MSH-1 and MSH-2 use one character for two separators"
    return ""


@lru_cache(maxsize=64)
def _escape_pattern(escape: str) -> re.Pattern[str]:
    """Known sequences only: `C:\\temp` sent unescaped stays what it is. No part can overlap the next: linear."""
    mark = re.escape(escape)
    known = r"[FSTRENH]|[Xx][0-9A-Fa-f]+|[CMZ][0-9A-Fa-f]+|\.(?:br|BR|ce|fi|nf|(?:sp|sk|in|ti)[+-]?[0-9]{0,6})"
    return re.compile(f"{mark}({known}){mark}")


def _decode_hex(digits: str, codec: str) -> str | None:
    """Characters of a `\\Xhh..\\` in the message's character set, else as cp1252, else as Latin-1."""
    if len(digits) % 2:
        return None
    data = bytes.fromhex(digits)
    for name in (codec, "cp1252"):
        try:
            return data.decode(name)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")


def _blanks(command: str) -> str:
    digits = command.lstrip(".spk+-")
    return (" " if command.startswith(".sk") else "\n") * min(int(digits or 1), MAX_BLANKS)


def unescape(value: str, encoding: Encoding) -> str:
    """`value` with its escape sequences replaced, once, from left to right; character set switches
    (`\\C..\\`, `\\M..\\`), local (`\\Z..\\`), unknown and unterminated sequences are kept as written."""
    if encoding.escape not in value:
        return value
    plain = {
        "F": encoding.field,
        "S": encoding.component,
        "T": encoding.subcomponent,
        "R": encoding.repetition,
        "E": encoding.escape,
        "H": "",
        "N": "",
        ".br": "\n",
        ".BR": "\n",
        ".ce": "\n",
    }

    def replace(match: re.Match[str]) -> str:
        code = match[1]
        if code in plain:
            return plain[code]
        if code[0] in "Xx":
            decoded = _decode_hex(code[1:], encoding.codec)
            return match[0] if decoded is None else decoded
        if code.startswith((".sp", ".sk")):
            return _blanks(code)
        return "" if code[0] == "." else match[0]

    return _escape_pattern(encoding.escape).sub(replace, value)


def _piece(raw: str, separator: str, number: int) -> str:
    if number == 1:
        end = raw.find(separator)
        return raw if end < 0 else raw[:end]
    pieces = raw.split(separator, number) if number > 1 else []
    return pieces[number - 1] if 0 < number <= len(pieces) else ""


@dataclass(frozen=True, slots=True)
class Repetition:
    """One repetition of a field, as sent."""

    raw: str
    encoding: Encoding

    def component(self, component: int = 1, subcomponent: int = 1) -> str:
        """The value as sent, escapes and null included; empty if absent."""
        return _piece(_piece(self.raw, self.encoding.component, component), self.encoding.subcomponent, subcomponent)

    def text(self, component: int = 1, subcomponent: int = 1) -> str:
        """The value unescaped; empty if absent or null."""
        raw = self.component(component, subcomponent)
        return "" if raw == NULL else unescape(raw, self.encoding)

    def is_null(self, component: int = 1, subcomponent: int = 1) -> bool:
        """Whether the sender deletes this value."""
        return self.component(component, subcomponent) == NULL


@dataclass(frozen=True)
class Segment:
    """One segment: its name and its line as sent, without the segment end."""

    name: str
    line: str
    encoding: Encoding

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The fields as sent, field n at index n (index 0 is the name); MSH-1 is the separator itself."""
        name, *fields = self.line.split(self.encoding.field)
        return (name, self.encoding.field, *fields) if self.name == "MSH" else (name, *fields)

    def raw(self, field: int) -> str:
        """The whole field as sent, all its repetitions; empty if absent."""
        return self.fields[field] if 0 < field < len(self.fields) else ""

    def _is_delimiters(self, field: int) -> bool:
        return self.name == "MSH" and field in (1, 2)

    def repetition(self, field: int, repetition: int = 1) -> Repetition:
        """One repetition; an empty one if absent. To walk through all of them use `repetitions`."""
        return Repetition(_piece(self.raw(field), self.encoding.repetition, repetition), self.encoding)

    def repetitions(self, field: int) -> Iterator[Repetition]:
        """Every repetition that holds anything, in order."""
        raw = self.raw(field)
        for part in raw.split(self.encoding.repetition) if raw else ():
            if part:
                yield Repetition(part, self.encoding)

    def text(self, field: int, component: int = 1, subcomponent: int = 1, repetition: int = 1) -> str:
        """The value unescaped; empty if absent or null (`is_null` tells which)."""
        if self._is_delimiters(field):
            return self.raw(field)
        return self.repetition(field, repetition).text(component, subcomponent)

    def is_null(self, field: int, component: int = 1, subcomponent: int = 1, repetition: int = 1) -> bool:
        """Whether the sender deletes this value, rather than not mention it."""
        return self.repetition(field, repetition).is_null(component, subcomponent)


@dataclass(frozen=True)
class Header:
    """What MSH says. Texts are unescaped first components (of MSH-3 to MSH-6 the universal id
    where there is no namespace); `control_id`, `parties` (MSH-3 to MSH-6) and `character_set` (MSH-18) are
    the whole fields as sent, for an answer that must repeat them exactly.
    `message_time` is MSH-7 as sent: it may have no offset, and the reader knows no zone."""

    encoding: Encoding = Encoding()
    sending_application: str = ""
    sending_facility: str = ""
    receiving_application: str = ""
    receiving_facility: str = ""
    parties: tuple[str, str, str, str] = ("", "", "", "")
    message_time: str = ""
    message_type: str = ""
    trigger: str = ""
    structure: str = ""
    control_id: str = ""
    processing_id: str = ""
    version: str = ""
    accept_acknowledgement: str = ""
    application_acknowledgement: str = ""
    character_set: str = ""

    @property
    def event(self) -> str:
        """Type and trigger: `ORM^O01`."""
        return f"{self.message_type}^{self.trigger}" if self.trigger else self.message_type


def segment_to_header(msh: Segment) -> Header:
    """The header of an MSH segment."""
    application, facility, receiver, receiving_facility = (
        (msh.text(field, 1) or msh.text(field, 2)).strip() for field in (3, 4, 5, 6)
    )
    return Header(
        encoding=msh.encoding,
        sending_application=application,
        sending_facility=facility,
        receiving_application=receiver,
        receiving_facility=receiving_facility,
        parties=(msh.raw(3), msh.raw(4), msh.raw(5), msh.raw(6)),
        message_time=msh.text(7).strip(),
        message_type=msh.text(9, 1).strip(),
        trigger=msh.text(9, 2).strip(),
        structure=msh.text(9, 3).strip(),
        control_id=msh.raw(10),
        processing_id=msh.text(11).strip(),
        version=msh.text(12).strip(),
        accept_acknowledgement=msh.text(15).strip().upper(),
        application_acknowledgement=msh.text(16).strip().upper(),
        character_set=msh.raw(18),
    )


def drop_controls(value: str) -> str:
    """`value` without control characters and Unicode line ends: safe on one line, in a frame, in a database."""
    return _BREAKING.sub("", value) if _BREAKING.search(value) else value


def holds_controls(value: str) -> bool:
    """Whether `value` holds a control character or a Unicode line end."""
    return _BREAKING.search(value) is not None


def _sketch_control_id(fields: list[str]) -> str:
    """MSH-10 where MSH-2 stands in its place, whatever is wrong with it; if it may be missing or split by
    the field separator all later fields may have moved, and no id is better than a wrong one."""
    if len(fields) < 10 or any(character.isalnum() for character in fields[1]):
        return ""
    if len(fields[1]) < 4 and fields[2] and not any(character.isalnum() for character in fields[2]):
        return ""
    return fields[9]


def sketch_header(raw: bytes) -> Header:
    """What can be read of the header of anything at all: every part that cannot is empty. Never raises."""
    start = raw.find(b"MSH", 0, _SKETCH_BYTES)
    if start < 0:
        return Header()
    line = re.split(rb"[\r\n\x1c]", raw[start : start + _SKETCH_BYTES], maxsplit=1)[0]
    try:
        text, codec = line.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        text, codec = line.decode("latin-1"), "latin-1"
    separator = text[3:4]
    if separator not in _PUNCTUATION:
        return Header()
    fields = text.split(separator)
    if len(fields) < 2 or find_separators_fault(separator, fields[1]):
        return Header(control_id=_sketch_control_id(fields))
    encoding = replace(Encoding(separator, *fields[1]), codec=codec)
    return segment_to_header(Segment("MSH", text, encoding))


@dataclass(frozen=True)
class Message:
    """A message as read: its header, its segments' lines in order (MSH first), what was odd about it
    (`warnings`, without patient data) and the SHA-256 of the bytes it came in."""

    header: Header
    lines: tuple[str, ...]
    digest: str
    warnings: tuple[str, ...] = ()

    def segments(self, name: str = "") -> tuple[Segment, ...]:
        """The segments of that name in their order; without a name, all of them."""
        encoding = self.header.encoding
        return tuple(Segment(line[:3], line, encoding) for line in self.lines if line.startswith(name))

    def first(self, name: str) -> Segment:
        """The first segment of that name; an empty one if there is none."""
        for line in self.lines:
            if line.startswith(name):
                return Segment(name, line, self.header.encoding)
        return Segment(name, name, self.header.encoding)

"""HL7 v2 ER7 text from plain Python values: fields in, one CR-ended segment a line out.

A field is a str (one value), a tuple (components; a tuple inside it holds subcomponents) or a list
(repetitions of either). Escaping follows HL7 v2.5.1 chapter 2.7; the separators are the usual `|^~\\&`.
"""

import re
from collections.abc import Sequence
from datetime import date, datetime

Component = str | tuple[str, ...]
Repetition = str | tuple[Component, ...]
Field = Repetition | list[Repetition]

LINE_BREAK = "\\.br\\"
"""What a reader shows as a new line inside a TX or FT value."""


def _hex_escape(character: str) -> str:
    return f"\\X{character.encode('utf-8').hex().upper()}\\"


_SEPARATORS = {"\\": "\\E\\", "|": "\\F\\", "^": "\\S\\", "&": "\\T\\", "~": "\\R\\"}
# C0, DEL and C1 controls, and Unicode's own line ends: some readers split segments at them.
_CONTROLS = [*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), "\u2028", "\u2029"]
_ESCAPES = str.maketrans({c: _hex_escape(c) for c in _CONTROLS} | _SEPARATORS)
_NEEDS_ESCAPE = re.compile("[\\\\|^&~\x00-\x1f\x7f-\x9f\u2028\u2029]")


def escape(value: str) -> str:
    """`value` with separators and control characters as escape sequences; it holds no CR afterwards."""
    return value.translate(_ESCAPES) if _NEEDS_ESCAPE.search(value) else value


def escape_text(value: str) -> str:
    """Like `escape`, with line ends (LF, CR, CRLF) as `\\.br\\`; for TX values."""
    lines = value.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return LINE_BREAK.join(escape(line) for line in lines)


class Verbatim(str):
    """Text that is ER7 already (made by `escape_text`), written as it is."""

    __slots__ = ()


def text_value(value: str) -> Verbatim:
    """A TX value as a field: line ends become `\\.br\\`, the rest is escaped."""
    return Verbatim(escape_text(value))


def _write_value(value: str) -> str:
    return value if isinstance(value, Verbatim) else escape(value)


def _write_component(component: Component) -> str:
    if isinstance(component, str):
        return _write_value(component)
    return "&".join(map(_write_value, component)).rstrip("&")


def _write_repetition(repetition: Repetition) -> str:
    if isinstance(repetition, str):
        return _write_value(repetition)
    return "^".join(map(_write_component, repetition)).rstrip("^")


def write_field(field: Field) -> str:
    """One field's ER7; trailing empty components, subcomponents and repetitions are dropped."""
    if isinstance(field, list):
        return "~".join(map(_write_repetition, field)).rstrip("~")
    return _write_repetition(field)


def write_segment(name: str, fields: Sequence[Field]) -> str:
    """One segment without its end; `fields[0]` is field 1, trailing empty fields are dropped.

    For MSH `fields[0]` is MSH-3: the two that declare the separators are written here.
    """
    head = "MSH|^~\\&" if name == "MSH" else name
    return "|".join((head, *map(write_field, fields))).rstrip("|")


def write_message(segments: Sequence[str]) -> bytes:
    """The message as UTF-8, a CR after every segment; half a surrogate pair becomes `?`."""
    return ("\r".join(segments) + "\r").encode("utf-8", "replace")


def format_date(day: date | None) -> str:
    """HL7 DT `YYYYMMDD`, empty for None."""
    return day.isoformat().replace("-", "") if day else ""


def format_time(moment: datetime) -> str:
    """HL7 DTM to the second with its offset from UTC; `moment` is aware."""
    return f"{format_date(moment.date())}{moment:%H%M%S%z}"

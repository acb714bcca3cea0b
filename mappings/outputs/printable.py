"""Makes strings safe to show: nothing invisible, nothing that could forge a line or turn the reading order."""

import dataclasses
import re
from typing import Any, TypeVar

Value = TypeVar("Value")

# Controls, invisible and direction-changing characters, and lone surrogates: they could hide or forge a line
# of the report, or not be written at all.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def _show(match: re.Match[str]) -> str:
    return f"<U+{ord(match.group()):04X}>"


def _make_printable(value: Any) -> Any:
    if isinstance(value, str):
        return _UNPRINTABLE.sub(_show, value)
    if isinstance(value, tuple):
        return tuple(_make_printable(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: _make_printable(getattr(value, name)) for name in names})
    return value


def make_printable(value: Value) -> Value:
    """`value` with every string in it (dataclasses and tuples included) free of characters that do not print:
    each is shown as `<U+0007>`. Joiners of Persian and Indic names stay."""
    result: Value = _make_printable(value)
    return result

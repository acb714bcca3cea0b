"""Tolerant reading of DICOM JSON (PS3.18 annex F): what is not of the expected shape counts as not stated."""

from collections.abc import Mapping
from typing import Any

DicomJson = dict[str, Any]


def first_value(headers: Mapping[str, Any], tag: str) -> str:
    """The first value of an element as text, stripped; empty where the element has none."""
    element = headers.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    first = values[0] if isinstance(values, list) and values else None
    return "" if first is None or isinstance(first, dict | list) else str(first).strip()


def count_value(headers: Mapping[str, Any], tag: str) -> int | None:
    """The first value of an element as a whole number, also where it is written as text or with a fraction of nought;
    None where it is none."""
    try:
        number = float(first_value(headers, tag))
    except ValueError:
        return None
    return int(number) if number >= 0 and number == int(number) else None

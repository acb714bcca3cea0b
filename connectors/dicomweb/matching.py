"""Does a data set match a QIDO-RS filter? Source: DICOM PS3.4 C.2.2.2 (attribute matching)."""

import re

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag

_RANGE_VR = ("DA", "DT", "TM")


def matches(header: Dataset, tag: BaseTag, wanted: str) -> bool:
    """Whether one attribute matches: an empty filter always; else a UID list, a range, a wildcard or equality."""
    if wanted in ("", "*"):
        return True
    element = header.get(tag)
    if element is None or element.value in (None, ""):
        return False
    values = list(element.value) if isinstance(element.value, MultiValue) else [element.value]
    return any(_matches_one(str(value), element.VR, wanted) for value in values)


def _matches_one(value: str, vr: str, wanted: str) -> bool:
    if vr == "UI":
        return value in re.split(r"[,\\]", wanted)
    if vr in _RANGE_VR and "-" in wanted:
        return _in_range(value, wanted)
    pattern = "".join({"*": ".*", "?": "."}.get(char, re.escape(char)) for char in wanted)
    ignore_case = re.IGNORECASE if vr == "PN" else re.NOFLAG
    return re.fullmatch(pattern, value, ignore_case | re.DOTALL) is not None


def _in_range(value: str, wanted: str) -> bool:
    """Both ends belong to the range, either may be open; an end of less precision covers all below it."""
    first, _, last = wanted.partition("-")
    return (not first or value[: len(first)] >= first) and (not last or value[: len(last)] <= last)

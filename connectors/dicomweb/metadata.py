"""DICOM JSON as it comes from a server (PS3.18 annex F): parsed, checked, and freed of references to bulk data."""

import json
import re
from collections.abc import Iterable
from typing import Any

from connectors.errors import Permanent

DicomJson = dict[str, Any]

STUDY_UID, SERIES_UID, SOP_UID = "0020000D", "0020000E", "00080018"
_TAG = re.compile(r"[0-9A-Fa-f]{8}")


def data_sets_of(body: bytes, where: str) -> list[DicomJson]:
    """The data sets in an answer; an empty body holds none. Permanent for what is not a list of them."""
    if not body.strip():
        return []
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Permanent(f"{where}: the answer is not DICOM JSON. Check that url is the DICOMweb root.") from error
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise Permanent(f"{where}: the answer is not a list of DICOM JSON data sets.")
    return found


def of_series(body: bytes, study_uid: str, series_uid: str, where: str) -> list[DicomJson]:
    """The data sets in a metadata answer, without bulk data, each content once.

    Permanent if one is no data set, has no SOP Instance UID, or is of another series than was asked for.
    """
    found: list[DicomJson] = []
    for number, one in enumerate(data_sets_of(body, where), 1):
        data_set = _checked(one, f"{where}: data set {number} of the answer")
        if (value_of(data_set, STUDY_UID), value_of(data_set, SERIES_UID)) != (study_uid, series_uid):
            raise Permanent(f"{where}: data set {number} of the answer is of another study or series.")
        found.append(data_set)
    return each_once(found)


def each_once(data_sets: Iterable[DicomJson]) -> list[DicomJson]:
    """The data sets by SOP Instance UID, without repetitions. What differs under one UID stays, to be seen."""
    kept: dict[str, list[DicomJson]] = {}
    for data_set in data_sets:
        same = kept.setdefault(value_of(data_set, SOP_UID), [])
        if data_set not in same:
            same.append(data_set)
    return [data_set for same in kept.values() for data_set in same]


def without_bulk(data_set: DicomJson) -> DicomJson:
    """The data set without the elements that stand elsewhere (BulkDataURI), in its sequences too."""
    return {tag: _attribute(one) for tag, one in data_set.items() if "BulkDataURI" not in one}


def value_of(data_set: DicomJson, tag: str) -> str:
    """The first value of an attribute as text, '' where there is none."""
    attribute = data_set.get(tag)
    values = attribute.get("Value") if isinstance(attribute, dict) else None
    return str(values[0]) if isinstance(values, list) and values and values[0] is not None else ""


def _attribute(attribute: DicomJson) -> DicomJson:
    if attribute.get("vr") != "SQ":
        return attribute
    return {**attribute, "Value": [without_bulk(item or {}) for item in attribute.get("Value") or []]}


def _checked(data_set: DicomJson, where: str) -> DicomJson:
    try:
        _check_attributes(data_set)
        checked = without_bulk(data_set)
    except (ValueError, RecursionError) as error:
        raise Permanent(f"{where} is not DICOM JSON.") from error
    if not value_of(checked, SOP_UID):
        raise Permanent(f"{where} has no SOP Instance UID.")
    return checked


def _check_attributes(data_set: object) -> None:
    """ValueError unless this is a data set with a VR and a list of values for each tag, in its sequences too."""
    if not isinstance(data_set, dict):
        raise ValueError("not a data set")
    for tag, attribute in data_set.items():
        if not (_TAG.fullmatch(tag) and isinstance(attribute, dict) and isinstance(attribute.get("vr"), str)):
            raise ValueError("not an attribute with a VR")
        values = attribute.get("Value") or []
        if not isinstance(values, list):
            raise ValueError("not a list of values")
        for item in values if attribute["vr"] == "SQ" else []:
            # An empty item may come as null.
            _check_attributes(item or {})

"""What a STOW-RS server says became of each instance.

Source: DICOM PS3.18 Annex I.2 (Store Instances Response Module), PS3.7 Annex C (status codes).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

SOP_INSTANCE_UID = "00081155"
WARNING_REASON = "00081196"
FAILURE_REASON = "00081197"
FAILED_SEQUENCE = "00081198"
REFERENCED_SEQUENCE = "00081199"

_REASONS = {
    0x0110: "processing failure",
    0x0111: "an instance with this UID is there already",
    0x0112: "no such object instance",
    0x0117: "invalid object instance",
    0x0122: "SOP class not supported",
    0x0124: "not authorized",
    0xB000: "some elements were coerced",
    0xB006: "some elements were discarded",
    0xB007: "the data set does not match its SOP class",
    0xC122: "transfer syntax not supported",
}
_REASON_RANGES = (
    (0xA700, 0xA7FF, "out of resources"),
    (0xA900, 0xA9FF, "the data set does not match its SOP class"),
    (0xC000, 0xCFFF, "the server cannot understand it"),
)

DicomJson = Mapping[str, Any]


@dataclass(frozen=True)
class StoreOutcome:
    """What became of one instance. Only `stored` means that the server said so."""

    sop_instance_uid: str
    stored: bool
    code: int | None = None
    reason: str = ""
    warning: str = ""

    @property
    def retryable(self) -> bool:
        """The server was out of resources (A7xx): the same instance may be taken later."""
        return self.code is not None and 0xA700 <= self.code <= 0xA7FF


def reason_of(code: int | None) -> str:
    """The meaning of a failure or warning code, with the code in hexadecimal."""
    if code is None:
        return "the server gave no reason"
    ranges = (text for low, high, text in _REASON_RANGES if low <= code <= high)
    return f"{_REASONS.get(code) or next(ranges, 'a reason of its own')} ({code:04X}H)"


def outcomes_of(body: bytes, sent: Sequence[str]) -> tuple[StoreOutcome, ...] | None:
    """One outcome for each UID in `sent`, in that order; None if the body is no store response at all.

    An instance that the response does not mention is not stored, as is one that it both stores and fails.
    """
    response = _response(body)
    if response is None:
        return None
    failed = {_uid(item): _number(item, FAILURE_REASON) for item in _items(response, FAILED_SEQUENCE)}
    stored = {_uid(item): _number(item, WARNING_REASON) for item in _items(response, REFERENCED_SEQUENCE)}
    return tuple(_outcome(uid, stored, failed) for uid in sent)


def not_mentioned(uid: str) -> StoreOutcome:
    """The outcome of an instance about which the server said nothing."""
    return StoreOutcome(uid, stored=False, reason="the server's answer does not mention it")


def _outcome(uid: str, stored: Mapping[str, int | None], failed: Mapping[str, int | None]) -> StoreOutcome:
    if uid in failed:
        return StoreOutcome(uid, stored=False, code=failed[uid], reason=reason_of(failed[uid]))
    if uid not in stored:
        return not_mentioned(uid)
    warning = stored[uid]
    return StoreOutcome(uid, stored=True, code=warning, warning=reason_of(warning) if warning else "")


def _response(body: bytes) -> DicomJson | None:
    """The response data set as DICOM JSON, from JSON or from native DICOM XML (PS3.19), None if it is neither."""
    text = body.strip()
    read = _from_xml if text.startswith(b"<") else json.loads
    try:
        response = read(text)
    except (ValueError, RecursionError, ElementTree.ParseError):
        return None
    if isinstance(response, list) and len(response) == 1:
        response = response[0]
    known = (FAILED_SEQUENCE, REFERENCED_SEQUENCE)
    return response if isinstance(response, dict) and any(tag in response for tag in known) else None


def _from_xml(text: bytes) -> dict[str, Any]:
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise ValueError("a document type declaration has no place in native DICOM XML")
    return _attributes(ElementTree.fromstring(text))


def _attributes(parent: ElementTree.Element) -> dict[str, Any]:
    found = (element for element in parent if element.tag.rpartition("}")[2] == "DicomAttribute")
    return {element.get("tag", ""): {"Value": list(_values(element))} for element in found}


def _values(attribute: ElementTree.Element) -> Iterator[Any]:
    is_sequence = attribute.get("vr") == "SQ"
    for child in attribute:
        kind = child.tag.rpartition("}")[2]
        if is_sequence and kind == "Item":
            yield _attributes(child)
        elif not is_sequence and kind == "Value":
            yield child.text or ""


def _items(response: DicomJson, tag: str) -> list[DicomJson]:
    attribute = response.get(tag)
    values = attribute.get("Value") if isinstance(attribute, dict) else None
    return [item for item in values if isinstance(item, dict)] if isinstance(values, list) else []


def _first(item: DicomJson, tag: str) -> object:
    attribute = item.get(tag)
    values = attribute.get("Value") if isinstance(attribute, dict) else None
    return values[0] if isinstance(values, list) and values else None


def _uid(item: DicomJson) -> str:
    return str(_first(item, SOP_INSTANCE_UID) or "")


def _number(item: DicomJson, tag: str) -> int | None:
    try:
        return int(str(_first(item, tag)))
    except ValueError:
        return None

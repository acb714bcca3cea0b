"""Tolerant reading of FHIR R4 JSON: what is not of the expected type counts as not there, never as an error."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from mappings.model.codes import SYSTEM_URLS, Code
from mappings.model.context import Identifier

Json = dict[str, Any]

LOCAL_SCHEME = "L"
"""Scheme of a code whose system is none of the model's; HL7 table 0396 calls local codes L."""

_SCHEMES = {url: scheme for scheme, url in SYSTEM_URLS.items()} | {"urn:oid:1.2.840.10008.2.16.4": "DCM"}
EARLIEST_YEAR = 1900
"""Anything earlier is a placeholder, and arithmetic with time zones fails near year 1."""

_BUNDLE_DEPTH = 8
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True)
class Record:
    """One resource: its JSON, its `Type/id` reference (or full URL), and every name it is referred to by."""

    resource: Json
    kind: str
    reference: str
    names: frozenset[str]

    @property
    def title(self) -> str:
        """How problems name it."""
        return self.reference or f"{self.kind} without id"


def as_dict(value: object) -> Json:
    """`value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: object) -> list[Any]:
    """`value` if it is a JSON array, else an empty one."""
    return value if isinstance(value, list) else []


def as_text(value: object) -> str:
    """`value` if it is a string, stripped, else empty."""
    return value.strip() if isinstance(value, str) else ""


def flatten(items: Sequence[object], depth: int = 0, url: str = "") -> Iterator[tuple[object, str]]:
    """Every resource (with its full URL) of resources, Bundle entries and Bundles, in any mix."""
    for item in items:
        inner = as_dict(item)
        if inner.get("resourceType") == "Bundle" and depth < _BUNDLE_DEPTH:
            yield from flatten(as_list(inner.get("entry")), depth + 1)
        elif "resource" in inner and "resourceType" not in inner and depth < _BUNDLE_DEPTH:
            yield from flatten([inner["resource"]], depth + 1, as_text(inner.get("fullUrl")))
        else:
            yield item, url


def normalise_reference(reference: str) -> str:
    """`Type/id` of a relative, absolute or versioned reference; a `urn:` reference as it is."""
    if reference.startswith("urn:"):
        return reference
    return "/".join(reference.partition("/_history/")[0].rsplit("/", 2)[-2:])


def to_record(item: object, url: str) -> Record | None:
    """A record of a resource; None where it is none (no object, no type)."""
    resource = as_dict(item)
    kind, own_id = as_text(resource.get("resourceType")), as_text(resource.get("id"))
    if not kind:
        return None
    reference = f"{kind}/{own_id}" if own_id else url
    names = {normalise_reference(name) for name in (reference, url) if name}
    return Record(resource, kind, reference, frozenset(names))


def read_identifiers(resource: Json) -> tuple[Identifier, ...]:
    """The identifiers that have a value, with the first coding of their type."""
    found = []
    for item in map(as_dict, as_list(resource.get("identifier"))):
        if value := as_text(item.get("value")):
            codings = map(as_dict, as_list(as_dict(item.get("type")).get("coding")))
            type_code = next((code for c in codings if (code := as_text(c.get("code")))), "")
            found.append(Identifier(value, as_text(item.get("system")), type_code))
    return tuple(found)


def read_codings(concept: object) -> tuple[tuple[str, str, str], ...]:
    """(system, code, display) of each coding of a CodeableConcept that has a code."""
    codings = map(as_dict, as_list(as_dict(concept).get("coding")))
    parts = ((as_text(c.get("system")), as_text(c.get("code")), as_text(c.get("display"))) for c in codings)
    return tuple(part for part in parts if part[1])


def read_concept_text(concept: object) -> str:
    """A CodeableConcept in words: its text, else a display, else a code."""
    codings = read_codings(concept)
    words = [as_text(as_dict(concept).get("text")), *(c[2] for c in codings), *(c[1] for c in codings)]
    return next((word for word in words if word), "")


def read_code(concept: object) -> tuple[Code | None, str]:
    """The first coding as a Code and its system URL; a system that the model does not know is local."""
    for system, code, display in read_codings(concept):
        meaning = display or as_text(as_dict(concept).get("text")) or code
        return Code(code, _SCHEMES.get(system, LOCAL_SCHEME), meaning), system
    return None, ""


def read_code_values(concept: object) -> frozenset[str]:
    """The bare codes of a CodeableConcept (for status concepts of one code system)."""
    return frozenset(code for _, code, _ in read_codings(concept))


def parse_day(value: object) -> date | None:
    """The day of a FHIR date or dateTime, as written; None for a month, a year or anything else."""
    match = _DAY.match(as_text(value))
    try:
        return date.fromisoformat(match.group()) if match else None
    except ValueError:
        return None


def parse_moment(value: object) -> datetime | None:
    """An aware datetime of a FHIR dateTime or instant.

    A bare date is its midnight in UTC: the day that is shown stays the day that was written. None for what
    is not exact to a day, or has a time without zone (R4 forbids it, so the writer is not to be trusted).
    """
    text = as_text(value)
    try:
        if _DAY.fullmatch(text):
            return datetime.combine(date.fromisoformat(text), datetime.min.time(), UTC)
        moment = datetime.fromisoformat(text) if _DAY.match(text) and "T" in text else None
    except ValueError:
        return None
    return moment if moment and moment.tzinfo and moment.year >= EARLIEST_YEAR else None

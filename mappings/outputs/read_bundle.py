"""Reads a FHIR transaction Bundle back from its JSON."""

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from mappings.model.codes import SYSTEM_URLS
from mappings.model.findings import Findings
from mappings.outputs.read_bundle_expected import REPORT, expect_bundle, observation_names
from mappings.outputs.read_facts import Facts, Value, compare, exact, moment, number, prose, withheld
from mappings.outputs.read_impression import check_impression
from mappings.outputs.read_revision import withdrawn_uids

BUNDLE = "fhir-bundle.json"
OWN = "urn:wetread:codes"
DICOM_OID = "urn:oid:1.2.840.10008.2.16.4"
"""The other FHIR name of DICOM's coding scheme."""
FORMS = {"text/html": "report.html", "text/plain": "report.txt"}
Json = dict[str, Any]


def check_bundle_agrees(data: bytes, findings: Findings, contents: Mapping[str, bytes]) -> list[str]:
    """Everything in which the Bundle disagrees with the findings, or its attachments with `contents`."""
    entries = json.loads(data, parse_float=str, parse_int=str)["entry"]
    resources = [entry["resource"] for entry in entries]
    links = {entry["fullUrl"]: _identity(entry["resource"]) for entry in entries}
    names = withdrawn_uids(findings) | observation_names(findings)
    withdrawn = {*withdrawn_uids(findings).values()}
    found, by_reference = Facts(), _refers_to_server(resources)
    for resource in resources:
        where = _where(resource, names)
        found.add(where, "resource", resource["resourceType"])
        if where in withdrawn:
            _read_withdrawn(found, where, resource, links)
            continue
        _read_links(found, where, resource, links)
        _READERS.get(resource["resourceType"], _read_unknown)(found, where, resource)
    expected = expect_bundle(findings, by_reference=by_reference)
    messages = compare(BUNDLE, expected, found)
    for report in (r for r in resources if r["resourceType"] == REPORT):
        messages += _check_forms(report, contents)
        messages += check_impression(BUNDLE, report.get("conclusion", ""), findings)
    return messages


def read_conclusion(data: bytes) -> str:
    """The report's conclusion; empty where there is none."""
    resources = [entry["resource"] for entry in json.loads(data)["entry"]]
    return "".join(str(r.get("conclusion", "")) for r in resources if r["resourceType"] == REPORT)


def _identity(resource: Json) -> str:
    """Type and first identifier of a resource."""
    identifiers = resource.get("identifier") or [{}]
    return f"{resource['resourceType']} {identifiers[0].get('value', '')}".strip()


def _uid(resource: Json) -> str:
    return _identity(resource).partition(" ")[2].removeprefix("urn:oid:")


def _where(resource: Json, names: Mapping[str, str]) -> str:
    """What a resource is about: a tracking id, or its type."""
    if resource["resourceType"] != "Observation":
        return str(resource["resourceType"])
    return names.get(_uid(resource), f"Observation {_uid(resource)}")


def _refers_to_server(resources: Iterable[Json]) -> bool:
    """Whether patient or order are references into the server that gave the context."""
    reports = [r for r in resources if r["resourceType"] == REPORT]
    return any("reference" in link for r in reports for link in (r.get("subject", {}), *r.get("basedOn", [])))


def _target(reference: Json, links: Mapping[str, str]) -> str:
    """Whom a Reference means: an entry by its identity, a resource of the server, or an identifier."""
    if reference.get("type") == "Practitioner":
        return " ".join((reference.get("display", ""), reference.get("identifier", {}).get("value", ""))).strip()
    if "reference" in reference:
        return links.get(reference["reference"], reference["reference"])
    return str(reference.get("identifier", {}).get("value", "") or reference.get("display", ""))


def _read_links(facts: Facts, where: str, resource: Json, links: Mapping[str, str]) -> None:
    for keyword in ("subject", "device"):
        if keyword in resource:
            facts.add(where, keyword, withheld(_target(resource[keyword], links)))
    for keyword in ("basedOn", "imagingStudy", "result", "hasMember", "derivedFrom", "target"):
        for reference in resource.get(keyword, []):
            facts.add(where, keyword, withheld(_target(reference, links)))
    for agent in resource.get("agent", []):
        facts.add(where, "agent", withheld(f"{_kind(agent)} {_target(agent['who'], links)}"))
    for person in resource.get("resultsInterpreter", []):
        facts.add(where, "resultsInterpreter", withheld(_target(person, links)))
    for entity in resource.get("entity", []):
        facts.add(where, "entity", withheld(_target(entity["what"], links)))


def _kind(agent: Json) -> str:
    """What an agent of the Provenance did."""
    return " ".join(str(coding.get("code", "")) for coding in agent.get("type", {}).get("coding", []))


def _read_withdrawn(facts: Facts, where: str, resource: Json, links: Mapping[str, str]) -> None:
    """An Observation that is entered in error: that it says so, why, and whose it was."""
    facts.add(where, "status", resource.get("status", ""))
    facts.add(where, "device", withheld(_target(resource.get("device", {}), links).removeprefix("Device ")))
    for note in resource.get("note", []):
        facts.add(where, "note", prose(note.get("text", "")))


def _read_unknown(facts: Facts, where: str, resource: Json) -> None:
    facts.add(where, "identity", _identity(resource))


def _read_device(facts: Facts, where: str, resource: Json) -> None:
    facts.add(where, "identifier", prose(_identity(resource)))
    facts.add(where, "name", prose(" ".join(name["name"] for name in resource.get("deviceName", []))))
    facts.add(where, "model number", prose(resource.get("modelNumber", "")))
    facts.add(where, "version", prose(" ".join(version["value"] for version in resource.get("version", []))))
    facts.add(where, "manufacturer", prose(resource.get("manufacturer", "")))


def _read_study(facts: Facts, where: str, resource: Json) -> None:
    for identifier in resource.get("identifier", []):
        system = identifier.get("system", "")
        value = identifier.get("value", "")
        facts.add(where, f"identifier {system}".strip(), exact(value) if system else withheld(value))
    facts.add(where, "started", resource.get("started", ""))


def _read_report(facts: Facts, where: str, resource: Json) -> None:
    _read_state(facts, where, resource)
    facts.add(where, "identifier", prose(_identity(resource)))
    facts.add(where, "code", prose(_coded(resource.get("code", {}), 1)))
    for concept in resource.get("conclusionCode", []):
        facts.add(where, "conclusionCode", _coded(concept, 1))


def _read_state(facts: Facts, where: str, resource: Json) -> None:
    facts.add(where, "status", resource.get("status", ""))
    facts.add(where, "effectiveDateTime", resource.get("effectiveDateTime", ""))
    facts.add(where, "issued", _instant(resource.get("issued", "")))


def _instant(text: str) -> Value:
    try:
        return moment(datetime.fromisoformat(text))
    except ValueError:
        return exact(text)


def _read_provenance(facts: Facts, where: str, resource: Json) -> None:
    tags = resource.get("meta", {}).get("tag", [])
    facts.add(where, "activity", " ".join(c.get("code", "") for c in resource["activity"]["coding"]))
    for reason in resource.get("reason", []):
        facts.add(where, "reason", prose(reason.get("text", "")))
    facts.add(where, "tag", " ".join(str(tag.get("code", "")) for tag in tags))
    facts.add(where, "recorded", _instant(resource.get("recorded", "")))


def _read_observation(facts: Facts, where: str, resource: Json) -> None:
    _read_state(facts, where, resource)
    facts.add(where, "code", _coded(resource.get("code", {})))
    if resource.get("bodySite"):
        facts.add(where, "bodySite", _coded(resource["bodySite"]))
        facts.add(where, "bodySite in words", prose(resource["bodySite"].get("text", "").casefold()))
    if _coded(resource.get("code", {})).startswith("121071 "):
        facts.add(where, "title", prose(resource["code"].get("text", "")))
    _read_value(facts, where, "value", resource)
    if "dataAbsentReason" in resource:
        facts.add(where, "absent because", prose(resource["dataAbsentReason"].get("text", "")))
    if "method" in resource:
        facts.add(where, "method", _coded(resource["method"]))
    for note in resource.get("note", []):
        facts.add(where, "note", prose(note.get("text", "")))
    for component in resource.get("component", []):
        _read_component(facts, where, component)


def _read_component(facts: Facts, where: str, component: Json) -> None:
    codings = component["code"].get("coding", [])
    own = [c["code"] for c in codings if c.get("system") == OWN]
    what = own[0] if own else " ".join(c.get("code", "") for c in codings)
    foreign = [c for c in codings if c.get("system") != OWN]
    facts.add(where, f"{what}: question", _coded({"coding": foreign}))
    _read_value(facts, where, what, component)
    if "." in what and "valueCodeableConcept" in component:
        facts.add(where, f"{what}: in words", prose(component["valueCodeableConcept"].get("text", "")))


def _read_value(facts: Facts, where: str, what: str, element: Json) -> None:
    if "valueQuantity" in element:
        quantity = element["valueQuantity"]
        facts.add(where, what, number(quantity.get("value", "")))
        unit = f"{quantity.get('unit', '')}, {quantity.get('code', '')} ({quantity.get('system', '')})"
        facts.add(where, f"{what}: unit", unit)
    elif "valueCodeableConcept" in element:
        facts.add(where, what, _coded(element["valueCodeableConcept"]))
    elif "valueString" in element:
        facts.add(where, what, prose(element["valueString"]))
    elif "valueDateTime" in element:
        facts.add(where, what, element["valueDateTime"])


def _coded(concept: Json, limit: int | None = None) -> str:
    """The codes of a CodeableConcept with their systems."""
    codings = concept.get("coding", [])[:limit]
    return ", ".join(f"{c.get('code', '')} ({_system(c)})" for c in codings)


def _system(coding: Json) -> str:
    system = str(coding.get("system", ""))
    return SYSTEM_URLS["DCM"] if system == DICOM_OID else system


_READERS = {
    "Device": _read_device,
    "ImagingStudy": _read_study,
    REPORT: _read_report,
    "Provenance": _read_provenance,
    "Observation": _read_observation,
}


def _check_forms(report: Json, contents: Mapping[str, bytes]) -> list[str]:
    """The report's attachments are the drafts, byte for byte, with their true size and hash."""
    messages = []
    forms = {form.get("contentType", ""): form for form in report.get("presentedForm", [])}
    for kind, name in FORMS.items():
        what = f"{BUNDLE}: {REPORT}: presentedForm {kind}"
        if kind not in forms:
            messages.append(f"{what}: expected {name}, found nothing")
            continue
        data, digest = _decode(forms[kind].get("data", "")), forms[kind].get("hash", "")
        if name in contents and data != contents[name]:
            messages.append(f"{what}: expected the bytes of {name}, found others")
        if _decode(digest) != hashlib.sha1(data, usedforsecurity=False).digest():
            messages.append(f"{what}: hash: expected the SHA-1 of its data, found another")
        if str(forms[kind].get("size", "")) != str(len(data)):
            messages.append(f"{what}: size: expected '{len(data)}', found '{forms[kind].get('size', '')}'")
    return messages


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return b""

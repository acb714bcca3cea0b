"""The findings as one FHIR R4 transaction Bundle that stores the same thing however often it is sent.

Every entry is a conditional create or update by an identifier derived from study, protocol and finding, so
a revision replaces what an earlier one stored. Sources: FHIR R4 4.0.1 (http.html#transaction, imagingstudy,
diagnosticreport, observation, provenance), IHE IMR for `presentedForm`; ../shared/STANDARDS.md.

Blank values: the PSA density becomes an Observation with `dataAbsentReason`, as a value sent before would
otherwise stay; every other blank is left out and named in `conclusion` and the report text.
"""

import base64
import hashlib
import json

import fhirkit
from fhir.resources.R4B.bundle import Bundle

from mappings.model.codes import SYSTEM_URLS, Code
from mappings.model.context import ContextOrder
from mappings.model.findings import Findings
from mappings.model.ids import derive_uuid
from mappings.outputs.comparison_to_observations import prior_report
from mappings.outputs.fhir_elements import (
    MODEL,
    PROVENANCE,
    REPORT,
    Json,
    to_coding,
    to_concept,
    to_identifier,
    to_query,
    uid_identifier,
    without_empty,
)
from mappings.outputs.findings_to_observations import Links, dropped_entries, findings_to_observations, full_url
from mappings.outputs.impression import findings_to_impression
from mappings.outputs.printable import make_printable
from mappings.outputs.revision_words import name_person, people_of

IMAGING_STUDY_CODE = Code("18748-4", "LN", "Diagnostic imaging study")
RADIOLOGY = {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0074", "code": "RAD"}]}
PARTICIPANT_TYPE = "http://terminology.hl7.org/CodeSystem/provenance-participant-type"
DATA_OPERATION = "http://terminology.hl7.org/CodeSystem/v3-DataOperation"


def _subject(findings: Findings, same_server: bool) -> Json:
    """The EHR's Patient, or the images' patient id where the EHR has none (or is another server)."""
    known = findings.context.patient
    if known is not None and same_server:
        return {"reference": known.reference}
    patient = findings.patient
    identifier = to_identifier("", patient.patient_id, "MR")
    if patient.issuer:
        identifier["assigner"] = {"display": patient.issuer}
    return {"type": "Patient", "identifier": identifier}


def _order(findings: Findings, same_server: bool) -> Json | None:
    order = findings.context.order
    if order is not None and same_server and not order.from_message:
        return {"reference": order.reference}
    if not findings.accession_number:
        return None
    identifier = to_identifier("", findings.accession_number, "ACSN")
    return {"type": "ServiceRequest", "identifier": identifier}


def _psa(findings: Findings, same_server: bool) -> Json | None:
    if findings.psa is None:
        return None
    if same_server:
        return {"reference": findings.psa.reference}
    return {"type": "Observation", "display": f"{findings.psa.reference} of {findings.context.source}"}


def _links(findings: Findings, same_server: bool) -> Links:
    return Links(
        subject=_subject(findings, same_server),
        order=_order(findings, same_server),
        study={"reference": full_url(findings, "ImagingStudy")},
        device={"reference": full_url(findings, "Device")},
        psa=_psa(findings, same_server),
    )


def _create(entry_url: str, resource: Json, query: str) -> Json:
    kind = resource["resourceType"]
    request = {"method": "POST", "url": kind, "ifNoneExist": query}
    return {"fullUrl": entry_url, "resource": resource, "request": request}


def _update(entry: Json) -> Json:
    resource = entry["resource"]
    query = to_query(resource["identifier"][0])
    return {**entry, "request": {"method": "PUT", "url": f"{resource['resourceType']}?{query}"}}


def _device_entry(findings: Findings) -> Json:
    model = findings.model
    identifier = to_identifier(MODEL, f"{model.name}:{model.version}")
    device = {
        "resourceType": "Device",
        "identifier": [identifier],
        "manufacturer": model.manufacturer,
        "deviceName": [{"name": model.name, "type": "model-name"}],
        "modelNumber": model.name,
        "version": [{"value": model.version}],
        "type": {"text": "AI model"},
        "note": [{"text": model.description}] if model.description else None,
    }
    return _create(full_url(findings, "Device"), without_empty(device), to_query(identifier))


def _study_entry(findings: Findings, links: Links) -> Json:
    """The ImagingStudy, created only where the EHR has none of this UID."""
    identifier = uid_identifier(findings.study_instance_uid)
    accession = to_identifier("", findings.accession_number, "ACSN")
    study = {
        "resourceType": "ImagingStudy",
        "identifier": [identifier, *([accession] if findings.accession_number else [])],
        "status": "available",
        "subject": links.subject,
        "started": findings.study_date.isoformat() if findings.study_date else None,
        "basedOn": [links.order] if links.order else None,
        "description": findings.study_description,
    }
    return _create(links.study["reference"], without_empty(study), to_query(identifier))


def _report_code(order: ContextOrder | None, procedure: Code) -> Json:
    if order is None or order.code is None:
        return to_concept(procedure)
    system = order.code_system_url or SYSTEM_URLS.get(order.code.scheme, "")
    return {"coding": [to_coding(order.code, system)], "text": order.code.meaning or order.code.value}


def _attachment(content_type: str, content: str, title: str, created: str) -> Json:
    data = content.encode("utf-8", "replace")
    return {
        "contentType": content_type,
        "language": "en",
        "data": base64.b64encode(data).decode("ascii"),
        "size": len(data),
        "hash": base64.b64encode(hashlib.sha1(data, usedforsecurity=False).digest()).decode("ascii"),
        "title": title,
        "creation": created,
    }


def _report_entry(
    findings: Findings, links: Links, observations: list[Json], *, html: str, text: str, procedure: Code
) -> Json:
    created = findings.created_at.isoformat()
    identifier = to_identifier(REPORT, f"{findings.study_instance_uid}:{findings.protocol_name}")
    report = {
        "resourceType": "DiagnosticReport",
        "identifier": [identifier],
        "basedOn": [links.order] if links.order else None,
        "status": findings.status,
        "category": [RADIOLOGY],
        "code": _report_code(findings.context.order, procedure),
        "subject": links.subject,
        "effectiveDateTime": findings.study_date.isoformat() if findings.study_date else None,
        "issued": created,
        "resultsInterpreter": [_practitioner(findings.signature.person, findings.signature.identifier)]
        if findings.signature
        else None,
        "result": [{"reference": entry["fullUrl"]} for entry in observations],
        "imagingStudy": [links.study],
        "conclusion": "\n".join(findings_to_impression(findings)),
        "conclusionCode": [to_concept(a.value) for a in findings.assessments],
        "presentedForm": [
            _attachment("text/html", html, findings.protocol_title, created),
            _attachment("text/plain", text, findings.protocol_title, created),
        ],
    }
    return {"fullUrl": full_url(findings, "DiagnosticReport"), "resource": without_empty(report)}


def _practitioner(person: str, identifier: str = "") -> Json:
    """A person by name, and by number where it is known: whether the EHR has them as Practitioner is not."""
    known = to_identifier("", identifier, "EI") if identifier else None
    return without_empty({"type": "Practitioner", "display": name_person(person), "identifier": known})


def _agents(findings: Findings, links: Links) -> list[Json]:
    """The model as assembler; who signed as verifier, everyone else who changed or withdrew something as author."""

    def agent(kind: str, who: Json) -> Json:
        return {"type": {"coding": [{"system": PARTICIPANT_TYPE, "code": kind}]}, "who": who}

    signed = findings.signature
    verifiers = [agent("verifier", _practitioner(signed.person, signed.identifier))] if signed else []
    others = [person for person in people_of(findings) if signed is None or person != signed.person]
    return [agent("assembler", links.device), *verifiers, *(agent("author", _practitioner(p)) for p in others)]


def _operation(findings: Findings) -> str:
    """What the revision did to the report (v3-DataOperation)."""
    if findings.rejection is not None:
        return "NULLIFY"
    return "CREATE" if findings.revision == 1 else "UPDATE"


def _provenance_entry(findings: Findings, links: Links, targets: list[Json]) -> Json:
    """What made the report, from which inputs. R4's Provenance has no identifier: a tag derived from job and
    revision finds it again, so each revision leaves one."""
    made = (findings.study_instance_uid, findings.job_id, str(findings.revision))
    tag = {"system": PROVENANCE, "value": str(derive_uuid("provenance", findings.protocol_name, *made))}
    order = links.order if findings.context.order else None
    sources = [reference for reference in (links.study, order, links.psa, prior_report(findings)) if reference]
    rejection = findings.rejection
    provenance = {
        "resourceType": "Provenance",
        "meta": {"tag": [{"system": PROVENANCE, "code": tag["value"]}]},
        "target": [{"reference": target["fullUrl"]} for target in targets],
        "recorded": findings.created_at.isoformat(),
        "reason": [{"text": rejection.reason}] if rejection else None,
        "activity": {"coding": [{"system": DATA_OPERATION, "code": _operation(findings)}]},
        "agent": _agents(findings, links),
        "entity": [{"role": "source", "what": source} for source in sources],
    }
    url = full_url(findings, "Provenance", *made)
    return _create(url, without_empty(provenance), to_query(tag, "_tag"))


def findings_to_bundle(
    findings: Findings,
    *,
    html: str,
    text: str,
    procedure: Code = IMAGING_STUDY_CODE,
    same_server: bool = True,
) -> Json:
    """The transaction Bundle as JSON-ready dicts, checked against the R4B models on the way.

    `html` and `text` are the drafts. `procedure` codes the report where the order states no code.
    `same_server` says that the context came from the server that will receive this; otherwise patient and
    order are named by identifier instead of referenced. Raises pydantic.ValidationError if it is not FHIR.
    """
    shown = make_printable(findings)
    links = _links(shown, same_server)
    observations = findings_to_observations(shown, links)
    report = _report_entry(shown, links, observations, html=html, text=text, procedure=procedure)
    dropped = dropped_entries(shown, links)
    entries = [
        _device_entry(shown),
        _study_entry(shown, links),
        *map(_update, [*observations, *dropped, report]),
        _provenance_entry(shown, links, [report, *observations, *dropped]),
    ]
    bundle = Bundle.model_validate({"resourceType": "Bundle", "type": "transaction", "entry": entries})
    result: Json = json.loads(bundle.model_dump_json())
    return result


def _references(value: object) -> list[str]:
    if isinstance(value, dict):
        own = [value["reference"]] if isinstance(value.get("reference"), str) else []
        return own + [found for item in value.values() for found in _references(item)]
    if isinstance(value, list):
        return [found for item in value for found in _references(item)]
    return []


def check_bundle(bundle: Json) -> tuple[str, ...]:
    """What is wrong with a transaction Bundle, one sentence each; empty if nothing is.

    Strict R4 by fhirkit, then what a transaction needs: distinct full URLs, every `urn:` reference answered
    by an entry, every entry conditional so that sending it twice stores it once.
    """
    issues = [f"{issue.path}: {issue.message}" for issue in fhirkit.validate(bundle)]
    entries = bundle.get("entry", [])
    urls = [entry.get("fullUrl") for entry in entries]
    repeated = [f"Bundle: {url} names two entries" for url in {*urls} if urls.count(url) > 1]
    lost = [
        f"Bundle: {reference} is referenced but not an entry"
        for reference in dict.fromkeys(_references(entries))
        if reference.startswith("urn:") and reference not in urls
    ]
    requests = [entry.get("request", {}) for entry in entries]
    plain = [
        f"Bundle.entry[{index}].request: not conditional, a resend would store it again"
        for index, request in enumerate(requests)
        if not (request.get("ifNoneExist") or (request.get("method") == "PUT" and "?" in request.get("url", "")))
    ]
    return (*issues, *repeated, *lost, *plain)

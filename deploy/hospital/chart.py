"""The phantom patient's chart for the EHR, as one FHIR R4 transaction.

Every entry is a conditional create by identifier (`ifNoneExist`): loading it twice stores it once.
Sources: FHIR R4 4.0.1; identifier types HL7 v2 table 0203 (MR, PLAC, FILL, ACSN, PRN); LOINC 2857-1 (PSA),
2160-0 (creatinine), 33914-3 (eGFR, MDRD), 36389-5 (MR prostate WO and W contrast IV); SNOMED CT 396152005
(raised PSA); UCUM units.
"""

import uuid
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from deploy.hospital.phantom import PhantomSpec

Resource = dict[str, Any]

ROOT = "urn:oid:1.2.3.4.5"
"""Identifier systems of the simulator hospital: `.1` MRN, `.2` accession, `.3` placer, `.4` filler."""
MRN_SYSTEM = f"{ROOT}.1"
ACCESSION_SYSTEM = f"{ROOT}.2"
PLACER_SYSTEM = f"{ROOT}.3"
FILLER_SYSTEM = f"{ROOT}.4"
RECORD_SYSTEM = f"{ROOT}.9"

LOINC = "http://loinc.org"
SNOMED = "http://snomed.info/sct"
UCUM = "http://unitsofmeasure.org"
IDENTIFIER_TYPES = "http://terminology.hl7.org/CodeSystem/v2-0203"
OBSERVATION_CATEGORY = "http://terminology.hl7.org/CodeSystem/observation-category"
CONDITION_CLINICAL = "http://terminology.hl7.org/CodeSystem/condition-clinical"
NAMESPACE = uuid.UUID("1c8f6b4e-3f52-5f0a-8d8c-2a6f1f0a7b11")


def chart_bundle(spec: PhantomSpec, *, psa_ng_ml: tuple[float, ...] = (9.4, 13.0), with_order: bool = True) -> Resource:
    """The transaction for the patient of `spec`: organisation, practitioner, patient, order, PSA values
    (oldest first, the last a week before the study, a year apart), creatinine, eGFR and the condition."""
    resources = [_organization(), _practitioner(), _patient(spec), *_labs(spec, psa_ng_ml), _condition(spec)]
    if with_order:
        resources.append(_service_request(spec))
    entries = [_entry(resource) for resource in resources]
    return {"resourceType": "Bundle", "type": "transaction", "entry": entries}


def placer_number(spec: PhantomSpec) -> str:
    """The order's number at the department that ordered it."""
    return f"P-{spec.accession}"


def filler_number(spec: PhantomSpec) -> str:
    """The order's number at radiology."""
    return f"F-{spec.accession}"


def _entry(resource: Resource) -> Resource:
    first = resource["identifier"][0]
    condition = f"identifier={first['system']}|{first['value']}"
    return {
        "fullUrl": _full_url(first["system"], first["value"]),
        "resource": resource,
        "request": {"method": "POST", "url": resource["resourceType"], "ifNoneExist": condition},
    }


def _full_url(system: str, value: str) -> str:
    return f"urn:uuid:{uuid.uuid5(NAMESPACE, f'{system}|{value}')}"


def _reference(system: str, value: str) -> Resource:
    return {"reference": _full_url(system, value)}


def _identifier(system: str, value: str, kind: str = "") -> Resource:
    typed = {"type": {"coding": [{"system": IDENTIFIER_TYPES, "code": kind}]}} if kind else {}
    return {**typed, "system": system, "value": value}


def _organization() -> Resource:
    return {
        "resourceType": "Organization",
        "identifier": [_identifier(RECORD_SYSTEM, "HOSPITAL")],
        "name": "Simulator Hospital",
    }


def _practitioner() -> Resource:
    return {
        "resourceType": "Practitioner",
        "identifier": [_identifier(RECORD_SYSTEM, "UROLOGIST-1", "PRN")],
        "name": [{"family": "Ordering", "given": ["Ursula"]}],
    }


def _patient(spec: PhantomSpec) -> Resource:
    family, _, given = spec.patient_name.partition("^")
    return {
        "resourceType": "Patient",
        "identifier": [_identifier(MRN_SYSTEM, spec.patient_id, "MR")],
        "name": [{"family": family, "given": given.split("^")}],
        "gender": {"M": "male", "F": "female", "O": "other"}[spec.sex],
        "birthDate": spec.birth_date.isoformat(),
        "managingOrganization": _reference(RECORD_SYSTEM, "HOSPITAL"),
    }


def _service_request(spec: PhantomSpec) -> Resource:
    prostate_mri = {"system": LOINC, "code": "36389-5", "display": "MR Prostate WO and W contrast IV"}
    return {
        "resourceType": "ServiceRequest",
        "identifier": [
            _identifier(ACCESSION_SYSTEM, spec.accession, "ACSN"),
            _identifier(PLACER_SYSTEM, placer_number(spec), "PLAC"),
            _identifier(FILLER_SYSTEM, filler_number(spec), "FILL"),
        ],
        "status": "active",
        "intent": "order",
        "priority": "routine",
        "code": {"coding": [prostate_mri], "text": "MRI prostate, multiparametric"},
        "subject": _reference(MRN_SYSTEM, spec.patient_id),
        "requester": _reference(RECORD_SYSTEM, "UROLOGIST-1"),
        "authoredOn": _at(spec.study_date - timedelta(days=5)),
        "reasonCode": [{"text": "Raised PSA"}],
    }


def _labs(spec: PhantomSpec, psa_ng_ml: tuple[float, ...]) -> list[Resource]:
    latest = spec.study_date - timedelta(days=7)
    years_back = range(len(psa_ng_ml) - 1, -1, -1)
    psa = [
        _lab(spec, latest - timedelta(days=365 * years), "2857-1", "PSA", value, "ng/mL")
        for years, value in zip(years_back, psa_ng_ml, strict=True)
    ]
    creatinine = _lab(spec, latest, "2160-0", "Creatinine", 0.94, "mg/dL")
    egfr = _lab(spec, latest, "33914-3", "eGFR", 84.0, "mL/min/{1.73_m2}")
    return [*psa, creatinine, egfr]


def _lab(spec: PhantomSpec, day: date, code: str, text: str, value: float, unit: str) -> Resource:
    number = f"{spec.patient_id}-{code}-{day.isoformat()}"
    return {
        "resourceType": "Observation",
        "identifier": [_identifier(RECORD_SYSTEM, number)],
        "status": "final",
        "category": [{"coding": [{"system": OBSERVATION_CATEGORY, "code": "laboratory"}]}],
        "code": {"coding": [{"system": LOINC, "code": code}], "text": text},
        "subject": _reference(MRN_SYSTEM, spec.patient_id),
        "performer": [_reference(RECORD_SYSTEM, "HOSPITAL")],
        "effectiveDateTime": _at(day),
        "valueQuantity": {"value": value, "unit": unit, "system": UCUM, "code": unit},
    }


def _condition(spec: PhantomSpec) -> Resource:
    raised_psa = {"system": SNOMED, "code": "396152005", "display": "Raised prostate specific antigen"}
    return {
        "resourceType": "Condition",
        "identifier": [_identifier(RECORD_SYSTEM, f"{spec.patient_id}-raised-psa")],
        "clinicalStatus": {"coding": [{"system": CONDITION_CLINICAL, "code": "active"}]},
        "code": {"coding": [raised_psa], "text": "Raised PSA"},
        "subject": _reference(MRN_SYSTEM, spec.patient_id),
        "recordedDate": _at(spec.study_date - timedelta(days=7)),
    }


def _at(day: date) -> str:
    return datetime.combine(day, time(9, 30), UTC).isoformat()

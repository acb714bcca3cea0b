"""What the EHR says about the patient and the order; every value keeps where and when it came from."""

from dataclasses import dataclass
from datetime import date, datetime

from mappings.model.codes import Code


@dataclass(frozen=True)
class Identifier:
    """A FHIR identifier: `system`, `value`, and its v2-0203 type code (MR, ACSN, PLAC, FILL) if stated."""

    value: str
    system: str = ""
    type_code: str = ""


@dataclass(frozen=True)
class ContextPatient:
    """The patient as the EHR knows them. `reference` is the FHIR reference (`Patient/123`)."""

    reference: str
    identifiers: tuple[Identifier, ...]
    name: str = ""
    birth_date: date | None = None
    gender: str = ""


@dataclass(frozen=True)
class ContextOrder:
    """The imaging order (ServiceRequest). Numbers are empty where the order does not state them. One that the EHR does
    not have, but a message told of, is `from_message`: its `reference` is words, no FHIR reference."""

    reference: str
    accession_number: str = ""
    placer_order_number: str = ""
    filler_order_number: str = ""
    code: Code | None = None
    code_system_url: str = ""
    patient_reference: str = ""
    reason: str = ""
    requester: str = ""
    priority: str = ""
    status: str = ""
    from_message: bool = False


@dataclass(frozen=True)
class ContextValue:
    """One laboratory value with its source. `value` is in `unit` (UCUM code)."""

    code: Code
    value: float
    unit: str
    effective_at: datetime
    reference: str


@dataclass(frozen=True)
class ContextNote:
    """A condition, allergy or prior report: its text, source reference and date."""

    kind: str
    text: str
    reference: str
    recorded_on: date | None = None


@dataclass(frozen=True)
class ClinicalContext:
    """All context gathered for one study. `source` names the system; `missing` names what was looked for and
    not found, or refused, with the reason. `conflicts` says where the source contradicts the images about whose
    study it is, without patient data: a person must look before anything is released."""

    source: str
    patient: ContextPatient | None = None
    order: ContextOrder | None = None
    labs: tuple[ContextValue, ...] = ()
    notes: tuple[ContextNote, ...] = ()
    missing: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()

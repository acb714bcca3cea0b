"""FHIR R4 resources of an EHR to the events of an HL7 message: orders, imaging studies, merged patients.

A resource tells how things stand, not what happened: a `ServiceRequest` that is active is not on hold, whatever it was
before. Data errors never raise: they are `problems` of an event, or an UnhandledEvent with its reason, in sentences
without patient data.

Sources: FHIR R4 servicerequest.html, imagingstudy.html, patient.html#links; code systems request-status,
request-intent, request-priority, imagingstudy-status; identifier types of HL7 table 0203. The Study Instance UID is
the identifier of system `urn:dicom:uid` with the value `urn:oid:` + UID (imagingstudy.html#notes).

An order's numbers are the identifiers of type ACSN (accession), PLAC (placer), FILL (filler); of identifiers without
a type, those of the systems that the site names (`NumberSystems`). Any other identifier is no number: to take the
only one for the accession number would be a guess.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mappings.inputs.fhir_elements import (
    Json,
    as_dict,
    as_list,
    as_text,
    normalise_reference,
    parse_day,
    parse_moment,
    read_code,
    read_codings,
    read_concept_text,
    read_identifiers,
)
from mappings.inputs.hl7_elements import Remarks, choose_patient_id, read_line, read_uid
from mappings.model.context import Identifier
from mappings.model.events import (
    Event,
    OrderControl,
    OrderEvent,
    OrderNumbers,
    OrderStatus,
    PatientEvent,
    Priority,
    UnhandledEvent,
)
from mappings.model.message import holds_controls
from mappings.model.study import PatientIdentity

STATUS_OF_REQUEST: dict[str, tuple[OrderControl, OrderStatus]] = {
    "draft": ("new", ""),
    "active": ("resume", "requested"),
    "on-hold": ("hold", "requested"),
    "revoked": ("cancel", "cancelled"),
    "completed": ("complete", "completed"),
    "entered-in-error": ("cancel", "cancelled"),
    "unknown": ("status", ""),
}
"""request-status. A draft is not ordered yet, so it has no status. Active ends a hold: nothing else would."""

STATUS_OF_STUDY: dict[str, tuple[OrderControl, OrderStatus]] = {
    "registered": ("status", "scheduled"),
    "available": ("status", "in-progress"),
    "cancelled": ("cancel", "cancelled"),
    "entered-in-error": ("cancel", "cancelled"),
    "unknown": ("status", ""),
}
"""imagingstudy-status. Available says that images can be asked for, not that all of them are there."""

INTENTS = frozenset({"order", "original-order", "reflex-order", "filler-order", "instance-order"})
"""request-intent of what somebody wants done; a proposal, plan or option is none."""

PRIORITY_OF_REQUEST: dict[str, Priority] = {"routine": "R", "urgent": "A", "asap": "A", "stat": "S"}
"""request-priority; table 0485 has one code for urgent and as soon as possible."""

NUMBERS = ("placer_order_number", "filler_order_number", "accession_number", "study_instance_uid")
DICOM_UID = "urn:dicom:uid"
SEXES = {"male": "M", "female": "F", "other": "O"}


@dataclass(frozen=True)
class NumberSystems:
    """What a site's resources leave unsaid: the identifier systems of numbers without a type, and of the patient id
    that is in the images (empty: the identifier of type MR, else PI, else the only one without a type)."""

    accession: str = ""
    placer: str = ""
    filler: str = ""
    patient: str = ""


def resources_to_events(resources: Sequence[object], systems: NumberSystems) -> tuple[Event, ...]:
    """What the first of these resources tells; the others are those that it refers to, as far as they were found."""
    told, *others = [as_dict(resource) for resource in resources] or [{}]
    known = {f"{as_text(o.get('resourceType'))}/{as_text(o.get('id'))}": o for o in others}
    mapping = _MAPPINGS.get(kind := as_text(told.get("resourceType")))
    if mapping is None:
        return (UnhandledEvent(type=kind or "unknown", reason="resources of this type are not acted on"),)
    return (mapping(told, known, systems),)


def references_of(resource: Json) -> tuple[str, ...]:
    """References, as written, to the resources that `resources_to_events` needs beside this one."""
    kind = as_text(resource.get("resourceType"))
    named: list[object] = [resource.get("subject")] if kind in ("ServiceRequest", "ImagingStudy") else []
    if kind == "ImagingStudy":
        named += as_list(resource.get("basedOn"))
    elif kind == "Patient":
        named += _replacing(resource)
    return tuple(dict.fromkeys(reference for each in named if (reference := _reference(each))))


def is_merged_away(resource: Json) -> bool:
    """Whether a Patient says that another one stands in its place."""
    return bool(_replacing(resource))


def _reference(value: object) -> str:
    return as_text(as_dict(value).get("reference"))


def _find(value: object, known: Mapping[str, Json]) -> Json | None:
    return known.get(normalise_reference(_reference(value))) if _reference(value) else None


# Orders


def _order_event(resource: Json, known: Mapping[str, Json], systems: NumberSystems) -> Event:
    if reason := _why_no_order(resource):
        return UnhandledEvent(type="ServiceRequest", reason=reason)
    remarks = Remarks()
    numbers = _read_numbers(resource, systems, remarks)
    if numbers == OrderNumbers() and not remarks.problems:
        return UnhandledEvent(
            type="ServiceRequest", reason="the order has no accession, placer or filler number by which to know it"
        )
    control, status = _read_status(resource, STATUS_OF_REQUEST, remarks)
    patient, identifiers = _read_subject(resource, known, systems, remarks)
    occurrence = as_text(resource.get("occurrenceDateTime"))
    return OrderEvent(
        **vars(numbers),
        control=control,
        status=status,
        patient=patient,
        patient_identifiers=identifiers,
        procedure=read_code(resource.get("code"))[0],
        priority=PRIORITY_OF_REQUEST.get(as_text(resource.get("priority")), ""),
        reason=_read_reasons(resource),
        requester=_read_requester(resource),
        scheduled_at=parse_moment(occurrence) if "T" in occurrence else None,
        occurred_at=parse_moment(as_dict(resource.get("meta")).get("lastUpdated")),
        problems=tuple(remarks.problems),
        notes=tuple(remarks.notes),
    )


def _why_no_order(resource: Json) -> str:
    if resource.get("doNotPerform") is True:
        return "the request asks not to do it (doNotPerform)"
    if as_text(resource.get("intent")) not in INTENTS:
        return "the request is a proposal or a plan, not an order (intent)"
    return ""


def _read_status(
    resource: Json, meanings: Mapping[str, tuple[OrderControl, OrderStatus]], remarks: Remarks
) -> tuple[OrderControl, OrderStatus]:
    status = as_text(resource.get("status"))
    if status not in meanings:
        remarks.problem("the status is missing or none that FHIR R4 knows")
    return meanings.get(status, ("status", ""))


def _read_reasons(resource: Json) -> str:
    return read_line("; ".join(filter(None, map(read_concept_text, as_list(resource.get("reasonCode"))))))


def _read_requester(resource: Json) -> str:
    """The name as the EHR displays it, without the characters that separate the parts of a DICOM name."""
    shown = read_line(as_text(as_dict(resource.get("requester")).get("display")))
    return " ".join(re.sub(r"[\^=\\]", " ", shown).split())


# Numbers


def _read_numbers(resource: Json, systems: NumberSystems, remarks: Remarks) -> OrderNumbers:
    identifiers = read_identifiers(resource)
    accession = _read_number(identifiers, "ACSN", systems.accession, remarks)
    placer = _read_number(identifiers, "PLAC", systems.placer, remarks)
    filler = _read_number(identifiers, "FILL", systems.filler, remarks)
    return OrderNumbers(
        placer_order_number=placer.value,
        placer_authority=placer.system,
        filler_order_number=filler.value,
        filler_authority=filler.system,
        accession_number=accession.value,
        accession_authority=accession.system,
        study_instance_uid=_read_study_uid(identifiers, remarks),
    )


def _read_number(identifiers: Iterable[Identifier], type_code: str, system: str, remarks: Remarks) -> Identifier:
    """The one identifier of this type or, without a type, of this system; two that differ are none."""
    named = [i for i in identifiers if i.type_code == type_code or (system and not i.type_code and i.system == system)]
    values = {i.value for i in named}
    if len(values) > 1:
        remarks.problem(f"several identifiers of type {type_code} that differ")
    elif any(map(holds_controls, values)):
        remarks.problem(f"the identifier of type {type_code} holds control characters")
    elif named:
        return Identifier(named[0].value, named[0].system, type_code)
    return Identifier("")


def _read_study_uid(identifiers: Iterable[Identifier], remarks: Remarks) -> str:
    stated = {i.value.removeprefix("urn:oid:") for i in identifiers if i.system == DICOM_UID}
    if len(stated) > 1:
        remarks.problem("several Study Instance UIDs (urn:dicom:uid) that differ")
        return ""
    return read_uid(stated.pop(), "the identifier of urn:dicom:uid", remarks) if stated else ""


# Imaging studies


def _study_event(resource: Json, known: Mapping[str, Json], systems: NumberSystems) -> Event:
    """The order of a study, and that its images can be asked for. A study that was cancelled or recorded in error
    speaks for itself alone: what else it names may be the error."""
    remarks = Remarks()
    own = _read_numbers(resource, systems, remarks)
    if not own.study_instance_uid and not remarks.problems:
        return UnhandledEvent(type="ImagingStudy", reason="the study has no Study Instance UID (urn:dicom:uid)")
    control, status = _read_status(resource, STATUS_OF_STUDY, remarks)
    if control == "cancel":
        numbers = OrderNumbers(study_instance_uid=own.study_instance_uid)
    else:
        numbers = _with_order_numbers(own, resource, known, systems, remarks)
    patient, identifiers = _read_subject(resource, known, systems, remarks)
    modalities = read_codings({"coding": as_list(resource.get("modality"))})
    return OrderEvent(
        **vars(numbers),
        control=control,
        status=status,
        patient=patient,
        patient_identifiers=identifiers,
        modality=next((code for _, code, _ in modalities), ""),
        occurred_at=parse_moment(as_dict(resource.get("meta")).get("lastUpdated")),
        problems=tuple(remarks.problems),
        notes=tuple(remarks.notes),
    )


def _with_order_numbers(
    own: OrderNumbers, resource: Json, known: Mapping[str, Json], systems: NumberSystems, remarks: Remarks
) -> OrderNumbers:
    """The study's numbers and, where it is based on one ServiceRequest, those of that; a contradiction is a problem."""
    based_on = as_list(resource.get("basedOn"))
    request = _find(based_on[0], known) if len(based_on) == 1 else None
    if request is None or request.get("resourceType") != "ServiceRequest":
        return own
    order = _read_numbers(request, systems, remarks)
    contradicting = [n for n in NUMBERS if getattr(own, n) and getattr(order, n) not in ("", getattr(own, n))]
    if contradicting:
        remarks.problem(f"the study and its order differ in {', '.join(contradicting).replace('_', ' ')}")
        return own
    return OrderNumbers(**{name: getattr(own, name) or getattr(order, name) for name in vars(own)})


# Patients


def _current_identifiers(patient: Json) -> tuple[Identifier, ...]:
    """A patient's identifiers without those that are no longer in use: a merge leaves the other's among them."""
    current = [i for i in as_list(patient.get("identifier")) if as_text(as_dict(i).get("use")) != "old"]
    return read_identifiers({"identifier": current})


def _read_identity(
    patient: Json, identifiers: tuple[Identifier, ...], systems: NumberSystems, where: str, remarks: Remarks
) -> PatientIdentity:
    """Who a Patient is. The system that the site names as that of its patient ids is its own authority, which HL7 and
    DICOM call by other names or not at all: it is left out, as theirs can be compared with nothing then."""
    if systems.patient:
        identifiers = tuple(i for i in identifiers if i.system == systems.patient)
        own = choose_patient_id(tuple(Identifier(i.value) for i in identifiers), where, remarks)
    else:
        own = choose_patient_id(identifiers, where, remarks)
    if holds_controls(own.value):
        remarks.problem(f"{where}: the identifier holds control characters")
        own = Identifier("")
    return PatientIdentity(
        own.value,
        own.system,
        birth_date=parse_day(patient.get("birthDate")),
        sex=SEXES.get(as_text(patient.get("gender")), ""),
    )


def _read_subject(
    resource: Json, known: Mapping[str, Json], systems: NumberSystems, remarks: Remarks
) -> tuple[PatientIdentity, tuple[Identifier, ...]]:
    """The patient a resource is about: the Patient it refers to, else the identifier that it names instead."""
    subject = as_dict(resource.get("subject"))
    patient = _find(subject, known)
    if patient is not None:
        identifiers = _current_identifiers(patient)
        return _read_identity(patient, identifiers, systems, "Patient", remarks), read_identifiers(patient)
    identifiers = read_identifiers({"identifier": [subject.get("identifier")]})
    if not identifiers:
        remarks.problem("the patient cannot be told: the subject names none that the EHR gives us")
        return PatientIdentity(""), ()
    return _read_identity({}, identifiers, systems, "subject", remarks), identifiers


def _replacing(patient: Json) -> list[Json]:
    links = map(as_dict, as_list(patient.get("link")))
    return [as_dict(link.get("other")) for link in links if link.get("type") == "replaced-by"]


def _merge_event(resource: Json, known: Mapping[str, Json], systems: NumberSystems) -> Event:
    others = _replacing(resource)
    if not others:
        return UnhandledEvent(type="Patient", reason="only patients that were merged into another are acted on")
    remarks = Remarks()
    if len(others) > 1:
        remarks.problem("the patient is replaced by more than one other")
    survivor = _find(others[0], known)
    if survivor is None:
        remarks.problem("the patient that stands in the place of this one cannot be read")
    kept, kept_ids = _read_merged(survivor or {}, systems, "the patient that stays", remarks)
    gone, gone_ids = _read_merged(resource, systems, "the patient merged away", remarks)
    if gone.patient_id and (gone.patient_id, gone.issuer) == (kept.patient_id, kept.issuer):
        remarks.problem("both patients of the merge have the same patient id")
    return PatientEvent(
        kind="merge",
        patient=kept,
        patient_identifiers=kept_ids,
        merged_patient=gone,
        merged_identifiers=gone_ids,
        occurred_at=parse_moment(as_dict(resource.get("meta")).get("lastUpdated")),
        problems=tuple(remarks.problems),
        notes=tuple(remarks.notes),
    )


def _read_merged(
    patient: Json, systems: NumberSystems, where: str, remarks: Remarks
) -> tuple[PatientIdentity, tuple[Identifier, ...]]:
    every = read_identifiers(patient)
    return _read_identity(patient, _current_identifiers(patient) or every, systems, where, remarks), every


_MAPPINGS = {"ServiceRequest": _order_event, "ImagingStudy": _study_event, "Patient": _merge_event}

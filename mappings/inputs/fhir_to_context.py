"""FHIR R4 resources of an EHR to the clinical context of one study; whatever is refused is named with its reason.

Data errors never raise: `missing` says what was looked for and not found, or found and not used. Its
sentences name resources, never patients.
"""

from collections.abc import Collection, Iterable, Sequence
from datetime import date, timedelta

from mappings.inputs.fhir_elements import (
    Json,
    Record,
    as_dict,
    as_list,
    as_text,
    flatten,
    normalise_reference,
    parse_day,
    read_code,
    read_code_values,
    read_concept_text,
    read_identifiers,
    to_record,
)
from mappings.inputs.fhir_to_labs import PSA_CODES, find_lab, read_lab
from mappings.model.context import (
    ClinicalContext,
    ContextNote,
    ContextOrder,
    ContextPatient,
    ContextValue,
    Identifier,
)

AFTER_STUDY_TOLERANCE = timedelta(days=1)
"""A PSA may be dated the day after the study: its time and the study's date can be in different zones.
Later ones were not known when the images were made, and a biopsy may lie between."""

NOTE_KINDS = {
    "Condition": "condition",
    "AllergyIntolerance": "allergy",
    "DiagnosticReport": "prior report",
    "ImagingStudy": "prior study",
}
REFUSED_STATUSES = frozenset({"entered-in-error", "cancelled", "refuted", "inactive", "resolved", "registered"})
"""Statuses (of record, verification and clinical course) that make a note no statement about the patient now."""

WITHDRAWN = frozenset({"entered-in-error", "revoked"})
"""Statuses of an order that nobody wants carried out (FHIR R4 request-status)."""

OWN_REPORTS = "urn:wetread:report"
"""Identifier system of Wetread's own reports (mappings.outputs.fhir_elements): they are not priors."""


def _bare_oid(system: str) -> str:
    return system.removeprefix("urn:oid:")


def _is_universal(system: str) -> bool:
    return bool(system) and (":" in system or system.replace(".", "").isdecimal())


def _issuer_agrees(system: str, issuer: str, names: Collection[str]) -> bool:
    """Whether an identifier system and a DICOM issuer can be the same; they are where `names` (of the issuer) has the
    system. A bare name (`HOSPITAL`) and a URI or OID cannot be compared, and count as agreeing; then the value alone
    must single out one patient."""
    if not system or not issuer or system in names or _is_universal(system) != _is_universal(issuer):
        return True
    return _bare_oid(system) == _bare_oid(issuer)


def _is_patient(record: Record, patient_id: str, issuer: str, names: Collection[str]) -> bool:
    matches = (i for i in read_identifiers(record.resource) if i.value == patient_id)
    return record.kind == "Patient" and any(_issuer_agrees(i.system, issuer, names) for i in matches)


def _read_name(resource: Json) -> str:
    """`Family^Given Middle` of the official name, else of the first; its text where it has no parts."""
    names = [as_dict(name) for name in as_list(resource.get("name"))]
    chosen = next((name for name in names if name.get("use") == "official"), names[0] if names else {})
    family = as_text(chosen.get("family"))
    given = " ".join(filter(None, map(as_text, as_list(chosen.get("given")))))
    return f"{family}^{given}".rstrip("^") or as_text(chosen.get("text"))


def _replaced(record: Record) -> bool:
    links = map(as_dict, as_list(record.resource.get("link")))
    return any(link.get("type") == "replaced-by" for link in links)


def _choose_patient(
    records: Sequence[Record], patient_id: str, issuer: str, names: Collection[str], missing: list[str]
) -> tuple[ContextPatient | None, Record | None]:
    """The one Patient of this id; two different ones, or a merged one, are none."""
    matches = [r for r in records if patient_id and _is_patient(r, patient_id, issuer, names)]
    found = {r.reference or repr(r.resource): r for r in matches}
    if len(found) != 1:
        listed = ", ".join(sorted(r.title for r in found.values()))
        missing.append(
            f"patient: {len(found)} different patients have this id ({listed}); none was chosen"
            if found
            else "patient: none with the patient id of the images"
        )
        return None, None
    (record,) = found.values()
    if not record.reference:
        missing.append("patient: the one of this id has no id of its own, so nothing can be known to be theirs")
        return None, None
    if _replaced(record):
        missing.append(f"patient: {record.title} was merged into another (replaced-by); it was not used")
        return None, None
    resource = record.resource
    patient = ContextPatient(
        reference=record.reference,
        identifiers=read_identifiers(resource),
        name=_read_name(resource),
        birth_date=parse_day(resource.get("birthDate")),
        gender=as_text(resource.get("gender")),
    )
    return patient, record


def _belongs(record: Record, patient: ContextPatient, owner: Record) -> bool:
    """Whether the resource's subject is the patient: by reference, or by identifier where it has only that."""
    subject = as_dict(record.resource.get("subject") or record.resource.get("patient"))
    if reference := as_text(subject.get("reference")):
        return normalise_reference(reference) in owner.names
    logical = read_identifiers({"identifier": [subject.get("identifier")]})
    return any(i.value == known.value and i.system == known.system for i in logical for known in patient.identifiers)


def _typed_value(identifiers: Iterable[Identifier], type_code: str) -> str:
    return next((i.value for i in identifiers if i.type_code == type_code), "")


def _read_order(record: Record, accession_number: str) -> ContextOrder:
    resource = record.resource
    identifiers = read_identifiers(resource)
    code, system = read_code(resource.get("code"))
    reasons = map(read_concept_text, as_list(resource.get("reasonCode")))
    return ContextOrder(
        reference=record.reference,
        accession_number=accession_number,
        placer_order_number=_typed_value(identifiers, "PLAC"),
        filler_order_number=_typed_value(identifiers, "FILL"),
        code=code,
        code_system_url=system,
        patient_reference=as_text(as_dict(resource.get("subject")).get("reference")),
        reason="; ".join(filter(None, reasons)),
        requester=as_text(as_dict(resource.get("requester")).get("display")),
        priority=as_text(resource.get("priority")),
        status=as_text(resource.get("status")),
    )


def _find_orders(records: Sequence[Record], accession_number: str) -> list[ContextOrder]:
    """The orders of this accession number: by an identifier typed ACSN, else by any of that value."""
    typed: dict[ContextOrder, None] = {}
    untyped: dict[ContextOrder, None] = {}
    for record in (r for r in records if r.kind == "ServiceRequest"):
        matches = [i for i in read_identifiers(record.resource) if i.value == accession_number]
        if matches:
            tier = typed if any(i.type_code == "ACSN" for i in matches) else untyped
            tier[_read_order(record, accession_number)] = None
    return list(typed or untyped)


def _choose_order(records: Sequence[Record], accession_number: str, missing: list[str]) -> ContextOrder | None:
    """The one order of this accession number; two that differ are none."""
    if not accession_number:
        missing.append("order: the study has no accession number")
        return None
    found = _find_orders(records, accession_number)
    usable = [order for order in found if order.status not in WITHDRAWN]
    for order in found:
        if order not in usable:
            missing.append(f"order: {order.reference} not used, its status is {order.status!r}")
    if len(usable) > 1:
        listed = ", ".join(sorted(order.reference for order in usable))
        missing.append(f"order: {len(usable)} different orders have this accession number ({listed}); none chosen")
    elif not found:
        missing.append("order: none with the accession number of the study")
    return usable[0] if len(usable) == 1 else None


def _find_conflicts(records: Sequence[Record], mine: Sequence[Record], accession_number: str) -> tuple[str, ...]:
    """Why the orders of this accession number speak against a result for this patient: none of them is theirs,
    or all are withdrawn."""
    found = _find_orders(records, accession_number) if accession_number else []
    theirs = [order for order in found if any(order.reference == r.reference for r in mine)]
    if found and not theirs:
        return ("the order of this accession number belongs to another patient",)
    if theirs and all(order.status in WITHDRAWN for order in theirs):
        return (f"the order of this accession number is {theirs[0].status}",)
    return ()


def _find_study_conflicts(
    records: Sequence[Record], mine: Sequence[Record], accession_number: str, study_instance_uid: str
) -> tuple[str, ...]:
    """Why the ImagingStudy of this Study Instance UID, where there is one, speaks against a result for this patient:
    it is somebody else's, or names another accession number than the images."""
    uids = {study_instance_uid, f"urn:oid:{study_instance_uid}"} if study_instance_uid else set()
    conflicts = []
    for record in (r for r in records if r.kind == "ImagingStudy"):
        identifiers = read_identifiers(record.resource)
        if not any(i.value in uids for i in identifiers) or record.resource.get("status") == "entered-in-error":
            continue
        if record not in mine:
            conflicts.append("the ImagingStudy of this Study Instance UID belongs to another patient")
        accession = _typed_value(identifiers, "ACSN")
        if accession and accession_number and accession != accession_number:
            conflicts.append("the ImagingStudy of this Study Instance UID names another accession number")
    return tuple(dict.fromkeys(conflicts))


def _read_labs(records: Sequence[Record], missing: list[str]) -> tuple[ContextValue, ...]:
    values = []
    for record in records:
        lab = find_lab(record)
        if lab is None:
            continue
        value = read_lab(record, lab)
        if isinstance(value, str):
            missing.append(f"{lab.title}: {record.title} not used, {value}")
        else:
            values.append(value)
    if not any(value.code.value in PSA_CODES for value in values):
        missing.append("PSA: no usable value")
    return tuple(sorted(values, key=lambda v: (v.effective_at, v.reference)))


def _statuses(resource: Json) -> frozenset[str]:
    concepts = (resource.get("clinicalStatus"), resource.get("verificationStatus"))
    return frozenset({as_text(resource.get("status"))}.union(*map(read_code_values, concepts)))


def _note_text(record: Record) -> str:
    resource = record.resource
    described = as_text(resource.get("conclusion")) or as_text(resource.get("description"))
    return ": ".join(filter(None, (read_concept_text(resource.get("code")), described)))


def _is_current(record: Record, numbers: frozenset[str]) -> bool:
    """Whether it is about the study itself, or is Wetread's own report: no prior then."""
    identifiers = read_identifiers(record.resource)
    own = any(i.system == OWN_REPORTS for i in identifiers)
    return own or any(i.value.removeprefix("urn:oid:") in numbers for i in identifiers)


def _read_note(record: Record) -> ContextNote | None:
    resource, text = record.resource, _note_text(record)
    if not text or _statuses(resource) & REFUSED_STATUSES:
        return None
    keys = ("onsetDateTime", "started", "effectiveDateTime", "recordedDate", "issued")
    days = (parse_day(resource.get(key)) for key in keys)
    return ContextNote(NOTE_KINDS[record.kind], text, record.reference, next(filter(None, days), None))


def _read_notes(records: Sequence[Record], *numbers: str) -> tuple[ContextNote, ...]:
    """Notes of everything that is not about the study of these numbers itself."""
    own = frozenset(filter(None, numbers))
    notes = [_read_note(r) for r in records if r.kind in NOTE_KINDS and not _is_current(r, own)]
    kept = {note for note in notes if note is not None}
    return tuple(sorted(kept, key=lambda n: (n.kind, n.recorded_on or date.min, n.reference, n.text)))


def _is_looked_for(record: Record) -> bool:
    return record.kind in NOTE_KINDS or find_lab(record) is not None


def _read_records(resources: Sequence[object], missing: list[str]) -> list[Record]:
    """The records in order of reference, equal copies once, so that the order of input changes nothing."""
    records: list[Record] = []
    for item, url in flatten(resources):
        record = to_record(item, url)
        if record is None:
            missing.append("resource: one is malformed (no object with a resourceType); it was not read")
        elif record not in records:
            records.append(record)
    return sorted(records, key=lambda r: (r.reference, repr(r.resource)))


def fhir_to_context(
    resources: Sequence[object],
    *,
    source: str,
    patient_id: str,
    patient_issuer: str,
    accession_number: str,
    study_instance_uid: str = "",
    issuer_names: Collection[str] = (),
) -> ClinicalContext:
    """The context that `resources` (resources, Bundles or Bundle entries, in any mix) hold for one study.

    The identifiers are the images'; `issuer_names` are what else the issuer of their patient id is called. Nothing
    that belongs to someone else, or to no one, is used; without a patient nothing is.
    """
    missing: list[str] = []
    records = _read_records(resources, missing)
    patient, owner = _choose_patient(records, patient_id, patient_issuer, issuer_names, missing)
    if patient is None or owner is None:
        missing.append("order, PSA, other context: not used, as the patient is not known")
        return ClinicalContext(source, missing=tuple(dict.fromkeys(missing)))
    mine = [r for r in records if _belongs(r, patient, owner)]
    for record in records:
        if record not in mine and _is_looked_for(record):
            missing.append(f"{record.kind}: {record.title} not used, it is not this patient's")
    order = _choose_order(records, accession_number, missing)
    if order is not None and not any(order.reference == r.reference for r in mine):
        missing.append(f"order: {order.reference} not used, it is not this patient's")
        order = None
    labs, notes = _read_labs(mine, missing), _read_notes(mine, accession_number, study_instance_uid)
    conflicts = (
        *_find_conflicts(records, mine, accession_number),
        *_find_study_conflicts(records, mine, accession_number, study_instance_uid),
    )
    return ClinicalContext(source, patient, order, labs, notes, tuple(dict.fromkeys(missing)), conflicts)


def latest_psa(context: ClinicalContext, on: date, maximum_age_days: int) -> tuple[ContextValue | None, str]:
    """The latest PSA for a study of day `on`, and in words which it is, or why there is none.

    Values dated more than a day after the study are passed over. The latest of the rest must not be older
    than `maximum_age_days` (an older but fitting one does not exist then), and not contradict another of its
    day at the same time.
    """
    values = [v for v in context.labs if v.code.value in PSA_CODES and v.unit == "ng/mL"]
    if not values:
        return None, "no usable PSA in the context"
    known = [v for v in values if v.effective_at.date() <= on + AFTER_STUDY_TOLERANCE]
    if not known:
        return None, "every PSA is dated after the study"
    latest = max(known, key=lambda v: (v.effective_at, v.reference))
    if any(v.effective_at == latest.effective_at and v.value != latest.value for v in known):
        return None, f"two PSA values of {latest.effective_at.date()} contradict each other"
    age_days = (on - latest.effective_at.date()).days
    if age_days > maximum_age_days:
        day = latest.effective_at.date()
        return None, f"the latest PSA ({day}) is {age_days} days old, {maximum_age_days} are allowed"
    when = f"{age_days} days before the study" if age_days >= 0 else "dated the day after the study"
    return latest, f"PSA of {latest.effective_at.date()}, {when}"

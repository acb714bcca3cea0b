"""What a message's events change: orders that never go back, patients that stay merged, reports.

Numbers of an order come in any subset. They find the order; where they contradict it or name two, nothing is
changed and a person is told: a guess here would join two patients.
"""

from datetime import datetime

from sqlmodel import Session, select

from mappings.model.events import (
    OrderEvent,
    OrderStatus,
    PatientEvent,
    ReportEvent,
    UnhandledEvent,
    order_status_rank,
)
from mappings.model.ids import derive_uuid
from mappings.model.study import PatientIdentity
from middleware.store.heard import HeardMessage, OrderRecord, PatientRecord, ReportRecord

NUMBERS = ("placer_order_number", "filler_order_number", "accession_number", "study_instance_uid")
DETAILS = ("priority", "reason", "requester")

Events = tuple[OrderEvent | PatientEvent | ReportEvent | UnhandledEvent, ...]


class Contradiction(Exception):
    """The event cannot be applied without guessing; the message says why, without patient data."""


def apply_events(session: Session, message: HeardMessage, events: Events, now: datetime) -> None:
    """Apply all events of a message or, where one contradicts what is known, none of them; sets the message's
    state and notes."""
    problems = [problem for event in events if not isinstance(event, UnhandledEvent) for problem in event.problems]
    notes = [note for event in events if not isinstance(event, UnhandledEvent) for note in event.notes]
    savepoint = session.begin_nested()
    try:
        if problems:
            raise Contradiction("; ".join(dict.fromkeys(problems)))
        for event in events:
            _apply(session, message, event, now)
    except Contradiction as contradiction:
        savepoint.rollback()
        message.state, message.notes = "refused", [*message.notes, str(contradiction)]
        return
    savepoint.commit()
    unhandled = [event.reason for event in events if isinstance(event, UnhandledEvent)]
    message.state = "unhandled" if len(unhandled) == len(events) else "applied"
    message.notes = [*message.notes, *notes, *unhandled]


def _apply(
    session: Session,
    message: HeardMessage,
    event: OrderEvent | PatientEvent | ReportEvent | UnhandledEvent,
    now: datetime,
) -> None:
    if isinstance(event, OrderEvent):
        _apply_order(session, message, event, now)
    elif isinstance(event, PatientEvent):
        _apply_patient(session, event, now)
    elif isinstance(event, ReportEvent):
        _apply_report(session, message, event, now)


# Orders


def _apply_order(session: Session, message: HeardMessage, event: OrderEvent, now: datetime) -> None:
    order = _find_order(session, event)
    if order is None:
        order = OrderRecord(order_id=str(derive_uuid("order", message.message_key, _number_key(event))), updated_at=now)
    _check_agreement(session, order, event)
    for name in NUMBERS:
        setattr(order, name, getattr(order, name) or getattr(event, name))
    if event.patient.patient_id:
        order.patient_id, order.patient_issuer = event.patient.patient_id, event.patient.issuer
    _advance(order, event)
    for name in DETAILS:
        if getattr(event, name) or name in event.cleared:
            setattr(order, name, getattr(event, name))
    if event.procedure:
        order.procedure_code, order.procedure_scheme = event.procedure.value, event.procedure.scheme
        order.procedure_meaning = event.procedure.meaning
    order.updated_at = now
    session.add(order)
    session.flush()


def _number_key(event: OrderEvent) -> str:
    return "|".join(getattr(event, name) for name in NUMBERS)


def _find_order(session: Session, event: OrderEvent) -> OrderRecord | None:
    found: dict[str, OrderRecord] = {}
    for name in NUMBERS:
        value = getattr(event, name)
        if value:
            for order in session.exec(select(OrderRecord).where(getattr(OrderRecord, name) == value)):
                found[order.order_id] = order
    if len(found) > 1:
        raise Contradiction(f"the order numbers name {len(found)} different orders")
    return next(iter(found.values()), None)


def _check_agreement(session: Session, order: OrderRecord, event: OrderEvent) -> None:
    for name in NUMBERS:
        known, told = getattr(order, name), getattr(event, name)
        if known and told and known != told:
            raise Contradiction(f"the {name.replace('_', ' ')} differs from the one known for this order")
    told_id = event.patient.patient_id
    if order.patient_id and told_id and _current(session, order.patient_id) != _current(session, told_id):
        raise Contradiction("the order is known for another patient")


def _advance(order: OrderRecord, event: OrderEvent) -> None:
    """Status only moves forward: a late or repeated `new` never opens again what is cancelled or done."""
    if event.control == "hold":
        order.is_on_hold = True
    elif event.control == "resume":
        order.is_on_hold = False
    told: OrderStatus = event.status
    known: OrderStatus = order.status  # type: ignore[assignment]
    if order_status_rank(told) > order_status_rank(known):
        order.status = told


# Patients


def _patient_key(patient_id: str) -> str:
    return patient_id


def _current(session: Session, patient_id: str) -> str:
    """The id under which a patient is known now, merges followed."""
    seen: set[str] = set()
    while patient_id not in seen:
        seen.add(patient_id)
        record = session.get(PatientRecord, _patient_key(patient_id))
        if record is None or not record.merged_into:
            return patient_id
        patient_id = record.merged_into
    return patient_id


def _apply_patient(session: Session, event: PatientEvent, now: datetime) -> None:
    record = _remember(session, event.patient, now)
    if event.kind != "merge" or event.merged_patient is None:
        return
    survivor = _current(session, event.patient.patient_id)
    away = _remember(session, event.merged_patient, now)
    if survivor == away.patient_id:
        raise Contradiction("the merge would move a patient into itself")
    if away.merged_into and _current(session, away.patient_id) != survivor:
        raise Contradiction("the patient merged away was merged into another one before")
    away.merged_into, away.updated_at = record.patient_id, now
    session.add(away)
    session.flush()


def _remember(session: Session, patient: PatientIdentity, now: datetime) -> PatientRecord:
    """The patient's record with what the message tells; a record that was merged away stays as it was."""
    if not patient.patient_id:
        raise Contradiction("the message names no patient id")
    record = session.get(PatientRecord, _patient_key(patient.patient_id))
    if record is None:
        record = PatientRecord(
            patient_key=_patient_key(patient.patient_id), patient_id=patient.patient_id, updated_at=now
        )
    if not record.merged_into:
        record.issuer = patient.issuer or record.issuer
        record.name = patient.name or record.name
        record.sex = patient.sex or record.sex
        record.birth_date = patient.birth_date.isoformat() if patient.birth_date else record.birth_date
        record.updated_at = now
    session.add(record)
    session.flush()
    return record


# Reports

_REPORT_RANK = {"": 0, "P": 1, "F": 2, "C": 3, "X": 4}


def _apply_report(session: Session, message: HeardMessage, event: ReportEvent, now: datetime) -> None:
    """Keep the report's latest state: a preliminary one that comes late never replaces a final one."""
    named = event.filler_order_number or event.accession_number or event.study_instance_uid or event.placer_order_number
    if not named:
        raise Contradiction("the report names no order, accession or study")
    key = str(derive_uuid("report", message.sender, named))
    record = session.get(ReportRecord, key) or ReportRecord(report_key=key, updated_at=now)
    if _REPORT_RANK[event.status] < _REPORT_RANK[record.status]:
        return
    record.accession_number = event.accession_number or record.accession_number
    record.study_instance_uid = event.study_instance_uid or record.study_instance_uid
    record.patient_id = event.patient.patient_id or record.patient_id
    record.status, record.text, record.reported_at = event.status, event.text, event.reported_at
    record.updated_at = now
    session.add(record)

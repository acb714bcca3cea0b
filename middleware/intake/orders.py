"""What a message's events change: orders that never go back, patients that stay merged, reports.

Numbers of an order come in any subset. They find the order; what was told under different numbers becomes one order
once a message names them together. Where numbers contradict each other or patients differ, nothing is changed and a
person is told: a guess here would join two patients.
"""

from collections.abc import Iterable
from datetime import datetime
from itertools import combinations
from typing import TypeVar

from sqlalchemy import or_
from sqlmodel import Session, col, select

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
from middleware.store.heard import HeardMessage, OrderRecord, PatientRecord, RefusedNumber, ReportRecord
from middleware.store.hearing import find_patient, find_survivor, same_patient

NUMBERS = ("placer_order_number", "filler_order_number", "accession_number", "study_instance_uid")
DETAILS = ("priority", "reason", "requester")
PROCEDURE = ("procedure_code", "procedure_scheme", "procedure_meaning")

Events = tuple[OrderEvent | PatientEvent | ReportEvent | UnhandledEvent, ...]


OTHER_PATIENT = "is known for another patient"
"""How the note of a message ends that was refused because order or report are somebody else's."""


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
        _remember_numbers(session, message, events)
        return
    savepoint.commit()
    unhandled = [event.reason for event in events if isinstance(event, UnhandledEvent)]
    message.state = "unhandled" if len(unhandled) == len(events) else "applied"
    message.notes = [*message.notes, *notes, *unhandled]


def _remember_numbers(session: Session, message: HeardMessage, events: Events) -> None:
    """Keep what a refused message is about: people who ask for the order must find it."""
    about = [event for event in events if isinstance(event, OrderEvent | ReportEvent)]
    named = {(name, getattr(event, name)) for event in about for name in NUMBERS if getattr(event, name)}
    session.add_all(RefusedNumber(number=n, kind=name, position=message.position or 0) for name, n in sorted(named))


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
    _take_numbers(order, event)
    _take_patient(order, event.patient.patient_id, event.patient.issuer)
    _advance(order, event, message.format)
    for name in DETAILS:
        if getattr(event, name) or name in event.cleared:
            setattr(order, name, getattr(event, name))
    if event.procedure:
        order.procedure_code, order.procedure_scheme = event.procedure.value, event.procedure.scheme
        order.procedure_meaning = event.procedure.meaning
    elif "procedure" in event.cleared:
        order.procedure_code = order.procedure_scheme = order.procedure_meaning = ""
    order.updated_at = order.look_after = now  # whatever changed may name its study, or say that it is complete
    session.add(order)
    session.flush()


def _number_key(event: OrderEvent) -> str:
    return "|".join(getattr(event, name) for name in NUMBERS)


def _take_numbers(record: OrderRecord | ReportRecord, told: OrderEvent | ReportEvent | OrderRecord) -> None:
    for name in NUMBERS:
        setattr(record, name, getattr(record, name) or getattr(told, name))


def _find_order(session: Session, event: OrderEvent) -> OrderRecord | None:
    """The order that the event's numbers name. Several records, each told under other numbers, are joined: the
    event says that they are one. Raises Contradiction where that cannot be."""
    orders = _find_by_numbers(session, OrderRecord, event)
    contradicting = {name for order in orders for name in _differing_numbers(order, event)}
    contradicting.update(name for one, other in combinations(orders, 2) for name in _differing_numbers(one, other))
    if contradicting and len(orders) > 1:
        raise Contradiction(f"the order numbers name {len(orders)} different orders")
    if contradicting:
        raise Contradiction(f"the {_words(contradicting)} differs from the one known for this order")
    _check_one_patient(session, [*map(_patient_of, orders), (event.patient.patient_id, event.patient.issuer)], "order")
    for other in orders[1:]:
        _join(session, orders[0], other)
    return orders[0] if orders else None


Record = TypeVar("Record", OrderRecord, ReportRecord)


def _find_by_numbers(session: Session, table: type[Record], event: OrderEvent | ReportEvent) -> list[Record]:
    """Records that share a number with the event, the oldest first."""
    named = [col(getattr(table, name)) == getattr(event, name) for name in NUMBERS if getattr(event, name)]
    found = session.exec(select(table).where(or_(*named))).all() if named else ()
    return sorted(found, key=lambda record: record.updated_at)


def _differing_numbers(record: OrderRecord | ReportRecord, told: OrderEvent | ReportEvent | OrderRecord) -> list[str]:
    pairs = [(name, getattr(record, name), getattr(told, name)) for name in NUMBERS]
    return [name for name, known, other in pairs if known and other and known != other]


def _words(names: Iterable[str]) -> str:
    return ", ".join(name.replace("_", " ") for name in sorted(names))


def _patient_of(record: OrderRecord | ReportRecord) -> tuple[str, str]:
    return record.patient_id, record.patient_issuer


def _take_patient(record: OrderRecord | ReportRecord, patient_id: str, issuer: str) -> None:
    if patient_id:
        known_issuer = record.patient_issuer if record.patient_id == patient_id else ""
        record.patient_id, record.patient_issuer = patient_id, issuer or known_issuer


def _check_one_patient(session: Session, patients: Iterable[tuple[str, str]], what: str) -> None:
    """Raise Contradiction unless all that state a patient state the same one, merges followed."""
    for one, other in combinations([patient for patient in patients if patient[0]], 2):
        if not same_patient(session, one, other):
            raise Contradiction(f"the {what} {OTHER_PATIENT}")


def _join(session: Session, order: OrderRecord, other: OrderRecord) -> None:
    """Make `order` both: the further status, a hold of either, and the details that the later one states."""
    _take_numbers(order, other)
    _take_patient(order, other.patient_id, other.patient_issuer)
    if order_status_rank(other.status) > order_status_rank(order.status):  # type: ignore[arg-type]
        order.status = other.status
    order.held_by = order.held_by if order.is_on_hold else other.held_by
    order.is_on_hold = order.is_on_hold or other.is_on_hold
    for names in (*((name,) for name in DETAILS), PROCEDURE):
        if getattr(other, names[0]):
            for name in names:
                setattr(order, name, getattr(other, name))
    session.delete(other)
    session.flush()


IMAGES_ARE_THERE = order_status_rank("completed")


def _advance(order: OrderRecord, event: OrderEvent, told_by: str) -> None:
    """Status only moves forward: a late or repeated `new` never opens again what is cancelled or done. An EHR whose
    order is active does not lift the hold that the RIS put on it, nor the other way round."""
    is_over = order_status_rank(event.status) >= IMAGES_ARE_THERE
    if is_over or order_status_rank(order.status) >= IMAGES_ARE_THERE:  # type: ignore[arg-type]
        order.is_on_hold = False  # there is nothing left to hold
    elif event.control == "hold":
        order.is_on_hold, order.held_by = True, told_by
    elif event.control == "resume" and order.held_by in ("", told_by):
        order.is_on_hold = False
    told: OrderStatus = event.status
    known: OrderStatus = order.status  # type: ignore[assignment]
    if order_status_rank(told) > order_status_rank(known):
        order.status = told


# Patients


def _apply_patient(session: Session, event: PatientEvent, now: datetime) -> None:
    record = _remember(session, event.patient, now)
    if event.kind != "merge" or event.merged_patient is None:
        return
    away = _remember(session, event.merged_patient, now)
    survivor = find_survivor(session, record) or record
    if survivor.patient_key == away.patient_key:
        raise Contradiction("the merge would move a patient into itself")
    merged_before = find_survivor(session, away)
    if merged_before is not None and merged_before.patient_key != survivor.patient_key:
        raise Contradiction("the patient merged away was merged into another one before")
    away.merged_into, away.updated_at = record.patient_key, now
    session.add(away)
    session.flush()


def _remember(session: Session, patient: PatientIdentity, now: datetime) -> PatientRecord:
    """The patient's record with what the message tells; a record that was merged away stays as it was."""
    if not patient.patient_id:
        raise Contradiction("the message names no patient id")
    found = find_patient(session, patient.patient_id, patient.issuer)
    if len(found) > 1:
        raise Contradiction("the patient id is known of several authorities, and the message states none")
    record = found[0] if found else _new_patient(patient, now)
    if not record.merged_into:
        record.issuer = patient.issuer or record.issuer
        record.name = patient.name or record.name
        record.sex = patient.sex or record.sex
        record.birth_date = patient.birth_date.isoformat() if patient.birth_date else record.birth_date
        record.updated_at = now
    session.add(record)
    session.flush()
    return record


def _new_patient(patient: PatientIdentity, now: datetime) -> PatientRecord:
    key = str(derive_uuid("patient", patient.patient_id, patient.issuer))
    return PatientRecord(patient_key=key, patient_id=patient.patient_id, updated_at=now)


# Reports

_REPORT_RANK = {"": 0, "P": 1, "F": 2, "C": 3, "X": 4}


def _apply_report(session: Session, message: HeardMessage, event: ReportEvent, now: datetime) -> None:
    """Keep the report's latest state: a preliminary one that comes late never replaces a final one, nor an earlier
    state a later one of the same status."""
    record = _find_report(session, message, event, now)
    _check_one_patient(session, [_patient_of(record), (event.patient.patient_id, event.patient.issuer)], "report")
    _take_numbers(record, event)
    _take_patient(record, event.patient.patient_id, event.patient.issuer)
    if not _is_earlier(event, record):
        record.status, record.text, record.reported_at = event.status, event.text, event.reported_at
        record.updated_at = now
    session.add(record)
    session.flush()


def _find_report(session: Session, message: HeardMessage, event: ReportEvent, now: datetime) -> ReportRecord:
    """The report with one of the event's numbers and no other one that differs: an accession may have several."""
    named = [getattr(event, name) for name in NUMBERS]
    if not any(named):
        raise Contradiction("the report names no order, accession or study")
    found = [r for r in _find_by_numbers(session, ReportRecord, event) if not _differing_numbers(r, event)]
    if len(found) > 1:
        raise Contradiction(f"the report's numbers name {len(found)} different reports")
    key = str(derive_uuid("report", message.message_key, *named))
    return found[0] if found else ReportRecord(report_key=key, updated_at=now)


def _is_earlier(event: ReportEvent, record: ReportRecord) -> bool:
    told, known = _REPORT_RANK[event.status], _REPORT_RANK[record.status]
    if told != known or not (event.reported_at and record.reported_at):
        return told < known
    return event.reported_at < record.reported_at

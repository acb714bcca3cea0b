"""What a hospital's HL7 v2 message tells: an order and how far it is, a patient or a merge, a report.

`problems` are contradictions and missing identifiers in sentences without patient data: such an event is for a
person to settle, and the value in question is left empty, never guessed. `notes` are oddities that stop nothing.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from mappings.model.codes import Code
from mappings.model.context import Identifier
from mappings.model.study import PatientIdentity

OrderControl = Literal["new", "change", "cancel", "discontinue", "hold", "resume", "status", "complete"]
"""What the message does to the order. `complete`: the images are there; `status`: any other step or number."""

OrderStatus = Literal[
    "", "requested", "scheduled", "in-progress", "completed", "preliminary", "final", "discontinued", "cancelled"
]
ORDER_STATUSES: tuple[OrderStatus, ...] = (
    "",
    "requested",
    "scheduled",
    "in-progress",
    "completed",
    "preliminary",
    "final",
    "discontinued",
    "cancelled",
)
"""How far an order is, in the order in which it may move: never to an earlier one. Empty: not stated.
`completed`: images acquired; `preliminary`, `final`: reported. A hold is no status, it stops the clock."""

Priority = Literal["", "S", "A", "T", "P", "C", "R"]
PRIORITIES: tuple[Priority, ...] = ("S", "A", "T", "P", "C", "R")
"""Stat, as soon as possible, timing critical, preoperative, callback, routine, most urgent first (table 0485)."""

ReportStatus = Literal["", "P", "F", "C", "X"]
"""OBR-25 of a report: preliminary, final, corrected, cancelled (table 0123); empty where the message does not say."""


def order_status_rank(status: OrderStatus) -> int:
    """Place of a status in `ORDER_STATUSES`; the store keeps the highest it ever saw."""
    return ORDER_STATUSES.index(status)


@dataclass(frozen=True, kw_only=True)
class OrderNumbers:
    """What names an order. Any may be empty; an authority is empty where the message states none."""

    placer_order_number: str = ""
    placer_authority: str = ""
    filler_order_number: str = ""
    filler_authority: str = ""
    accession_number: str = ""
    accession_authority: str = ""
    study_instance_uid: str = ""


@dataclass(frozen=True, kw_only=True)
class OrderEvent(OrderNumbers):
    """One order (one ORC and OBR) as one message tells it.

    `patient_identifiers` are all of PID-3; `patient.patient_id` is the one of them that is the patient's, empty
    where it cannot be told. `procedure_alternate` is OBR-4's second coding. `cleared` names the attributes that
    the sender deletes (HL7 null) rather than does not mention. `requester` is family^given^middle^prefix^suffix.
    """

    control: OrderControl
    status: OrderStatus = ""
    patient: PatientIdentity
    patient_identifiers: tuple[Identifier, ...] = ()
    procedure: Code | None = None
    procedure_alternate: Code | None = None
    modality: str = ""
    priority: Priority = ""
    reason: str = ""
    requester: str = ""
    scheduled_at: datetime | None = None
    occurred_at: datetime | None = None
    cleared: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PatientEvent:
    """A patient made known or changed, or `merged_patient` merged away into `patient`."""

    kind: Literal["register", "update", "merge"]
    patient: PatientIdentity
    patient_identifiers: tuple[Identifier, ...] = ()
    merged_patient: PatientIdentity | None = None
    merged_identifiers: tuple[Identifier, ...] = ()
    occurred_at: datetime | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ReportEvent(OrderNumbers):
    """A report on an order (one OBR and its OBX). `text` has one line an OBX-5 line. `observed_at` is when the
    images were taken, `reported_at` when this state of the report was."""

    status: ReportStatus = ""
    patient: PatientIdentity
    patient_identifiers: tuple[Identifier, ...] = ()
    procedure: Code | None = None
    text: str = ""
    observed_at: datetime | None = None
    reported_at: datetime | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class UnhandledEvent:
    """A message, or a part of one, that nothing is done with: kept and acknowledged. `type` is `ADT^A03`."""

    type: str
    reason: str


Event = OrderEvent | PatientEvent | ReportEvent | UnhandledEvent

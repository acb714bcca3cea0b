"""ADT^A01, A04, A08 and A40 to patient events.

Source: HL7 v2.5.1 chapter 3 (PID, MRG, 3.3.40 A40: the patient of MRG-1 is merged into the one of PID-3; several
pairs may follow each other).
"""

from collections.abc import Iterator
from datetime import datetime
from typing import Literal

from mappings.inputs.hl7_elements import (
    Remarks,
    Site,
    choose_patient_id,
    read_first_time,
    read_identifiers,
    read_patient,
    read_person_name,
)
from mappings.model.events import PatientEvent, UnhandledEvent
from mappings.model.message import Message, Segment
from mappings.model.study import PatientIdentity

KIND_OF_TRIGGER: dict[str, Literal["register", "update"]] = {"A01": "register", "A04": "register", "A08": "update"}
MERGE_TRIGGER = "A40"


def message_to_patients(message: Message, site: Site) -> tuple[PatientEvent | UnhandledEvent, ...]:
    """One event for an admission, registration or update; one for each PID and MRG of a merge."""
    if message.header.trigger == MERGE_TRIGGER:
        merges = tuple(_to_merge(pid, mrg, message, site) for pid, mrg in _pairs(message))
        return merges or (UnhandledEvent(type=message.header.event, reason="a merge without PID and MRG segments"),)
    remarks = Remarks()
    pids = message.segments("PID")
    if len(pids) > 1:
        remarks.problem("the message has more than one PID segment")
    patient, identifiers = read_patient(message.first("PID"), site, remarks)
    return (
        PatientEvent(
            kind=KIND_OF_TRIGGER[message.header.trigger],
            patient=patient,
            patient_identifiers=identifiers,
            occurred_at=_read_moment(message, site),
            problems=tuple(remarks.problems),
            notes=tuple(remarks.notes),
        ),
    )


def _read_moment(message: Message, site: Site) -> datetime | None:
    evn = message.first("EVN")
    return read_first_time((evn.text(6), evn.text(2), message.header.message_time), site.zone)


def _pairs(message: Message) -> Iterator[tuple[Segment, Segment]]:
    """Each PID with its MRG; either is empty where its other half is missing."""
    encoding = message.header.encoding
    no_pid, no_mrg = Segment("PID", "PID", encoding), Segment("MRG", "MRG", encoding)
    pid: Segment | None = None
    for segment in message.segments():
        if segment.name == "PID":
            if pid:
                yield pid, no_mrg
            pid = segment
        elif segment.name == "MRG":
            yield pid or no_pid, segment
            pid = None
    if pid:
        yield pid, no_mrg


def _may_be_same(authority: str, other: str) -> bool:
    return authority == other or not authority or not other


def _to_merge(pid: Segment, mrg: Segment, message: Message, site: Site) -> PatientEvent:
    remarks = Remarks()
    patient, identifiers = read_patient(pid, site, remarks)
    merged_identifiers = read_identifiers(mrg, 1, remarks)
    own = choose_patient_id(merged_identifiers, "MRG-1", remarks, site.patient_authority)
    merged = PatientIdentity(own.value, own.system, read_person_name(mrg, 7))
    if own.value and own.value == patient.patient_id and _may_be_same(own.system, patient.issuer):
        remarks.problem("PID-3 and MRG-1 name the same patient: nothing to merge, or an authority is missing")
    return PatientEvent(
        kind="merge",
        patient=patient,
        patient_identifiers=identifiers,
        merged_patient=merged,
        merged_identifiers=merged_identifiers,
        occurred_at=_read_moment(message, site),
        problems=tuple(remarks.problems),
        notes=tuple(remarks.notes),
    )

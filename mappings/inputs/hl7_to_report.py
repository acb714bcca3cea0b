"""ORU^R01 to report events: one for each OBR.

Sources: HL7 v2.5.1 chapters 4 (OBR-25, table 0123) and 7 (OBX, ORU).
"""

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from itertools import chain, pairwise

from mappings.inputs.hl7_elements import (
    Remarks,
    Site,
    read_code,
    read_first_time,
    read_patient,
    read_prose,
    read_time,
)
from mappings.inputs.hl7_to_order import OrderGroup, read_numbers, split_orders, states_study_uid
from mappings.model.events import ReportEvent, ReportStatus, UnhandledEvent
from mappings.model.message import NULL, Message, Segment, unescape

STATUS_OF_OBR_25: dict[str, ReportStatus] = {"P": "P", "R": "P", "A": "P", "F": "F", "C": "C", "X": "X"}
"""Table 0123. R (stored, not verified) and A (some results) are preliminary."""
NO_RESULT_YET = frozenset("OIS")
_TEXT_TYPES = frozenset({"TX", "FT", "ST"})
_CODED_TYPES = frozenset({"CE", "CWE", "CNE"})
_WITHDRAWN = frozenset("DWX")


def message_to_reports(message: Message, site: Site) -> tuple[ReportEvent | UnhandledEvent, ...]:
    """An event for every OBR of the message, each with the patient (PID) before it."""
    events = tuple(_to_event(group, pid, message, site) for pid, group in _split_reports(message))
    return events or (UnhandledEvent(type=message.header.event, reason="the message has no OBR segment"),)


def _split_reports(message: Message) -> Iterator[tuple[Segment, OrderGroup]]:
    """Each report with its PID: a message may hold the results of several patients."""
    pid = Segment("PID", "PID", message.header.encoding)
    starts = [index for index, line in enumerate(message.lines) if line.startswith("PID")]
    for start, end in pairwise((0, *starts, len(message.lines))):
        part = replace(message, lines=message.lines[start + 1 : end])
        if start:
            pid = Segment("PID", message.lines[start], message.header.encoding)
        yield from ((pid, group) for group in split_orders(part) if group.obr.fields[1:])


def _to_event(group: OrderGroup, pid: Segment, message: Message, site: Site) -> ReportEvent | UnhandledEvent:
    obr, observations = group.obr, group.named("OBX")
    stated = obr.text(25).strip().upper()
    if stated in NO_RESULT_YET:
        return UnhandledEvent(type=message.header.event, reason=f"OBR-25 is {stated}: no result yet")
    remarks = Remarks()
    if stated not in STATUS_OF_OBR_25:
        remarks.problem("OBR-25 (result status) is missing or of another table: preliminary or final?")
    patient, identifiers = read_patient(pid, site, remarks)
    numbers = read_numbers(group, site, remarks)
    event = ReportEvent(
        **vars(numbers),
        status=STATUS_OF_OBR_25.get(stated, ""),
        patient=patient,
        patient_identifiers=identifiers,
        procedure=read_code(obr, 4),
        text=_read_report(group, remarks),
        observed_at=_read_observed_at(obr, observations, site),
        reported_at=read_first_time((obr.text(22), message.header.message_time), site.zone),
    )
    return replace(event, problems=tuple(remarks.problems), notes=tuple(remarks.notes))


def _read_observed_at(obr: Segment, observations: list[Segment], site: Site) -> datetime | None:
    stated = chain((obr.text(7),), (obx.text(14) for obx in observations))
    return next((time for time in (read_time(value, site.zone) for value in stated) if time), None)


def _read_report(group: OrderGroup, remarks: Remarks) -> str:
    """The report's words: a line for each repetition of OBX-5 and NTE-3; withdrawn observations are left out."""
    lines: list[str] = []
    statuses = set()
    for segment in group.others:
        if segment.name == "NTE":
            lines.extend(_read_texts(segment, 3))
        elif segment.name == "OBX":
            statuses.add(segment.text(11).strip().upper())
            lines.extend(_read_observation(segment, remarks))
    if "P" in statuses and "F" in statuses:
        remarks.note("some observations are preliminary, some final (OBX-11)")
    return "\n".join(lines).strip("\n")


def _read_observation(obx: Segment, remarks: Remarks) -> Iterator[str]:
    kind = obx.text(2).strip().upper()
    if obx.text(11).strip().upper() in _WITHDRAWN or states_study_uid(obx):
        return
    if kind in _TEXT_TYPES:
        yield from _read_texts(obx, 5)
    elif kind in _CODED_TYPES:
        yield from (read_prose(coded.text(2) or coded.text(1)) for coded in obx.repetitions(5))
    else:
        remarks.note(f"OBX of a type other than text ({_quote(kind)}) are not in the report's text")


def _read_texts(segment: Segment, number: int) -> Iterator[str]:
    """Each repetition of a text, whole: text has no components, an unescaped `^` or `&` in it is a character."""
    raw = segment.raw(number)
    if raw != NULL:
        yield from (read_prose(unescape(part, segment.encoding)) for part in raw.split(segment.encoding.repetition))


def _quote(kind: str) -> str:
    return kind if len(kind) in (2, 3) and kind.isascii() and kind.isalpha() else "none stated"

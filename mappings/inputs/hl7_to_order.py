"""ORM^O01, OMG^O19 and OMI^O23 to order events: one for each ORC and OBR.

Sources: HL7 v2.5.1 chapter 4 (ORC, OBR, TQ1, IPC; tables 0038, 0119, 0123); IHE Radiology TF-2 4.4 (ZDS-1 and
IPC-3 carry the Study Instance UID; OBR-18 and IPC-1 the accession number).

The accession number has no field of its own in OBR. OBR-18 and IPC-1 are IHE's; sites that use another one
(OBR-3, OBR-20) say so in `Site.accession_from`. OBR-20 is not tried unasked: in IHE's profile it is the id of the
scheduled procedure step.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from mappings.inputs.hl7_elements import (
    Remarks,
    Site,
    agree_on_identifier,
    read_code,
    read_coded_texts,
    read_entity,
    read_first_time,
    read_line,
    read_patient,
    read_person,
    read_prose,
    read_time,
    read_uid,
)
from mappings.model.context import Identifier
from mappings.model.events import (
    PRIORITIES,
    OrderControl,
    OrderEvent,
    OrderNumbers,
    OrderStatus,
    Priority,
    UnhandledEvent,
    order_status_rank,
)
from mappings.model.message import Message, Segment
from mappings.model.study import PatientIdentity

CONTROLS: dict[str, OrderControl] = {
    **dict.fromkeys(("NW", "SN", "RO", "CH"), "new"),
    **dict.fromkeys(("XO", "XX", "XR"), "change"),
    **dict.fromkeys(("CA", "OC", "CR", "UA", "RP", "RU", "RQ"), "cancel"),
    **dict.fromkeys(("DC", "OD", "DR"), "discontinue"),
    **dict.fromkeys(("HD", "OH", "HR"), "hold"),
    **dict.fromkeys(("RL", "OE", "OR"), "resume"),
    **dict.fromkeys(("SC", "SR", "OK", "NA", "RE", "PA", "UC", "UD", "UH", "UX", "UR", "UM", "RR"), "status"),
}
"""ORC-1 (table 0119). UA: the filler will not do it; RP, RU, RQ name the order that another one (RO) replaces; UC, UD,
UH, UX, UR, UM refuse a change, so the order stays as it is."""

STATUS_OF_ORC_5: dict[str, OrderStatus] = {
    "SC": "scheduled",
    "IP": "in-progress",
    "A": "in-progress",
    "CM": "completed",
    "DC": "discontinued",
    "CA": "cancelled",
    "RP": "cancelled",
}
"""Table 0038. HD (on hold) is no status here, ER (order not found) a problem."""

STATUS_OF_OBR_25: dict[str, OrderStatus] = {
    "O": "requested",
    "S": "scheduled",
    "I": "in-progress",
    "A": "in-progress",
    "R": "preliminary",
    "P": "preliminary",
    "F": "final",
    "C": "final",
    "X": "cancelled",
}
"""Table 0123. Y and Z (no order, no patient on record) are problems."""

_ENDED: tuple[OrderStatus, ...] = ("cancelled", "discontinued")
_DONE: tuple[OrderStatus, ...] = ("completed", "preliminary", "final")
_PRIORITY_CODES: dict[str, Priority] = {**{p: p for p in PRIORITIES}, "STAT": "S", "ASAP": "A", "ROUTINE": "R"}
_CLEARABLE = (
    ("OBR", 18, "accession_number"),
    ("OBR", 4, "procedure"),
    ("OBR", 31, "reason"),
    ("OBR", 13, "reason"),
    ("OBR", 16, "requester"),
    ("OBR", 36, "scheduled_at"),
)


@dataclass
class OrderGroup:
    """The segments of one order: those that precede its OBR (ORC, TQ1) and those that follow it."""

    orc: Segment
    obr: Segment
    others: list[Segment] = field(default_factory=list)

    def named(self, name: str) -> list[Segment]:
        """The group's other segments of that name."""
        return [segment for segment in self.others if segment.name == name]


def _empty(name: str, like: Segment) -> Segment:
    return Segment(name, name, like.encoding)


def split_orders(message: Message) -> Iterator[OrderGroup]:
    """Each order of a message. An OBR without an ORC of its own shares the one before; an ORC may stand alone.
    After a second PID (OMG: prior results) an OBR without an ORC is no order of this message."""
    msh = message.first("MSH")
    group: OrderGroup | None = None
    is_prior = False
    for segment in message.segments():
        if is_prior and group is None and segment.name != "ORC":
            continue
        if segment.name == "ORC" or (segment.name == "OBR" and (group is None or group.obr.fields[1:])):
            if group:
                yield group
            orc = segment if segment.name == "ORC" else group.orc if group else _empty("ORC", msh)
            obr = segment if segment.name == "OBR" else _empty("OBR", msh)
            group = OrderGroup(orc, obr)
        elif segment.name == "OBR" and group:
            group.obr = segment
        elif segment.name == "PID" and group:
            yield group
            group, is_prior = None, True
        elif group:
            group.others.append(segment)
    if group:
        yield group


def read_numbers(group: OrderGroup, site: Site, remarks: Remarks) -> OrderNumbers:
    """What names the order. What is stated in several places differently is a problem and left empty; so is an
    order that nothing names."""
    orc, obr = group.orc, group.obr
    problems_before = len(remarks.problems)
    placer = agree_on_identifier(_places(((orc, 2), (obr, 2)), remarks), "placer order number", remarks)
    filler = agree_on_identifier(_places(((orc, 3), (obr, 3)), remarks), "filler order number", remarks)
    accession = agree_on_identifier(_places(_accession_fields(group, site), remarks), "accession number", remarks)
    numbers = OrderNumbers(
        placer_order_number=placer.value,
        placer_authority=placer.system,
        filler_order_number=filler.value,
        filler_authority=filler.system,
        accession_number=accession.value,
        accession_authority=accession.system,
        study_instance_uid=_read_study_uid(group, remarks),
    )
    if numbers == OrderNumbers() and len(remarks.problems) == problems_before:
        remarks.problem("no placer, filler or accession number and no Study Instance UID")
    return numbers


def _places(fields: Iterable[tuple[Segment, int]], remarks: Remarks) -> list[tuple[str, Identifier]]:
    return [(f"{segment.name}-{number}", read_entity(segment, number, remarks)) for segment, number in fields]


def _accession_fields(group: OrderGroup, site: Site) -> Iterator[tuple[Segment, int]]:
    for place in site.accession_from:
        name, _, number = place.partition("-")
        for segment in (group.orc, group.obr, *group.others):
            if segment.name == name and number.isdecimal():
                yield segment, int(number)


def states_study_uid(obx: Segment) -> bool:
    """Whether an observation is the Study Instance UID (PS3.16: DCM 110180; 113014, the study, is used as well)."""
    return obx.text(3) in ("110180", "113014") and obx.text(3, 3) == "DCM"


def _read_study_uid(group: OrderGroup, remarks: Remarks) -> str:
    places = [
        *((ipc, 3) for ipc in group.named("IPC")),
        *((zds, 1) for zds in group.named("ZDS")),
        *((obx, 5) for obx in group.named("OBX") if states_study_uid(obx)),
    ]
    uids = {read_uid(segment.text(number), f"{segment.name}-{number}", remarks) for segment, number in places} - {""}
    if len(uids) > 1:
        remarks.problem("different Study Instance UIDs are stated (IPC-3, ZDS-1, OBX-5)")
    return uids.pop() if len(uids) == 1 else ""


def _read_status(group: OrderGroup, remarks: Remarks) -> OrderStatus:
    """How far the order is: the further of ORC-5 and OBR-25; ended in one and done in the other is a problem."""
    order_code, result_code = (s.text(n).strip().upper() for s, n in ((group.orc, 5), (group.obr, 25)))
    if order_code == "ER" or result_code in ("Y", "Z"):
        remarks.problem("the sender has no such order or patient on record (ORC-5 ER, OBR-25 Y or Z)")
    elif order_code not in ("", "HD", *STATUS_OF_ORC_5):
        remarks.note("ORC-5 is not of table 0038")
    if result_code not in ("", "Y", "Z", *STATUS_OF_OBR_25):
        remarks.note("OBR-25 is not of table 0123")
    stated = {STATUS_OF_ORC_5.get(order_code, ""), STATUS_OF_OBR_25.get(result_code, "")} - {""}
    if stated.intersection(_ENDED) and stated.intersection(_DONE):
        remarks.problem("ORC-5 and OBR-25 contradict each other: ended without images, and done")
        return ""
    return max(stated, key=order_status_rank, default="")


def _settle(
    control: OrderControl, stated: OrderStatus, held: bool, remarks: Remarks
) -> tuple[OrderControl, OrderStatus]:
    """What ORC-1 and the status mean together. A change or status message (IHE sends XO for "procedure complete")
    does what its status says; ORC-1 and a status that exclude each other are a problem."""
    ends: dict[OrderControl, OrderStatus] = {"cancel": "cancelled", "discontinue": "discontinued"}
    if control in ends:
        if stated in _DONE:
            remarks.problem("ORC-1 ends the order, ORC-5 or OBR-25 says it is done")
            return control, ""
        return control, ends[control]
    if control in ("status", "change"):
        if stated in _ENDED:
            return ("cancel" if stated == "cancelled" else "discontinue"), stated
        if stated in _DONE:
            return "complete", stated
        return ("hold" if held else control), stated
    if stated in _ENDED:
        remarks.problem("ORC-1 asks for the order, ORC-5 or OBR-25 says it has ended")
        return control, ""
    if control == "new":
        return ("hold" if held else "new"), stated or "requested"
    return control, stated


def _priority_values(group: OrderGroup) -> Iterator[str]:
    for tq1 in group.named("TQ1"):
        yield from (priority.text() for priority in tq1.repetitions(9))
    for segment, number in ((group.orc, 7), (group.obr, 27)):
        yield from (timing.text(6) for timing in segment.repetitions(number))
    yield group.obr.text(5)


def _read_priority(group: OrderGroup, remarks: Remarks) -> Priority:
    """The most urgent that TQ1-9, ORC-7, OBR-27 or OBR-5 states: read too early harms nobody, too late may."""
    known: set[Priority] = set()
    for value in _priority_values(group):
        code = value.strip().upper()
        priority = _PRIORITY_CODES.get(code, "T" if code.startswith("T") else "")
        if code and not priority:
            remarks.note("a priority is not of table 0485")
        known.add(priority)
    known.discard("")
    if len(known) > 1:
        remarks.note("different priorities are stated; the most urgent counts")
    return min(known, key=PRIORITIES.index, default="")


def _read_reason(group: OrderGroup) -> str:
    """OBR-31, else OBR-13 (relevant clinical information), else the order's diagnoses (DG1)."""
    if texts := read_coded_texts(group.obr, 31):
        return "; ".join(texts)
    if information := read_prose(group.obr.text(13)).strip():
        return information
    texts = tuple(read_line(dg1.text(4) or dg1.text(3, 2) or dg1.text(3)) for dg1 in group.named("DG1"))
    return "; ".join(dict.fromkeys(text for text in texts if text))


def _scheduled_values(group: OrderGroup) -> Iterator[str]:
    yield from (tq1.text(7) for tq1 in group.named("TQ1"))
    yield from (group.orc.text(7, 4), group.obr.text(27, 4), group.obr.text(36))


def _cleared(group: OrderGroup) -> tuple[str, ...]:
    by_name = {"ORC": group.orc, "OBR": group.obr}
    return tuple(dict.fromkeys(name for segment, n, name in _CLEARABLE if by_name[segment].is_null(n)))


def _read_modality(group: OrderGroup) -> str:
    return next((text for text in (read_line(ipc.text(5)).upper() for ipc in group.named("IPC")) if text), "")


@dataclass(frozen=True)
class _Person:
    """The patient of a message, read once for all its orders, with the remarks that each of them inherits."""

    patient: PatientIdentity
    identifiers: tuple[Identifier, ...]
    remarks: Remarks


def _to_event(group: OrderGroup, person: _Person, message: Message, site: Site) -> OrderEvent | UnhandledEvent:
    code = group.orc.text(1).strip().upper()
    if code and code not in CONTROLS:
        return UnhandledEvent(type=message.header.event, reason=f"an order with ORC-1 {_quote(code)} is not acted on")
    remarks = Remarks(list(person.remarks.problems), list(person.remarks.notes))
    if not code:
        remarks.problem("ORC-1 (order control) is missing")
    numbers = read_numbers(group, site, remarks)
    held = group.orc.text(5).strip().upper() == "HD"
    control, status = _settle(CONTROLS.get(code, "status"), _read_status(group, remarks), held, remarks)
    orc, obr = group.orc, group.obr
    scheduled = (read_time(value, site.zone) for value in _scheduled_values(group))
    event = OrderEvent(
        **vars(numbers),
        control=control,
        status=status,
        patient=person.patient,
        patient_identifiers=person.identifiers,
        procedure=read_code(obr, 4),
        procedure_alternate=read_code(obr, 4, alternate=True),
        modality=_read_modality(group),
        priority=_read_priority(group, remarks),
        reason=_read_reason(group),
        requester=read_person(obr, 16) or read_person(orc, 12),
        scheduled_at=next((time for time in scheduled if time), None),
        occurred_at=read_first_time((orc.text(9), message.header.message_time), site.zone),
        cleared=_cleared(group),
    )
    return replace(event, problems=tuple(remarks.problems), notes=tuple(remarks.notes))


def _quote(code: str) -> str:
    return code if len(code) == 2 and code.isascii() and code.isalpha() else "of another table"


def _read_person_of_message(message: Message, site: Site) -> _Person:
    """A message's one patient; a second PID (a prior result) must name the same one."""
    remarks = Remarks()
    patient, identifiers = read_patient(message.first("PID"), site, remarks)
    others = {read_patient(pid, site, Remarks())[0].patient_id for pid in message.segments("PID")[1:]}
    if others - {patient.patient_id}:
        remarks.problem("the PID segments name different patients")
    return _Person(patient, identifiers, remarks)


def _number_of(group: OrderGroup, site: Site) -> str:
    numbers = read_numbers(group, site, Remarks())
    return numbers.accession_number or numbers.filler_order_number or numbers.placer_order_number


def _share_study_uids(groups: list[OrderGroup], site: Site) -> None:
    """Give orders without a ZDS the one that follows a later order of the same number: IHE sends several OBR of
    one requested procedure and then one ZDS for all. To an order of another number it says nothing."""
    following: list[Segment] = []
    number = ""
    for group in reversed(groups):
        if own := group.named("ZDS"):
            following, number = own, _number_of(group, site)
        elif number and _number_of(group, site) == number and not group.named("IPC"):
            group.others.extend(following)


def message_to_orders(message: Message, site: Site) -> tuple[OrderEvent | UnhandledEvent, ...]:
    """An event for every order of the message, in its order."""
    groups = list(split_orders(message))
    if not groups:
        return (UnhandledEvent(type=message.header.event, reason="the message has no ORC or OBR segment"),)
    _share_study_uids(groups, site)
    person = _read_person_of_message(message, site)
    return tuple(_to_event(group, person, message, site) for group in groups)

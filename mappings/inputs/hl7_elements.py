"""HL7 v2 data types to the model: identifiers, names, codes, times. What is malformed counts as not there and
is remarked on, never as an error.

Source: HL7 v2.5.1 chapter 2A (CX, EI, HD, XPN, XCN, CE, TS), tables 0001, 0203, 0396.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone, tzinfo
from typing import Literal

from mappings.model.codes import Code
from mappings.model.context import Identifier
from mappings.model.message import Repetition, Segment, drop_controls, holds_controls
from mappings.model.study import PatientIdentity

LOCAL_SCHEME = "L"
"""Table 0396's name for a local code; also where the message names no coding system."""

ACCESSION_FROM = ("IPC-1", "OBR-18")
"""Fields that state the accession number in IHE's profiles."""

EARLIEST_YEAR, LATEST_YEAR = 1900, 9998
"""Anything outside is a placeholder, and arithmetic with time zones fails near year 1 and 9999."""

_TIME = re.compile(
    r"(\d{4})(?:(\d\d)(?:(\d\d)(?:(\d\d)(?:(\d\d)(?:(\d\d)(?:\.(\d{1,6})\d*)?)?)?)?)?)?([+-]\d{4})?", re.ASCII
)
_KINDS_OF_PATIENT_ID = ("MR", "PI", "")
"""Table 0203, most telling first; an untyped identifier only where there is neither."""
_LEGAL_NAME_TYPES = ("L", "D", "")
_UID = re.compile(r"[0-2](\.(0|[1-9][0-9]*))+")
_MAX_UID_LENGTH = 64
_TEXT_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")

Sex = Literal["M", "F", "O", ""]
_SEXES: dict[str, Sex] = {"M": "M", "F": "F", "O": "O", "A": "O", "U": "", "N": "", "": ""}


@dataclass
class Remarks:
    """Collects what is wrong (`problems`, a person must settle it) and what is odd (`notes`)."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(self, sentence: str) -> None:
        """Note a contradiction or a missing identifier, once."""
        if sentence not in self.problems:
            self.problems.append(sentence)

    def note(self, sentence: str) -> None:
        """Note an oddity, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)


def read_line(value: str) -> str:
    """A value for one line: control characters gone, blanks around it too."""
    return drop_controls(value).strip()


def read_prose(value: str) -> str:
    """A text of several lines: line ends as LF, other control characters (but tabs) gone."""
    return _TEXT_CONTROLS.sub("", value.replace("\r\n", "\n").replace("\r", "\n"))


def read_key(value: str, where: str, remarks: Remarks) -> str:
    """An identifying value; one that holds control characters is not taken, since cleaning would be guessing."""
    if holds_controls(value):
        remarks.problem(f"{where} holds control characters")
        return ""
    return value.strip()


def read_authority(repetition: Repetition, component: int) -> str:
    """An assigning authority (HD): its namespace, else its universal id."""
    return read_line(repetition.text(component, 1) or repetition.text(component, 2))


def read_entity(segment: Segment, number: int, remarks: Remarks) -> Identifier:
    """An EI: the number with its authority (namespace, else universal id)."""
    repetition = segment.repetition(number)
    value = read_key(repetition.text(1), f"{segment.name}-{number}", remarks)
    return Identifier(value, read_line(repetition.text(2) or repetition.text(3)) if value else "")


def agree_on_identifier(found: Iterable[tuple[str, Identifier]], what: str, remarks: Remarks) -> Identifier:
    """The one identifier that all places (name, identifier) with a value state. Different values or authorities
    are a problem and give an empty one; an authority stated in one place counts for all."""
    stated = [(place, identifier) for place, identifier in found if identifier.value]
    values = {identifier.value for _, identifier in stated}
    authorities = {identifier.system for _, identifier in stated if identifier.system}
    if len(values) > 1 or len(authorities) > 1:
        different = "values" if len(values) > 1 else "authorities"
        remarks.problem(f"{what}: different {different} in {' and '.join(dict.fromkeys(place for place, _ in stated))}")
        return Identifier("")
    return Identifier(values.pop(), authorities.pop() if authorities else "") if values else Identifier("")


def read_identifiers(segment: Segment, number: int, remarks: Remarks) -> tuple[Identifier, ...]:
    """Every CX of a field: value, assigning authority, type code; each once."""
    where = f"{segment.name}-{number}"
    found = (
        Identifier(read_key(cx.text(1), where, remarks), read_authority(cx, 4), read_line(cx.text(5)).upper())
        for cx in segment.repetitions(number)
    )
    return tuple(dict.fromkeys(identifier for identifier in found if identifier.value))


@dataclass(frozen=True)
class Site:
    """What a site's messages leave unsaid: the zone of its local times, the fields that state the accession number
    (all of those that hold a value must agree), and whose patient id counts where PID-3 has several (an authority
    as in PID-3.4; empty: several are a problem)."""

    zone: tzinfo
    accession_from: tuple[str, ...] = ACCESSION_FROM
    patient_authority: str = ""


def choose_patient_id(
    identifiers: tuple[Identifier, ...], where: str, remarks: Remarks, authority: str = ""
) -> Identifier:
    """The patient's own identifier: the one MR, else the one PI, else the one without a type; of `authority`
    alone where it issued any of them. Two of the same kind, or none of these, are a problem and give an empty one."""
    of_authority = tuple(i for i in identifiers if i.system == authority and i.type_code in _KINDS_OF_PATIENT_ID)
    if authority and of_authority:
        identifiers = of_authority
    for kind in _KINDS_OF_PATIENT_ID:
        candidates = [identifier for identifier in identifiers if identifier.type_code == kind]
        if not candidates:
            continue
        authorities = {identifier.system for identifier in candidates if identifier.system}
        if len({identifier.value for identifier in candidates}) > 1 or len(authorities) > 1:
            remarks.problem(f"{where} has several identifiers of type {kind or '(none)'}: which is the patient's?")
            return Identifier("")
        return Identifier(candidates[0].value, authorities.pop() if authorities else "", kind)
    remarks.problem(f"{where} has no identifier of type MR or PI")
    return Identifier("")


def _name_part(text: str) -> str:
    """A part of a DICOM person name, without the characters that separate its parts."""
    return " ".join(re.sub(r"[\^=\\]", " ", read_line(text)).split())


def _join_name(family: str, given: str, middle: str, prefix: str, suffix: str) -> str:
    return "^".join(map(_name_part, (family, given, middle, prefix, suffix))).rstrip("^")


def read_person_name(segment: Segment, number: int) -> str:
    """XPN to a DICOM person name (PS3.5 6.2.1.2): the legal name, its representations A, I, P joined by `=`."""
    names = [name for name in segment.repetitions(number) if name.text(7) in _LEGAL_NAME_TYPES]
    groups = {"A": "", "I": "", "P": ""}
    for name in names or list(segment.repetitions(number))[:1]:
        representation = name.text(8) if name.text(8) in groups else "A"
        parts = _join_name(name.text(1), name.text(2), name.text(3), name.text(5), name.text(4))
        groups[representation] = groups[representation] or parts
    return "=".join(groups.values()).rstrip("=")


def read_person(segment: Segment, number: int) -> str:
    """XCN to a DICOM person name, or the person's id where no name is stated."""
    person = segment.repetition(number)
    name = _join_name(person.text(2), person.text(3), person.text(4), person.text(6), person.text(5))
    return name or _name_part(person.text(1))


def read_code(segment: Segment, number: int, *, alternate: bool = False) -> Code | None:
    """The coding of a CE or CWE (or its alternate one); None where it has neither code nor text."""
    start = 4 if alternate else 1
    repetition = segment.repetition(number)
    value, meaning, scheme = (read_line(repetition.text(start + offset)) for offset in range(3))
    return Code(value, scheme or LOCAL_SCHEME, meaning) if value or meaning else None


def read_coded_texts(segment: Segment, number: int) -> tuple[str, ...]:
    """The words of each repetition of a CE: its text, else its code."""
    texts = (read_line(coded.text(2) or coded.text(5) or coded.text(1)) for coded in segment.repetitions(number))
    return tuple(dict.fromkeys(text for text in texts if text))


def read_uid(value: str, where: str, remarks: Remarks) -> str:
    """A DICOM UID; one that is none is a problem and gives an empty one."""
    uid = read_key(value, where, remarks)
    if not uid or (len(uid) <= _MAX_UID_LENGTH and _UID.fullmatch(uid)):
        return uid
    remarks.problem(f"{where} is no DICOM UID")
    return ""


def read_time(value: str, zone: tzinfo) -> datetime | None:
    """An aware time of an HL7 TS or DTM: with its own offset, else in `zone`; None if malformed or coarser than a
    day. Where only the day is stated it is its midnight."""
    match = _TIME.fullmatch(value.strip())
    if not match or not match[3] or not EARLIEST_YEAR <= int(match[1]) <= LATEST_YEAR:
        return None
    year, month, day, hour, minute, second = (int(part or 0) for part in match.groups()[:6])
    microsecond = int((match[7] or "").ljust(6, "0"))
    try:
        stated_zone = _read_offset(match[8]) if match[8] else zone
        return datetime(year, month, day, hour, minute, second, microsecond, tzinfo=stated_zone)
    except ValueError:
        return None


def _read_offset(text: str) -> timezone:
    offset = timedelta(hours=int(text[1:3]), minutes=int(text[3:]))
    return timezone(-offset if text[0] == "-" else offset)


def states_hour(value: str) -> bool:
    """Whether an HL7 time is precise enough to say what came first."""
    match = _TIME.fullmatch(value.strip())
    return match is not None and match[4] is not None


def read_first_time(values: Iterable[str], zone: tzinfo) -> datetime | None:
    """The first of several HL7 times that is precise to the hour or better, aware; None if none is."""
    times = (read_time(value, zone) for value in values if states_hour(value))
    return next((time for time in times if time), None)


def _read_birth_date(pid: Segment, remarks: Remarks) -> date | None:
    stated = pid.text(7).strip()
    match = _TIME.fullmatch(stated)
    try:
        if match and match[3] and int(match[1]) >= EARLIEST_YEAR:
            return date(int(match[1]), int(match[2]), int(match[3]))
    except ValueError:
        pass
    if stated:
        remarks.note("PID-7 (birth date) is not a full date")
    return None


def _read_sex(pid: Segment, remarks: Remarks) -> Sex:
    stated = pid.text(8).strip().upper()
    if stated not in _SEXES:
        remarks.note("PID-8 (sex) is not of table 0001")
    return _SEXES.get(stated, "")


def read_patient(pid: Segment, site: Site, remarks: Remarks) -> tuple[PatientIdentity, tuple[Identifier, ...]]:
    """The patient of a PID and all identifiers of its PID-3; an absent PID is a problem and an empty patient."""
    if not pid.fields[1:]:
        remarks.problem("there is no PID segment")
        return PatientIdentity(""), ()
    identifiers = read_identifiers(pid, 3, remarks)
    own = choose_patient_id(identifiers, "PID-3", remarks, site.patient_authority)
    name, birth_date, sex = read_person_name(pid, 5), _read_birth_date(pid, remarks), _read_sex(pid, remarks)
    return PatientIdentity(own.value, own.system, name, birth_date, sex), identifiers

"""Reads an ORU^R01 back with a splitter of its own: separators, escapes, segments, OBX groups by OBX-4."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from mappings.model.codes import Code
from mappings.model.findings import Assessment, Finding, Findings
from mappings.model.ids import derive_control_id
from mappings.model.measurement import Measurement
from mappings.outputs.read_changes import (
    STATUSES as CHANGE_STATUSES,
)
from mappings.outputs.read_changes import (
    Number,
    gone_sentences,
    interval_of,
    links_of,
    numbers_of,
    row_of,
)
from mappings.outputs.read_facts import Facts, Value, code_name, compare, exact, moment, prose, withheld
from mappings.outputs.read_oru_revision import check_former, expect_interpreter, is_deleted, read_interpreter

ORU = "oru.hl7"
MESSAGE = "message"
STUDY = "study"
NARRATIVE, IMPRESSION = "18782-3", "19005-8"
TRACKING_ID, STUDY_UID = "112039", "110180"
STATUSES = {
    "preliminary": ("P", "P"),
    "final": ("F", "F"),
    "amended": ("C", "C"),
    "corrected": ("C", "C"),
    "entered-in-error": ("C", "W"),
}
"""OBR-25 (table 0123) and OBX-11 (table 0085)."""
SCHEMES = {"IBSI": "99IBSI", "": "L"}
OWN = "99WETREAD"
PRIOR_VALUE = "value-at-prior"
_ESCAPE = re.compile(r"\\([^\\]*)\\")
_LETTERS = {"F": "|", "S": "^", "T": "&", "R": "~", "E": "\\", ".br": "\n"}


def _unescape(value: str) -> str:
    def replace(match: re.Match[str]) -> str:
        code = match[1]
        if code.startswith("X"):
            return bytes.fromhex(code[1:]).decode("utf-8", "replace")
        return _LETTERS.get(code, match[0])

    return _ESCAPE.sub(replace, value)


@dataclass(frozen=True)
class Segment:
    """One segment: its name and its raw fields, field n at index n."""

    name: str
    fields: tuple[str, ...]

    def raw(self, field: int) -> str:
        """The field as sent."""
        return self.fields[field] if field < len(self.fields) else ""

    def parts(self, field: int) -> list[str]:
        """The components of the field's first repetition, unescaped."""
        return [_unescape(part) for part in self.raw(field).split("~")[0].split("^")]

    def part(self, field: int, component: int = 1) -> str:
        """One component, counted from 1."""
        parts = self.parts(field)
        return parts[component - 1] if component <= len(parts) else ""


def read_segments(message: bytes) -> list[Segment]:
    """The message's segments; MSH-1 is put in its place so that numbers are the standard's."""
    segments = []
    for line in message.decode("utf-8").split("\r"):
        if line.strip():
            name, *fields = line.split("|")
            segments.append(Segment(name, (name, "|", *fields) if name == "MSH" else (name, *fields)))
    return segments


def check_oru(message: bytes, findings: Findings, report_text: str | None, former: bytes | None = None) -> list[str]:
    """Everything in which the message disagrees with the findings, its narrative with `report_text`, or with what
    `former`, the message that it replaces, had said."""
    segments = read_segments(message)
    found, expected = Facts(), Facts()
    _read_head(found, segments)
    _expect_head(expected, findings)
    everything = [s for s in segments if s.name == "OBX"]
    observations = [s for s in everything if not is_deleted(s.fields + ("",) * 12)]
    _read_common(found, observations, everything)
    _expect_common(expected, findings)
    for group in _groups(observations):
        _read_group(found, group)
    for finding in findings.findings:
        _expect_finding(expected, findings, finding)
    _expect_study(expected, findings)
    messages = compare(ORU, expected, found)
    narrative = _join(observations, NARRATIVE)
    if report_text is not None and prose(narrative) != prose(report_text):
        messages.append(f"{ORU}: {MESSAGE}: narrative: expected the words of report.txt, found others")
    return messages + check_former(message, findings, former)


def read_impression(message: bytes) -> str:
    """The impression's words, its lines joined."""
    rows = [s for s in read_segments(message) if s.name == "OBX"]
    return _join([s for s in rows if not is_deleted(s.fields + ("",) * 12)], IMPRESSION)


def _join(observations: Sequence[Segment], code: str) -> str:
    return "\n".join(_unescape(s.raw(5)) for s in observations if s.part(3) == code)


def _time(text: str) -> Value:
    try:
        return moment(datetime.strptime(text, "%Y%m%d%H%M%S%z"))
    except ValueError:
        return exact(text)


def _read_head(facts: Facts, segments: Sequence[Segment]) -> None:
    kinds = [s.name for s in segments]
    order = ["MSH", "PID", "PV1", "ORC", "OBR"]
    facts.add(MESSAGE, "segments before the OBX", " ".join(kinds[: len(order)]))
    facts.add(MESSAGE, "other segments", " ".join(k for k in kinds[len(order) :] if k != "OBX"))
    by_name = {s.name: s for s in reversed(segments)}
    empty = Segment("", ())
    msh, pid, orc, obr = (by_name.get(name, empty) for name in ("MSH", "PID", "ORC", "OBR"))
    facts.add(MESSAGE, "MSH-7", _time(msh.raw(7)))
    for field in (9, 10, 12, 18):
        facts.add(MESSAGE, f"MSH-{field}", msh.raw(field))
    issuer = [_unescape(part) for part in (pid.raw(3).split("^") + [""] * 4)[3].split("&")]
    facts.add(MESSAGE, "PID-3", withheld(pid.part(3)))
    facts.add(MESSAGE, "PID-3 authority", withheld(next((part for part in issuer if part), "")))
    facts.add(MESSAGE, "PID-5", withheld(_person(pid)))
    facts.add(MESSAGE, "PID-7", withheld(pid.raw(7)))
    facts.add(MESSAGE, "PID-8", withheld(pid.raw(8)))
    facts.add(MESSAGE, "ORC-1", orc.raw(1))
    for segment, fields in ((orc, (2, 3)), (obr, (2, 3, 18))):
        for field in fields:
            facts.add(MESSAGE, f"{segment.name}-{field}", withheld(segment.part(field)))
    facts.add(MESSAGE, "OBR-4", _code(obr, 4))
    facts.add(MESSAGE, "OBR-22", _time(obr.raw(22)))
    read_interpreter(facts, MESSAGE, obr.raw(32), _unescape)
    for field in (7, 24, 25):
        facts.add(MESSAGE, f"OBR-{field}", obr.raw(field))


def _person(pid: Segment) -> str:
    """Family, given, middle, prefix, suffix of each representation, as DICOM orders them."""
    people = []
    for repetition in pid.raw(5).split("~"):
        parts = ([_unescape(part) for part in repetition.split("^")] + [""] * 5)[:5]
        people.append("^".join((*parts[:3], parts[4], parts[3])).rstrip("^"))
    return "=".join(people)


def _expect_person(name: str) -> str:
    groups = [[part.strip(" ") for part in group.split("^")[:5]] for group in name.split("=")[:3]]
    return "=".join("^".join(parts).rstrip("^") for parts in groups if any(parts))


def _expect_head(facts: Facts, findings: Findings) -> None:
    order, patient = findings.context.order, findings.patient
    code = findings.procedure or Code("18748-4", "LN", "Diagnostic imaging study")
    facts.add(MESSAGE, "segments before the OBX", "MSH PID PV1 ORC OBR")
    facts.add(MESSAGE, "other segments", "")
    facts.add(MESSAGE, "MSH-7", moment(findings.created_at))
    facts.add(MESSAGE, "MSH-9", "ORU^R01^ORU_R01")
    facts.add(MESSAGE, "MSH-10", derive_control_id(findings.job_id, findings.revision, "oru"))
    facts.add(MESSAGE, "MSH-12", "2.5.1")
    facts.add(MESSAGE, "MSH-18", "UNICODE UTF-8")
    facts.add(MESSAGE, "PID-3", withheld(patient.patient_id))
    facts.add(MESSAGE, "PID-3 authority", withheld(patient.issuer))
    facts.add(MESSAGE, "PID-5", withheld(_expect_person(patient.name)))
    facts.add(MESSAGE, "PID-7", withheld(f"{patient.birth_date:%Y%m%d}" if patient.birth_date else ""))
    facts.add(MESSAGE, "PID-8", withheld(patient.sex))
    facts.add(MESSAGE, "ORC-1", "RE")
    for name in ("ORC", "OBR"):
        facts.add(MESSAGE, f"{name}-2", withheld(order.placer_order_number if order else ""))
        facts.add(MESSAGE, f"{name}-3", withheld(order.filler_order_number if order else ""))
    facts.add(MESSAGE, "OBR-18", withheld(findings.accession_number))
    facts.add(MESSAGE, "OBR-4", _name(order.code if order and order.code else code))
    facts.add(MESSAGE, "OBR-22", moment(findings.created_at))
    facts.add(MESSAGE, "OBR-7", f"{findings.study_date:%Y%m%d}" if findings.study_date else "")
    facts.add(MESSAGE, "OBR-24", "RAD")
    expect_interpreter(facts, MESSAGE, findings)
    facts.add(MESSAGE, "OBR-25", STATUSES[findings.status][0])


def _read_common(facts: Facts, observations: Sequence[Segment], everything: Sequence[Segment]) -> None:
    """What every OBX that gives a value must share, and the numbering of all."""
    for segment in observations:
        facts.add_once(MESSAGE, "OBX-11", segment.raw(11))
        if not _is_prior_value(segment):
            facts.add_once(MESSAGE, "OBX-14", segment.raw(14))
        facts.add_once(MESSAGE, "OBX-18", prose(" ".join(segment.parts(18))))
        facts.add_once(MESSAGE, "OBX-19", _time(segment.raw(19)))
    numbers = [segment.raw(1) for segment in everything]
    numbered = numbers == [str(n) for n in range(1, len(numbers) + 1)]
    facts.add(MESSAGE, "OBX-1", "counts from 1" if numbered else "does not count from 1 without gaps")
    sub_ids = [segment.raw(4) for segment in everything]
    facts.add(MESSAGE, "OBX-4", "distinct" if len({*sub_ids}) == len(sub_ids) else "repeated")


def _is_prior_value(segment: Segment) -> bool:
    """Whether it is a value of the prior study, observed then."""
    return segment.part(17) == PRIOR_VALUE


def _expect_common(facts: Facts, findings: Findings) -> None:
    facts.add(MESSAGE, "OBX-11", STATUSES[findings.status][1])
    facts.add(MESSAGE, "OBX-14", f"{findings.study_date:%Y%m%d}" if findings.study_date else "")
    facts.add(MESSAGE, "OBX-18", prose(f"{findings.model.name} {findings.model.version}"))
    facts.add(MESSAGE, "OBX-19", moment(findings.created_at))
    facts.add(MESSAGE, "OBX-1", "counts from 1")
    facts.add(MESSAGE, "OBX-4", "distinct")


def _groups(observations: Sequence[Segment]) -> Iterator[list[Segment]]:
    """OBX with the same number before the dot of OBX-4, less the narratives."""
    groups: dict[str, list[Segment]] = {}
    for segment in observations:
        if segment.part(3) not in (NARRATIVE, IMPRESSION):
            groups.setdefault(segment.raw(4).partition(".")[0], []).append(segment)
    yield from groups.values()


def _read_group(facts: Facts, group: Sequence[Segment]) -> None:
    named = [s.part(5) for s in group if s.part(3) == TRACKING_ID]
    whole = any(s.part(3) == STUDY_UID for s in group)
    where = named[0] if named else STUDY if whole else f"OBX group {group[0].raw(4).partition('.')[0]}"
    for segment in group:
        facts.add(where, _what(segment), _value(segment))
        if segment.raw(2) == "NM":
            facts.add(where, f"{_what(segment)}: label", prose(segment.part(3, 5) or segment.part(3, 2)))
        if _is_prior_value(segment):
            facts.add(where, f"{_what(segment)}: observed", segment.raw(14))


def _what(segment: Segment) -> str:
    """The key in Wetread's own scheme where stated, else the code's words."""
    parts = segment.parts(3) + [""] * 6
    own = parts[0] if parts[2] == OWN else parts[3] if parts[5] == OWN else ""
    return own or code_name(parts[2], parts[0], parts[1])


def _value(segment: Segment) -> Value:
    """Type, the coded question, value, unit, flag and method, as far as stated."""
    kind = segment.raw(2)
    value = _code(segment, 5) if kind == "CWE" else _unescape(segment.raw(5))
    unit = f" {segment.part(6)} ({segment.part(6, 3)})" if segment.raw(6) else ""
    flag = f", flag {segment.raw(8)}" if segment.raw(8) else ""
    question = segment.parts(3) + [""] * 3
    asked = "" if question[2] == OWN else f", {code_name(question[2], question[0], question[1])}"
    methods = [r.split("^") for r in segment.raw(17).split("~") if r]
    made = [_method([_unescape(part) for part in m]) for m in methods]
    return prose(", ".join([f"{kind} {value}{unit}{flag}{asked}", *made]))


def _method(parts: list[str]) -> str:
    return code_name(parts[2], parts[0], parts[1]) if len(parts) > 2 else " ".join(p for p in parts if p)


def _code(segment: Segment, field: int) -> str:
    """A CE or CWE in words, its alternate included."""
    parts = segment.parts(field) + [""] * 6
    alternate = f" = {parts[3]}" if parts[5] == OWN else ""
    return code_name(parts[2], parts[0], parts[1]) + alternate


def _name(code: Code) -> str:
    return code_name(SCHEMES.get(code.scheme, code.scheme), code.value, code.meaning)


def _expect(kind: str, value: str, question: Code | None = None, *details: str) -> Value:
    asked = f", {_name(question)}" if question else ""
    return prose(", ".join([f"{kind} {value}{asked}", *details]))


def _expect_finding(facts: Facts, findings: Findings, finding: Finding) -> None:
    where = finding.tracking_id
    found, tracked = Code("121071", "DCM", "Finding"), Code("112039", "DCM", "Tracking Identifier")
    unique = Code("112040", "DCM", "Tracking Unique Identifier")
    site, side = Code("363698007", "SCT", "Finding Site"), Code("272741003", "SCT", "Laterality")
    facts.add(where, _name(found), _expect("CWE", _name(finding.kind), found))
    facts.add(where, _name(tracked), _expect("ST", finding.tracking_id, tracked))
    facts.add(where, _name(unique), _expect("ST", finding.tracking_uid, unique))
    places = (("site", site, finding.site), ("side", side, finding.laterality), ("zone", site, finding.zone))
    for key, question, code in (*places, ("sector", site, finding.sector)):
        if code is not None:
            facts.add(where, key, _expect("CWE", _name(code), question))
    if finding.level:
        facts.add(where, "level", _expect("ST", finding.level))
    for m in finding.measurements:
        facts.add(where, m.key, _expect_number(m))
        facts.add(where, f"{m.key}: label", prose(m.label))
    for assessment in finding.assessments:
        _expect_assessment(facts, where, assessment)
    _expect_change(facts, findings, finding)


def _expect_change(facts: Facts, findings: Findings, finding: Finding) -> None:
    """The numbers of the comparison, and what the lesion was in the prior."""
    where, row = finding.tracking_id, row_of(findings, finding)
    for number in numbers_of(findings, finding):
        _expect_change_number(facts, where, number)
    if row is None:
        return
    facts.add(where, "change_status", _expect("CWE", _name(CHANGE_STATUSES[row.status])))
    for concept, uid in links_of(row):
        facts.add(where, concept.value, _expect("ST", uid))
    for note in row.notes:
        facts.add(where, "change_note", _expect("TX", note))


def _expect_change_number(facts: Facts, where: str, number: Number) -> None:
    made = [_name(number.how)] if number.how else []
    value = _expect("NM", f"{number.text} {number.unit.value} ({number.unit.scheme})", None, *made)
    facts.add(where, number.key, value)
    facts.add(where, f"{number.key}: label", prose(number.label))
    if number.day is not None:
        facts.add(where, f"{number.key}: observed", f"{number.day:%Y%m%d}")


def _expect_prior(facts: Facts, findings: Findings) -> None:
    """The study that was compared, and what only it has."""
    done = findings.comparison
    if done is None:
        return
    facts.add(STUDY, "prior_study_uid", _expect("ST", done.prior_study_instance_uid))
    facts.add(STUDY, "prior_study_date", _expect("DT", f"{done.prior_study_date:%Y%m%d}"))
    for number in interval_of(findings):
        _expect_change_number(facts, STUDY, number)
    for sentence, uid in gone_sentences(findings):
        facts.add(STUDY, "gone", _expect("TX", sentence))
        facts.add(STUDY, "prior_gone_uid", _expect("ST", uid))
    for note in done.notes:
        facts.add(STUDY, "change_note", _expect("TX", note))


def _expect_number(m: Measurement) -> Value:
    made = [_name(code) for code in (m.method, m.derivation) if code is not None]
    return _expect("NM", f"{m.text} {m.unit.value} ({m.unit.scheme})", m.concept, *made)


def _expect_assessment(facts: Facts, where: str, assessment: Assessment) -> None:
    key, rule = assessment.key, assessment.rule
    flag = ", flag A" if rule.startswith("pirads") and assessment.score in ("4", "5") else ""
    value = f"{_name(assessment.value)} = {assessment.score}{flag}"
    facts.add(where, key, _expect("CWE", value, assessment.concept, rule))
    for given in assessment.inputs:
        kind, said = ("CWE", _name(given.code)) if given.code else ("ST", given.value)
        facts.add(where, f"{key}.{given.name}", _expect(kind, said, given.concept, rule))
    facts.add(where, f"{key}.derivation", _expect("TX", assessment.explanation, None, rule))


def _expect_study(facts: Facts, findings: Findings) -> None:
    uid = Code("110180", "DCM", "Study Instance UID")
    facts.add(STUDY, _name(uid), _expect("ST", findings.study_instance_uid, uid))
    for assessment in findings.assessments:
        _expect_assessment(facts, STUDY, assessment)
    _expect_prior(facts, findings)

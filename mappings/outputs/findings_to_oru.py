"""The findings as one HL7 v2.5.1 ORU^R01^ORU_R01 message.

Source: HL7 v2.5.1 chapters 2 (control), 3 (PID, PV1), 4 (ORC, OBR) and 7 (OBX, ORU); ../shared/STANDARDS.md.
Numbers of the order that it does not state stay empty; nothing is taken from the images in their place.
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from datetime import timedelta, timezone

from mappings.model.codes import Code
from mappings.model.findings import Assessment, AssessmentInput, Finding, Findings, Status
from mappings.model.ids import derive_control_id
from mappings.model.study import PatientIdentity
from mappings.outputs.comparison_to_oru import write_finding_change, write_study_change
from mappings.outputs.er7 import (
    LINE_BREAK,
    Component,
    Field,
    Repetition,
    Verbatim,
    format_date,
    format_time,
    text_value,
    write_message,
    write_segment,
)
from mappings.outputs.impression import findings_to_impression
from mappings.outputs.oru_observation import Common, clip, coded, methods, write_obx
from mappings.outputs.oru_sub_ids import Group, Sent, number_observations, read_sent, write_deletions

IMAGING_STUDY = Code("18748-4", "LN", "Diagnostic imaging study")
STUDY_OBSERVATION = Code("18782-3", "LN", "Radiology Study observation (narrative)")
IMPRESSION = Code("19005-8", "LN", "Radiology Imaging study [Impression] (narrative)")
STUDY_UID = Code("110180", "DCM", "Study Instance UID")
TRACKING_ID = Code("112039", "DCM", "Tracking Identifier")
TRACKING_UID = Code("112040", "DCM", "Tracking Unique Identifier")
FINDING = Code("121071", "DCM", "Finding")
FINDING_SITE = Code("363698007", "SCT", "Finding Site")
LATERALITY = Code("272741003", "SCT", "Laterality")

RESULT_STATUS: dict[Status, tuple[str, str]] = {
    "preliminary": ("P", "P"),
    "final": ("F", "F"),
    "amended": ("C", "C"),
    "corrected": ("C", "C"),
    "entered-in-error": ("C", "W"),
}
"""OBR-25 (table 0123, which has no "wrong") and OBX-11 (table 0085) of each status."""

PERSON_NAME_PARTS = 5
"""Components of a DICOM person name: family, given, middle, prefix, suffix."""

LINE_LENGTH = 80
"""Characters of one narrative line; many RIS screens cut off what is longer."""

_OID = re.compile(r"[0-2](\.(0|[1-9]\d*))+")


def _abnormal_flag(assessment: Assessment) -> str:
    """`A` (table 0078) for PI-RADS 4 and 5, likely and highly likely cancer; other rules set none here."""
    return "A" if assessment.rule.startswith("pirads") and assessment.score in {"4", "5"} else ""


def _write_input(common: Common, assessment: Assessment, given: AssessmentInput) -> list[Field]:
    key = f"{assessment.key}.{given.name}"
    name = coded(given.concept, (key, given.name)) if given.concept else (key, given.name, "99WETREAD")
    rule: Field = ("", assessment.rule)
    if given.code:
        return write_obx(common, "CWE", name, coded(given.code), method=rule)
    return write_obx(common, "ST", name, clip(given.value), method=rule)


def _write_assessment(common: Common, assessment: Assessment) -> Iterator[list[Field]]:
    """The category, what the rule looked at, and how it got there."""
    named = coded(assessment.concept, (assessment.key, assessment.label))
    rule: Field = ("", assessment.rule)
    value = coded(assessment.value, (assessment.score, f"{assessment.label} {assessment.score}"))
    yield write_obx(common, "CWE", named, value, flag=_abnormal_flag(assessment), method=rule)
    for given in assessment.inputs:
        yield _write_input(common, assessment, given)
    derivation = (f"{assessment.key}.derivation", f"{assessment.label}: derivation", "99WETREAD")
    yield write_obx(common, "TX", derivation, text_value(assessment.explanation), method=rule)


def _write_place(common: Common, finding: Finding) -> Iterator[list[Field]]:
    places = (
        (FINDING_SITE, "site", "Finding site", finding.site),
        (LATERALITY, "side", "Side", finding.laterality),
        (FINDING_SITE, "zone", "Zone", finding.zone),
        (FINDING_SITE, "sector", "Sector", finding.sector),
    )
    for concept, key, label, code in places:
        if code is not None:
            yield write_obx(common, "CWE", coded(concept, (key, label)), coded(code))
    if finding.level:
        yield write_obx(common, "ST", ("level", "Level", "99WETREAD"), finding.level)


def _write_finding(common: Common, findings: Findings, finding: Finding) -> Iterator[list[Field]]:
    """What it is and where, each measurement, each assessment, what changed since the prior."""
    yield write_obx(common, "CWE", coded(FINDING), coded(finding.kind))
    yield write_obx(common, "ST", coded(TRACKING_ID), finding.tracking_id)
    yield write_obx(common, "ST", coded(TRACKING_UID), finding.tracking_uid)
    yield from _write_place(common, finding)
    for m in finding.measurements:
        yield write_obx(common, "NM", coded(m.concept, (m.key, m.label)), m.text, unit=m.unit, method=methods(m))
    for assessment in finding.assessments:
        yield from _write_assessment(common, assessment)
    yield from write_finding_change(common, findings, finding)


def _write_study(common: Common, findings: Findings) -> Iterator[list[Field]]:
    yield write_obx(common, "ST", coded(STUDY_UID), findings.study_instance_uid)
    for assessment in findings.assessments:
        yield from _write_assessment(common, assessment)
    yield from write_study_change(common, findings)


def _break_line(line: str) -> list[str]:
    """A line as lines of at most LINE_LENGTH characters; the indentation stays on the first."""
    if len(line) <= LINE_LENGTH:
        return [line.rstrip()]
    return textwrap.wrap(line, LINE_LENGTH) or [""]


def _narrative_values(text: str) -> list[Verbatim]:
    """One TX value a line. An empty line has no value of its own (OBX-5 must be valued): it is a line break
    at the end of the line before it."""
    values: list[Verbatim] = []
    lines = text.replace("\r\n", "\n").replace("\r", "\n").strip("\n").split("\n")
    for line in (part for whole in lines for part in _break_line(whole)):
        if line:
            values.append(text_value(line))
        elif values:
            values[-1] = Verbatim(values[-1] + LINE_BREAK)
    return values


def _write_narrative(common: Common, code: Code, text: str) -> Iterator[list[Field]]:
    for value in _narrative_values(text):
        yield write_obx(common, "TX", coded(code), value)


def _write_observations(common: Common, findings: Findings, text: str, sent: Sequence[Sent]) -> Iterator[str]:
    """Every OBX. OBX-4 is `group.item`: groups 1..n are the findings in their order, then the study, the
    report text and the impression; a revision keeps the numbers of what was sent before."""
    groups: list[Group] = [
        *((finding.tracking_uid, [*_write_finding(common, findings, finding)]) for finding in findings.findings),
        (STUDY_UID.value, [*_write_study(common, findings)]),
        (STUDY_OBSERVATION.value, [*_write_narrative(common, STUDY_OBSERVATION, text)]),
        (IMPRESSION.value, [*_write_narrative(common, IMPRESSION, "\n".join(findings_to_impression(findings)))]),
    ]
    rows = [*number_observations(groups, sent)]
    kept = {str(fields[2]) for fields in rows}
    for set_id, fields in enumerate([*rows, *write_deletions(common, sent, kept)], 1):
        yield write_segment("OBX", [str(set_id), *fields])


def _hierarchic(authority: str) -> Component:
    """HD of an issuer: an OID as universal id, anything else as namespace."""
    return ("", authority, "ISO") if _OID.fullmatch(authority) else authority


def _person_name(name: str) -> Field:
    """XPN repetitions of a DICOM person name (PS3.5 6.2.1.2): one a representation, prefix and suffix
    change places, PN's `^` and `=` are structure. An empty name is typed U, unspecified (table 0200)."""
    names: list[Repetition] = []
    for representation, group in zip("AIP", name.split("=", 2), strict=False):
        if group.strip("^ "):
            parts = (group.split("^") + [""] * PERSON_NAME_PARTS)[:PERSON_NAME_PARTS]
            family, given, middle, prefix, suffix = (part.strip(" ") for part in parts)
            names.append((family, given, middle, suffix, prefix, "", "L", representation))
    return names or ("", "", "", "", "", "", "U")


def _write_pid(patient: PatientIdentity) -> str:
    identifier: Repetition = (patient.patient_id, "", "", _hierarchic(patient.issuer), "MR")
    birth, name = format_date(patient.birth_date), _person_name(patient.name)
    return write_segment("PID", ["1", "", [identifier], "", name, "", birth, patient.sex])


def _order_code(findings: Findings, procedure: Code) -> tuple[str, ...]:
    order = findings.context.order
    return coded(order.code if order and order.code else procedure)


def _write_obr(findings: Findings, procedure: Code, reported: str) -> str:
    order = findings.context.order
    fields: list[Field] = [""] * 32
    numbered: dict[int, Field] = {
        1: "1",
        2: order.placer_order_number if order else "",
        3: order.filler_order_number if order else "",
        4: _order_code(findings, procedure),
        7: format_date(findings.study_date),
        18: findings.accession_number,
        22: reported,
        24: "RAD",
        25: RESULT_STATUS[findings.status][0],
        31: ("", clip(order.reason)) if order and order.reason else "",
        32: _write_interpreter(findings),
    }
    for number, value in numbered.items():
        fields[number - 1] = value
    return write_segment("OBR", fields)


def _write_interpreter(findings: Findings) -> Field:
    """OBR-32 (NDL): the person who signed; empty where nobody did."""
    signed = findings.signature
    if signed is None:
        return ""
    group = next(group for group in signed.person.split("=") if group.strip("^ "))
    parts = (group.split("^") + [""] * PERSON_NAME_PARTS)[:PERSON_NAME_PARTS]
    family, given, middle, prefix, suffix = (part.strip(" ") for part in parts)
    return ((signed.identifier, family, given, middle, suffix, prefix),)


def findings_to_oru(
    findings: Findings,
    *,
    text: str,
    sending_application: str = "WETREAD",
    sending_facility: str = "",
    receiving_application: str = "",
    receiving_facility: str = "",
    processing_id: str = "P",
    utc_offset: timedelta | None = None,
    procedure: Code = IMAGING_STUDY,
    former: bytes | None = None,
) -> bytes:
    """The whole message, UTF-8, segments ended by CR, without MLLP framing.

    `text` is the report draft. `procedure` codes OBR-4 where the order states no code. Times are the
    findings' `created_at`, moved to `utc_offset` where given; the study's is a date, as the findings have
    no time of it. `former` is the message of the revision that this one replaces: its observations keep OBX-4, and
    those that are gone are deleted (OBX-11 D). MSH-10 derives from job and revision, so the same result always
    carries the same id.
    """
    created = findings.created_at
    made = format_time(created.astimezone(timezone(utc_offset)) if utc_offset is not None else created)
    order = findings.context.order
    numbers = [order.placer_order_number, order.filler_order_number] if order else []
    control_id = derive_control_id(findings.job_id, findings.revision, "oru")
    model = (findings.model.name, findings.model.version)
    status = RESULT_STATUS[findings.status][1]
    common = Common(status, format_date(findings.study_date), made, model)
    parties: list[Field] = [sending_application, sending_facility, receiving_application, receiving_facility]
    kind: list[Field] = [("ORU", "R01", "ORU_R01"), control_id, processing_id, "2.5.1"]
    return write_message(
        [
            write_segment("MSH", [*parties, made, "", *kind, "", "", "", "", "", "UNICODE UTF-8"]),
            _write_pid(findings.patient),
            write_segment("PV1", ["1", "U"]),
            write_segment("ORC", ["RE", *numbers]),
            _write_obr(findings, procedure, made),
            *_write_observations(common, findings, text, read_sent(former)),
        ]
    )

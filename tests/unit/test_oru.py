"""The ORU: ER7 escaping, structure by two parsers that did not write it, and hostile input."""

import dataclasses
from datetime import timedelta
from typing import Any

import hl7  # type: ignore[import-untyped]
import pytest
from hl7apy.consts import VALIDATION_LEVEL  # type: ignore[import-untyped]
from hl7apy.core import Message  # type: ignore[import-untyped]
from hl7apy.parser import parse_message  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from mappings.model import codes
from mappings.model.context import ClinicalContext, ContextOrder
from mappings.model.findings import Blank, Findings
from mappings.model.study import PatientIdentity
from mappings.outputs.er7 import escape, text_value, write_field, write_segment
from mappings.outputs.findings_to_oru import LINE_LENGTH, findings_to_oru
from tests.builders import build_context, build_findings, build_gland

ORDER = ContextOrder("ServiceRequest/s1", "ACC-1", "PLAC-1", "FILL-1", patient_reference="Patient/p1")
TEXT = "FINDINGS\n\nProstate 50.0 mL | ADC ~ 812 ^ um2/s\n" + "word " * 60


def render(findings: Findings | None = None, **options: Any) -> str:
    return findings_to_oru(findings or build_findings(), text=TEXT, **options).decode()


def segments(message: str, name: str) -> list[list[str]]:
    return [line.split("|") for line in message.split("\r") if line.startswith(name + "|")]


def judge(message: str) -> Message:
    """hl7apy's own strict validation at 2.5.1: segments, groups, cardinality, datatypes."""
    parsed = parse_message(message, validation_level=VALIDATION_LEVEL.STRICT, find_groups=True)
    assert parsed.validate()
    return parsed


def unescape(value: str) -> str:
    for code, character in (("\\F\\", "|"), ("\\S\\", "^"), ("\\T\\", "&"), ("\\R\\", "~"), ("\\E\\", "\\")):
        value = value.replace(code, character)
    return value


def test_separators_and_controls_are_escaped() -> None:
    assert escape("a|b^c&d~e\\f") == "a\\F\\b\\S\\c\\T\\d\\R\\e\\E\\f"
    assert escape("a\r\nb\x00\x7f\x85") == "a\\X0D\\\\X0A\\b\\X00\\\\X7F\\\\XC285\\"
    assert text_value("a\r\nb\rc\nd|") == "a\\.br\\b\\.br\\c\\.br\\d\\F\\"


def test_components_repetitions_and_trailing_empties() -> None:
    assert write_field([("a", "", ("x", "y&")), "b"]) == "a^^x&y\\T\\~b"
    assert write_segment("PV1", ["1", "", ("", ""), [""]]) == "PV1|1"
    assert write_segment("MSH", ["A|"]) == "MSH|^~\\&|A\\F\\"


@given(st.text())
def test_no_value_ever_breaks_out_of_its_field(value: str) -> None:
    for written in (escape(value), str(text_value(value))):
        assert not set(written) & set("|^&~\r\n\x0b\x1c")


def test_hl7apy_validates_the_structure_strictly() -> None:
    parsed = judge(render(sending_facility="HOSPITAL", receiving_application="RIS"))
    result = parsed.oru_r01_patient_result
    assert result.oru_r01_patient.pid.pid_3.pid_3_1.value == "TEST-001"
    order = result.oru_r01_order_observation
    assert order.orc.orc_2.value == "PLAC-1"
    assert len(order.oru_r01_observation) == len(segments(render(), "OBX"))


def test_strict_judge_notices_a_broken_message() -> None:
    broken = render().replace("\rORC|RE", "\rORC|")
    with pytest.raises(Exception, match="ORC"):
        judge(broken)


def test_python_hl7_reads_header_order_and_times() -> None:
    parsed = hl7.parse(render(utc_offset=timedelta(hours=1), processing_id="T"))
    msh, obr = parsed.segment("MSH"), parsed.segment("OBR")
    assert str(msh[9]) == "ORU^R01^ORU_R01"
    assert str(msh[7]) == "20260304113000+0100"
    assert (str(msh[11]), str(msh[12]), str(msh[18])) == ("T", "2.5.1", "UNICODE UTF-8")
    assert 0 < len(str(msh[10])) <= 20
    assert [str(obr[n]) for n in (2, 3, 7, 18, 24, 25)] == ["PLAC-1", "FILL-1", "20260304", "ACC-1", "RAD", "P"]
    assert str(obr[4]).endswith("^MR Prostate^LN")


def test_measurements_are_nm_with_ucum_and_assessments_cwe() -> None:
    obx = segments(render(), "OBX")
    density = next(o for o in obx if o[3].startswith("15325-4^"))
    assert (density[2], density[5], density[6].split("^")[::2]) == ("NM", "0.26", ["ng/mL/mL", "UCUM"])
    category = next(o for o in obx if o[3].startswith("130560^") and o[4].startswith("2."))
    assert category[2] == "CWE"
    assert category[5].startswith("RID50299^PI-RADS 4 - High (lesion)^RADLEX^4^")
    assert category[8] == "A"
    side = next(o for o in obx if o[4].startswith("3.") and o[3].startswith("272741003^"))
    assert side[5] == "7771000^Left^SCT"
    p10 = next(o for o in obx if "^adc_p10^" in o[3])
    assert (p10[5], p10[17].split("^")[0]) == ("640", "371890005")
    assert {o[18] for o in obx} == {"prostate_reference^1"}


def test_sub_ids_group_each_finding_and_are_unique() -> None:
    obx = segments(render(), "OBX")
    assert [int(o[1]) for o in obx] == list(range(1, len(obx) + 1))
    assert len({o[4] for o in obx}) == len(obx)
    tracking = {o[4].split(".")[0]: o[5] for o in obx if o[3].startswith("112039^")}
    assert tracking == {"1": "gland", "2": "lesion-1", "3": "lesion-2"}


def test_narrative_carries_every_line_wrapped() -> None:
    lines = [o[5] for o in segments(render(), "OBX") if o[3].startswith("18782-3^")]
    assert lines[0] == "FINDINGS\\.br\\"
    assert unescape(lines[1]) == "Prostate 50.0 mL | ADC ~ 812 ^ um2/s"
    assert max(map(len, map(unescape, lines[1:]))) <= LINE_LENGTH
    assert " ".join(lines[2:]).split() == ["word"] * 60
    impression = [o[5] for o in segments(render(), "OBX") if o[3].startswith("19005-8^")]
    assert impression[0].startswith("AI-PROPOSED, UNVERIFIED, PRELIMINARY")
    assert "PI-RADS v2.1 overall category: 4." in impression


@pytest.mark.parametrize(
    ("status", "order_status", "result_status"),
    [
        ("preliminary", "P", "P"),
        ("final", "F", "F"),
        ("amended", "C", "C"),
        ("corrected", "C", "C"),
        ("entered-in-error", "C", "W"),
    ],
)
def test_status_maps_to_obr_and_obx(status: str, order_status: str, result_status: str) -> None:
    message = render(build_findings(status=status))
    assert segments(message, "OBR")[0][25] == order_status
    assert {o[11] for o in segments(message, "OBX")} == {result_status}


def test_same_result_same_bytes_new_revision_new_control_id() -> None:
    findings = build_findings()
    assert render(findings) == render(findings)
    revised = render(dataclasses.replace(findings, revision=2))
    assert segments(revised, "MSH")[0][9] != segments(render(findings), "MSH")[0][9]


def test_without_order_or_context_nothing_is_guessed() -> None:
    for context in (build_context(order=None), ClinicalContext(source="none")):
        message = render(build_findings(context=context, accession_number="", study_date=None))
        obr = segments(message, "OBR")[0]
        assert [obr[n] for n in (2, 3, 7, 18)] == ["", "", "", ""]
        assert obr[4] == "18748-4^Diagnostic imaging study^LN"
        assert segments(message, "ORC") == [["ORC", "RE"]]
        judge(message)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("Müller^Jörg^Paul^Dr^Jr", "Müller^Jörg^Paul^Jr^Dr^^L^A"),
        ("O|Neil~&\\^Ann\rPID|2", "O\\F\\Neil\\R\\\\T\\\\E\\^Ann\\X0D\\PID\\F\\2^^^^^L^A"),
        ("Yamada^Tarou=山田^太郎=やまだ^たろう", "Yamada^Tarou^^^^^L^A~山田^太郎^^^^^L^I~やまだ^たろう^^^^^L^P"),
        ("", "^^^^^^U"),
        ("<script>alert(1)</script>^{{7*7}}", "<script>alert(1)</script>^{{7*7}}^^^^^L^A"),
    ],
)
def test_names_stay_inside_pid_5_in_both_parsers(name: str, field: str) -> None:
    message = render(build_findings(patient=PatientIdentity("P|1", "1.2.3", name, None, "M")))
    assert segments(message, "PID") == [["PID", "1", "", "P\\F\\1^^^&1.2.3&ISO^MR", "", field, "", "", "M"]]
    judge(message)
    assert str(hl7.parse(message).segment("PID")[8]) == "M"


def test_a_very_long_name_is_sent_whole_though_longer_than_the_standard_allows() -> None:
    name = "X" * 10_000
    message = render(build_findings(patient=PatientIdentity("P1", "", name, None, "M")))
    assert segments(message, "PID")[0][5] == f"{name}^^^^^^L^A"
    parsed = parse_message(message, validation_level=VALIDATION_LEVEL.TOLERANT, find_groups=True)
    assert parsed.oru_r01_patient_result.oru_r01_patient.pid.pid_8.value == "M"


def test_a_long_reason_is_cut_to_the_length_of_st() -> None:
    order = dataclasses.replace(ORDER, reason="why " * 200)
    message = render(build_findings(context=build_context(order=order)))
    reason = segments(message, "OBR")[0][31].removeprefix("^")
    assert len(reason) == 199
    assert reason.endswith("...")
    judge(message)


def test_no_lesions_and_all_blank_is_a_valid_message() -> None:
    blanks = tuple(Blank(name, "reason | with ^ marks") for name in ("PSA", "DCE", "ADC"))
    bare = dataclasses.replace(build_gland(None), measurements=(), evidence=())
    message = render(build_findings(lesions=(), findings=(bare,), blanks=blanks, psa=None))
    judge(message)
    impression = [unescape(o[5]) for o in segments(message, "OBX") if o[3].startswith("19005-8^")]
    assert "No lesion was proposed by the model." in impression
    assert "Left blank: ADC (reason | with ^ marks)." in impression
    assert not [o for o in segments(message, "OBX") if o[2] == "NM"]


def test_local_order_code_is_l_in_table_0396() -> None:
    order = dataclasses.replace(ORDER, code=codes.Code("MRPRO", "", "MR prostate, local"))
    message = render(build_findings(context=build_context(order=order)))
    assert segments(message, "OBR")[0][4] == "MRPRO^MR prostate, local^L"

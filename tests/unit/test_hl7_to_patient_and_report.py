"""ADT and ORU messages to events: patients, merges, reports."""

from datetime import UTC, date, datetime

import pytest

from mappings.inputs.er7_to_message import read_message
from mappings.inputs.hl7_to_event import message_to_events
from mappings.model.codes import Code
from mappings.model.context import Identifier
from mappings.model.events import PatientEvent, ReportEvent, UnhandledEvent
from mappings.model.study import PatientIdentity
from mappings.outputs.findings_to_oru import findings_to_oru
from tests.builders import build_findings
from tests.hl7_messages import BERLIN, PID, UID, tell_events, write_obr


@pytest.mark.parametrize(("trigger", "kind"), [("A01", "register"), ("A04", "register"), ("A08", "update")])
def test_patients(trigger: str, kind: str) -> None:
    (event,) = tell_events(f"ADT^{trigger}^ADT_A01", "EVN||20260102080000", PID, "PV1|1|O")
    assert event == PatientEvent(
        kind=kind,  # type: ignore[arg-type]
        patient=PatientIdentity("4711", "HOSP", "Doe^Jane^Q^Dr^Jr", date(1961, 2, 3), "F"),
        patient_identifiers=(Identifier("4711", "HOSP", "MR"),),
        occurred_at=datetime(2026, 1, 2, 8, tzinfo=BERLIN),
    )
    (two,) = tell_events(f"ADT^{trigger}", PID, PID)
    assert isinstance(two, PatientEvent)
    assert two.problems == ("the message has more than one PID segment",)


def merges(*segments: str) -> list[PatientEvent]:
    found = tell_events("ADT^A40^ADT_A39", "EVN||20260102080000", *segments)
    assert all(isinstance(event, PatientEvent) and event.kind == "merge" for event in found)
    return [event for event in found if isinstance(event, PatientEvent)]


def test_merges() -> None:
    one, two = merges(PID, "PD1|1", "MRG|815^^^HOSP^MR||||||Roe^J", PID.replace("4711", "1"), "MRG|2^^^HOSP^MR")
    assert (one.patient.patient_id, two.patient.patient_id) == ("4711", "1")
    assert one.merged_patient == PatientIdentity("815", "HOSP", "Roe^J")
    assert one.merged_identifiers == (Identifier("815", "HOSP", "MR"),)
    assert two.merged_patient == PatientIdentity("2", "HOSP")
    assert one.problems == two.problems == ()


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ((PID,), "MRG-1 has no identifier"),
        (("MRG|1^^^HOSP^MR",), "no PID"),
        ((PID, "MRG|4711^^^HOSP^MR"), "same patient"),
        ((PID, "MRG|4711^^^^MR"), "same patient"),
        ((PID, "MRG|1^^^HOSP^MR~2^^^HOSP^MR"), "MRG-1 has several"),
    ],
)
def test_merges_that_cannot_be_done(segments: tuple[str, ...], words: str) -> None:
    (event,) = merges(*segments)
    assert words in event.problems[0]


def test_a_pid_without_its_mrg_takes_no_other() -> None:
    lonely, whole = merges(PID, PID.replace("4711", "1"), "MRG|2^^^HOSP^MR")
    assert lonely.problems == ("MRG-1 has no identifier of type MR or PI",)
    assert (whole.patient.patient_id, whole.problems) == ("1", ())


def test_a_merge_of_the_same_number_at_two_authorities_is_one() -> None:
    (event,) = merges(PID, "MRG|4711^^^CLINIC^MR")
    assert event.problems == ()


def test_an_empty_merge_and_unknown_messages_are_kept() -> None:
    assert tell_events("ADT^A40") == (UnhandledEvent(type="ADT^A40", reason="a merge without PID and MRG segments"),)
    for kind in ("ADT^A03", "SIU^S12", "ORM", "ACK"):
        assert tell_events(kind, PID) == (UnhandledEvent(type=kind, reason="messages of this type are not acted on"),)
    assert isinstance(tell_events("ORM^O01", PID)[0], UnhandledEvent)
    assert isinstance(tell_events("ORU^R01", PID)[0], UnhandledEvent)


def report(*segments: str) -> ReportEvent:
    (event,) = tell_events("ORU^R01", PID, *segments)
    assert isinstance(event, ReportEvent)
    return event


def test_report() -> None:
    event = report(
        "ORC|RE|P1|F1",
        write_obr(f2="P1", f3="F1", f4="MRPRO^MRI", f7="20260101", f18="A1", f22="20260102100000", f25="F"),
        "OBX|1|TX|18782-3^Text^LN||Line one~A & B ^ C \\T\\ D||||||F",
        "NTE|1||a comment",
        "OBX|2|FT|19005-8^Impression^LN||Two\\.br\\three||||||F",
        "OBX|3|TX|x||withdrawn||||||D",
        "OBX|4|CE|x||4^PI-RADS 4^L||||||F",
        "OBX|5|ED|x||^application^pdf^Base64^AAAA||||||F",
        f"OBX|6|ST|110180^Study Instance UID^DCM||{UID}||||||F",
    )
    assert event == ReportEvent(
        status="F",
        placer_order_number="P1",
        filler_order_number="F1",
        accession_number="A1",
        study_instance_uid=UID,
        patient=PatientIdentity("4711", "HOSP", "Doe^Jane^Q^Dr^Jr", date(1961, 2, 3), "F"),
        patient_identifiers=(Identifier("4711", "HOSP", "MR"),),
        procedure=Code("MRPRO", "L", "MRI"),
        text="Line one\nA & B ^ C & D\na comment\nTwo\nthree\nPI-RADS 4",
        observed_at=datetime(2026, 1, 1, tzinfo=BERLIN),
        reported_at=datetime(2026, 1, 2, 10, tzinfo=BERLIN),
        notes=("OBX of a type other than text (ED) are not in the report's text",),
    )


@pytest.mark.parametrize(("stated", "status"), [("P", "P"), ("R", "P"), ("A", "P"), ("F", "F"), ("C", "C"), ("X", "X")])
def test_report_status(stated: str, status: str) -> None:
    assert report("ORC|RE|P1", write_obr(f25=stated)).status == status


def test_report_without_status_or_result() -> None:
    event = report("ORC|RE|P1", write_obr(f4="x"), "OBX|1|TX|x||y||||||F")
    assert event.status == ""
    assert "preliminary or final?" in event.problems[0]
    (none,) = tell_events("ORU^R01", PID, "ORC|RE|P1", write_obr(f25="I"))
    assert none == UnhandledEvent(type="ORU^R01", reason="OBR-25 is I: no result yet")
    mixed = report("ORC|RE|P1", write_obr(f25="F"), "OBX|1|TX|x||y||||||F", "OBX|2|TX|x||z||||||P")
    assert len(mixed.notes) == 1


def test_reports_of_several_patients_and_conflicts() -> None:
    other = PID.replace("4711", "12")
    found = tell_events(
        "ORU^R01",
        PID,
        "ORC|RE|P1",
        write_obr(f25="F"),
        "ORC|RE|P2",
        write_obr(f25="F"),
        other,
        write_obr(f2="P3", f25="P"),
    )
    assert [(e.patient.patient_id, e.placer_order_number) for e in found if isinstance(e, ReportEvent)] == [
        ("4711", "P1"),
        ("4711", "P2"),
        ("12", "P3"),
    ]
    event = report("ORC|RE|P1", write_obr(f25="F"), f"OBX|1|UI|110180^^DCM||{UID}", "ZDS|1.2.3")
    assert event.problems == ("different Study Instance UIDs are stated (IPC-3, ZDS-1, OBX-5)",)


def test_our_own_report_is_read_back() -> None:
    findings = build_findings()
    order_of_findings = findings.context.order
    assert order_of_findings
    (event,) = message_to_events(read_message(findings_to_oru(findings, text="One\n\ntwo")), zone=UTC)
    assert isinstance(event, ReportEvent)
    assert event.problems == ()
    assert event.patient == findings.patient
    assert event.study_instance_uid == findings.study_instance_uid
    assert event.accession_number == findings.accession_number
    assert event.placer_order_number == order_of_findings.placer_order_number
    assert event.reported_at == findings.created_at.replace(microsecond=0)
    assert "One\n\ntwo" in event.text


def test_large_reports_are_linear() -> None:
    """The test's own time limit fails a quadratic mapping."""
    many = [f"OBX|{n}|TX|x||line {n}||||||F" for n in range(50_000)]
    assert report("ORC|RE|P1", write_obr(f25="F"), *many).text.count("\n") == 49_999
    assert len(report("ORC|RE|P1", write_obr(f25="F"), "OBX|1|TX|x||" + "word " * 400_000).text) == 2_000_000

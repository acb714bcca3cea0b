"""HL7 v2 messages to events: what is stated is read, what contradicts itself is a problem, nothing is guessed."""

from dataclasses import fields
from datetime import UTC, date, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mappings.inputs.er7_to_message import UnreadableMessage, read_message
from mappings.inputs.hl7_elements import read_time
from mappings.inputs.hl7_to_event import message_to_events
from mappings.model.codes import Code
from mappings.model.context import Identifier
from mappings.model.events import (
    ORDER_STATUSES,
    OrderEvent,
    UnhandledEvent,
    order_status_rank,
)
from mappings.model.study import PatientIdentity
from tests.hl7_messages import BERLIN, PID, UID, tell_events, write_obr


def order(*segments: str, kind: str = "ORM^O01", **more: str) -> OrderEvent:
    (event,) = tell_events(kind, PID, *segments, authority=more.get("authority", ""))
    assert isinstance(event, OrderEvent)
    return event


def test_ihe_order() -> None:
    obr = write_obr(
        f2="P1^EHR",
        f3="F1^RIS&1.2.3&ISO",
        f4="MRPRO^MRI prostate^99SITE^24531-6^MR Prostate^LN",
        f13="PSA 8",
        f16="17^Referrer^Rita^^^Dr",
        f18="ACC1",
        f27="^^^202601050800^^S",
        f31="^Elevated PSA~R97.20^^I10",
        f36="202601060900",
    )
    event = order(
        "PV1|1|O", "ORC|NW|P1^EHR|F1^RIS|||||20260102|20260102090000", obr, f"ZDS|{UID}^RIS^Application^DICOM"
    )
    assert event == OrderEvent(
        control="new",
        status="requested",
        placer_order_number="P1",
        placer_authority="EHR",
        filler_order_number="F1",
        filler_authority="RIS",
        accession_number="ACC1",
        study_instance_uid=UID,
        patient=PatientIdentity("4711", "HOSP", "Doe^Jane^Q^Dr^Jr", date(1961, 2, 3), "F"),
        patient_identifiers=(Identifier("4711", "HOSP", "MR"),),
        procedure=Code("MRPRO", "99SITE", "MRI prostate"),
        procedure_alternate=Code("24531-6", "LN", "MR Prostate"),
        priority="S",
        reason="Elevated PSA; R97.20",
        requester="Referrer^Rita^^Dr",
        scheduled_at=datetime(2026, 1, 5, 8, 0, tzinfo=BERLIN),
        occurred_at=datetime(2026, 1, 2, 9, 0, tzinfo=BERLIN),
    )


def test_imaging_order_with_ipc_and_timing() -> None:
    segments = (
        "ORC|NW|P1|||IP",
        "TQ1|1||||||20260105080000-0500||A^ASAP",
        write_obr(f4="MRPRO"),
        f"IPC|ACC7^RIS|RP1|{UID}^RIS|SPS1|MR^^DCM",
        f"IPC|ACC7|RP1|{UID}|SPS2|MR^^DCM",
    )
    event = order(*segments, kind="OMI^O23^OMI_O23")
    assert (event.accession_number, event.accession_authority, event.study_instance_uid) == ("ACC7", "RIS", UID)
    assert (event.priority, event.modality, event.status) == ("A", "MR", "in-progress")
    assert event.scheduled_at == datetime(2026, 1, 5, 13, 0, tzinfo=UTC)
    assert event.procedure == Code("MRPRO", "L", "")
    assert event.problems == ()


@pytest.mark.parametrize(
    ("orc_1", "orc_5", "obr_25", "control", "status"),
    [
        ("NW", "", "", "new", "requested"),
        ("SN", "", "", "new", "requested"),
        ("NW", "SC", "", "new", "scheduled"),
        ("NW", "CM", "", "new", "completed"),
        ("NW", "HD", "", "hold", "requested"),
        ("XO", "", "", "change", ""),
        ("XO", "SC", "S", "change", "scheduled"),
        ("XO", "CM", "", "complete", "completed"),
        ("XO", "CA", "", "cancel", "cancelled"),
        ("SC", "IP", "", "status", "in-progress"),
        ("SC", "", "I", "status", "in-progress"),
        ("SC", "CM", "", "complete", "completed"),
        ("SC", "CM", "R", "complete", "preliminary"),
        ("SC", "", "F", "complete", "final"),
        ("SC", "DC", "", "discontinue", "discontinued"),
        ("SC", "CA", "X", "cancel", "cancelled"),
        ("SC", "HD", "", "hold", ""),
        ("OK", "", "", "status", ""),
        ("NA", "", "", "status", ""),
        ("CA", "", "", "cancel", "cancelled"),
        ("OC", "CA", "", "cancel", "cancelled"),
        ("CA", "IP", "", "cancel", "cancelled"),
        ("DC", "", "", "discontinue", "discontinued"),
        ("HD", "", "", "hold", ""),
        ("RL", "", "", "resume", ""),
        ("UC", "IP", "", "status", "in-progress"),
        ("ca", "ca", "x", "cancel", "cancelled"),
    ],
)
def test_control_and_status(orc_1: str, orc_5: str, obr_25: str, control: str, status: str) -> None:
    event = order(f"ORC|{orc_1}|P1|||{orc_5}", write_obr(f25=obr_25))
    assert (event.control, event.status) == (control, status)
    assert event.problems == ()


@pytest.mark.parametrize(
    ("orc_1", "orc_5", "obr_25", "words"),
    [
        ("NW", "CA", "", "has ended"),
        ("NW", "", "X", "has ended"),
        ("CA", "CM", "", "says it is done"),
        ("DC", "", "F", "says it is done"),
        ("SC", "CA", "F", "contradict"),
        ("SC", "CM", "X", "contradict"),
        ("SC", "ER", "", "no such order"),
        ("SC", "", "Y", "no such order"),
        ("", "IP", "", "ORC-1 (order control) is missing"),
    ],
)
def test_contradicting_states_are_problems(orc_1: str, orc_5: str, obr_25: str, words: str) -> None:
    event = order(f"ORC|{orc_1}|P1|||{orc_5}", write_obr(f25=obr_25))
    assert len(event.problems) == 1
    assert words in event.problems[0]
    assert event.status in ("", "in-progress")


def test_statuses_are_ordered() -> None:
    assert [order_status_rank(status) for status in ORDER_STATUSES] == list(range(len(ORDER_STATUSES)))
    assert order_status_rank("scheduled") < order_status_rank("completed") < order_status_rank("cancelled")


def test_unknown_order_control_and_status() -> None:
    (event,) = tell_events("ORM^O01", PID, "ORC|PR|P1")
    assert event == UnhandledEvent(type="ORM^O01", reason="an order with ORC-1 PR is not acted on")
    assert order("ORC|SC|P1|||ARRIVED").notes == ("ORC-5 is not of table 0038",)


@pytest.mark.parametrize(
    ("orc", "obr", "problem"),
    [
        ("ORC|SC|P1|F1", write_obr(f2="P2", f3="F1"), "placer order number: different values in ORC-2 and OBR-2"),
        ("ORC|SC|P1|F1", write_obr(f3="F2"), "filler order number: different values in ORC-3 and OBR-3"),
        ("ORC|SC|P1^A", write_obr(f2="P1^B"), "placer order number: different authorities in ORC-2 and OBR-2"),
        ("ORC|SC", write_obr(f4="X"), "no placer, filler or accession number and no Study Instance UID"),
        ("ORC|SC|P\\X00\\1|F1", write_obr(), "ORC-2 holds control characters"),
    ],
)
def test_contradicting_or_missing_numbers_are_problems(orc: str, obr: str, problem: str) -> None:
    event = order(orc, obr)
    assert event.problems == (problem,)
    assert event.placer_order_number in ("", "P1")
    assert "different values in ORC-2" not in problem or event.placer_order_number == ""


def test_numbers_in_any_subset() -> None:
    assert order("ORC|SC|P1").placer_order_number == "P1"
    assert order("ORC|SC", write_obr(f3="F1")).filler_order_number == "F1"
    assert order("ORC|SC", write_obr(f18="A1")).problems == ()
    assert order("ORC|SC", write_obr(), f"ZDS|{UID}").problems == ()
    assert order("ORC|SC|P1^EHR", write_obr(f2="P1")).placer_authority == "EHR"


def test_accession_number_where_the_site_puts_it() -> None:
    segments = (PID, "ORC|SC|P1|F1", write_obr(f3="F1", f18="OTHER", f20="A9"))
    for places, number in ((("OBR-20",), "A9"), (("OBR-3", "ORC-3"), "F1"), (("ZZZ-1", "OBR"), "")):
        (event,) = tell_events("ORM^O01", *segments, accession_from=places)
        assert isinstance(event, OrderEvent)
        assert event.accession_number == number
    (event,) = tell_events("ORM^O01", *segments, accession_from=("OBR-18", "OBR-20"))
    assert isinstance(event, OrderEvent)
    assert event.problems == ("accession number: different values in OBR-18 and OBR-20",)
    assert event.accession_number == ""


def test_study_uids_that_differ_or_are_none() -> None:
    two = order("ORC|SC|P1", write_obr(), f"ZDS|{UID}", "ZDS|1.2.3")
    assert (two.study_instance_uid, two.problems) == (
        "",
        ("different Study Instance UIDs are stated (IPC-3, ZDS-1, OBX-5)",),
    )
    bad = order("ORC|SC|P1", write_obr(), "ZDS|1.02.x")
    assert (bad.study_instance_uid, bad.problems) == ("", ("ZDS-1 is no DICOM UID",))


def test_several_orders_and_the_study_uid_they_share() -> None:
    groups = []
    for number, accession in (("P1", "A1"), ("P2", "A1"), ("P3", "A2")):
        groups += [f"ORC|NW|{number}", write_obr(f2=number, f18=accession)]
    trailing = [e for e in tell_events("ORM^O01", PID, *groups[:4], f"ZDS|{UID}") if isinstance(e, OrderEvent)]
    assert [(e.placer_order_number, e.study_instance_uid) for e in trailing] == [("P1", UID), ("P2", UID)]
    other = [e for e in tell_events("ORM^O01", PID, *groups, f"ZDS|{UID}") if isinstance(e, OrderEvent)]
    assert [e.study_instance_uid for e in other] == ["", "", UID]
    own = tell_events("ORM^O01", PID, *groups[:2], "ZDS|1.2.3", *groups[2:4], f"ZDS|{UID}")
    assert [e.study_instance_uid for e in own if isinstance(e, OrderEvent)] == ["1.2.3", UID]
    stated = tell_events("OMI^O23", PID, *groups[:2], "IPC|A1|RP1|1.2.3", *groups[2:4], f"ZDS|{UID}")
    assert [e.study_instance_uid for e in stated if isinstance(e, OrderEvent)] == ["1.2.3", UID]
    assert [e.problems for e in stated if isinstance(e, OrderEvent)] == [(), ()]


def test_several_obr_of_one_orc_and_prior_results() -> None:
    two = tell_events("ORM^O01", PID, "ORC|NW|P1", write_obr(f18="A1"), write_obr(f18="A2"))
    assert [e.accession_number for e in two if isinstance(e, OrderEvent)] == ["A1", "A2"]
    prior = (PID, "PV1|1|O", write_obr(f2="OLD"), "OBX|1|NM|x||3", "ORC|PR|OLD2", write_obr(f2="OLD2"))
    first, second = tell_events("OMG^O19^OMG_O19", PID, "ORC|NW|P1", write_obr(f2="P1"), *prior)
    assert isinstance(first, OrderEvent)
    assert first.problems == ()
    assert isinstance(second, UnhandledEvent)
    stranger = tell_events("OMG^O19", PID, "ORC|NW|P1", write_obr(), PID.replace("4711", "4712"), write_obr(f2="OLD"))
    assert [e.problems for e in stranger if isinstance(e, OrderEvent)] == [
        ("the PID segments name different patients",)
    ]


@pytest.mark.parametrize(
    ("segments", "priority", "notes"),
    [
        (("TQ1|1||||||||S",), "S", 0),
        (("TQ1|1||||||||TS60",), "T", 0),
        (("TQ1|1||||||||ROUTINE", write_obr(f5="S", f2="P1")), "S", 1),
        ((write_obr(f5="R"),), "R", 0),
        ((write_obr(f5="9"),), "", 1),
        ((), "", 0),
    ],
)
def test_priority(segments: tuple[str, ...], priority: str, notes: int) -> None:
    event = order("ORC|NW|P1", *segments)
    assert (event.priority, len(event.notes)) == (priority, notes)
    assert order("ORC|NW|P1|||||^^^^^A").priority == "A"


def test_reasons_and_deletions() -> None:
    assert order("ORC|XO|P1", write_obr(f13="PSA 8\\.br\\rising")).reason == "PSA 8\nrising"
    assert order("ORC|XO|P1", write_obr(), "DG1|1||R97.20^Elevated PSA^I10").reason == "Elevated PSA"
    assert order("ORC|XO|P1", write_obr(f31='""', f36='""')).cleared == ("reason", "scheduled_at")
    assert order("ORC|XO|P1", write_obr()).cleared == ()


def patient_of(pid_3: str, *, authority: str = "") -> OrderEvent:
    (event,) = tell_events("ORM^O01", f"PID|1||{pid_3}||Doe^Jane", "ORC|SC|P1", authority=authority)
    assert isinstance(event, OrderEvent)
    return event


@pytest.mark.parametrize(
    ("pid_3", "patient_id", "issuer"),
    [
        ("1^^^H^MR", "1", "H"),
        ("9^^^N^SS~1^^^H^MR~2^^^X^PI", "1", "H"),
        ("9^^^N^SS~2^^^&1.2.3&ISO^PI", "2", "1.2.3"),
        ("9^^^N^SS~3", "3", ""),
        ("1^^^H^MR~1^^^^MR", "1", "H"),
    ],
)
def test_patient_id(pid_3: str, patient_id: str, issuer: str) -> None:
    event = patient_of(pid_3)
    assert (event.patient.patient_id, event.patient.issuer, event.problems) == (patient_id, issuer, ())


@pytest.mark.parametrize(
    ("pid_3", "words"),
    [
        ("1^^^H^MR~2^^^H^MR", "several identifiers of type MR"),
        ("1^^^H^MR~1^^^G^MR", "several identifiers of type MR"),
        ("1~2", "several identifiers of type (none)"),
        ("1^^^N^SS", "no identifier of type MR or PI"),
        ("", "no identifier of type MR or PI"),
        ('""', "no identifier of type MR or PI"),
    ],
)
def test_patient_id_that_cannot_be_told(pid_3: str, words: str) -> None:
    event = patient_of(pid_3)
    assert event.patient.patient_id == ""
    assert words in event.problems[0]


def test_patient_id_of_the_sites_own_authority() -> None:
    event = patient_of("1^^^H^MR~2^^^G^MR~3^^^G^SS", authority="G")
    assert (event.patient.patient_id, event.patient.issuer, event.problems) == ("2", "G", ())
    assert patient_of("1^^^H^MR", authority="G").patient.patient_id == "1"
    assert patient_of("1^^^G^MR~2^^^G^MR", authority="G").problems


def test_names_dates_and_sex() -> None:
    pid = "PID|1||1^^^H^MR||Yamada^Tarou^^^^^L^A~山田^太郎^^^^^L^I~Alias^X^^^^^A||1961|unknown"
    (event,) = tell_events("ORM^O01", pid, "ORC|SC|P1")
    assert isinstance(event, OrderEvent)
    assert event.patient == PatientIdentity("1", "H", "Yamada^Tarou=山田^太郎", None, "")
    assert event.notes == ("PID-7 (birth date) is not a full date", "PID-8 (sex) is not of table 0001")
    (event,) = tell_events("ORM^O01", "PID|1||1^^^H^MR||a\\S\\b\\.br\\^c=d||19610231|A", "ORC|SC|P1")
    assert isinstance(event, OrderEvent)
    assert (event.patient.name, event.patient.birth_date, event.patient.sex) == ("a b^c d", None, "O")


def test_no_pid() -> None:
    (event,) = tell_events("ORM^O01", "ORC|SC|P1")
    assert isinstance(event, OrderEvent)
    assert event.problems == ("there is no PID segment",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20260102030405.1234-0500", datetime(2026, 1, 2, 3, 4, 5, 123400, timezone(-timedelta(hours=5)))),
        ("202601020304+0545", datetime(2026, 1, 2, 3, 4, tzinfo=timezone(timedelta(hours=5, minutes=45)))),
        ("20260702030405", datetime(2026, 7, 2, 3, 4, 5, tzinfo=BERLIN)),
        ("2026010203", datetime(2026, 1, 2, 3, tzinfo=BERLIN)),
        ("20260102", datetime(2026, 1, 2, tzinfo=BERLIN)),
        *(
            (bad, None)
            for bad in ("", "2026", "202601", "20260230", "2026010225", "00010101", "99991231", "20260102+9999")
        ),
        *((bad, None) for bad in ("2026-01-02", "x", "20260102T03", "٢٠٢٦٠١٠٢", "20260102030405.", "202601020304059")),
    ],
)
def test_times(text: str, expected: datetime | None) -> None:
    assert read_time(text, BERLIN) == expected


def test_occurred_at_needs_an_hour() -> None:
    assert order("ORC|SC|P1||||||20260101|20260101").occurred_at == datetime(2026, 1, 2, 3, 4, 5, tzinfo=BERLIN)


def test_problems_name_no_patient() -> None:
    found = tell_events(
        "ORM^O01", "PID|1||77123^^^H^MR~88123^^^H^MR||Secret^Name||x|y", "ORC|SC|P77", write_obr(f2="P88")
    )
    for event in found:
        assert isinstance(event, OrderEvent)
        said = " ".join((*event.problems, *event.notes))
        assert not any(word in said for word in ("77123", "88123", "Secret", "P77", "P88"))


_value = st.one_of(
    st.sampled_from(["", '""', "P1", "1^^^H^MR", "NW", "SC", "CM", "F", "20260102", "1.2.3", "\\", "^&~", "\\X00\\"]),
    st.text(max_size=6),
)
_line = st.tuples(
    st.sampled_from(["PID", "ORC", "OBR", "OBX", "ZDS", "IPC", "TQ1", "MRG", "NTE", "DG1", "EVN"]),
    st.lists(_value, max_size=32),
)
_kinds = ["ORM^O01", "OMG^O19", "OMI^O23", "ADT^A01", "ADT^A40", "ORU^R01", "ZZZ^Z01"]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(_kinds), st.lists(_line, max_size=8))
def test_no_message_raises(kind: str, lines: list[tuple[str, list[str]]]) -> None:
    raw = "\r".join([f"MSH|^~\\&|R|C|W|A|20260102||{kind}|1|P|2.4", *("|".join((n, *v)) for n, v in lines)])
    try:
        message = read_message(raw.encode("utf-8", "surrogatepass"))
    except UnreadableMessage:
        return
    found = message_to_events(message, zone=BERLIN)
    assert found
    for event in found:
        for field in fields(event):
            value = getattr(event, field.name)
            assert not (isinstance(value, str) and "\x00" in value)
            assert not isinstance(value, datetime) or value.astimezone(UTC)


def test_many_orders_of_a_patient_of_many_identifiers_are_linear() -> None:
    """The test's own time limit fails a quadratic mapping."""
    pid = "PID|1||" + "~".join(f"{n}^^^H^MR" for n in range(100_000))
    assert len(tell_events("ORM^O01", pid, *(["ORC|SC|P1", write_obr(f2="P1")] * 1000))) == 1000

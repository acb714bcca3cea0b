"""What messages change: numbers in any subset make one order, contradictions change nothing, nothing goes back."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError
from sqlmodel import Session

from mappings.model.events import ORDER_STATUSES, OrderEvent
from mappings.model.study import PatientIdentity
from middleware.intake import hearing
from middleware.intake.orders import apply_events
from middleware.store.heard import HeardMessage
from tests.hl7_inbox import POLICY, START, Inbox, order_segments, write_message, write_order

UID = "1.2.840.99.1"
WHOLE = ("P1", "F1", "A1", UID)
PLACER, FILLER, ACCESSION, STUDY = (tuple(n if i == j else "" for j, n in enumerate(WHOLE)) for i in range(4))
NUMBERS = ("placer_order_number", "filler_order_number", "accession_number", "study_instance_uid")


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


def numbers_of(inbox: Inbox) -> tuple[str, ...]:
    return tuple(getattr(inbox.order, name) for name in NUMBERS)


def hear_all(inbox: Inbox, *orders: tuple[str, Sequence[str]], **values: str) -> list[HeardMessage]:
    """An order message each, which must be applied."""
    heard = [inbox.hear(write_order(f"m{n}", control, ns, **values)) for n, (control, ns) in enumerate(orders)]
    assert {h.state for h in heard} == {"applied"}, [h.notes for h in heard]
    return heard


def refused(inbox: Inbox, raw: bytes) -> str:
    """Hear a message that must change nothing; its note."""
    before = inbox.known
    heard = inbox.hear(raw)
    assert heard.state == "refused"
    assert inbox.known == before
    assert not any(word in " ".join(heard.notes) for word in ("4711", "Canary", "Karla", "P1", "A1"))
    return heard.notes[-1]


# Numbers


@pytest.mark.parametrize("order", list(permutations((PLACER, FILLER, ACCESSION, STUDY, WHOLE)))[::5])
def test_each_number_alone_and_all_together_are_one_order_in_any_sequence(order: tuple[tuple[str, ...], ...]) -> None:
    inbox = Inbox()
    hear_all(inbox, *(("XO" if numbers != WHOLE else "NW", numbers) for numbers in order))
    assert numbers_of(inbox) == WHOLE


def test_overlapping_pairs_make_one_order(inbox: Inbox) -> None:
    hear_all(inbox, ("NW", ("P1", "F1", "", "")), ("SC", ("", "", "A1", UID)), ("SC", ("", "F1", "A1", "")))
    assert numbers_of(inbox) == WHOLE


def test_numbers_that_share_nothing_stay_two_orders(inbox: Inbox) -> None:
    hear_all(inbox, ("NW", PLACER), ("NW", ("", "F2", "A2", "")))
    assert len(inbox.orders) == 2


@pytest.mark.parametrize("index", range(4))
def test_contradictory_number_is_refused(inbox: Inbox, index: int) -> None:
    hear_all(inbox, ("NW", WHOLE))
    other = ("P9", "F9", "A9", "1.2.9")
    told = [other[i] if i == index else number for i, number in enumerate(WHOLE)]
    assert NUMBERS[index].replace("_", " ") in refused(inbox, write_order("x", "XO", told))


def test_message_that_names_two_orders_which_contradict_each_other_is_refused(inbox: Inbox) -> None:
    hear_all(inbox, ("NW", ("P1", "F1", "", "")), ("NW", ("P2", "", "A2", "")))
    assert "2 different orders" in refused(inbox, write_order("x", "SC", ("", "F1", "A2", "")))
    assert len(inbox.orders) == 2


def test_order_of_another_patient_is_refused(inbox: Inbox) -> None:
    hear_all(inbox, ("NW", WHOLE))
    assert "another patient" in refused(inbox, write_order("x", "CA", PLACER, patient="4712"))
    assert inbox.order.status == "requested"


def test_numbers_of_two_patients_are_never_joined(inbox: Inbox) -> None:
    hear_all(inbox, ("NW", PLACER))
    hear_all(inbox, ("NW", ACCESSION), patient="4712")
    assert "another patient" in refused(inbox, write_order("x", "SC", ("P1", "", "A1", "")))


def test_same_id_of_another_authority_is_another_patient(inbox: Inbox) -> None:
    inbox.hear(write_message("ORM^O01", "a", *order_segments("NW", WHOLE), authority="HOSP"))
    other = write_message("ORM^O01", "b", *order_segments("CA", PLACER), authority="CLINIC")
    assert "another patient" in refused(inbox, other)
    unstated = inbox.hear(write_message("ORM^O01", "c", *order_segments("SC", PLACER), authority=""))
    assert (unstated.state, inbox.order.patient_issuer) == ("applied", "HOSP")


def test_message_without_any_number_is_refused(inbox: Inbox) -> None:
    refused(inbox, write_order("x", "NW", ("", "", "", "")))


# Status


@pytest.mark.parametrize("end", ["CA", "DC"])
def test_late_new_order_opens_nothing_again(inbox: Inbox, end: str) -> None:
    hear_all(inbox, ("NW", WHOLE), (end, PLACER), ("NW", WHOLE), ("XO", FILLER))
    assert inbox.order.status == {"CA": "cancelled", "DC": "discontinued"}[end]


def test_late_new_order_and_schedule_do_not_undo_completion(inbox: Inbox) -> None:
    inbox.hear(write_order("a", "SC", WHOLE, status="CM"))
    inbox.hear(write_order("b", "NW", WHOLE))
    inbox.hear(write_order("c", "SC", WHOLE, status="SC"))
    assert inbox.order.status == "completed"


def test_cancel_before_its_order(inbox: Inbox) -> None:
    hear_all(inbox, ("CA", PLACER), ("NW", WHOLE))
    assert inbox.order.status == "cancelled"


def test_joined_order_has_the_further_status(inbox: Inbox) -> None:
    hear_all(inbox, ("CA", PLACER), ("NW", ACCESSION), ("SC", ("P1", "", "A1", "")))
    assert inbox.order.status == "cancelled"


def test_resend_is_kept_once_and_counted(inbox: Inbox) -> None:
    raw = write_order("a", "NW", WHOLE)
    first = inbox.hear(raw)
    inbox.hear(write_order("b", "CA", WHOLE))
    again = inbox.hear(raw)
    assert (again.position, again.repeats, inbox.order.status) == (first.position, 1, "cancelled")
    assert inbox.store.count_by_state() == {"applied": 2}


def test_control_id_used_again_for_other_content_is_applied_with_a_note(inbox: Inbox) -> None:
    inbox.hear(write_order("a", "NW", WHOLE))
    heard = inbox.hear(write_order("a", "CA", WHOLE))
    assert (heard.state, heard.notes) == ("applied", ["this control id was used before with other content"])
    assert inbox.order.status == "cancelled"


def test_hold_and_resume(inbox: Inbox) -> None:
    hear_all(inbox, ("NW", WHOLE), ("HD", PLACER))
    assert (inbox.order.is_on_hold, inbox.order.status) == (True, "requested")
    hear_all(inbox, ("RL", FILLER))
    assert inbox.order.is_on_hold is False


def test_hold_survives_a_join() -> None:
    for first, second in ((PLACER, ACCESSION), (ACCESSION, PLACER)):
        inbox = Inbox()
        hear_all(inbox, ("HD", first), ("NW", second), ("SC", ("P1", "", "A1", "")))
        assert inbox.order.is_on_hold
        inbox = Inbox()
        hear_all(inbox, ("NW", first), ("HD", second), ("SC", ("P1", "", "A1", "")))
        assert inbox.order.is_on_hold


def test_cleared_fields_are_emptied_and_unmentioned_ones_kept(inbox: Inbox) -> None:
    def tell(control_id: str, obr_4: str, obr_13: str, obr_16: str) -> None:
        obr = f"OBR|1|P1||{obr_4}|||||||||{obr_13}|||{obr_16}"
        assert inbox.hear(write_message("ORM^O01", control_id, "ORC|XO|P1", obr)).state == "applied"

    tell("a", "MRPRO^MRI prostate^L", "PSA 8", "17^Referrer^Rita")
    assert (inbox.order.procedure_code, inbox.order.reason, inbox.order.requester) == (
        "MRPRO",
        "PSA 8",
        "Referrer^Rita",
    )
    tell("b", "", "", "")
    assert (inbox.order.procedure_code, inbox.order.reason) == ("MRPRO", "PSA 8")
    tell("c", '""', '""', '""')
    assert (inbox.order.procedure_code, inbox.order.procedure_meaning, inbox.order.reason, inbox.order.requester) == (
        ("",) * 4
    )


def test_several_orders_of_a_message_are_applied_all_or_none(inbox: Inbox) -> None:
    good, other = order_segments("NW", ("P1", "", "A1", "")), order_segments("NW", ("P2", "", "A2", ""))
    assert inbox.hear(write_message("ORM^O01", "a", *good, *other)).state == "applied"
    assert len(inbox.orders) == 2
    third, contradictory = order_segments("NW", ("P3", "", "", "")), order_segments("CA", ("P1", "", "A2", ""))
    refused(inbox, write_message("ORM^O01", "b", *third, *contradictory))


STATUSES: dict[str, tuple[str, str]] = {
    "requested": ("NW", ""),
    "scheduled": ("SC", "SC"),
    "in-progress": ("SC", "IP"),
    "completed": ("XO", "CM"),
    "cancelled": ("CA", ""),
}
SUBSETS = st.lists(st.booleans(), min_size=4, max_size=4).filter(any)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_sequence_of_the_same_messages_ends_in_the_same_orders(data: st.DataObject) -> None:
    statuses = data.draw(st.lists(st.sampled_from(sorted(STATUSES)), min_size=1, max_size=5))
    masks = data.draw(st.lists(SUBSETS, min_size=len(statuses), max_size=len(statuses)))
    subsets = [tuple(n if told else "" for n, told in zip(WHOLE, mask, strict=True)) for mask in masks]
    messages = [
        write_order(f"m{n}", STATUSES[status][0], subset, status=STATUSES[status][1])
        for n, (status, subset) in enumerate(zip(statuses, subsets, strict=True))
    ]
    expected = expected_orders(subsets, statuses)
    for sequence in (messages, data.draw(st.permutations(messages)), [*messages[::-1], *messages]):
        inbox = Inbox()
        assert {inbox.hear(raw).state for raw in sequence} == {"applied"}
        found = [(frozenset(getattr(o, n) for n in NUMBERS) - {""}, o.status) for o in inbox.orders]
        assert Counter(found) == Counter(expected)


def expected_orders(subsets: list[tuple[str, ...]], statuses: list[str]) -> list[tuple[frozenset[str], str]]:
    """The numbers and status of each order: messages that share a number, through others too, tell one order."""
    orders: list[tuple[frozenset[str], str]] = []
    for subset, status in zip(subsets, statuses, strict=True):
        numbers = frozenset(subset) - {""}
        same = [order for order in orders if order[0] & numbers]
        further = max((status, *(order[1] for order in same)), key=ORDER_STATUSES.index)
        orders = [order for order in orders if order not in same]
        orders.append((numbers.union(*(order[0] for order in same)), further))
    return orders


# Patients


def merge(control_id: str, *, into: str, away: str, authority: str = "HOSP", away_authority: str = "HOSP") -> bytes:
    return write_message("ADT^A40", control_id, f"MRG|{away}^^^{away_authority}", patient=into, authority=authority)


def is_away(inbox: Inbox, *patients: str, issuer: str = "HOSP") -> list[bool]:
    return [inbox.store.was_merged_away(p, issuer) for p in patients]


def test_merge_retires_one_patient_for_good(inbox: Inbox) -> None:
    assert inbox.hear(merge("a", into="2", away="1")).state == "applied"
    assert is_away(inbox, "1", "2") == [True, False]
    assert inbox.hear(write_message("ADT^A08", "b", patient="1")).state == "applied"
    assert is_away(inbox, "1", "2") == [True, False]
    assert inbox.patients["1"].name == ""


def test_chain_of_merges_leads_to_its_end_in_either_sequence() -> None:
    for first, second in (("a", "b"), ("b", "a")):
        inbox = Inbox()
        raws = {"a": merge("a", into="2", away="1"), "b": merge("b", into="3", away="2")}
        assert [inbox.hear(raws[name]).state for name in (first, second)] == ["applied", "applied"]
        inbox.hear(write_order("c", "NW", WHOLE, patient="1"))
        inbox.hear(write_order("d", "CA", PLACER, patient="3"))
        assert inbox.order.status == "cancelled"
        assert not inbox.store.is_other_patient(inbox.order, "2")
        assert inbox.store.is_other_patient(inbox.order, "4")
        assert is_away(inbox, "1", "2", "3") == [True, True, False]


def test_merge_into_a_retired_patient_goes_on_to_its_survivor(inbox: Inbox) -> None:
    for raw in (merge("a", into="2", away="1"), merge("b", into="1", away="0")):
        assert inbox.hear(raw).state == "applied"
    inbox.hear(write_order("c", "NW", WHOLE, patient="0"))
    assert inbox.hear(write_order("d", "CA", WHOLE, patient="2")).state == "applied"


def test_merge_into_itself_and_back_are_refused(inbox: Inbox) -> None:
    refused(inbox, merge("a", into="1", away="1"))
    refused(inbox, merge("b", into="1", away="1", authority=""))
    inbox.hear(merge("c", into="2", away="1"))
    inbox.hear(merge("d", into="3", away="2"))
    assert "into itself" in refused(inbox, merge("e", into="1", away="3"))
    assert "another one before" in refused(inbox, merge("f", into="9", away="1"))
    assert is_away(inbox, "1", "2", "3") == [True, True, False]


def test_repeated_merge_changes_nothing(inbox: Inbox) -> None:
    inbox.hear(merge("a", into="2", away="1"))
    assert inbox.hear(merge("b", into="2", away="1")).state == "applied"
    assert is_away(inbox, "1", "2") == [True, False]


def test_same_id_of_two_authorities_are_two_patients(inbox: Inbox) -> None:
    for control_id, authority in (("a", "HOSP"), ("b", "CLINIC")):
        inbox.hear(write_message("ADT^A01", control_id, patient="1", authority=authority))
    inbox.hear(merge("c", into="2", away="1", authority="CLINIC", away_authority="CLINIC"))
    assert is_away(inbox, "1") == [False]
    assert is_away(inbox, "1", issuer="CLINIC") == [True]
    assert is_away(inbox, "1", issuer="spelt in another way") == [True]
    assert "several authorities" in refused(inbox, write_message("ADT^A08", "d", patient="1", authority=""))


def test_merge_of_one_id_from_one_authority_to_another(inbox: Inbox) -> None:
    assert inbox.hear(merge("a", into="1", away="1", authority="HOSP", away_authority="CLINIC")).state == "applied"
    assert is_away(inbox, "1") == [False]
    assert is_away(inbox, "1", issuer="CLINIC") == [True]


def test_patient_known_without_an_authority_is_the_one_told_with_it(inbox: Inbox) -> None:
    inbox.hear(write_message("ADT^A04", "a", patient="1", authority=""))
    inbox.hear(write_message("ADT^A08", "b", patient="1", authority="HOSP"))
    assert [(p.patient_id, p.issuer) for p in inbox.patients.values()] == [("1", "HOSP")]


def test_order_goes_on_after_its_patient_was_merged(inbox: Inbox) -> None:
    inbox.hear(write_order("a", "NW", WHOLE, patient="1"))
    refused(inbox, write_order("b", "SC", WHOLE, status="CM", patient="2"))
    inbox.hear(merge("c", into="2", away="1"))
    assert inbox.hear(write_order("d", "SC", WHOLE, status="CM", patient="2")).state == "applied"
    assert inbox.order.status == "completed"


# Reports


def write_report(
    control_id: str,
    status: str,
    text: str,
    numbers: str = "P1|F1",
    accession: str = "A1",
    at: str = "",
    patient: str = "4711",
) -> bytes:
    obr = f"OBR|1|{numbers}|MRPRO{'|' * 14}{accession}|||{'|' if not at else '|' + at}|||{status}"
    return write_message("ORU^R01", control_id, obr, f"OBX|1|TX|18782-3^^LN||{text}||||||F", patient=patient)


def test_preliminary_report_never_replaces_a_final_one(inbox: Inbox) -> None:
    for control_id, status in (("a", "P"), ("b", "F"), ("c", "P")):
        assert inbox.hear(write_report(control_id, status, f"text {control_id}")).state == "applied"
    (report,) = inbox.reports
    assert (report.status, report.text) == ("F", "text b")
    inbox.hear(write_report("d", "C", "corrected"))
    assert [(r.status, r.text) for r in inbox.reports] == [("C", "corrected")]


def test_older_state_of_one_status_does_not_replace_the_newer_one(inbox: Inbox) -> None:
    inbox.hear(write_report("a", "C", "second", at="20260304120000+0000"))
    inbox.hear(write_report("b", "C", "first", at="20260304110000+0000"))
    assert [r.text for r in inbox.reports] == ["second"]


def test_report_is_found_by_any_of_its_numbers(inbox: Inbox) -> None:
    inbox.hear(write_report("a", "F", "final"))
    inbox.hear(write_report("b", "P", "late", numbers="|"))
    assert [(r.status, r.filler_order_number) for r in inbox.reports] == [("F", "F1")]


def test_reports_of_two_procedures_of_one_accession_are_two(inbox: Inbox) -> None:
    inbox.hear(write_report("a", "F", "one"))
    inbox.hear(write_report("b", "F", "two", numbers="P2|F2"))
    assert sorted(r.text for r in inbox.reports) == ["one", "two"]
    assert "2 different reports" in refused(inbox, write_report("c", "P", "which", numbers="|"))


def test_report_of_another_patient_is_refused(inbox: Inbox) -> None:
    inbox.hear(write_report("a", "F", "final"))
    assert "another patient" in refused(inbox, write_report("b", "C", "other", patient="4712"))


# Messages


@pytest.mark.parametrize(("kind", "segments"), [("ADT^A03", ()), ("SIU^S12", ("SCH|1",)), ("ORM^O01", ("ORC|ZZ|P1",))])
def test_what_is_not_acted_on_is_kept_with_its_reason(inbox: Inbox, kind: str, segments: tuple[str, ...]) -> None:
    heard = inbox.hear(write_message(kind, "a", *segments))
    assert (heard.state, bool(heard.notes), inbox.known) == ("unhandled", True, [])


def test_z_segments_stop_nothing(inbox: Inbox) -> None:
    raw = write_message("ORM^O01", "a", "ZPI|secret|x", *order_segments("NW", WHOLE), "ZZZ|1")
    assert inbox.hear(raw).state == "applied"
    assert inbox.store.message(1).raw == raw


def test_message_that_fails_by_itself_stops_none_behind_it(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(session: Session, message: HeardMessage, *_: object) -> None:
        session.merge(HeardMessage(**{**message.model_dump(), "notes": ["half applied"]}))
        raise KeyError("4711 Canary")

    with monkeypatch.context() as patched:
        patched.setattr(hearing, "apply_events", fail)
        heard = inbox.hear(write_order("a", "NW", WHOLE))
    assert (heard.state, heard.notes) == ("refused", ["this message could not be applied: unexpected KeyError"])
    hear_all(inbox, ("NW", WHOLE))


def test_one_that_fails_among_several_is_the_only_one_refused(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_once(session: Session, message: HeardMessage, *rest: Any) -> None:
        apply_events(session, message, *rest)
        if message.control_id == "m2":
            raise KeyError("4711")

    monkeypatch.setattr(hearing, "apply_events", fail_once)
    inbox.keep(*(write_order(f"m{n}", "NW", (f"P{n}", "", "", "")) for n in range(5)))
    inbox.apply()
    assert [inbox.store.message(n).state for n in range(1, 6)] == [
        "applied",
        "applied",
        "refused",
        "applied",
        "applied",
    ]
    assert sorted(order.placer_order_number for order in inbox.orders) == ["P0", "P1", "P3", "P4"]


def test_message_stays_unapplied_while_the_database_is_away(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OperationalError("UPDATE", {}, Exception("database is locked"))

    with monkeypatch.context() as patched:
        patched.setattr(hearing, "apply_events", fail)
        with pytest.raises(OperationalError):
            inbox.hear(write_order("a", "NW", WHOLE))
    assert inbox.store.pending() == [1]
    hear_all(inbox, ("XO", WHOLE))
    assert inbox.store.message(1).state == "applied"


def test_a_result_of_our_own_that_comes_back_is_no_report() -> None:
    inbox = Inbox(replace(POLICY, own_name=("WETREAD", "AI")))
    theirs = write_message("ORU^R01", "R1", "OBR|1|P1|F1|MRPRO^MRI prostate^L|||||||||||||||||||||F")
    assert inbox.hear(theirs.replace(b"|RIS|C|WETREAD|AI|", b"|WETREAD|AI|RIS|C|")).state == "unhandled"
    assert inbox.reports == []
    assert inbox.hear(theirs).state == "applied"
    assert len(inbox.reports) == 1


# Refused messages


def test_a_refused_message_is_found_by_each_number_it_names_and_by_no_other() -> None:
    inbox = Inbox()
    hear_all(inbox, ("NW", WHOLE))
    refused(inbox, write_order("other", "XO", ("P1", "F2", "", "")))
    refused(inbox, write_order("again", "XO", ("", "", "A1", "1.2.840.99.2")))
    for number, found in {"P1": ["other"], "F2": ["other"], "A1": ["again"], "F1": [], "": []}.items():
        messages = inbox.store.refused_about({(name, number) for name in NUMBERS})
        assert [m.control_id for m in messages] == found
    assert inbox.store.refused_about({("accession_number", "P1")}) == [], "a number of another kind is another number"
    every = inbox.store.refused_about({(name, getattr(inbox.order, name)) for name in NUMBERS})
    assert [(m.control_id, m.state) for m in every] == [("other", "refused"), ("again", "refused")]
    assert [o.order_id for o in inbox.store.orders_of_study(UID)] == [inbox.order.order_id]
    assert inbox.store.orders_of_study("1.2.3", "A1") == inbox.store.orders_of_study(UID)
    assert inbox.store.orders_of_study("1.2.3") == []


@pytest.mark.parametrize(("resumed_by", "is_on_hold"), [("hl7", False), ("fhir", True)])
def test_hold_is_lifted_by_the_system_that_put_it_on(inbox: Inbox, resumed_by: str, is_on_hold: bool) -> None:
    inbox.hear(write_order("hold-1", "HD", ("P1", "", "", "")))
    event = OrderEvent(control="resume", placer_order_number="P1", patient=PatientIdentity("4711", "HOSP"))
    message = HeardMessage(message_key="k", sender="s", control_id="c", message_type="t", raw=b"", received_at=START)
    message.format = resumed_by
    with Session(inbox.engine) as session:
        apply_events(session, message, (event,), START)
        session.commit()
    assert inbox.order.is_on_hold == is_on_hold

"""What people may decide about a study, what they are told otherwise, and that every decision is kept."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from middleware.intake.holding import NotDecidable, reject_study, release_study
from middleware.intake.inbox import accept_study, hear_of_study, job_id_of, workflow_id
from middleware.store.arrivals import ArrivalStore
from middleware.store.queries import Store, open_engine
from middleware.store.tables import StudyJob

AT = datetime(2026, 3, 4, 10, 30, tzinfo=UTC)
UID = "1.2.3"
JOB = job_id_of(UID)
EVERY_STATE = (
    "waiting", "accepted", "reading", "released", "unmatched", "unusable", "held", "quarantined", "failed", "rejected",
)  # fmt: skip
Decide = Callable[..., StudyJob]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(open_engine(f"sqlite:///{tmp_path}/wetread.sqlite"))


def become(store: Store, state: str, *reasons: str, **facts: Any) -> StudyJob:
    """The study's job in this state."""
    if not store.jobs_of_study(UID):
        accept_study(store, UID, source="test", key="first", now=AT)
    store.update_job(JOB, AT, state=state, reasons=list(reasons), facts=facts)
    return store.job(JOB)


def hold(store: Store, *reasons: str, identity: str = "digest") -> StudyJob:
    return become(store, "held", *(reasons or ("the sex differs",)), held_identity=identity)


def release(
    store: Store, person: str = "anna", reason: str = "checked by phone", minutes: int = 1, overrule: bool = True
) -> StudyJob:
    now = AT + timedelta(minutes=minutes)
    return release_study(store, JOB, person=person, reason=reason, now=now, overrule=overrule)


def reject(store: Store, person: str = "ben", reason: str = "a test patient", minutes: int = 2) -> StudyJob:
    return reject_study(store, JOB, person=person, reason=reason, now=AT + timedelta(minutes=minutes))


def decided(store: Store) -> list[tuple[str, str, str]]:
    return [(d.action, d.person, d.reason) for d in store.decisions(JOB)]


def test_release_starts_the_next_run_for_just_these_reasons(store: Store) -> None:
    before = hold(store, "the sex differs", "the order is cancelled")
    job = release(store)
    assert (job.state, job.reasons, job.look_at) == ("accepted", [], AT + timedelta(minutes=1))
    assert workflow_id(job) != workflow_id(before)
    assert job.facts["accepted"] == {
        "identity": "digest",
        "reasons": ["the sex differs", "the order is cancelled"],
        "person": "anna",
    }
    assert decided(store) == [("release", "anna", "checked by phone")]


@pytest.mark.parametrize("state", EVERY_STATE)
@pytest.mark.parametrize(("decide", "possible"), [
    (release, {"held", "rejected"}),
    (reject, {"waiting", "held", "unmatched", "unusable", "failed", "quarantined"}),
])  # fmt: skip
def test_only_what_waits_for_a_person_can_be_decided(
    store: Store, state: str, decide: Decide, possible: set[str]
) -> None:
    before = become(store, state, "some reason")
    if state in possible:
        assert decide(store).state in ("accepted", "rejected")
        assert len(decided(store)) == 1
        return
    with pytest.raises(NotDecidable, match=f"the study is {state}"):
        decide(store)
    assert store.job(JOB) == before
    assert decided(store) == []


@pytest.mark.parametrize("decide", [release_study, reject_study])
def test_unknown_job_is_told_and_nothing_is_kept(store: Store, decide: Decide) -> None:
    with pytest.raises(LookupError):
        decide(store, "nobody", person="anna", reason="why", now=AT)
    assert store.decisions("nobody") == []


@pytest.mark.parametrize("words", ["", "  \n ", "x" * 1001, "bell\x07", "zero\x00"])
@pytest.mark.parametrize("what", ["person", "reason"])
@pytest.mark.parametrize("decide", [release, reject])
def test_decision_without_a_usable_name_and_reason_is_refused(
    store: Store, decide: Decide, what: str, words: str
) -> None:
    before = hold(store)
    with pytest.raises(NotDecidable, match=what):
        decide(store, **{what: words})
    assert store.job(JOB) == before
    assert decided(store) == []


def test_words_on_several_lines_are_kept_on_one(store: Store) -> None:
    hold(store)
    assert release(store, " Anna\tB. ", "asked\n the ward").facts["accepted"]["person"] == "Anna B."
    assert decided(store) == [("release", "Anna B.", "asked the ward")]


@pytest.mark.parametrize("state", ["waiting", "unmatched", "unusable", "failed", "quarantined"])
def test_what_was_rejected_before_it_was_held_is_released_for_no_reason_at_all(store: Store, state: str) -> None:
    become(store, state, "something else")
    reject(store)
    job = release(store, minutes=3)
    assert job.state == "accepted"
    assert (job.facts["accepted"]["identity"], job.facts["accepted"]["reasons"]) == ("", [])


def test_rejected_while_held_it_is_released_for_the_reasons_it_was_held_for(store: Store) -> None:
    hold(store, "the sex differs")
    assert reject(store).reasons == ["rejected by ben: a test patient", "the sex differs"]
    assert release(store, minutes=3).facts["accepted"]["reasons"] == ["the sex differs"]
    assert [action for action, _, _ in decided(store)] == ["reject", "release"]


def test_a_later_hold_is_released_for_its_own_reasons(store: Store) -> None:
    hold(store, "the sex differs")
    reject(store)
    release(store, minutes=3)
    hold(store, "the birth date differs", identity="another")
    accepted = release(store, minutes=4).facts["accepted"]
    assert (accepted["identity"], accepted["reasons"]) == ("another", ["the birth date differs"])


def test_no_event_reads_what_a_person_rejected(store: Store, tmp_path: Path) -> None:
    hold(store)
    reject(store)
    arrivals = ArrivalStore(open_engine(f"sqlite:///{tmp_path}/wetread.sqlite"))
    later = AT + timedelta(hours=1)
    for source in ("api", "retry", "restart"):
        accept_study(store, UID, source=source, key="again", now=later)
    for kind in ("order", "images", "images-stable"):
        hear_of_study(arrivals, UID, kind, source=kind, key="again", now=later)  # type: ignore[arg-type]
    job = store.job(JOB)
    assert (job.state, job.look_at) == ("rejected", None)
    assert arrivals.due(later + timedelta(days=1)) == []
    notes = {event.source: event.note for event in store.events_of_job(JOB) if event.source != "test"}
    assert set(notes.values()) == {"nothing: a person rejected this study"}


def test_of_many_people_at_once_one_decides_and_the_others_are_told(store: Store, tmp_path: Path) -> None:
    hold(store)
    outcomes: list[str] = []
    start = threading.Barrier(8)

    def decide(number: int) -> None:
        own = Store(open_engine(f"sqlite:///{tmp_path}/wetread.sqlite"))
        act = release_study if number % 2 else reject_study
        start.wait()
        try:
            act(own, JOB, person=f"person-{number}", reason="me first", now=AT + timedelta(seconds=number))
            outcomes.append(f"done by person-{number}")
        except NotDecidable as refusal:
            outcomes.append(str(refusal))
        own.close()

    threads = [threading.Thread(target=decide, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    (done,) = [outcome for outcome in outcomes if outcome.startswith("done")]
    ((action, winner, _),) = decided(store)
    assert done == f"done by {winner}"
    refusals = [outcome for outcome in outcomes if outcome != done]
    assert len(refusals) == 7
    assert all(f"(last decision: {action} by {winner} at " in refusal for refusal in refusals)


def test_a_rejection_is_overruled_only_by_who_knows_of_it(store: Store) -> None:
    hold(store)
    reject(store)
    with pytest.raises(NotDecidable, match=r"is rejected: .* --overrule \(last decision: reject by ben at "):
        release(store, overrule=False)
    assert store.job(JOB).state == "rejected"
    assert release(store, minutes=3).state == "accepted"

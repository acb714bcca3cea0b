"""What is heard of studies: one job however much comes, nothing lost between a look and an event."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine

from middleware.intake.holding import NotDecidable, reject_study, release_study
from middleware.intake.inbox import accept_study, hear_of_study, job_id_of, next_try_at, see_studies, workflow_id
from middleware.store.arrivals import ArrivalStore, Seen
from middleware.store.queries import Store, open_engine

NOW = datetime(2026, 3, 4, 10, 30, tzinfo=UTC)
UID = "1.2.840.113619.2.1"
JOB = job_id_of(UID)


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return open_engine(f"sqlite:///{tmp_path}/wetread.sqlite")


@pytest.fixture
def arrivals(engine: Engine) -> ArrivalStore:
    return ArrivalStore(engine)


@pytest.fixture
def store(engine: Engine, arrivals: ArrivalStore) -> Store:
    return Store(engine)


def hear(arrivals: ArrivalStore, kind: str, key: str, at: datetime = NOW) -> bool:
    return hear_of_study(arrivals, UID, kind, source="s", key=key, now=at)[1]  # type: ignore[arg-type]


def seen(instances: int, digest: str = "d", uid: str = UID) -> Seen:
    return Seen(uid, instances, digest, "20260304")


def test_hints_of_any_number_and_order_are_one_job_that_waits(arrivals: ArrivalStore, store: Store) -> None:
    for key, kind in enumerate(("order", "images", "order", "images-stable")):
        assert hear(arrivals, kind, str(key), after(key))
    assert not hear(arrivals, "order", "0", after(9))
    (job,) = store.jobs_of_study(UID)
    assert (job.state, job.look_at) == ("waiting", after(3))
    assert len(store.events_of_job(JOB)) == 4


def test_first_run_of_a_study_that_waited_is_number_1_and_starts_once(arrivals: ArrivalStore, store: Store) -> None:
    hear(arrivals, "images", "1")
    (job,) = arrivals.due(NOW)
    assert arrivals.settle(job, after(5), state="accepted", look_at=after(5))
    assert not arrivals.settle(job, after(6), state="accepted", look_at=after(6))
    job = store.job(JOB)
    assert workflow_id(job) == f"{JOB}/run-1"
    assert job.facts["run_started_at"] == after(5).isoformat()


def test_event_between_a_look_and_its_verdict_is_not_lost(arrivals: ArrivalStore, store: Store) -> None:
    hear(arrivals, "images", "1")
    (looked_at,) = arrivals.due(NOW)
    hear(arrivals, "images", "2", after(1))
    assert not arrivals.settle(looked_at, after(2), state="unmatched", look_at=None)
    (job,) = arrivals.due(after(2))
    assert job.state == "waiting"


def test_images_that_come_during_a_reading_are_looked_at_after_it(arrivals: ArrivalStore, store: Store) -> None:
    accept_study(store, UID, source="http", key="k", now=NOW)
    store.update_job(JOB, after(1), state="reading")
    assert store.job(JOB).look_at is None
    hear(arrivals, "images", "1", after(2))
    assert arrivals.due(after(3)) == []
    assert not store.conclude_job(JOB, after(4), "released", [])
    (job,) = arrivals.due(after(5))
    assert job.state == "released"
    assert arrivals.settle(job, after(6), state="released", look_at=None, note="nothing")
    assert [event.note for event in store.events_of_job(JOB)] == ["", "nothing"]
    assert arrivals.due(after(999)) == []


@pytest.mark.parametrize(
    ("state", "then"),
    [("held", "waiting"), ("unmatched", "waiting"), ("released", "released"), ("rejected", "rejected"),
     ("unusable", "unusable"), ("failed", "failed")],
)  # fmt: skip
def test_order_reads_again_only_where_it_may_change_the_end(
    arrivals: ArrivalStore, store: Store, state: str, then: str
) -> None:
    accept_study(store, UID, source="http", key="k", now=NOW)
    store.update_job(JOB, NOW, state=state)
    hear(arrivals, "order", "o", after(1))
    assert store.job(JOB).state == then
    assert bool(store.events_of_job(JOB)[-1].note) == (then == state)


def test_order_that_comes_during_a_reading_is_weighed_at_its_end(arrivals: ArrivalStore, store: Store) -> None:
    for number, (state, then) in enumerate((("released", "released"), ("held", "waiting"), ("unmatched", "waiting"))):
        accept_study(store, UID, source="http", key=f"k{number}", now=after(number * 10))
        store.update_job(JOB, after(number * 10 + 1), state="reading")
        hear(arrivals, "order", f"o{number}", after(number * 10 + 2))
        store.conclude_job(JOB, after(number * 10 + 3), state, [])
        job = store.job(JOB)
        assert (job.state, bool(job.look_at)) == (then, then == "waiting")


def test_run_of_a_command_is_left_alone_by_the_service(arrivals: ArrivalStore, store: Store) -> None:
    accept_study(store, UID, source="process", key="p", now=NOW, by_command=True)
    assert arrivals.due(after(9)) == []


def test_study_that_waits_is_read_at_once_when_asked_for(arrivals: ArrivalStore, store: Store) -> None:
    hear(arrivals, "images", "1")
    job, _ = accept_study(store, UID, source="http", key="k", now=after(1))
    assert (job.state, workflow_id(job)) == ("accepted", f"{JOB}/run-1")


def test_what_the_pacs_has_is_news_only_where_it_differs(arrivals: ArrivalStore, store: Store) -> None:
    assert see_studies(arrivals, [seen(5)], source="pacs", first=True, now=NOW) == 0
    assert store.jobs_of_study(UID) == []
    assert see_studies(arrivals, [seen(5)], source="pacs", first=False, now=NOW) == 0
    for number, (count, digest) in enumerate(((6, "d"), (5, "d"), (6, "d"), (6, "another patient"))):
        assert see_studies(arrivals, [seen(count, digest)], source="pacs", first=False, now=after(number)) == 1
    assert len(store.events_of_job(JOB)) == 4


def test_what_is_gone_is_news_when_it_is_back(arrivals: ArrivalStore, store: Store) -> None:
    see_studies(arrivals, [seen(5), seen(5, uid="1.2.3")], source="pacs", first=True, now=NOW)
    assert arrivals.missing({"1.2.3"}, "20260301") == [UID]
    arrivals.forget(UID)
    assert see_studies(arrivals, [seen(5), seen(5, uid="1.2.3")], source="pacs", first=False, now=NOW) == 1
    assert arrivals.missing(set(), "20260305") == []  # days that were not looked at


def test_what_is_no_uid_is_passed_over_or_refused(arrivals: ArrivalStore) -> None:
    odd = Seen("no uid", 5, "d", "20260304")
    assert see_studies(arrivals, [odd, seen(1)], source="pacs", first=False, now=NOW) == 1
    with pytest.raises(ValueError, match="not a DICOM UID"):
        hear_of_study(arrivals, "no uid", "order", source="s", key="k", now=NOW)


def test_failed_reading_is_tried_again_for_two_days() -> None:
    assert next_try_at(NOW.isoformat(), after(1)) == after(1) + timedelta(minutes=30)
    assert next_try_at(NOW.isoformat(), NOW + timedelta(days=2)) is None


def test_watermark_is_kept(arrivals: ArrivalStore) -> None:
    assert arrivals.watermark("pacs") == ""
    arrivals.set_watermark("pacs", "a", NOW)
    arrivals.set_watermark("pacs", "b", NOW)
    assert arrivals.watermark("pacs") == "b"


# People


def hold(store: Store) -> None:
    accept_study(store, UID, source="http", key="k", now=NOW)
    store.update_job(JOB, NOW, facts={"held_identity": "i"})
    store.conclude_job(JOB, NOW, "held", ["the sex differs"])


def test_release_reads_again_in_spite_of_the_reasons(store: Store, arrivals: ArrivalStore) -> None:
    hold(store)
    job = release_study(store, JOB, person="r.ferrer", reason="typo at the desk", now=after(1))
    assert (job.state, workflow_id(job)) == ("accepted", f"{JOB}/run-2")
    assert job.facts["accepted"] == {"identity": "i", "reasons": ["the sex differs"], "person": "r.ferrer"}
    assert arrivals.due(after(2))[0].job_id == JOB
    (decision,) = store.decisions(JOB)
    assert (decision.action, decision.person, decision.reason) == ("release", "r.ferrer", "typo at the desk")
    with pytest.raises(NotDecidable, match="accepted, not held"):
        release_study(store, JOB, person="someone", reason="too", now=after(2))
    assert len(store.decisions(JOB)) == 1


def test_rejected_stays_so_until_a_person_releases_it(store: Store, arrivals: ArrivalStore) -> None:
    hold(store)
    reject_study(store, JOB, person="a", reason="other patient", now=after(1))
    accept_study(store, UID, source="http", key="again", now=after(2))
    for number, kind in enumerate(("order", "images", "images-stable")):
        hear(arrivals, kind, str(number), after(3))
    assert store.job(JOB).state == "rejected"
    assert arrivals.due(after(9)) == []
    again = release_study(store, JOB, person="b", reason="it is his", now=after(10), overrule=True)
    assert again.state == "accepted"


@pytest.mark.parametrize(("person", "reason"), [("", "why"), ("who", ""), (" ", "why")])
def test_decision_needs_a_person_and_a_reason(store: Store, person: str, reason: str) -> None:
    hold(store)
    for decide in (release_study, reject_study):
        with pytest.raises(NotDecidable, match="needs a"):
            decide(store, JOB, person=person, reason=reason, now=NOW)
    assert store.job(JOB).state == "held"


def test_decision_about_nothing_is_a_lookup_error(store: Store) -> None:
    with pytest.raises(LookupError):
        reject_study(store, "none", person="a", reason="b", now=NOW)

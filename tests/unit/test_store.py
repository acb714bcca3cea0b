"""The store and the inbox: what is accepted is durable, happens once, and never goes back from delivered."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from threading import Barrier
from typing import TypeVar

import pytest
from sqlalchemy import text
from sqlalchemy.exc import StatementError
from sqlmodel import Session

from middleware.intake.inbox import ENDED, accept_study, run_started_at, workflow_id
from middleware.store.artifacts import ArtifactStore
from middleware.store.queries import Store, open_engine
from middleware.store.tables import ArtifactRecord, Decision, Delivery, StepRun, StudyEvent

NOW = datetime(2026, 3, 4, 10, 30, tzinfo=UTC)
LATER = NOW + timedelta(minutes=5)
T = TypeVar("T")
STUDY = "1.2.840.113619.2.1"


def open_store(folder: Path) -> Store:
    return Store(open_engine(f"sqlite:///{folder}/wetread.sqlite"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path)


def accept(store: Store, key: str = "k1", now: datetime = NOW, study: str = STUDY) -> tuple[str, bool]:
    job, is_new = accept_study(store, study, source="pacs", key=key, now=now)
    return job.job_id, is_new


def delivery(number: int = 1, *, state: str = "pending", revision: int = 1, job_id: str = "j") -> Delivery:
    return Delivery(
        delivery_id=f"d{revision}-{number}",
        job_id=job_id,
        revision=revision,
        destination="pacs",
        artifact_name="seg.dcm",
        kind="seg",
        digest="0" * 64,
        position=number,
        state=state,
        created_at=NOW,
        updated_at=NOW,
    )


# The inbox


def test_same_key_is_one_event_and_one_job(store: Store) -> None:
    first, is_new = accept(store)
    again, is_new_again = accept(store)
    assert (first, is_new, is_new_again) == (again, True, False)
    assert [e.idempotency_key for e in store.events_of_job(first)] == ["pacs:k1"]
    assert workflow_id(store.job(first)).endswith("/run-1")


def test_same_key_of_another_source_is_another_event(store: Store) -> None:
    job_id, _ = accept(store)
    _, is_new = accept_study(store, STUDY, source="ris", key="k1", now=NOW)
    assert is_new
    assert len(store.events_of_job(job_id)) == 2
    assert len(store.jobs_of_study(STUDY)) == 1


@pytest.mark.parametrize("state", ["accepted", "reading"])
def test_new_event_of_a_study_being_read_starts_nothing(store: Store, state: str) -> None:
    job_id, _ = accept(store)
    store.update_job(job_id, NOW, state=state)
    _, is_new = accept(store, "k2")
    assert is_new
    assert store.job(job_id).state == state
    assert workflow_id(store.job(job_id)).endswith("/run-1")


@pytest.mark.parametrize("state", sorted(ENDED))
def test_new_event_after_an_end_starts_another_run(store: Store, state: str) -> None:
    job_id, _ = accept(store)
    store.update_job(job_id, NOW, state=state, reasons=["why"], facts={"study": "digest"})
    accept(store, "k2", LATER)
    job = store.job(job_id)
    assert (job.state, job.reasons, workflow_id(job)) == ("accepted", [], f"{job_id}/run-2")
    assert job.facts["study"] == "digest"
    assert run_started_at(job) == LATER
    store.update_job(job_id, LATER, state="failed")
    accept(store, "k2", LATER)
    assert store.job(job_id).state == "failed", "the same key again starts nothing"


@pytest.mark.parametrize("state", ["released", "failed"])
def test_event_during_a_reading_starts_one_more_run_when_it_ends(store: Store, state: str) -> None:
    job_id, _ = accept(store)
    store.update_job(job_id, NOW, state="reading")
    accept(store, "k2", LATER)
    accept(store, "k3", LATER)
    assert store.conclude_job(job_id, LATER, state, ["why"])
    job = store.job(job_id)
    assert (job.state, job.reasons, workflow_id(job), run_started_at(job)) == (
        "accepted",
        [],
        f"{job_id}/run-2",
        LATER,
    )
    assert not store.conclude_job(job_id, LATER, state, ["why"])
    assert (store.job(job_id).state, store.job(job_id).reasons) == (state, ["why"])


def test_run_of_a_first_event_started_when_the_job_was_created(store: Store) -> None:
    job_id, _ = accept(store)
    assert run_started_at(store.job(job_id)) == NOW


NO_UIDS = ["", "abc", "1.2.3.", "1..2", "1.02.3", "1." + "2" * 63, "1.2.3; drop", "1.2\n.3", "\u0663.\u0664"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("uid", NO_UIDS)
def test_refuses_what_is_no_uid(store: Store, uid: str) -> None:
    with pytest.raises(ValueError, match="not a DICOM UID"):
        accept(store, study=uid)
    assert store.jobs_in_state("accepted") == []


def test_blanks_around_a_uid_do_not_make_another_study(store: Store) -> None:
    assert accept(store)[0] == accept(store, "k2", study=f" {STUDY}\n")[0]
    assert len(store.jobs_of_study(STUDY)) == 1


def at_once(count: int, act: Callable[[int], T]) -> list[T]:
    barrier = Barrier(count)

    def run(number: int) -> T:
        barrier.wait()
        return act(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_many_threads_with_one_event_make_one_job(store: Store) -> None:
    outcomes = at_once(8, lambda _: accept(store))
    assert len({job_id for job_id, _ in outcomes}) == 1
    assert sum(is_new for _, is_new in outcomes) == 1


def test_many_threads_with_events_of_their_own_lose_none(store: Store) -> None:
    outcomes = at_once(8, lambda n: accept(store, f"k{n}"))
    (job_id,) = {job_id for job_id, _ in outcomes}
    assert all(is_new for _, is_new in outcomes)
    assert len(store.events_of_job(job_id)) == 8


def test_many_new_events_after_a_failure_start_one_run(store: Store) -> None:
    job_id, _ = accept(store)
    store.update_job(job_id, NOW, state="failed")
    at_once(8, lambda n: accept(store, f"again{n}"))
    assert workflow_id(store.job(job_id)).endswith("/run-2")


def test_facts_written_at_once_are_all_kept(store: Store) -> None:
    job_id, _ = accept(store)
    at_once(8, lambda n: store.update_job(job_id, NOW, facts={f"fact{n}": n}))
    assert store.job(job_id).facts == {f"fact{n}": n for n in range(8)}


# Jobs


def test_update_changes_only_what_is_given(store: Store) -> None:
    job_id, _ = accept(store)
    store.update_job(job_id, NOW, state="reading", protocol="p", reasons=["a"], revision=2, facts={"x": 1, "y": 1})
    store.update_job(job_id, LATER, facts={"y": 2})
    job = store.job(job_id)
    assert (job.state, job.protocol, job.reasons, job.revision) == ("reading", "p", ["a"], 2)
    assert (job.facts, job.updated_at, job.created_at) == ({"x": 1, "y": 2}, LATER, NOW)
    assert [j.job_id for j in store.jobs_in_state("reading", "held")] == [job_id]
    assert store.jobs_in_state("held") == []


def test_unknown_job_and_delivery_are_lookup_errors(store: Store) -> None:
    with pytest.raises(LookupError, match="no job x"):
        store.job("x")
    with pytest.raises(LookupError, match="no job x"):
        store.update_job("x", NOW, state="held")
    with pytest.raises(LookupError, match="no delivery x"):
        store.delivery("x")


def test_naive_time_is_refused_and_zones_become_utc(store: Store) -> None:
    with pytest.raises(StatementError, match="naive datetime"):
        accept(store, now=datetime(2026, 3, 4, 10, 30))
    assert store.jobs_of_study(STUDY) == []
    job_id, _ = accept(store, now=datetime(2026, 3, 4, 12, 30, tzinfo=timezone(timedelta(hours=2))))
    created = store.job(job_id).created_at
    assert (created, created.utcoffset()) == (NOW, timedelta(0))


# Durability


def test_everything_survives_a_reopen(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    job_id, _ = accept(store)
    store.update_job(job_id, NOW, facts={"nested": {"a": [1, None, "é"]}})
    record = ArtifactRecord(
        artifact_id="a1", job_id=job_id, revision=1, name="sr.dcm", kind="sr", media_type="x", digest="d", size_bytes=1
    )
    store.save_artifacts([record])
    store.save_artifacts([ArtifactRecord(**record.model_dump())])
    store.plan_deliveries(job_id, 1, [delivery(job_id=job_id)], NOW)
    for step in ("fetch", "context"):
        store.add_step_run(StepRun(job_id=job_id, step=step, started_at=NOW, duration_s=0.5, outcome="done"))
    store.close()

    reopened = open_store(tmp_path)
    assert reopened.job(job_id).facts == {"nested": {"a": [1, None, "é"]}}
    assert reopened.job(job_id).created_at == NOW
    assert [a.name for a in reopened.artifacts(job_id, 1)] == ["sr.dcm"]
    assert reopened.artifacts(job_id, 2) == []
    assert [d.state for d in reopened.deliveries(job_id=job_id)] == ["pending"]
    assert [s.step for s in reopened.step_runs(job_id)] == ["fetch", "context"]
    assert accept(reopened) == (job_id, False)


def test_commits_are_synced_in_a_write_ahead_log(tmp_path: Path) -> None:
    with open_engine(f"sqlite:///{tmp_path}/w.sqlite").connect() as connection:
        pragmas = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2}


def test_two_processes_worth_of_engines_share_one_file(tmp_path: Path) -> None:
    first, second = open_store(tmp_path), open_store(tmp_path)
    job_id, _ = accept(first)
    at_once(8, lambda n: (first, second)[n % 2].update_job(job_id, NOW, facts={str(n): n}))
    assert len(second.job(job_id).facts) == 8


def test_event_row_is_not_changed_by_its_repeat(store: Store) -> None:
    job_id, _ = accept(store)
    accept(store, now=LATER)
    (event,) = store.events_of_job(job_id)
    assert isinstance(event, StudyEvent)
    assert event.received_at == NOW


# Artifacts


def test_artifacts_are_kept_once_by_digest(tmp_path: Path) -> None:
    artifacts = ArtifactStore(f"file://{tmp_path}/a")
    first, again = artifacts.put(b"bytes"), artifacts.put(b"bytes")
    assert first == again
    assert artifacts.get(first.digest) == b"bytes"
    assert first.size_bytes == 5
    assert len([p for p in (tmp_path / "a").rglob("*") if p.is_file()]) == 1
    assert artifacts.get(artifacts.put_json({"b": 1, "a": [2]}).digest) == b'{"a": [2], "b": 1}'


def test_damaged_or_missing_artifact_is_never_returned(tmp_path: Path) -> None:
    artifacts = ArtifactStore(f"file://{tmp_path}/a")
    ref = artifacts.put(b"bytes")
    (file,) = (p for p in (tmp_path / "a").rglob("*") if p.is_file())
    file.write_bytes(b"other")
    with pytest.raises(ValueError, match="do not match its digest"):
        artifacts.get(ref.digest)
    with pytest.raises(FileNotFoundError):
        artifacts.get("ab" * 32)


def test_artifacts_work_on_another_file_system() -> None:
    artifacts = ArtifactStore("memory://wetread-test-artifacts")
    assert artifacts.get(artifacts.put(b"x" * 1000).digest) == b"x" * 1000


def test_jobs_heard_since_are_those_that_an_event_named_since(store: Store) -> None:
    first, _ = accept(store, "k1", NOW, "1.2.1")
    second, _ = accept(store, "k2", LATER, "1.2.2")
    assert [j.job_id for j in store.jobs_heard_since(NOW)] == [first, second]
    assert [j.job_id for j in store.jobs_heard_since(LATER)] == [second]
    accept(store, "k3", LATER, "1.2.1")
    assert [j.job_id for j in store.jobs_heard_since(LATER)] == [first, second]
    assert store.jobs_heard_since(LATER + timedelta(seconds=1)) == []


def test_decisions_of_a_job_come_oldest_first(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path}/wetread.sqlite")
    store = Store(engine)
    with Session(engine) as session:
        for number, (job, at) in enumerate([("j", LATER), ("j", NOW), ("other", NOW)]):
            made = {"decision_id": str(number), "job_id": job, "person": "p", "action": "release", "decided_at": at}
            session.add(Decision(**made))
        session.commit()
    assert [d.decision_id for d in store.decisions("j")] == ["1", "0"]

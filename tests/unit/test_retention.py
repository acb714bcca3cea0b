"""What the retention policy removes, and everything that it must not."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import Session, col, select

from middleware.retention import Pruning
from middleware.settings import RetentionSettings, Settings
from middleware.store.artifacts import ArtifactStore
from middleware.store.heard import HeardMessage
from middleware.store.queries import Store, open_engine
from middleware.store.retention import RetentionStore
from middleware.store.tables import ArtifactRecord, Delivery, StepRun, StudyEvent, StudyJob

NOW = datetime(2026, 6, 1, tzinfo=UTC)
OLD, NEW = NOW - timedelta(days=200), NOW - timedelta(days=3)


@dataclass
class Kept:
    """A site's stores, with jobs and artifacts of any age."""

    store: Store
    artifacts: ArtifactStore
    pruning: Pruning
    folder: Path
    engine: Any

    def put(self, text: str, at: datetime = OLD) -> str:
        """An artifact made then; its digest."""
        digest = self.artifacts.put(text.encode()).digest
        os.utime(self.folder / "artifacts" / digest[:2] / digest, (at.timestamp(), at.timestamp()))
        return digest

    def job(self, job_id: str, state: str, at: datetime = OLD, **facts: Any) -> None:
        with Session(self.engine) as session:
            session.add(
                StudyJob(
                    job_id=job_id,
                    study_instance_uid=f"1.2.{job_id}",
                    state=state,
                    revision=facts.pop("revision", 1),
                    facts=facts,
                    created_at=at,
                    updated_at=at,
                )
            )
            session.commit()

    def add(self, *rows: Any) -> None:
        with Session(self.engine) as session:
            session.add_all(rows)
            session.commit()

    def record(self, job_id: str, revision: int, digest: str) -> None:
        self.add(
            ArtifactRecord(
                artifact_id=f"{job_id}/{revision}/0",
                job_id=job_id,
                revision=revision,
                name="sr.dcm",
                kind="sr",
                media_type="x",
                digest=digest,
                size_bytes=1,
            )
        )

    def left(self) -> set[str]:
        """Digests that are still there."""
        return {p.name for p in (self.folder / "artifacts").glob("*/*")}

    def prune(self, **policy: Any) -> Pruning:
        return replace(
            self.pruning,
            settings=Settings(data_dir=self.folder, retention=RetentionSettings(**policy)),
        )


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    engine = open_engine(f"sqlite:///{tmp_path}/wetread.sqlite")
    artifacts = ArtifactStore(str(tmp_path / "artifacts"))
    pruning = Pruning(Settings(data_dir=tmp_path), RetentionStore(engine), artifacts, NOW)
    yield Kept(Store(engine), artifacts, pruning, tmp_path, engine)
    engine.dispose()


# Artifacts


def test_what_nobody_needs_goes_and_what_was_released_stays(kept: Kept) -> None:
    findings, study, arrays, sr, superseded = (
        kept.put(t) for t in ("findings", "study", "arrays", "sr", "sr of rev 1")
    )
    kept.job("j", "released", findings=findings, study=study, answer={"arrays": arrays}, revision=2)
    kept.record("j", 1, superseded)
    kept.record("j", 2, sr)
    orphan, lately = kept.put("orphan"), kept.put("made lately", NEW)
    (kept.folder / "artifacts" / "ab").mkdir(exist_ok=True)
    half = kept.folder / "artifacts" / "ab" / "abc.part"
    half.write_bytes(b"half")
    os.utime(half, (OLD.timestamp(), OLD.timestamp()))
    dry = replace(kept.pruning, dry_run=True).prune_artifacts()
    assert kept.left() == {findings, study, arrays, sr, superseded, orphan, lately, "abc.part"}
    done = kept.pruning.prune_artifacts()
    assert kept.left() == {findings, study, arrays, sr, lately}
    assert dry == done
    assert (done.count, done.size_bytes) == (3, len("sr of rev 1") + len("orphan") + len("half"))


def test_renderings_of_a_released_result_go_where_the_site_says_so_but_not_what_a_comparison_needs(kept: Kept) -> None:
    findings, rules, arrays, sr = (kept.put(text) for text in ("findings", "rules", "arrays", "sr"))
    kept.job("j", "released", findings=findings, rules=rules, answer={"arrays": arrays})
    kept.record("j", 1, sr)
    kept.prune(released_days=100).prune_artifacts()
    assert kept.left() == {findings, rules}


def test_a_result_that_was_released_is_kept_though_a_later_run_ended_otherwise(kept: Kept) -> None:
    findings, sr = kept.put("findings"), kept.put("sr")
    kept.job("j", "quarantined", findings=findings)
    kept.record("j", 1, sr)
    kept.pruning.prune_artifacts()
    assert kept.left() == {findings, sr}


def test_what_was_never_released_goes(kept: Kept) -> None:
    kept.job("j", "quarantined", study=kept.put("study"))
    kept.record("j", 1, kept.put("sr"))
    kept.job("young", "unmatched", at=NEW, study=kept.put("study of a younger one"))
    kept.pruning.prune_artifacts()
    assert len(kept.left()) == 1


@pytest.mark.parametrize("state", ["pending", "in_flight", "retrying", "ambiguous", "dead", "delivered"])
def test_what_did_not_arrive_stays(state: str, kept: Kept) -> None:
    kept.job("j", "released", findings=kept.put("findings"), revision=2)
    digest = kept.put("sr of rev 1")
    kept.add(
        Delivery(
            delivery_id="d",
            job_id="j",
            revision=1,
            destination="pacs",
            artifact_name="sr.dcm",
            kind="sr",
            digest=digest,
            position=0,
            state=state,
            created_at=OLD,
            updated_at=OLD,
        )
    )
    kept.pruning.prune_artifacts()
    assert (digest in kept.left()) == (state != "delivered")


@pytest.mark.parametrize("state", ["held", "waiting", "accepted", "reading"])
def test_jobs_that_are_not_over_keep_everything(state: str, kept: Kept) -> None:
    digests = {kept.put("study"), kept.put("context")}
    kept.job("j", state, **dict(zip("ab", digests, strict=True)))
    kept.pruning.prune_artifacts()
    assert kept.left() == digests


def test_what_a_reading_in_progress_made_stays_though_no_job_names_it_yet(kept: Kept) -> None:
    began = NOW - timedelta(days=150)
    kept.job("j", "reading", at=began, run_started_at=began.isoformat())
    priors = kept.put("priors of this run", began + timedelta(hours=1))
    kept.put("of long before")
    kept.pruning.prune_artifacts()
    assert kept.left() == {priors}


def test_what_is_put_again_counts_as_new(kept: Kept) -> None:
    digest = kept.put("the same again")
    kept.artifacts.put(b"the same again")
    replace(kept.pruning, now=datetime.now(UTC)).prune_artifacts()
    assert kept.left() == {digest}


# Spool


def test_the_spool_of_what_is_over_goes(kept: Kept) -> None:
    states = {"a": "released", "b": "held", "c": "reading", "d": "waiting", "e": "failed", "f": "unmatched"}
    for job_id, state in states.items():
        kept.job(job_id, state)
        (kept.folder / "spool" / f"{job_id}.run-1").mkdir(parents=True)
        (kept.folder / "spool" / f"{job_id}.run-1" / "000001.dcm").write_bytes(b"pixels")
    kept.job("young", "released", at=NOW - timedelta(hours=2))
    (kept.folder / "spool" / "young.run-1").mkdir()
    done = kept.pruning.prune_spool()
    left = {p.name.partition(".")[0] for p in (kept.folder / "spool").iterdir()}
    assert left == {"b", "c", "d", "young"}
    assert (done.count, done.size_bytes) == (3, 18)


# Rows


def message(state: str, at: datetime, key: str) -> HeardMessage:
    return HeardMessage(
        message_key=key, sender="s", control_id=key, message_type="ORM", raw=b"MSH|", state=state, received_at=at
    )


def test_message_texts_go_but_not_what_somebody_needs(kept: Kept) -> None:
    states = ("received", "applied", "refused", "unhandled", "unreadable")
    kept.add(*(message(state, OLD, state) for state in states), message("applied", NEW, "young"))
    counted = replace(kept.pruning, dry_run=True).prune_rows()[0]
    assert kept.pruning.prune_rows()[0] == counted
    with Session(kept.engine) as session:
        emptied = set(session.exec(select(HeardMessage.message_key).where(col(HeardMessage.raw) == b"")))
    assert emptied == {"applied", "unhandled", "unreadable"}
    assert kept.pruning.prune_rows()[0].count == 0, "each once"


def test_events_and_step_times_go_with_age(kept: Kept) -> None:
    ancient = NOW - timedelta(days=400)
    kept.job("over", "released", at=ancient)
    kept.job("held", "held", at=ancient)
    for key, job_id, at in (("1", "over", ancient), ("2", "held", ancient), ("3", "over", NEW)):
        kept.add(
            StudyEvent(idempotency_key=key, source="s", kind="k", study_instance_uid="1", job_id=job_id, received_at=at)
        )
    kept.add(
        *(StepRun(job_id="over", step="fetch", started_at=at, duration_s=1, outcome="done") for at in (ancient, NEW))
    )
    counts = [pruned.count for pruned in kept.pruning.prune_rows()]
    assert counts == [0, 1, 1, 0]
    assert [e.idempotency_key for e in kept.store.events_of_job("held")] == ["2"]
    assert [e.idempotency_key for e in kept.store.events_of_job("over")] == ["3"]


def test_one_process_of_many_prunes(kept: Kept) -> None:
    store = RetentionStore(kept.engine)
    assert store.claim_turn("prune", NOW, NOW - timedelta(hours=1))
    assert not store.claim_turn("prune", NOW, NOW - timedelta(hours=1))
    assert store.claim_turn("prune", NOW + timedelta(hours=2), NOW + timedelta(hours=1))


# Artifact stores


@pytest.mark.parametrize("kind", ["folder", "file URL", "memory"])
def test_every_artifact_store_keeps_gives_back_and_forgets(kind: str, tmp_path: Path) -> None:
    urls = {"folder": str(tmp_path / "a"), "file URL": f"file://{tmp_path}/b c", "memory": f"memory://{tmp_path.name}"}
    store = ArtifactStore(urls[kind])
    ref = store.put(b"bytes")
    assert store.put(b"bytes") == ref
    assert store.get(ref.digest) == b"bytes"
    later = datetime.now(UTC) + timedelta(days=10)
    assert list(store.find_unneeded(datetime.now(UTC) - timedelta(days=2), set())) == []
    assert list(store.find_unneeded(later, {ref.digest})) == []
    ((path, size),) = store.find_unneeded(later, set())
    assert size == 5
    store.remove(path)
    store.remove(path)
    with pytest.raises(FileNotFoundError):
        store.get(ref.digest)
    again = ArtifactStore(urls[kind])
    again.put(b"bytes")
    assert store.get(ref.digest) == b"bytes"

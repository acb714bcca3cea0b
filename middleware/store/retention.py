"""What of our tables may go, and what must stay: queries of the retention policy. Removing is done in small
transactions, so that nobody waits for long."""

import re
from collections.abc import Collection, Iterator
from datetime import datetime
from typing import Any

from sqlalchemy import Engine
from sqlmodel import Session, SQLModel, col, delete, select, update

from middleware.store.heard import HeardMessage
from middleware.store.queries import changing
from middleware.store.tables import ArtifactRecord, Delivery, DeliveryAnswer, StepRun, StudyEvent, StudyJob, Watermark
from middleware.store.workers import ALIVE, Worker

UNFINISHED = ("waiting", "accepted", "reading")
BATCH = 500
_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")


def digests_in(text: str) -> set[str]:
    """Every sha256 that a text names."""
    return set(_DIGEST.findall(text))


class RetentionStore:
    """Looks for what may go. Nothing here decides how old that must be."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def claim_turn(self, what: str, now: datetime, latest: datetime) -> bool:
        """Whether nobody has done `what` since `latest`; then it is ours, of all processes, to do."""
        with changing(self._engine) as session:
            last = session.get(Watermark, what, with_for_update=True)
            if last is not None and last.updated_at > latest:
                return False
            session.merge(Watermark(source=what, value="", updated_at=now))
            return True

    # Artifacts

    def unfinished_since(self) -> datetime | None:
        """When the oldest reading began that has not ended; None where all have."""
        with Session(self._engine) as session:
            jobs = session.exec(select(StudyJob).where(col(StudyJob.state).in_(("accepted", "reading")))).all()
            began = [job.facts.get("run_started_at") for job in jobs]
            times = [datetime.fromisoformat(at) if at else job.created_at for at, job in zip(began, jobs, strict=True)]
            return min(times, default=None)

    def needed(self, before: datetime, released_before: datetime | None) -> set[str]:
        """Digests that somebody still needs, however old: of deliveries that did not arrive; of jobs that are not over
        or changed since `before`; of what was released last, the findings and what led to them for good, and what was
        rendered of it (None: for good too, else of jobs that changed since)."""
        found: set[str] = set()
        released: dict[str, int] = {}
        with Session(self._engine) as session:
            found.update(session.exec(select(Delivery.digest).where(Delivery.state != "delivered")))
            found.update(session.exec(select(DeliveryAnswer.digest)))
            for job in session.exec(select(StudyJob).execution_options(yield_per=BATCH)):
                is_shown = released_before is None or job.updated_at >= released_before
                if job.state in (*UNFINISHED, "held") or job.updated_at >= before:
                    found |= digests_in(str(job.facts))
                    released[job.job_id] = job.revision
                elif "findings" in job.facts:
                    facts = {k: v for k, v in job.facts.items() if is_shown or k != "answer"}
                    found |= digests_in(str(facts))
                    released |= {job.job_id: job.revision} if is_shown else {}
            records = select(ArtifactRecord.job_id, ArtifactRecord.revision, ArtifactRecord.digest)
            for job_id, revision, digest in session.exec(records.execution_options(yield_per=BATCH)):
                if released.get(job_id) == revision:
                    found.add(digest)
        return found

    # Spool

    def jobs(self, job_ids: Collection[str]) -> dict[str, StudyJob]:
        """Those of these jobs that are known, by id."""
        with Session(self._engine, expire_on_commit=False) as session:
            found = session.exec(select(StudyJob).where(col(StudyJob.job_id).in_(job_ids)))
            return {job.job_id: job for job in found}

    # Rows

    def empty_messages(self, before: datetime, *, dry_run: bool) -> int:
        """Drop the text of messages that were applied (or never will be) before; what a resend is known by stays, and
        so do refused ones, which a person settles. How many."""
        done = (
            col(HeardMessage.state).in_(("applied", "unhandled", "unreadable")),
            col(HeardMessage.received_at) < before,
            col(HeardMessage.raw) != b"",
        )
        count = 0
        for positions in self._batches(col(HeardMessage.position), *done, dry_run=dry_run):
            count += len(positions)
            if not dry_run:
                with changing(self._engine) as session:
                    chosen = col(HeardMessage.position).in_(positions)
                    session.exec(update(HeardMessage).where(chosen).values(raw=b""))
        return count

    def remove_events(self, before: datetime, *, dry_run: bool) -> int:
        """Remove events of jobs that have ended. How many."""
        ended = select(StudyJob.job_id).where(col(StudyJob.state).not_in((*UNFINISHED, "held")))
        old = (col(StudyEvent.received_at) < before, col(StudyEvent.job_id).in_(ended))
        return self._remove(StudyEvent, col(StudyEvent.idempotency_key), *old, dry_run=dry_run)

    def remove_step_runs(self, before: datetime, *, dry_run: bool) -> int:
        """Remove the times of steps. How many."""
        old = col(StepRun.started_at) < before
        return self._remove(StepRun, col(StepRun.run_id), old, dry_run=dry_run)

    def remove_workers(self, before: datetime, *, dry_run: bool) -> int:
        """Forget processes that are no more. How many."""
        old = (col(Worker.last_seen_at) < before, col(Worker.state) != ALIVE)
        return self._remove(Worker, col(Worker.executor_id), *old, dry_run=dry_run)

    def _remove(self, table: type[SQLModel], key: Any, *where: Any, dry_run: bool) -> int:
        count = 0
        for keys in self._batches(key, *where, dry_run=dry_run):
            count += len(keys)
            if not dry_run:
                with changing(self._engine) as session:
                    session.exec(delete(table).where(key.in_(keys), *where))
        return count

    def _batches(self, key: Any, *where: Any, dry_run: bool) -> Iterator[list[Any]]:
        """The keys of rows that match, a batch at a time; each batch must be gone before the next is looked for, but
        for a dry run, which gives them all at once."""
        while True:
            with Session(self._engine) as session:
                query = select(key).where(*where)
                keys = list(session.exec(query if dry_run else query.limit(BATCH)))
            if keys:
                yield keys
            if dry_run or len(keys) < BATCH:
                return

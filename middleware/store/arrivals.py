"""What is heard of studies besides being told to read them: which wait for images, how much the PACS has of each, and
how far each source was heard. Every method is one transaction."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, SQLModel, col, select

from middleware.store.queries import REJECTED, changing, start_next_run
from middleware.store.tables import SeenStudy, StudyEvent, StudyJob, Watermark

WAITING = "waiting"


@dataclass(frozen=True)
class Seen:
    """What the PACS says of a study: how many instances, and a digest of whose it is (identity, accession)."""

    study_instance_uid: str
    instances: int
    digest: str
    study_date: str = ""


class ArrivalStore:
    """The jobs that wait, and what was seen of studies."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        SQLModel.metadata.create_all(engine)

    # Events

    def hear(self, happened: StudyEvent, *, reopen: Collection[str] = (), otherwise: str = "") -> tuple[StudyJob, bool]:
        """Remember an event that is a hint, not a request; the study's job and whether the event is new.

        A study nobody knew waits from now on; one that waits is looked at at once; one whose run ended in a state of
        `reopen` is read again, and of any other the event is kept with the note `otherwise`. Events of images
        (`kind` images, images-stable) of a study that was read ask for a look at what came.
        """
        try:
            return self._hear_in_turn(happened, reopen, otherwise)
        except IntegrityError:  # another connection heard of the same study meanwhile
            return self._hear_in_turn(happened, reopen, otherwise)

    def _hear_in_turn(self, happened: StudyEvent, reopen: Collection[str], otherwise: str) -> tuple[StudyJob, bool]:
        with changing(self._engine) as session:
            known = session.get(StudyEvent, happened.idempotency_key)
            if known is not None:
                return _job(session, known.job_id), False
            return _apply(session, happened, reopen, otherwise), True

    def see(self, found: Sequence[Seen], source: str, now: datetime, job_ids: Mapping[str, str]) -> int:
        """Remember what the PACS has; for each study that differs from before, an event of its images. The number of
        those. `job_ids` are by study UID; a study without one is remembered and nothing more (the first look ever)."""
        heard = 0
        with changing(self._engine) as session:
            for seen in found:
                row = session.get(SeenStudy, seen.study_instance_uid, with_for_update=True)
                if row is not None and (row.instances, row.digest) == (seen.instances, seen.digest):
                    continue
                row = _remember(session, row, seen, now)
                if job_id := job_ids.get(seen.study_instance_uid, ""):
                    heard += 1
                    _apply(session, _images_event(row, source, job_id, now), (), "")
        return heard

    def forget_missing(self, found: Collection[str], study_date_from: str) -> None:
        """Note that the PACS has no longer what it had of studies from this date (YYYYMMDD) on that are not among
        `found`, so that the same images sent again are news."""
        with changing(self._engine) as session:
            rows = session.exec(select(SeenStudy).where(SeenStudy.study_date >= study_date_from)).all()
            for row in rows:
                if row.study_instance_uid not in found:
                    row.instances, row.digest = 0, ""

    # Studies that wait

    def due(self, now: datetime, limit: int = 50) -> list[StudyJob]:
        """Jobs that are to be looked at by now, the longest overdue first; none that is being read."""
        with Session(self._engine, expire_on_commit=False) as session:
            query = select(StudyJob).where(col(StudyJob.look_at) <= now, StudyJob.state != "reading")
            return list(session.exec(query.order_by(col(StudyJob.look_at)).limit(limit)))

    def next_look(self) -> datetime | None:
        """When the next job is due; None where none is."""
        with Session(self._engine) as session:
            query = select(StudyJob.look_at).where(col(StudyJob.look_at).is_not(None), StudyJob.state != "reading")
            return session.exec(query.order_by(col(StudyJob.look_at)).limit(1)).first()

    def settle(
        self,
        before: StudyJob,
        now: datetime,
        *,
        state: str,
        look_at: datetime | None,
        reasons: Sequence[str] = (),
        facts: Mapping[str, Any] | None = None,
        note: str = "",
    ) -> bool:
        """Remember what a look at a job's images came to; False where an event changed the job since `before`, so that
        it is looked at again. Becoming accepted starts the next run; `note` goes to the event that led to this look."""
        with changing(self._engine) as session:
            job = _job(session, before.job_id, for_update=True)
            if (job.state, job.look_at) != (before.state, before.look_at):
                return False
            if state == "accepted" != before.state:
                start_next_run(job, now)
            job.state, job.look_at, job.updated_at = state, look_at, now
            job.reasons, job.facts = list(reasons), {**job.facts, **(facts or {})}
            session.add(job)
            if note:
                _annotate(session, job.job_id, note)
            return True

    # Watermarks

    def watermark(self, source: str) -> str:
        """How far the source was heard; empty where it never was."""
        with Session(self._engine) as session:
            found = session.get(Watermark, source)
            return found.value if found else ""

    def set_watermark(self, source: str, value: str, now: datetime) -> None:
        """Remember how far the source was heard."""
        with changing(self._engine) as session:
            session.merge(Watermark(source=source, value=value, updated_at=now))


def _job(session: Session, job_id: str, *, for_update: bool = False) -> StudyJob:
    job = session.get(StudyJob, job_id, with_for_update=for_update or None)
    if job is None:
        raise LookupError(f"no job {job_id}")
    return job


def _apply(session: Session, happened: StudyEvent, reopen: Collection[str], otherwise: str) -> StudyJob:
    event = StudyEvent(**happened.model_dump())
    at = event.received_at
    job = session.get(StudyJob, event.job_id, with_for_update=True)
    if job is None:
        uid = event.study_instance_uid
        job = StudyJob(job_id=event.job_id, study_instance_uid=uid, state=WAITING, created_at=at, updated_at=at)
        job.look_at, job.facts = at, {"run": 0}  # none yet: the first run is number 1
    elif job.state == "rejected":
        event.note = REJECTED
    elif event.kind.startswith("images") or job.state == WAITING:
        job.look_at = at
    elif job.state in reopen:
        start_next_run(job, at)
        job.look_at = at
    else:
        event.note = otherwise
    if event.kind == "images-stable":
        job.facts = {**job.facts, "said_stable": event.idempotency_key}
    session.add(job)
    session.add(event)
    session.flush()
    return job


def _remember(session: Session, row: SeenStudy | None, seen: Seen, now: datetime) -> SeenStudy:
    row = row or SeenStudy(study_instance_uid=seen.study_instance_uid, instances=0, seen_at=now)
    row.instances, row.digest, row.study_date = seen.instances, seen.digest, seen.study_date
    row.changes, row.seen_at = row.changes + 1, now
    session.add(row)
    return row


def _images_event(row: SeenStudy, source: str, job_id: str, now: datetime) -> StudyEvent:
    return StudyEvent(
        idempotency_key=f"{source}:{row.study_instance_uid}/{row.changes}",
        source=source,
        kind="images",
        study_instance_uid=row.study_instance_uid,
        job_id=job_id,
        received_at=now,
    )


def _annotate(session: Session, job_id: str, note: str) -> None:
    query = select(StudyEvent).where(
        StudyEvent.job_id == job_id, StudyEvent.note == "", col(StudyEvent.kind).startswith("images")
    )
    latest = session.exec(query.order_by(col(StudyEvent.received_at).desc()).limit(1)).first()
    if latest is not None:
        latest.note = note

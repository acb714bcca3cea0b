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
AT_ONCE, TOGETHER = 500, 50
"""Studies asked for in one statement, and changed in one transaction."""


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

    def hear(
        self,
        happened: StudyEvent,
        *,
        reopen: Collection[str] = (),
        otherwise: str = "",
        changed_at: datetime | None = None,
    ) -> tuple[StudyJob, bool]:
        """Remember an event that is a hint, not a request; the study's job and whether the event is new.

        A study nobody knew waits from now on; one that waits is looked at at once; one whose run ended in a state of
        `reopen` waits again, so that a look decides whether it is to be read, and of any other the event is kept with
        the note `otherwise`. What is told of changed at `changed_at`; a run that began later knew it, and is not
        repeated. Events of images (`kind` images, images-stable) of a study that was read ask for a look at what came.
        """
        try:
            return self._hear_in_turn(happened, reopen, otherwise, changed_at)
        except IntegrityError:  # another connection heard of the same study meanwhile
            return self._hear_in_turn(happened, reopen, otherwise, changed_at)

    def _hear_in_turn(
        self, happened: StudyEvent, reopen: Collection[str], otherwise: str, changed_at: datetime | None
    ) -> tuple[StudyJob, bool]:
        with changing(self._engine) as session:
            known = session.get(StudyEvent, happened.idempotency_key)
            if known is not None:
                return _job(session, known.job_id), False
            return _apply(session, happened, reopen, otherwise, changed_at), True

    def see(self, found: Sequence[Seen], source: str, now: datetime, job_ids: Mapping[str, str]) -> int:
        """Remember what the PACS has; for each study that differs from before, an event of its images. The number of
        those. `job_ids` are by study UID; a study without one is remembered and nothing more (the first look ever)."""
        changed = self._differing(found)
        # A few at a time: who has a message to keep waits for us meanwhile.
        parts = [changed[first : first + TOGETHER] for first in range(0, len(changed), TOGETHER)]
        return sum(self._note_changes(part, source, now, job_ids) for part in parts)

    def _note_changes(self, changed: Sequence[Seen], source: str, now: datetime, job_ids: Mapping[str, str]) -> int:
        heard = 0
        with changing(self._engine) as session:
            for seen in changed:
                row = session.get(SeenStudy, seen.study_instance_uid, with_for_update=True)
                if row is not None and (row.instances, row.digest) == (seen.instances, seen.digest):
                    continue
                row = _remember(session, row, seen, now)
                if job_id := job_ids.get(seen.study_instance_uid, ""):
                    heard += 1
                    _apply(session, _images_event(row, source, job_id, now), (), "")
        return heard

    def _differing(self, found: Sequence[Seen]) -> list[Seen]:
        """Those that are not as they were, by plain reading."""
        known: dict[str, tuple[int, str]] = {}
        with Session(self._engine) as session:
            for first in range(0, len(found), AT_ONCE):
                uids = [seen.study_instance_uid for seen in found[first : first + AT_ONCE]]
                query = select(SeenStudy).where(col(SeenStudy.study_instance_uid).in_(uids))
                known.update((row.study_instance_uid, (row.instances, row.digest)) for row in session.exec(query))
        return [seen for seen in found if known.get(seen.study_instance_uid) != (seen.instances, seen.digest)]

    def missing(self, found: Collection[str], study_date_from: str) -> list[str]:
        """Studies from this date (YYYYMMDD) on that the PACS had, and that are not among `found`."""
        with Session(self._engine) as session:
            query = select(SeenStudy.study_instance_uid)
            query = query.where(SeenStudy.study_date >= study_date_from, SeenStudy.instances > 0)
            return [uid for uid in session.exec(query) if uid not in found]

    def forget(self, study_uid: str) -> None:
        """Note that the PACS has nothing of a study any more, so that the same images sent again are news."""
        with changing(self._engine) as session:
            row = session.get(SeenStudy, study_uid)
            if row is not None:
                row.instances, row.digest = 0, ""

    # Studies that wait

    def due(self, now: datetime, limit: int = 50) -> list[StudyJob]:
        """Jobs that are to be looked at by now, the longest overdue first; none that is being read."""
        with Session(self._engine, expire_on_commit=False) as session:
            query = select(StudyJob).where(col(StudyJob.look_at) <= now, StudyJob.state != "reading")
            return list(session.exec(query.order_by(col(StudyJob.look_at)).limit(limit)))

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


def _apply(
    session: Session,
    happened: StudyEvent,
    reopen: Collection[str],
    otherwise: str,
    changed_at: datetime | None = None,
) -> StudyJob:
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
    elif job.state in reopen and _is_news(job, changed_at):
        job.state, job.look_at = WAITING, at
    elif job.state in ("accepted", "reading") and _is_news(job, changed_at):
        job.facts = {**job.facts, "told_at": at.isoformat()}  # whether it matters is known when the run ends
        event.note = "weighed when the reading that went on has ended"
    else:
        event.note = otherwise
    if event.kind == "images-stable":
        job.facts = {**job.facts, "said_stable": event.idempotency_key}
    session.add(job)
    session.add(event)
    session.flush()
    return job


def _is_news(job: StudyJob, changed_at: datetime | None) -> bool:
    """Whether the last run of the job began before this changed."""
    began = job.facts.get("run_started_at")
    return changed_at is None or changed_at > (datetime.fromisoformat(began) if began else job.created_at)


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

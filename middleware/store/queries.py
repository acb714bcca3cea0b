"""Reading and writing the tables; each method is one transaction."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, SQLModel, col, create_engine, select

from middleware.store.tables import ArtifactRecord, Decision, Delivery, DeliveryAnswer, StepRun, StudyEvent, StudyJob

MAY_CHANGE = frozenset({"held", "unmatched"})
"""States of a job that what an order or the EHR says may change: whose study it is, and what rules look at."""
REJECTED = "nothing: a person rejected this study"
"""The note of an event that reads nothing for that."""
SUPERSEDED_STATES = ("pending", "retrying")
"""Deliveries in these states go no more once there is a newer revision. What is being sent at that moment is told by
its own end, since it may arrive."""


def open_engine(url: str) -> Engine:
    """An engine whose commits survive a crash: on SQLite write-ahead log, full sync and a patient busy timeout."""
    engine = create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
    if url.startswith("sqlite"):

        @event.listens_for(engine, "connect")
        def set_pragmas(connection: Any, _record: Any) -> None:
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=30000", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}")

    return engine


@contextmanager
def changing(engine: Engine) -> Iterator[Session]:
    """A transaction that reads before it writes, committed at the end. Nobody changes in between what it read
    with `for_update`: PostgreSQL locks the rows, SQLite (which has no row locks) the whole file for writers."""
    with Session(engine, expire_on_commit=False) as session:
        if engine.dialect.name == "sqlite":
            session.connection().exec_driver_sql("BEGIN IMMEDIATE")
        yield session
        session.commit()


def start_next_run(job: StudyJob, at: datetime) -> None:
    """Accept the job's next run in its own transaction; `at` dates the result."""
    run = {"run": int(job.facts.get("run", 1)) + 1, "run_started_at": at.isoformat()}
    job.state, job.reasons, job.facts, job.updated_at = "accepted", [], {**job.facts, **run}, at


class Store:
    """Wetread's memory. Methods take and give table rows, detached and safe to read."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        SQLModel.metadata.create_all(engine)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def ping(self) -> None:
        """Raise unless the database answers."""
        with self._session() as session:
            session.exec(select(StudyJob.job_id).limit(1)).all()

    def _session(self) -> Session:
        return Session(self._engine, expire_on_commit=False)

    def _changing(self) -> AbstractContextManager[Session]:
        return changing(self._engine)

    # Events and jobs

    def accept_event(
        self,
        happened: StudyEvent,
        *,
        ended: Collection[str] = (),
        looked_at: Collection[str] = (),
        by_command: bool = False,
    ) -> tuple[StudyJob, bool]:
        """Remember an event and its job durably; the job and whether the event is new. The same key twice is
        one event; a second event of a job that exists adds no second job, but starts its next run where the job's
        state is among `ended`, or has its images looked at again where among `looked_at`, in the same transaction.
        `by_command`: whoever asks does this run itself, with images, context or protocol of its own; the service leaves
        it alone."""
        try:
            return self._add_event(happened, ended, looked_at, by_command)
        except IntegrityError:  # the event, or another one of the same study, arrived on another connection meanwhile
            return self._add_event(happened, ended, looked_at, by_command)

    def _add_event(
        self, happened: StudyEvent, ended: Collection[str], looked_at: Collection[str], by_command: bool
    ) -> tuple[StudyJob, bool]:
        with self._changing() as session:
            known = session.get(StudyEvent, happened.idempotency_key)
            if known is not None:
                return self._existing_job(session, known.job_id), False
            job = session.get(StudyJob, happened.job_id, with_for_update=True)
            if job is None:
                job = StudyJob(
                    job_id=happened.job_id,
                    study_instance_uid=happened.study_instance_uid,
                    state="accepted",
                    look_at=happened.received_at,
                    created_at=happened.received_at,
                    updated_at=happened.received_at,
                )
            elif job.state in looked_at:
                job.look_at = happened.received_at
            elif job.state in ended:
                start_next_run(job, happened.received_at)
                job.look_at = happened.received_at  # whoever looks after jobs starts it, should the caller die now
            elif job.state == "reading":  # the images of this run may be fetched already: read once more after it
                job.facts = {**job.facts, "again_at": happened.received_at.isoformat()}
            note = REJECTED if job.state == "rejected" else happened.note
            if job.state == "accepted":
                others = {key: value for key, value in job.facts.items() if key != "by_command"}
                job.facts = {**others, "by_command": True} if by_command else others
                job.look_at = None if by_command else job.look_at
            session.add(job)
            session.add(StudyEvent(**{**happened.model_dump(), "note": note}))
            return job, True

    def conclude_job(
        self, job_id: str, now: datetime, state: str, reasons: Sequence[str], *, look_at: datetime | None = None
    ) -> bool:
        """Remember how a run ended, and when to look at the job again (or as events asked meanwhile); True where
        somebody asked for another reading meanwhile, so that the next run is accepted instead."""
        with self._changing() as session:
            job = self._existing_job(session, job_id, for_update=True)
            job.state, job.reasons, job.updated_at = state, list(reasons), now
            asked = job.look_at if state != "failed" else None
            job.look_at = min((at for at in (look_at, asked) if at), default=None)
            told_at = job.facts.get("told_at")
            if told_at and state in MAY_CHANGE:  # an order that came meanwhile: a look decides
                job.state, job.look_at = "waiting", now
            job.facts = {key: value for key, value in job.facts.items() if key != "told_at"}
            asked_at = job.facts.get("again_at")
            if asked_at:
                job.facts = {key: value for key, value in job.facts.items() if key != "again_at"}
                start_next_run(job, datetime.fromisoformat(asked_at))
            session.add(job)
            return bool(asked_at)

    def _existing_job(self, session: Session, job_id: str, *, for_update: bool = False) -> StudyJob:
        job = session.get(StudyJob, job_id, with_for_update=for_update or None)
        if job is None:
            raise LookupError(f"no job {job_id}")
        return job

    def job(self, job_id: str) -> StudyJob:
        """The job; LookupError if there is none."""
        with self._session() as session:
            return self._existing_job(session, job_id)

    def jobs_of_study(self, study_instance_uid: str) -> list[StudyJob]:
        """All jobs of a study, oldest first."""
        with self._session() as session:
            query = select(StudyJob).where(StudyJob.study_instance_uid == study_instance_uid)
            return list(session.exec(query.order_by(col(StudyJob.created_at))))

    def jobs_of_accession(self, accession_number: str) -> list[StudyJob]:
        """All jobs of studies whose images name this accession number."""
        with self._session() as session:
            query = select(StudyJob).where(StudyJob.accession_number == accession_number)
            return list(session.exec(query.order_by(col(StudyJob.created_at)))) if accession_number else []

    def jobs_of_patient(self, patient_ids: Collection[str]) -> list[StudyJob]:
        """All jobs of studies whose images name one of these patient ids, of any issuer; the newest study first."""
        with self._session() as session:
            query = select(StudyJob).where(col(StudyJob.patient_id).in_(patient_ids), StudyJob.patient_id != "")
            return list(session.exec(query.order_by(col(StudyJob.study_date).desc(), col(StudyJob.job_id))))

    def jobs_in_state(self, *states: str) -> list[StudyJob]:
        """All jobs in one of these states, oldest first."""
        with self._session() as session:
            query = select(StudyJob).where(col(StudyJob.state).in_(states))
            return list(session.exec(query.order_by(col(StudyJob.created_at))))

    def jobs_heard_since(self, since: datetime) -> list[StudyJob]:
        """All jobs that an event named since then, oldest first."""
        with self._session() as session:
            heard = select(StudyEvent.job_id).where(col(StudyEvent.received_at) >= since)
            query = select(StudyJob).where(col(StudyJob.job_id).in_(heard))
            return list(session.exec(query.order_by(col(StudyJob.created_at))))

    def events_of_job(self, job_id: str) -> list[StudyEvent]:
        """The events that led to a job, oldest first."""
        with self._session() as session:
            query = select(StudyEvent).where(StudyEvent.job_id == job_id)
            return list(session.exec(query.order_by(col(StudyEvent.received_at))))

    def update_job(
        self,
        job_id: str,
        now: datetime,
        *,
        state: str | None = None,
        protocol: str | None = None,
        reasons: Sequence[str] | None = None,
        revision: int | None = None,
        facts: dict[str, Any] | None = None,
        images: Mapping[str, str] | None = None,
    ) -> None:
        """Change what is given; `facts` are merged into those there. `images` are patient_id, patient_issuer,
        study_date and accession_number as the images state them."""
        with self._changing() as session:
            job = self._existing_job(session, job_id, for_update=True)
            job.updated_at = now
            if state is not None:
                job.state = state
                job.look_at = None if state == "reading" else job.look_at  # what comes from now on is another look
            if protocol is not None:
                job.protocol = protocol
            if reasons is not None:
                job.reasons = list(reasons)
            if revision is not None:
                job.revision = revision
            if facts is not None:
                job.facts = {**job.facts, **facts}
            for name, value in (images or {}).items():
                setattr(job, name, value)
            session.add(job)

    def decide(self, decision: Decision, apply: Callable[[StudyJob], None]) -> StudyJob:
        """Remember a person's decision together with what it changes of its job; neither where `apply` raises."""
        with self._changing() as session:
            job = self._existing_job(session, decision.job_id, for_update=True)
            apply(job)
            job.updated_at = decision.decided_at
            session.add(job)
            session.add(decision)
            return job

    def decisions(self, job_id: str) -> list[Decision]:
        """What people decided about a job, oldest first."""
        with self._session() as session:
            query = select(Decision).where(Decision.job_id == job_id)
            return list(session.exec(query.order_by(col(Decision.decided_at))))

    # Artifacts

    def save_artifacts(self, records: Sequence[ArtifactRecord]) -> None:
        """Remember artifacts; repeating it changes nothing."""
        with self._session() as session:
            for record in records:
                session.merge(record)
            session.commit()

    def artifacts(self, job_id: str, revision: int) -> list[ArtifactRecord]:
        """The artifacts of one revision of a job, in the order in which a destination gets them."""
        with self._session() as session:
            query = select(ArtifactRecord).where(ArtifactRecord.job_id == job_id, ArtifactRecord.revision == revision)
            return list(session.exec(query.order_by(col(ArtifactRecord.artifact_id))))

    # Deliveries

    def plan_deliveries(self, job_id: str, revision: int, deliveries: Sequence[Delivery], now: datetime) -> None:
        """Remember the deliveries of a revision: new ones are pending, dead ones of the same revision get another
        chance, and what is still on its way of an earlier revision is dead, since a newer result goes instead."""
        with self._changing() as session:
            for delivery in deliveries:
                known = session.get(Delivery, delivery.delivery_id, with_for_update=True)
                if known is None:
                    session.add(delivery)
                elif known.state == "dead" and delivery.state != "dead":  # what is withheld stays so
                    known.state, known.reason, known.updated_at = "pending", "", now
                    known.tried_since, known.due_at = None, None
            older = select(Delivery).where(Delivery.job_id == job_id, col(Delivery.revision) < revision)
            older = older.where(col(Delivery.state).in_(SUPERSEDED_STATES)).with_for_update()
            for delivery in session.exec(older.order_by(col(Delivery.created_at), col(Delivery.delivery_id))):
                delivery.state, delivery.reason = "dead", f"superseded by revision {revision}"
                delivery.due_at, delivery.updated_at = None, now

    def delivery(self, delivery_id: str) -> Delivery:
        """The delivery; LookupError if there is none."""
        with self._session() as session:
            found = session.get(Delivery, delivery_id)
            if found is None:
                raise LookupError(f"no delivery {delivery_id}")
            return found

    def deliveries(self, *, job_id: str | None = None, state: str | None = None) -> list[Delivery]:
        """Deliveries by job and state, in the order they are sent."""
        with self._session() as session:
            query = select(Delivery)
            if job_id is not None:
                query = query.where(Delivery.job_id == job_id)
            if state is not None:
                query = query.where(Delivery.state == state)
            order = (col(Delivery.created_at), col(Delivery.destination), col(Delivery.position))
            return list(session.exec(query.order_by(*order)))

    def keep_answer(self, answer: DeliveryAnswer) -> None:
        """Remember what the destination answered to an attempt; of the same attempt the last answer counts."""
        with self._session() as session:
            session.merge(answer)
            session.commit()

    def answers(self, delivery_id: str) -> list[DeliveryAnswer]:
        """The answers to a delivery's attempts that were kept, oldest first."""
        with self._session() as session:
            query = select(DeliveryAnswer).where(DeliveryAnswer.delivery_id == delivery_id)
            return list(session.exec(query.order_by(col(DeliveryAnswer.attempt))))

    # Steps

    def add_step_run(self, run: StepRun) -> None:
        """Remember one run of a step."""
        with self._session() as session:
            session.add(run)
            session.commit()

    def step_runs(self, job_id: str) -> list[StepRun]:
        """The step runs of a job, oldest first."""
        with self._session() as session:
            return list(session.exec(select(StepRun).where(StepRun.job_id == job_id).order_by(col(StepRun.run_id))))

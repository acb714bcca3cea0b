"""What Wetread remembers: events, studies, artifacts, deliveries, steps and people's decisions.

Times are aware UTC; SQLite keeps no zone, so `utc` puts it back on reading.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, Column, DateTime, TypeDecorator
from sqlalchemy.engine import Dialect
from sqlmodel import Field, SQLModel


class AwareTime(TypeDecorator[datetime]):
    """A timestamp that is UTC in every database and aware in Python; naive values are refused."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("naive datetime given to the store")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def time_field(*, nullable: bool = False, index: bool = False) -> Any:
    """A column of aware times."""
    return Field(
        default=None if nullable else ..., sa_column_kwargs={"nullable": nullable}, sa_type=AwareTime, index=index
    )


class StudyEvent(SQLModel, table=True):
    """What happened to a study, once for each key that its source gave it. `kind` is study-available (somebody says
    that it is to be read), images, images-stable or order; `note` says what came of it where it started nothing."""

    __tablename__ = "study_event"
    idempotency_key: str = Field(primary_key=True)
    source: str
    kind: str
    study_instance_uid: str = Field(index=True)
    job_id: str = Field(index=True)
    received_at: datetime = time_field()
    note: str = ""


class StudyJob(SQLModel, table=True):
    """One reading of one study. `state` is one of waiting (for images), accepted, reading, released, unmatched,
    unusable, held, quarantined, failed, rejected; `reasons` says why in sentences. `facts` holds references to what
    was made. `look_at` is when its images are to be looked at next, None where nothing is expected. Patient and date
    are the images', once they were read, so that priors are found."""

    __tablename__ = "study_job"
    job_id: str = Field(primary_key=True)
    study_instance_uid: str = Field(index=True)
    state: str = Field(index=True)
    protocol: str = ""
    revision: int = 1
    reasons: list[str] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    facts: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    patient_id: str = Field(default="", index=True)
    patient_issuer: str = ""
    study_date: str = ""
    accession_number: str = Field(default="", index=True)
    look_at: datetime | None = time_field(nullable=True, index=True)
    created_at: datetime = time_field()
    updated_at: datetime = time_field()


class SeenStudy(SQLModel, table=True):
    """What the PACS had of a study when it was last looked at: the number of instances, a digest of patient and
    accession. `changes` counts how often that differed, so that each change is an event of its own."""

    __tablename__ = "seen_study"
    study_instance_uid: str = Field(primary_key=True)
    instances: int
    digest: str = ""
    study_date: str = Field(default="", index=True)
    changes: int = 0
    seen_at: datetime = time_field()


class Watermark(SQLModel, table=True):
    """How far a source of events was heard, in the source's own words."""

    __tablename__ = "watermark"
    source: str = Field(primary_key=True)
    value: str
    updated_at: datetime = time_field()


class ArtifactRecord(SQLModel, table=True):
    """One rendered artifact: its name in the result, where its bytes are (sha256), and its SOP instance if DICOM."""

    __tablename__ = "artifact"
    artifact_id: str = Field(primary_key=True)
    job_id: str = Field(index=True)
    revision: int
    name: str
    kind: str
    media_type: str
    digest: str
    size_bytes: int
    sop_instance_uid: str = ""


class Delivery(SQLModel, table=True):
    """One artifact on its way to one destination. `state` is one of pending, in_flight, delivered, retrying,
    ambiguous, dead; `receipt` is what the destination answered, `reason` why it is not delivered.

    Deliveries of one `order_key` (the accession number; the job where images state none) reach a destination in the
    order in which they were planned. `due_at` is when the service takes it up by itself; None where a workflow has it
    (`claimed_by` names the one that sends) or nothing is to be done. `tried_since` starts the clock of giving up;
    `replay` says why what was delivered once goes again.
    """

    __tablename__ = "delivery"
    delivery_id: str = Field(primary_key=True)
    job_id: str = Field(index=True)
    revision: int
    destination: str = Field(index=True)
    artifact_name: str
    kind: str
    digest: str
    position: int
    order_key: str = Field(default="", index=True)
    priority: int = 4
    state: str = Field(default="pending", index=True)
    attempts: int = 0
    receipt: str = ""
    reason: str = ""
    replay: str = ""
    claimed_by: str = ""
    tried_since: datetime | None = time_field(nullable=True)
    due_at: datetime | None = time_field(nullable=True, index=True)
    created_at: datetime = time_field()
    updated_at: datetime = time_field()


class DeliveryAnswer(SQLModel, table=True):
    """What a destination answered to one attempt, in its own words: the artifact store has the bytes (`digest`). It may
    hold patient data, and is therefore kept beside what was sent and in no log."""

    __tablename__ = "delivery_answer"
    delivery_id: str = Field(primary_key=True)
    attempt: int = Field(primary_key=True)
    digest: str
    received_at: datetime = time_field()


class DestinationHealth(SQLModel, table=True):
    """Whether a destination answers, as all workers found it. `down_since` is set after so many `failures` in a row;
    then it is only probed (next at `probe_at`), and once it answers, the delivery named by `trial` goes alone. Until
    `hold_until` it has asked to be left alone."""

    __tablename__ = "destination_health"
    destination: str = Field(primary_key=True)
    failures: int = 0
    reason: str = ""
    down_since: datetime | None = time_field(nullable=True)
    probe_at: datetime | None = time_field(nullable=True)
    trial: str = ""
    hold_until: datetime | None = time_field(nullable=True)


class StepRun(SQLModel, table=True):
    """One run of one step: when, how long, how it ended. Several runs of a step mean retries or restarts."""

    __tablename__ = "step_run"
    run_id: int | None = Field(default=None, primary_key=True)
    job_id: str = Field(index=True)
    step: str
    started_at: datetime = time_field()
    duration_s: float
    outcome: str


class Decision(SQLModel, table=True):
    """What a person decided about a job: who, what, when, why."""

    __tablename__ = "decision"
    decision_id: str = Field(primary_key=True)
    job_id: str = Field(index=True)
    person: str
    action: str
    reason: str = ""
    decided_at: datetime = time_field()

"""The inbox: what is accepted here is durable and happens once, whatever its source repeats."""

from datetime import datetime

from pydicom.uid import UID

from mappings.model.ids import derive_uuid
from middleware import telemetry
from middleware.store.queries import Store
from middleware.store.tables import StudyEvent, StudyJob

ENDED = frozenset({"released", "unmatched", "unusable", "failed", "held", "quarantined"})
"""States of a job whose run is over; a new event starts another run."""


def accept_study(store: Store, study_uid: str, *, source: str, key: str, now: datetime) -> tuple[StudyJob, bool]:
    """Remember, durably, that a study is to be read; its job, and whether this event is new.

    `key` is the source's own name of the event: the same key again changes nothing. A new event of a study that
    was read before reads it again (other findings become a new revision, the same ones change nothing); one of a
    study that is being read adds nothing. Raises ValueError for what is not a DICOM UID.
    """
    study_uid = study_uid.strip()  # or the same study would look like another
    if not UID(study_uid).is_valid:
        raise ValueError("study_instance_uid is not a DICOM UID: digits and dots, 64 characters at most")
    event = StudyEvent(
        idempotency_key=f"{source}:{key}",
        source=source,
        kind="study-available",
        study_instance_uid=study_uid,
        job_id=str(derive_uuid("job", study_uid)),
        received_at=now,
    )
    job, is_new = store.accept_event(event, ended=ENDED)
    telemetry.EVENTS.labels(source, "new" if is_new else "repeated").inc()
    telemetry.log("event", source=source, kind=event.kind, job_id=job.job_id, state=job.state)
    return job, is_new


def run_started_at(job: StudyJob) -> datetime:
    """When the current run of the job was accepted; a result of this run is dated so."""
    return datetime.fromisoformat(job.facts["run_started_at"]) if "run_started_at" in job.facts else job.created_at


def workflow_id(job: StudyJob) -> str:
    """The id of the workflow that does this run of the job; the same run always has the same one."""
    return f"{job.job_id}/run-{job.facts.get('run', 1)}"

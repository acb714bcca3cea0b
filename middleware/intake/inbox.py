"""The inbox: what is accepted here is durable and happens once, whatever its source repeats."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Literal

from pydicom.uid import UID

from mappings.model.ids import derive_uuid
from middleware import telemetry
from middleware.store.arrivals import WAITING, ArrivalStore, Seen
from middleware.store.queries import MAY_CHANGE, Store
from middleware.store.tables import StudyEvent, StudyJob

ENDED = frozenset({"released", "unmatched", "unusable", "failed", "held", "quarantined"})
"""States of a job whose run is over; being asked to read it again starts another run. A study that a person
rejected stays so until a person releases it."""

READ_ALREADY = frozenset({"accepted", "reading", "released"})
"""States in which to hear once more that a study is there is no news, unless images came since."""

TRY_AGAIN = timedelta(minutes=30)
STOP_TRYING = timedelta(days=2)
"""A failed reading is tried again so often and so long by itself: systems come back, and nobody may be looking."""

FIRST_LATE_LOOK, LAST_LATE_LOOK = timedelta(minutes=10), timedelta(days=1)
"""Where nobody tells of images that come after a reading, the study is looked at again from so long after it until so
long after it."""

Hint = Literal["order", "images", "images-stable"]


def job_id_of(study_uid: str) -> str:
    """The id of a study's only job."""
    return str(derive_uuid("job", study_uid))


def accept_study(
    store: Store,
    study_uid: str,
    *,
    source: str,
    key: str,
    now: datetime,
    is_request: bool = True,
    by_command: bool = False,
) -> tuple[StudyJob, bool]:
    """Remember, durably, that a study is to be read; its job, and whether this event is new.

    `key` is the source's own name of the event: the same key again changes nothing. A new event of a study that
    was read before reads it again (other findings become a new revision, the same ones change nothing), one of a
    study that is being read does so afterwards; one that waits for images waits no longer. `is_request` False: it only
    says that the study is there, which somebody else may have said before; of a study that was read for that, or is
    being read, it is then looked whether images came since. `by_command`: the caller does this run itself. Raises
    ValueError for what is not a DICOM UID.
    """
    event = _event(study_uid, "study-available", source, key, now)
    looked_at = frozenset() if is_request else READ_ALREADY
    job, is_new = store.accept_event(event, ended=ENDED | {WAITING}, looked_at=looked_at, by_command=by_command)
    _tell(event, job, is_new)
    return job, is_new


def hear_of_study(
    arrivals: ArrivalStore,
    study_uid: str,
    kind: Hint,
    *,
    source: str,
    key: str,
    now: datetime,
    changed_at: datetime | None = None,
) -> tuple[StudyJob, bool]:
    """Remember, durably, a hint that a study exists or has changed; its job, and whether this hint is new.

    Image, order and EHR hints of one study are one piece of work, whatever their order and number: the first makes the
    study wait for its images, later ones have them looked at again. Of a study that was read, an order matters only
    where the run ended for want of it and began before the order changed (`changed_at`). Raises ValueError for what is
    not a DICOM UID.
    """
    event = _event(study_uid, kind, source, key, now)
    otherwise = "nothing: the study was read already"
    job, is_new = arrivals.hear(event, reopen=MAY_CHANGE, otherwise=otherwise, changed_at=changed_at)
    _tell(event, job, is_new)
    return job, is_new


def see_studies(arrivals: ArrivalStore, found: Sequence[Seen], *, source: str, first: bool, now: datetime) -> int:
    """Remember what the PACS has; how many studies are new or have changed, each of which is heard of. `first`: the
    PACS was never looked at before, so what it has is not news. What has no DICOM UID is passed over."""
    valid = [seen for seen in found if UID(seen.study_instance_uid).is_valid]
    job_ids = {} if first else {seen.study_instance_uid: job_id_of(seen.study_instance_uid) for seen in valid}
    heard = arrivals.see(valid, source, now, job_ids)
    if heard:
        telemetry.EVENTS.labels(source, "new").inc(heard)
        telemetry.log("events", source=source, kind="images", count=heard)
    return heard


def _event(study_uid: str, kind: str, source: str, key: str, now: datetime) -> StudyEvent:
    study_uid = study_uid.strip()  # or the same study would look like another
    if not UID(study_uid).is_valid:
        raise ValueError("study_instance_uid is not a DICOM UID: digits and dots, 64 characters at most")
    return StudyEvent(
        idempotency_key=f"{source}:{key}",
        source=source,
        kind=kind,
        study_instance_uid=study_uid,
        job_id=job_id_of(study_uid),
        received_at=now,
    )


def _tell(event: StudyEvent, job: StudyJob, is_new: bool) -> None:
    telemetry.EVENTS.labels(event.source, "new" if is_new else "repeated").inc()
    telemetry.log("event", source=event.source, kind=event.kind, job_id=job.job_id, state=job.state)


def run_started_at(job: StudyJob) -> datetime:
    """When the current run of the job was accepted; a result of this run is dated so."""
    return datetime.fromisoformat(job.facts["run_started_at"]) if "run_started_at" in job.facts else job.created_at


def next_try_at(failing_since: str, now: datetime) -> datetime | None:
    """When a reading that has been failing since then is tried again by itself; None once it was tried for long."""
    is_hopeless = now - datetime.fromisoformat(failing_since) >= STOP_TRYING
    return None if is_hopeless else now + TRY_AGAIN


def workflow_id(job: StudyJob) -> str:
    """The id of the workflow that does this run of the job; the same run always has the same one."""
    return f"{job.job_id}/run-{job.facts.get('run', 1)}"


def spool_name(job: StudyJob) -> str:
    """The name of the folder that holds the images of this run of the job; it starts with the job's id and a dot."""
    return workflow_id(job).replace("/", ".")

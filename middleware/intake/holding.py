"""Held studies, and the people who decide about them: a release in spite of named reasons, or a rejection."""

from collections.abc import Callable
from datetime import datetime

from mappings.model.ids import derive_uuid
from middleware import telemetry
from middleware.store.queries import Store, start_next_run
from middleware.store.tables import Decision, StudyJob

RELEASABLE = frozenset({"held", "rejected"})
REJECTABLE = frozenset({"waiting", "held", "unmatched", "unusable", "failed", "quarantined"})


class NotDecidable(Exception):
    """The job is not in a state that a person can decide about so; the message says which and what else to do."""


def release_study(store: Store, job_id: str, *, person: str, reason: str, now: datetime) -> StudyJob:
    """Have a held study read in spite of the reasons it was held for; the accepted job. It is held again where
    another reason appears, or images or EHR name somebody else by then. Raises LookupError, NotDecidable."""

    def apply(job: StudyJob) -> None:
        if job.state not in RELEASABLE or "held_identity" not in job.facts:
            raise NotDecidable(f"the study is {job.state}, not held: there is nothing to release")
        reasons = job.facts.get("held_reasons") or job.reasons
        accepted = {"identity": job.facts["held_identity"], "reasons": reasons, "person": person}
        start_next_run(job, now)
        job.facts, job.look_at = {**job.facts, "accepted": accepted}, now

    return _decide(store, job_id, "release", person, reason, now, apply)


def reject_study(store: Store, job_id: str, *, person: str, reason: str, now: datetime) -> StudyJob:
    """Put a study away for good: no event reads it from now on, only a release by a person. Raises LookupError,
    NotDecidable."""

    def apply(job: StudyJob) -> None:
        if job.state not in REJECTABLE:
            known = "wait for its end" if job.state in ("accepted", "reading") else "there is nothing to reject"
            raise NotDecidable(f"the study is {job.state}: {known}")
        job.facts = {**job.facts, "held_reasons": list(job.reasons)}
        job.state, job.look_at = "rejected", None
        job.reasons = [f"rejected by {person}: {reason}", *job.reasons]

    return _decide(store, job_id, "reject", person, reason, now, apply)


def _decide(
    store: Store, job_id: str, action: str, person: str, reason: str, now: datetime, apply: Callable[[StudyJob], None]
) -> StudyJob:
    """Change the job and remember who did so and why, both or neither."""
    person, reason = person.strip(), reason.strip()
    if not person or not reason:
        raise NotDecidable("a decision needs a person and a reason")
    decision = Decision(
        decision_id=str(derive_uuid("decision", job_id, action, person, now.isoformat())),
        job_id=job_id,
        person=person,
        action=action,
        reason=reason,
        decided_at=now,
    )
    job = store.decide(decision, apply)
    telemetry.log("decision", job_id=job_id, kind=action, state=job.state)
    return job

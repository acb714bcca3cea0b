"""Held studies, and the people who decide about them: a release in spite of named reasons, or a rejection."""

from collections.abc import Callable
from datetime import datetime

from mappings.model.ids import derive_uuid
from middleware import telemetry
from middleware.store.queries import Store, start_next_run
from middleware.store.tables import Decision, StudyJob

RELEASABLE = frozenset({"held", "rejected"})
REJECTABLE = frozenset({"waiting", "held", "unmatched", "unusable", "failed", "quarantined"})

LONGEST_NAME, LONGEST_REASON = 64, 1000


class NotDecidable(Exception):
    """The job is not in a state that a person can decide about so; the message says which and what else to do."""


def release_study(
    store: Store, job_id: str, *, person: str, reason: str, now: datetime, overrule: bool = False
) -> StudyJob:
    """Have a held study read in spite of the reasons it was held for; the accepted job.

    It is held again where another reason appears, or images, EHR or orders name somebody else by then. `overrule`:
    also a study that somebody has rejected, which whoever looked at the list before that does not know. Raises
    LookupError, NotDecidable.
    """

    def apply(job: StudyJob) -> None:
        if job.state not in RELEASABLE:
            raise NotDecidable(f"the study is {job.state}, not held: there is nothing to release")
        if job.state == "rejected" and not overrule:
            raise NotDecidable("the study is rejected: to have it read all the same, release it with --overrule")
        reasons = job.reasons if job.state == "held" else job.facts.get("held_reasons", [])
        identity = job.facts.get("held_identity", "")
        accepted = {"identity": identity, "reasons": list(reasons), "person": " ".join(person.split())}
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
        # Only what it was held for is accepted by a release later on.
        job.facts = {**job.facts, "held_reasons": list(job.reasons) if job.state == "held" else []}
        job.state, job.look_at = "rejected", None
        job.reasons = [f"rejected by {' '.join(person.split())}: {' '.join(reason.split())}", *job.reasons]

    return _decide(store, job_id, "reject", person, reason, now, apply)


def _decide(
    store: Store, job_id: str, action: str, person: str, reason: str, now: datetime, apply: Callable[[StudyJob], None]
) -> StudyJob:
    """Change the job and remember who did so and why, both or neither."""
    person, reason = _checked("person", person, LONGEST_NAME), _checked("reason", reason, LONGEST_REASON)
    decision = Decision(
        decision_id=str(derive_uuid("decision", job_id, action, person, now.isoformat())),
        job_id=job_id,
        person=person,
        action=action,
        reason=reason,
        decided_at=now,
    )
    try:
        job = store.decide(decision, apply)
    except NotDecidable as refusal:
        raise NotDecidable(f"{refusal}{_last_decision(store, job_id)}") from refusal
    telemetry.log("decision", job_id=job_id, kind=action, state=job.state)
    return job


def _checked(what: str, text: str, longest: int) -> str:
    """The text as it is kept, on one line: the name goes into every result that is released."""
    text = " ".join(text.split())
    if not text:
        raise NotDecidable(f"a decision needs a {what}")
    if len(text) > longest or not text.isprintable():
        raise NotDecidable(f"the {what} must be printable text of {longest} characters at most")
    return text


def _last_decision(store: Store, job_id: str) -> str:
    """Who was there before, for the one who comes too late."""
    known = store.decisions(job_id)
    if not known:
        return ""
    last = known[-1]
    return f" (last decision: {last.action} by {last.person} at {last.decided_at.astimezone():%Y-%m-%d %H:%M})"

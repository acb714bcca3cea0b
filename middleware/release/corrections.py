"""Changes to a released result: what a person does to it, and the radiologist's own report, as the next revision.

A change is asked for here, durably and together with who asked and why; the workflow `correct_result` then makes the
revision and brings it to every destination that got the one before.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from pydantic import TypeAdapter

from mappings.model.findings import Findings
from mappings.model.ids import derive_uuid
from mappings.model.revision import Edit, OwnReport, Rejection, RevisionRefused, Signature
from mappings.model.study import Study
from mappings.reading.findings_to_revision import edit_findings, note_own_report, sign_findings, withdraw_findings
from mappings.reading.rerun_to_revision import adopt_rerun
from middleware.intake.holding import NotDecidable
from middleware.store.artifacts import ArtifactStore
from middleware.store.hearing import HearingStore
from middleware.store.queries import Store, start_next_run
from middleware.store.tables import Decision, StudyJob

CHANGEABLE = frozenset({"released", "held", "failed", "quarantined", "unusable"})
"""States of a job in which a result that was released before may be changed."""


@dataclass(frozen=True)
class Change:
    """What is to be done to the released result, by whom (`family^given`), when (aware) and why. `adopt`: take over the
    reading that was held because a person's result stood against it."""

    kind: Literal["sign", "edit", "withdraw", "report"]
    person: str
    at: datetime
    reason: str
    organisation: str = ""
    edits: tuple[Edit, ...] = ()
    text: str | None = None
    adopt: bool = False
    report: OwnReport | None = None


CHANGES = TypeAdapter(Change)
_FINDINGS = TypeAdapter(Findings)


def revise(released: Findings, change: Change, held_reading: Findings | None) -> Findings:
    """The revision that a change makes of the released findings. Raises RevisionRefused, ValueError."""
    now = change.at
    if change.kind == "withdraw":
        return withdraw_findings(released, Rejection(change.person, now, change.reason), now)
    if change.kind == "report" and change.report is not None:
        return note_own_report(released, change.report, now)
    if change.kind == "edit":
        return edit_findings(released, change.edits, now)
    signature = Signature(change.person, change.organisation, now)
    if not change.adopt:
        return sign_findings(released, signature, now, edits=change.edits, text=change.text)
    if held_reading is None:
        raise RevisionRefused("No reading waits to be taken over.")
    return adopt_rerun(released, held_reading, signature, now)


def ask_for_change(store: Store, artifacts: ArtifactStore, job_id: str, change: Change) -> StudyJob:
    """Remember a change and who asked for it; the job, whose next run makes it. What cannot be made is refused at once.
    Raises LookupError, NotDecidable, RevisionRefused."""
    job = store.job(job_id)
    released, held = load_released(artifacts, job)
    revise(released, change, held)
    digest = artifacts.put(CHANGES.dump_json(change)).digest

    def apply(now_job: StudyJob) -> None:
        if now_job.facts.get("findings") != job.facts.get("findings"):
            raise NotDecidable("the result was revised meanwhile: look at it again")
        if now_job.state not in CHANGEABLE or now_job.facts.get("change"):
            raise NotDecidable(f"the study is {now_job.state} or another change is under way: wait for its end")
        start_next_run(now_job, change.at)
        now_job.facts, now_job.look_at = {**now_job.facts, "change": digest, "by_command": False}, change.at

    return store.decide(_decision(job_id, change), apply)


def _decision(job_id: str, change: Change) -> Decision:
    return Decision(
        decision_id=str(derive_uuid("decision", job_id, change.kind, change.person, change.at.isoformat())),
        job_id=job_id,
        person=change.person,
        action=change.kind,
        reason=change.reason,
        decided_at=change.at,
    )


def load_released(artifacts: ArtifactStore, job: StudyJob) -> tuple[Findings, Findings | None]:
    """The released findings of a job, and the reading that is held against them, if any. Raises NotDecidable where
    nothing was released."""
    if not job.facts.get("findings") or not job.facts.get("released"):
        raise NotDecidable(f"the study is {job.state} and no result of it was released: there is nothing to change")
    load: Callable[[str], Findings] = lambda digest: _FINDINGS.validate_json(artifacts.get(digest))  # noqa: E731
    held = job.facts.get("held_reading")
    return load(job.facts["findings"]), load(held) if held else None


def find_own_report(heard: HearingStore, study: Study) -> OwnReport | None:
    """The radiologist's own final report of a study as messages told it; None where there is none."""
    reports = heard.final_reports(study.study_instance_uid, study.accession_number)
    if not reports:
        return None
    return OwnReport("C" if reports[0].status == "C" else "F", reports[0].reported_at)


def with_own_report(findings: Findings, report: OwnReport | None) -> Findings:
    """The findings of a first reading of a study that the radiologist has reported already."""
    return findings if report is None or findings.own_report == report else replace(findings, own_report=report)

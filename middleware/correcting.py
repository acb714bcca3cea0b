"""The steps of `correct_result` that `read_study` has not: what was released, and the revision that a change makes."""

from typing import TypedDict

from mappings.model.revision import RevisionRefused
from middleware import durable, steps
from middleware.errors import Stopped
from middleware.release.corrections import CHANGES, load_released, revise


class Recalled(TypedDict):
    """How the released result was made: the protocol, study and series, and the model's answer."""

    route: steps.Route
    answered: steps.Answered


@durable.step
async def recall(job_id: str, change: str) -> Recalled:
    """Recall how the released result was made or, where a change takes it over, the reading that is held. Another
    reading that was not released does not count."""
    here = steps.systems()
    facts = here.store.job(job_id).facts
    made: Recalled = facts["held_from" if CHANGES.validate_json(here.artifacts.get(change)).adopt else "released"]
    return Recalled(route=made["route"], answered=made["answered"])


@durable.step
async def apply_change(job_id: str, change: str) -> str:
    """Make the revision that a change asks for; the digest of its findings. Stops as held where it can no longer be
    made, with the sentence for the person who asked."""
    here = steps.systems()
    asked = CHANGES.validate_json(here.artifacts.get(change))
    released, held = load_released(here.artifacts, here.store.job(job_id))
    try:
        revised = revise(released, asked, held)
    except (RevisionRefused, ValueError) as refusal:
        raise Stopped("held", (str(refusal),)) from refusal
    return steps.keep_findings(revised)

"""The product, top to bottom: what happens to a study from the moment Wetread hears of it.

The workflows are durable (DBOS Transact): killed at any point, they go on after the last finished step. Steps
may run twice, so every effect is safe to repeat: its ids derive from the job and its revision.
"""

from dbos import DBOS, SetWorkflowID, error

from middleware import correcting, delivering, steps
from middleware.errors import Stopped


@DBOS.workflow()
async def read_study(job_id: str, study_uid: str, wanted_protocol: str = "") -> str:
    """Read one study and release the result to every destination; the state in which the reading ended."""
    planned = steps.Planned(destinations=[], priority=0)
    ended: str = "released"
    reasons: tuple[str, ...] = ()
    try:
        images = await steps.fetch_images(job_id, study_uid)
        route = await steps.choose_protocol(job_id, study_uid, images, wanted_protocol)
        context = await steps.gather_context(job_id, route)
        await steps.check_identity(job_id, route, context)
        route = await steps.apply_rules(job_id, route, context, wanted_protocol)
        priors = await steps.find_priors(job_id, route, context)
        answered = await steps.ask_model(job_id, images, route)
        findings = await steps.derive_findings(job_id, images, route, context, priors, answered)
        await steps.render(job_id, images, route, answered, findings)
        await steps.validate(job_id, findings, answered)
        planned = await steps.plan_release(job_id, route, answered, findings)
    except Stopped as stop:
        ended, reasons = stop.state, stop.reasons
    except error.DBOSException:
        raise
    except Exception as fault:
        ended, reasons = "failed", (steps.describe_fault(fault),)
    return await _hand_over(job_id, study_uid, planned, ended, reasons, wanted_protocol)


@DBOS.workflow()
async def correct_result(job_id: str, study_uid: str, change: str) -> str:
    """Release the next revision of a result that a person changed, signed or withdrew (or that the radiologist's own
    report stands beside) to every destination; the state in which that ended."""
    planned = steps.Planned(destinations=[], priority=0)
    ended: str = "released"
    reasons: tuple[str, ...] = ()
    try:
        images = await steps.fetch_images(job_id, study_uid)
        was = await correcting.recall(job_id, change)
        findings = await correcting.apply_change(job_id, change)
        await steps.render(job_id, images, was["route"], was["answered"], findings)
        await steps.validate(job_id, findings, was["answered"])
        planned = await steps.plan_release(job_id, was["route"], was["answered"], findings)
    except Stopped as stop:
        ended, reasons = stop.state, stop.reasons
    except error.DBOSException:
        raise
    except Exception as fault:
        ended, reasons = "failed", (steps.describe_fault(fault),)
    return await _hand_over(job_id, study_uid, planned, ended, reasons, "")


async def _hand_over(
    job_id: str, study_uid: str, planned: steps.Planned, ended: str, reasons: tuple[str, ...], wanted_protocol: str
) -> str:
    """Start a `deliver` for each destination, remember how the run ended, and go on with what came meanwhile."""
    for destination in planned["destinations"]:
        with SetWorkflowID(f"{DBOS.workflow_id}/{destination}"):
            await delivering.start(deliver, job_id, destination, planned["priority"])
    next_run = await steps.conclude(job_id, DBOS.workflow_id or "", ended, list(reasons))
    if next_run:  # something happened to the study while it was being read
        with SetWorkflowID(next_run):
            await DBOS.start_workflow_async(read_study, job_id, study_uid, wanted_protocol)
    return ended


@DBOS.workflow()
async def deliver(job_id: str, destination: str) -> None:
    """Bring a job's artifacts to one destination, in order, as far as it takes them now. What must wait is due again
    later (dispatching.py); no other destination waits for it or repeats."""
    for delivery_id in await delivering.list_deliveries(job_id, destination):
        await delivering.attempt_delivery(delivery_id)

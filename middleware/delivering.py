"""The steps of `deliver`: which deliveries are due at a destination, and one attempt at one of them."""

from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

from dbos import DBOS, SetEnqueueOptions

from middleware import durable, steps, telemetry
from middleware.release.deliveries import Outcome, give_up, oru_control_id, send_to_ehr, send_to_ris
from middleware.release.health import note_answer, note_failure, note_wish
from middleware.release.storing import send_to_pacs
from middleware.store.deliveries import SETTLED, Health
from middleware.store.tables import Delivery, DeliveryAnswer, DestinationHealth

Workflow = Callable[[str, str], Coroutine[Any, Any, None]]


def queue_of(destination: str) -> str:
    """The queue that brings results to a destination."""
    return f"deliver-{destination}"


async def start(deliver: Workflow, job_id: str, destination: str, priority: int) -> None:
    """Queue the delivering of a job's results, or begin at once where this process takes nothing from queues. The
    workflow's id is the caller's; the same one again changes nothing."""
    if steps.systems().takes_from_queues:
        with SetEnqueueOptions(priority=priority):
            await DBOS.enqueue_workflow_async(queue_of(destination), deliver, job_id, destination)
    else:
        await DBOS.start_workflow_async(deliver, job_id, destination)


@durable.step
async def list_deliveries(job_id: str, destination: str) -> list[str]:
    """The deliveries of a job to one destination that are not settled yet, in order."""
    found = steps.systems().deliveries.search(destination=destination, job_ids=[job_id])
    return [d.delivery_id for d in found if d.state not in SETTLED]


@durable.step
async def attempt_delivery(delivery_id: str) -> str:
    """Send one artifact once, unless it must wait, and remember what the destination said; the delivery's state."""
    here = steps.systems()
    settings = here.settings.deliver.to(here.store.delivery(delivery_id).destination)
    claim = here.deliveries.claim(
        delivery_id, DBOS.workflow_id or "", here.now(), wait_for_ambiguous=settings.wait_for_ambiguous
    )
    if not claim.may_send:
        return claim.delivery.state
    outcome = await _send_kept(claim.delivery, resent=claim.resent)
    _keep_answer(claim.delivery, outcome.answer)
    return _settle(claim.delivery, outcome).state


def _settle(delivery: Delivery, outcome: Outcome) -> Delivery:
    here = steps.systems()
    now, settings = here.now(), here.settings.deliver.to(delivery.destination)
    health = _health_of(delivery.destination, outcome, now)
    due_at = None
    if outcome.state == "retrying":
        tried = now - (delivery.tried_since or now)
        due_at = now + timedelta(seconds=settings.wait_s(delivery.attempts, outcome.retry_after_s))
        if tried >= timedelta(seconds=settings.give_up_after_s):
            outcome, due_at = give_up(outcome, delivery.attempts), None
    settled = here.deliveries.settle(
        delivery.delivery_id,
        now,
        outcome.state,
        receipt=outcome.receipt,
        reason=outcome.reason,
        due_at=due_at,
        health=health,
    )
    _tell(settled)
    return settled


def _health_of(destination: str, outcome: Outcome, now: datetime) -> Health | None:
    """What an attempt says of its destination; None where it says nothing."""
    settings = steps.systems().settings.deliver.to(destination)

    def note(health: DestinationHealth) -> None:
        if outcome.retry_after_s is not None:
            note_wish(health, outcome.retry_after_s, now)
        elif outcome.answered:
            note_answer(health)
        else:
            note_failure(health, outcome.reason, now, settings)
        telemetry.DOWN.labels(destination).set(health.down_since is not None)

    return note if outcome.answered is not None or outcome.retry_after_s is not None else None


def _tell(delivery: Delivery) -> None:
    telemetry.DELIVERIES.labels(delivery.destination, delivery.state).inc()
    telemetry.log(
        "delivery",
        job_id=delivery.job_id,
        destination=delivery.destination,
        state=delivery.state,
        attempt=delivery.attempts,
    )
    what = f"{delivery.artifact_name} to {delivery.destination}"
    telemetry.tell(telemetry.Progress(what, delivery.state, delivery.reason or delivery.receipt))


def _keep_answer(delivery: Delivery, answer: bytes) -> None:
    """Keep the destination's own words. That they cannot be kept does not change what became of the delivery."""
    if not answer:
        return
    here = steps.systems()
    with suppress(OSError):
        digest = here.artifacts.put(answer).digest
        attempt = DeliveryAnswer(
            delivery_id=delivery.delivery_id, attempt=delivery.attempts, digest=digest, received_at=here.now()
        )
        here.store.keep_answer(attempt)


async def _send_kept(delivery: Delivery, *, resent: bool) -> Outcome:
    """Send what the artifact store kept. Every failure ends in a state that people see: of an unexpected one only
    the RIS may have got something that it must not get twice."""
    try:
        data = steps.systems().artifacts.get(delivery.digest)
    except (FileNotFoundError, ValueError) as error:
        return Outcome("dead", reason=f"{error}; nothing was sent", answered=None)
    except OSError as error:
        return Outcome("retrying", reason=f"the artifact store cannot be read: {error}", answered=None)
    try:
        return await _send(delivery, data, resent=resent)
    except Exception as fault:
        state = "ambiguous" if delivery.destination == "ris" else "dead"
        return Outcome(state, reason=steps.describe_fault(fault), answered=None)


async def _send(delivery: Delivery, data: bytes, *, resent: bool) -> Outcome:
    here = steps.systems()
    if delivery.destination == "pacs" and here.pacs is not None:
        waited = here.now() - (delivery.tried_since or here.now())
        within = timedelta(seconds=here.settings.deliver.pacs.confirm_within_s)
        study_uid = here.store.job(delivery.job_id).study_instance_uid
        is_first = delivery.attempts == 1
        return await send_to_pacs(here.pacs, data, study_uid, is_first=is_first, waited=waited, confirm_within=within)
    if delivery.destination == "ehr" and here.ehr is not None:
        return await send_to_ehr(here.ehr, data)
    if delivery.destination == "ris" and here.ris is not None:
        safe = here.settings.ris.duplicate_safe if here.settings.ris else False
        return await send_to_ris(here.ris, data, oru_control_id(delivery), duplicate_safe=safe, resent=resent)
    reason = f"{delivery.destination} is no longer configured; configure it, then `wetread retry` this delivery"
    return Outcome("dead", reason=reason, answered=None)

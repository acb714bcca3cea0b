"""The steps of `deliver`: which deliveries are due at a destination, and one attempt at one of them."""

from typing import TypedDict

from middleware import durable, steps, telemetry
from middleware.release.deliveries import Outcome, give_up, oru_control_id, send_to_ehr, send_to_pacs, send_to_ris
from middleware.store.tables import Delivery


@durable.step
async def list_deliveries(job_id: str, destination: str) -> list[str]:
    """The deliveries of a job to one destination that are not settled yet, in order."""
    everything = steps.systems().store.deliveries(job_id=job_id)
    settled = ("delivered", "dead", "ambiguous")
    return [d.delivery_id for d in everything if d.destination == destination and d.state not in settled]


class Attempted(TypedDict):
    """How one attempt ended, and how long to wait before the next (seconds)."""

    state: str
    wait_s: float


@durable.step
async def attempt_delivery(delivery_id: str, attempt: int) -> Attempted:
    """Send one artifact once and remember what the destination said. The workflow waits and calls again."""
    store, now, retry = steps.systems().store, steps.systems().now, steps.systems().settings.retry
    before = store.delivery(delivery_id)
    if before.state in ("delivered", "dead", "ambiguous"):  # settled meanwhile: sent, or superseded
        return Attempted(state=before.state, wait_s=0.0)
    resent = before.state == "in_flight"
    delivery = store.mark_delivery(delivery_id, now(), "in_flight", attempt=True)
    outcome = await _send_kept(delivery, resent=resent)
    if outcome.state == "retrying" and attempt >= retry.attempts:
        outcome = give_up(outcome, attempt)
    store.mark_delivery(delivery_id, now(), outcome.state, receipt=outcome.receipt, reason=outcome.reason)
    telemetry.DELIVERIES.labels(delivery.destination, outcome.state).inc()
    telemetry.log(
        "delivery", job_id=delivery.job_id, destination=delivery.destination, state=outcome.state, attempt=attempt
    )
    what = f"{delivery.artifact_name} to {delivery.destination}"
    telemetry.tell(telemetry.Progress(what, outcome.state, outcome.reason or outcome.receipt))
    return Attempted(state=outcome.state, wait_s=retry.wait_s(attempt, outcome.retry_after_s))


async def _send_kept(delivery: Delivery, *, resent: bool) -> Outcome:
    """Send what the artifact store kept. Every failure ends in a state that people see: of an unexpected one only
    the RIS may have got something that it must not get twice."""
    try:
        data = steps.systems().artifacts.get(delivery.digest)
    except (FileNotFoundError, ValueError) as error:
        return Outcome("dead", reason=f"{error}; nothing was sent")
    except OSError as error:
        return Outcome("retrying", reason=f"the artifact store cannot be read: {error}")
    try:
        return await _send(delivery, data, resent=resent)
    except Exception as fault:
        state = "ambiguous" if delivery.destination == "ris" else "dead"
        return Outcome(state, reason=f"unexpected {type(fault).__name__}: {fault}")


async def _send(delivery: Delivery, data: bytes, *, resent: bool) -> Outcome:
    here = steps.systems()
    if delivery.destination == "pacs" and here.pacs is not None:
        return await send_to_pacs(here.pacs, data, here.store.job(delivery.job_id).study_instance_uid)
    if delivery.destination == "ehr" and here.ehr is not None:
        return await send_to_ehr(here.ehr, data)
    if delivery.destination == "ris" and here.ris is not None:
        safe = here.settings.ris.duplicate_safe if here.settings.ris else False
        return await send_to_ris(here.ris, data, oru_control_id(delivery), duplicate_safe=safe, resent=resent)
    return Outcome("dead", reason=f"{delivery.destination} is no longer configured; configure it, then retry")

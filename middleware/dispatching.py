"""Which deliveries are started by the service itself: those that waited and are due, and people's; and the probing of
destinations that are down. Any number of workers may do this at once: a delivery is started by one name only."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

from dbos import SetWorkflowID

from connectors.errors import ConnectorError
from middleware import delivering, telemetry
from middleware.store.deliveries import SETTLED
from middleware.store.tables import Delivery
from middleware.systems import Systems
from middleware.workflow import deliver

TURN_S = 0.25
"""How often it is asked what is due."""
LONGEST_TURN_S = 5.0
"""No longer pause between two turns while the store is away."""


@asynccontextmanager
async def look_after_deliveries(systems: Systems) -> AsyncIterator[None]:
    """Start what is due and probe what is down, while the block runs."""
    task = asyncio.create_task(_repeat(systems))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _repeat(systems: Systems) -> None:
    pause_s = TURN_S
    while True:
        try:
            await start_due(systems)
            await probe_down(systems)
            pause_s = TURN_S
        except Exception as error:  # the store is away; what is due stays due
            telemetry.log("deliveries not looked at", kind=type(error).__name__)
            pause_s = min(pause_s * 2, LONGEST_TURN_S)
        await asyncio.sleep(pause_s)


async def start_due(systems: Systems, *, job_id: str = "") -> int:
    """Start every delivery that is due (of one job, or of all); how many."""
    due = await asyncio.to_thread(lambda: systems.deliveries.due(systems.now(), job_id=job_id))
    for delivery in due:
        await _start(systems, delivery)
    return len(due)


async def _start(systems: Systems, delivery: Delivery) -> None:
    """Start the delivery's workflow, named by the moment at which it was due, and note that a workflow has it."""
    with SetWorkflowID(start_id(delivery)):
        await delivering.start(deliver, delivery.job_id, delivery.destination, delivery.priority)
    await asyncio.to_thread(systems.deliveries.handed_over, delivery)


def start_id(delivery: Delivery) -> str:
    """The id of the workflow that takes up a delivery that is due; each time it is put off, the next has another."""
    at = delivery.due_at.isoformat() if delivery.due_at else ""
    return f"{delivery.delivery_id}/{at}"


# Destinations that are down


async def probe_down(systems: Systems, *, job_id: str = "") -> None:
    """Ask each destination that is down, when its turn has come, whether it answers; one that does gets one delivery,
    and all of them once that has arrived. `job_id`: only a delivery of this job may be that one."""
    for destination, probe in systems.probes().items():
        now, settings = systems.now(), systems.settings.deliver.to(destination)
        next_at = now + timedelta(seconds=settings.probe_every_s)
        if not await asyncio.to_thread(systems.deliveries.take_probe, destination, now, next_at):
            continue
        try:
            await probe()
        except ConnectorError:
            telemetry.log("probed", destination=destination, state="down")
            continue
        telemetry.log("probed", destination=destination, state="answers")
        trial = await asyncio.to_thread(systems.deliveries.choose_trial, destination, systems.now(), job_id)
        if trial is not None:
            await _start(systems, trial)


# One job by hand


async def deliver_now(systems: Systems, job_id: str, revision: int, patience: timedelta) -> None:
    """Bring a job's deliveries to their end in this process. What waits for a destination that is down, or for its
    turn, is left to the service once `patience` is over."""
    deadline = systems.now() + patience
    while True:
        open_now = [d for d in systems.store.deliveries(job_id=job_id) if d.revision == revision]
        open_now = [d for d in open_now if d.state not in SETTLED and d.destination in systems.configured()]
        is_sending = any(d.state == "in_flight" for d in open_now)
        if not open_now or (not is_sending and systems.now() > deadline):
            return
        await start_due(systems, job_id=job_id)
        await probe_down(systems, job_id=job_id)
        await asyncio.sleep(0.05)

"""The listeners of `wetread serve`: what the hospital's messages set in motion."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta

from connectors.errors import ConnectorError
from middleware import telemetry
from middleware.bootstrap import open_listener
from middleware.intake.hearing import Hearing, HearingPolicy
from middleware.intake.inbox import accept_study
from middleware.store.heard import OrderRecord
from middleware.store.tables import StudyJob
from middleware.systems import Systems

StartReading = Callable[[StudyJob], Awaitable[None]]

IMAGES_ARE_THERE = frozenset({"completed", "preliminary", "final"})
"""Order statuses from which on the images of an order are expected in the PACS."""

LOOK_AGAIN_S = 30.0
LOOK_BACK_DAYS = 7
"""How often, and for how long, the study of a finished order is looked for in the PACS."""


@asynccontextmanager
async def listen_to_hl7(systems: Systems, start_reading: StartReading) -> AsyncIterator[Hearing | None]:
    """Hear HL7 messages while the block runs, where a listener is configured; what was kept before a restart is
    applied first."""
    config = systems.settings.hl7_listener
    if config is None:
        yield None
        return
    policy = HearingPolicy(frozenset(config.processing_ids), systems.settings.zone)
    hearing = Hearing(systems.heard, policy, systems.now)
    hearing.arrived.set()
    writing = asyncio.create_task(hearing.write_forever())
    applying = asyncio.create_task(_apply_forever(hearing, systems, start_reading))
    try:
        async with open_listener(config, lambda raw, peer: hearing.take(raw, peer.address)) as listener:
            telemetry.log("hearing HL7", source="hl7", count=listener.port)
            yield hearing
    finally:
        for task in (writing, applying):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _apply_forever(hearing: Hearing, systems: Systems, start_reading: StartReading) -> None:
    """Apply messages as they arrive and look for the studies of finished orders, again every while: a study may
    come after its order. An error leaves messages kept and orders unasked; the next turn tries them again."""
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(hearing.arrived.wait(), LOOK_AGAIN_S)
        hearing.arrived.clear()
        try:
            await asyncio.to_thread(hearing.apply_all)
            await _read_finished_orders(systems, start_reading)
        except Exception as error:
            telemetry.log("applying HL7 failed", source="hl7", kind=type(error).__name__)


async def _read_finished_orders(systems: Systems, start_reading: StartReading) -> None:
    since = systems.now() - timedelta(days=LOOK_BACK_DAYS)
    for order in await asyncio.to_thread(systems.heard.orders_to_read, IMAGES_ARE_THERE, since):
        studies = await _find_studies(order, systems)
        for study_uid in studies:
            key = f"{order.order_id}/{study_uid}"
            job, is_new = accept_study(systems.store, study_uid, source="hl7", key=key, now=systems.now())
            if is_new:
                await start_reading(job)
        if studies:
            systems.heard.mark_asked(order.order_id)


async def _find_studies(order: OrderRecord, systems: Systems) -> list[str]:
    """The order's study UID or, where it states none, the studies that the PACS has under its accession number."""
    if order.study_instance_uid:
        return [order.study_instance_uid]
    if not order.accession_number or systems.pacs is None:
        return []
    try:
        found = await systems.pacs.search_studies({"AccessionNumber": order.accession_number})
    except ConnectorError:
        telemetry.log("study of an order not looked up", source="hl7", state=order.status)
        return []
    return [str(study["0020000D"]["Value"][0]) for study in found if study.get("0020000D", {}).get("Value")]

"""The listeners of `wetread serve`: what the hospital's messages set in motion."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

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
    site = systems.settings.site
    own_name = (site.sending_application, site.sending_facility)
    numbers = systems.settings.number_systems
    policy = HearingPolicy(frozenset(config.processing_ids), systems.settings.zone, own_name, numbers)
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
    """Apply messages as they arrive and look for the studies of finished orders: of those just changed at once, of
    all of them every while, since a study may come after its order. An error leaves messages kept and orders
    unasked; the next turn tries them again."""
    look_at_all_at = 0.0
    changed_since = systems.now()
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(hearing.arrived.wait(), LOOK_AGAIN_S)
        hearing.arrived.clear()
        is_for_all = time.monotonic() >= look_at_all_at
        since = systems.now() - timedelta(days=LOOK_BACK_DAYS) if is_for_all else changed_since
        turn_began = systems.now()
        try:
            await asyncio.to_thread(hearing.apply_all)
            await _read_finished_orders(systems, start_reading, since)
        except Exception as error:
            telemetry.log("applying HL7 failed", source="hl7", kind=type(error).__name__)
            continue
        changed_since = turn_began
        if is_for_all:
            look_at_all_at = time.monotonic() + LOOK_AGAIN_S


async def _read_finished_orders(systems: Systems, start_reading: StartReading, since: datetime) -> None:
    """Hand on the studies of orders that are done, changed since then and not handed on yet."""
    for order in await asyncio.to_thread(systems.heard.orders_to_read, IMAGES_ARE_THERE, since):
        studies = await _find_studies(order, systems)
        for study_uid in studies:
            await _read(study_uid, f"{order.order_id}/{study_uid}", systems, start_reading)
        if studies:
            await asyncio.to_thread(systems.heard.mark_asked, order.order_id)


async def _read(study_uid: str, key: str, systems: Systems, start_reading: StartReading) -> None:
    try:
        job, _ = await asyncio.to_thread(
            accept_study, systems.store, study_uid, source="hl7", key=key, now=systems.now()
        )
    except ValueError:  # the PACS has it under what is no DICOM UID
        telemetry.log("study of an order not read", source="hl7", kind="not a DICOM UID")
        return
    await start_reading(job)  # again does nothing, and an earlier try may have failed between the two


async def _find_studies(order: OrderRecord, systems: Systems) -> list[str]:
    """The studies of the order that the PACS has by now: by its study UID or, where it states none, its accession
    number. What the PACS answers is compared: `*` in a number is a wildcard to it."""
    keyword, tag, value = "StudyInstanceUID", _STUDY_UID, order.study_instance_uid
    if not value:
        keyword, tag, value = "AccessionNumber", _ACCESSION, order.accession_number
    if not value or systems.pacs is None:
        return []
    try:
        found = await systems.pacs.search_studies({keyword: value})
    except ConnectorError:
        telemetry.log("study of an order not looked up", source="hl7", state=order.status)
        return []
    uids = [_value(study, _STUDY_UID) for study in found if _value(study, tag) == value]
    return [uid for uid in uids if uid]


_STUDY_UID, _ACCESSION = "0020000D", "00080050"


def _value(study: dict[str, Any], tag: str) -> str:
    return str(next(iter(study.get(tag, {}).get("Value", ())), "")).strip()

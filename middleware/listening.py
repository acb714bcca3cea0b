"""The listeners of `wetread serve`: what the hospital's messages set in motion."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Any

from connectors.errors import ConnectorError
from middleware import telemetry
from middleware.bootstrap import open_listener
from middleware.intake.hearing import Hearing, HearingPolicy
from middleware.intake.inbox import hear_of_study
from middleware.intake.room import check_room
from middleware.settings import Settings
from middleware.store.heard import OrderRecord
from middleware.systems import Systems

LOOK_AGAIN_S = 30.0
"""Shortest time after which the study of an order is looked for again; longer the older the order is."""
SLOWEST_LOOK = timedelta(hours=1)
LOOK_BACK_DAYS = 30
"""So long after its last change the study of an order is looked for in the PACS."""
TURN_S = 1.0


@asynccontextmanager
async def listen_to_messages(systems: Systems) -> AsyncIterator[Hearing]:
    """Keep and apply messages while the block runs, and hear HL7 where a listener is configured; what was kept before
    a restart is applied first."""
    hearing = Hearing(systems.heard, _policy(systems.settings), systems.now)
    hearing.arrived.set()
    loops = (hearing.write_forever(), _apply_forever(hearing, systems))
    tasks = [asyncio.create_task(loop) for loop in loops]
    try:
        async with AsyncExitStack() as stack:
            if config := systems.settings.hl7_listener:
                listener = await stack.enter_async_context(
                    open_listener(config, lambda raw, peer: hearing.take(raw, peer.address))
                )
                telemetry.log("hearing HL7", source="hl7", count=listener.port)
            yield hearing
    finally:
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _policy(settings: Settings) -> HearingPolicy:
    site, config = settings.site, settings.hl7_listener
    own_name = (site.sending_application, site.sending_facility)
    room = partial(check_room, settings.data_dir, settings.storage.min_free_mib)
    return HearingPolicy(frozenset(config.processing_ids if config else ()), settings.zone, own_name, room)


async def _apply_forever(hearing: Hearing, systems: Systems) -> None:
    """Apply messages as they arrive and look for the studies of the orders that they told of. An error leaves messages
    kept and orders not looked for; the next turn tries them again."""
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(hearing.arrived.wait(), TURN_S)
        hearing.arrived.clear()
        try:
            await asyncio.to_thread(hearing.apply_all)
            await _look_for_studies(systems)
        except Exception as error:
            telemetry.log("applying messages failed", source="inbox", kind=type(error).__name__)


async def _look_for_studies(systems: Systems) -> None:
    """Hear of the studies of orders, as soon as the PACS has them. An order that changes is looked for at once (it may
    say that its study is complete), one that does not more and more seldom."""
    now = systems.now()
    since = now - timedelta(days=LOOK_BACK_DAYS)
    if systems.pacs is None:
        return
    for order in await asyncio.to_thread(systems.heard.orders_to_look_for, now, since):
        studies = await _find_studies(order, systems)
        for study_uid in studies:
            await _hear_of(study_uid, order, systems)
        pause = max((now - order.updated_at) / 20, timedelta(seconds=LOOK_AGAIN_S))
        look_after = None if studies else now + min(pause, SLOWEST_LOOK)
        await asyncio.to_thread(systems.heard.looked_for, order, now, look_after)


async def _hear_of(study_uid: str, order: OrderRecord, systems: Systems) -> None:
    key = f"{order.order_id}/{order.updated_at.isoformat()}/{study_uid}"
    try:
        await asyncio.to_thread(
            hear_of_study, systems.arrivals, study_uid, "order", source="order", key=key, now=systems.now()
        )
    except ValueError:  # the PACS has it under what is no DICOM UID
        telemetry.log("study of an order not read", source="order", kind="not a DICOM UID")


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
        telemetry.log("study of an order not looked up", source="order", state=order.status)
        return []
    uids = [_value(study, _STUDY_UID) for study in found if _value(study, tag) == value]
    return [uid for uid in uids if uid]


_STUDY_UID, _ACCESSION = "0020000D", "00080050"


def _value(study: dict[str, Any], tag: str) -> str:
    return str(next(iter(study.get(tag, {}).get("Value", ())), "")).strip()

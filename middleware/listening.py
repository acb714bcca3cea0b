"""The listeners of `wetread serve`: what the hospital's messages set in motion."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime, timedelta
from functools import partial

from connectors.errors import ConnectorError
from mappings.inputs.dicom_json import first_value
from mappings.model.revision import OwnReport, RevisionRefused
from middleware import telemetry
from middleware.bootstrap import open_listener
from middleware.intake.hearing import Hearing, HearingPolicy
from middleware.intake.holding import NotDecidable
from middleware.intake.inbox import hear_of_study
from middleware.intake.room import check_room
from middleware.release.corrections import Change, ask_for_change
from middleware.settings import Settings
from middleware.store.heard import OrderRecord, ReportRecord
from middleware.store.tables import StudyJob
from middleware.systems import Systems

LOOK_AGAIN_S = 30.0
"""Shortest time after which the study of an order is looked for again; longer the older the order is."""
SLOWEST_LOOK = timedelta(hours=2)
LOOK_BACK_DAYS = 180
"""So long after its last change the study of an order is looked for in the PACS."""
TELL_DAYS = 30
STILL_LOOK_H = 12
"""So long after an order's last change more of its studies may come."""
TURN_S = 1.0


@asynccontextmanager
async def listen_to_messages(systems: Systems) -> AsyncIterator[Hearing]:
    """Keep and apply messages while the block runs, and hear HL7 where a listener is configured; what was kept before
    a restart is applied first."""
    hearing = Hearing(systems.heard, _policy(systems.settings), systems.now)
    hearing.arrived.set()
    loops = (hearing.write_forever(), _apply_forever(hearing), _look_forever(systems))
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
    processing_ids = frozenset(config.processing_ids if config else ())
    room = partial(check_room, settings.data_dir, settings.storage.min_free_mib)
    return HearingPolicy(processing_ids, settings.zone, own_name, settings.number_systems, room)


async def _apply_forever(hearing: Hearing) -> None:
    """Apply messages as they arrive. An error leaves them kept; the next turn tries them again."""
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(hearing.arrived.wait(), TURN_S)
        hearing.arrived.clear()
        try:
            await asyncio.to_thread(hearing.apply_all)
        except Exception as error:
            telemetry.log("applying messages failed", source="inbox", kind=type(error).__name__)


async def _look_forever(systems: Systems) -> None:
    """Look for the studies of orders, apart from the messages, so that a slow PACS delays no merge and no
    cancellation."""
    while True:
        try:
            await _look_for_studies(systems)
            await asyncio.to_thread(tell_reports, systems)
        except Exception as error:  # the store is away
            telemetry.log("studies of orders not looked for", source="order", kind=type(error).__name__)
        await asyncio.sleep(TURN_S)


async def _look_for_studies(systems: Systems) -> None:
    """Hear of the studies of orders, as soon as the PACS has them. An order that changes is looked for at once (it may
    say that its study is complete), one that does not more and more seldom."""
    now = systems.now()
    since = now - timedelta(days=LOOK_BACK_DAYS)
    if systems.pacs is None:
        return
    for order in await asyncio.to_thread(systems.heard.orders_to_look_for, now, since):
        studies: list[str] = []
        try:
            studies = await _find_studies(order, systems)
            for study_uid in studies:
                await _hear_of(study_uid, order, systems)
        except ConnectorError as error:
            telemetry.log("study of an order not looked up", source="order", kind=type(error).__name__)
        age = now - order.updated_at
        pause = min(max(age / 20, timedelta(seconds=LOOK_AGAIN_S)), SLOWEST_LOOK)
        # One accession number may have more than one study, so that one found does not end the looking at once.
        is_over = bool(studies) and age > STILL_LOOK_H * timedelta(hours=1)
        await asyncio.to_thread(
            systems.heard.looked_for, order, now, None if is_over else now + pause, is_found=bool(studies)
        )


def tell_reports(systems: Systems) -> None:
    """Let results know of the radiologist's own final report that came after them: the next revision says so."""
    now = systems.now()
    for report in systems.heard.reports_to_tell(now - timedelta(days=TELL_DAYS)):
        jobs = systems.store.jobs_of_study(report.study_instance_uid) if report.study_instance_uid else []
        jobs = jobs or systems.store.jobs_of_accession(report.accession_number)
        if jobs and all(_is_told(job, report, systems, now) for job in jobs):
            systems.heard.told_of(report, now)


def _is_told(job: StudyJob, report: ReportRecord, systems: Systems, now: datetime) -> bool:
    """Whether nothing is left to tell a job of a report; False to try again later."""
    if job.state in ("waiting", "accepted", "reading", "failed"):
        return False  # its reading looks for the report itself, or a change is under way
    if job.state != "released" or not job.facts.get("released"):
        return True
    own = OwnReport("C" if report.status == "C" else "F", report.reported_at)
    change = Change("report", "radiologist", now, "the radiologist's own final report came (ORU^R01)", report=own)
    try:
        ask_for_change(systems.store, systems.artifacts, job.job_id, change)
    except RevisionRefused:  # it says so already, or was withdrawn
        return True
    except NotDecidable:
        return False
    return True


async def _hear_of(study_uid: str, order: OrderRecord, systems: Systems) -> None:
    key = f"{order.order_id}/{order.updated_at.isoformat()}/{study_uid}"
    try:
        await asyncio.to_thread(
            lambda: hear_of_study(
                systems.arrivals,
                study_uid,
                "order",
                source="order",
                key=key,
                now=systems.now(),
                changed_at=order.updated_at,
            )
        )
    except ValueError:  # the PACS has it under what is no DICOM UID
        telemetry.log("study of an order not read", source="order", kind="not a DICOM UID")


async def _find_studies(order: OrderRecord, systems: Systems) -> list[str]:
    """The studies of the order that the PACS has by now: by its study UID or, where there is none of that, its
    accession number; the identity gate then says that they differ. What the PACS answers is compared: `*` in a number
    is a wildcard to it."""
    numbers = {"StudyInstanceUID": order.study_instance_uid, "AccessionNumber": order.accession_number}
    for keyword, number in numbers.items():
        found = await systems.pacs.search_studies({keyword: number}) if systems.pacs and number else []
        uids = [first_value(study, _STUDY_UID) for study in found if first_value(study, _TAGS[keyword]) == number]
        if any(uids):
            return [uid for uid in uids if uid]
    return []


_STUDY_UID = "0020000D"
_TAGS = {"StudyInstanceUID": _STUDY_UID, "AccessionNumber": "00080050"}

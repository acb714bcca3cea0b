"""The watchers of `wetread serve`: what is new in the PACS, and which of the studies that wait are due."""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

from connectors.errors import ConnectorError
from middleware import telemetry
from middleware.intake.inbox import Hint, hear_of_study, see_studies
from middleware.intake.room import check_room
from middleware.looking import StartReading, look_after_studies
from middleware.ports import ChangeLog, ImageArchive
from middleware.store.arrivals import Seen
from middleware.systems import Systems

SOURCE, ORTHANC = "pacs", "orthanc"
LONGEST_PAUSE_S = 60.0


@asynccontextmanager
async def watch_studies(systems: Systems, start_reading: StartReading) -> AsyncIterator[None]:
    """Watch the PACS, where that is configured, and the studies that wait, while the block runs."""
    loops = [look_after_studies(systems, start_reading)]
    if systems.pacs is not None and systems.settings.pacs_watch is not None:
        loops.append(_watch_pacs(systems, systems.pacs))
    if systems.changes is not None:
        loops.append(_watch_orthanc(systems, systems.changes))
    tasks = [asyncio.create_task(loop) for loop in loops]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


# What is new in the PACS


async def _watch_pacs(systems: Systems, pacs: ImageArchive) -> None:
    settings = systems.settings.pacs_watch
    assert settings is not None
    whole_at = 0.0

    async def turn() -> None:
        nonlocal whole_at
        is_whole = time.monotonic() >= whole_at
        await _look_at_pacs(systems, pacs, is_whole=is_whole)
        whole_at = time.monotonic() + settings.look_back_every_s if is_whole else whole_at

    await _repeat(turn, settings.interval_s, SOURCE)


async def _repeat(turn: Callable[[], Awaitable[None]], interval_s: float, source: str) -> None:
    """Do it for ever, more and more seldom while it fails: an odd answer must not end the watch."""
    pause_s = interval_s
    while True:
        try:
            await turn()
            pause_s = interval_s
        except Exception as error:
            pause_s = min(max(pause_s, 1.0) * 2, max(LONGEST_PAUSE_S, interval_s))
            reason = str(error) if isinstance(error, ConnectorError) else ""
            telemetry.log("not watched just now", source=source, kind=type(error).__name__)
            telemetry.tell(telemetry.Progress(f"watching {source}", "waiting", reason))
        await asyncio.sleep(pause_s)


async def _look_at_pacs(systems: Systems, pacs: ImageArchive, *, is_whole: bool) -> None:
    """Hear of every study that is new or changed. `is_whole`: also of the days since the last whole look and before,
    so that nothing is missed however long the service or the PACS was away; the PACS dates studies by the modality's
    clock, hence the days in between."""
    settings, now = systems.settings.pacs_watch, systems.now()
    assert settings is not None
    check_room(systems.settings.data_dir, systems.settings.storage.min_free_mib)
    watermark = await asyncio.to_thread(systems.arrivals.watermark, SOURCE)
    last = min(datetime.fromisoformat(watermark), now) if watermark else now
    days = settings.look_back_days if is_whole else settings.recent_days
    since = f"{(last if is_whole else now).astimezone(systems.settings.zone).date() - timedelta(days=days):%Y%m%d}"
    found = await pacs.search_studies({**settings.filters, "StudyDate": f"{since}-"}, include=_INCLUDED)
    seen = [await _seen(pacs, study) for study in found]
    await asyncio.to_thread(see_studies, systems.arrivals, seen, source=SOURCE, first=not watermark, now=now)
    if is_whole:
        present = {one.study_instance_uid for one in seen}
        await asyncio.to_thread(systems.arrivals.forget_missing, present, since)
        await asyncio.to_thread(systems.arrivals.set_watermark, SOURCE, now.isoformat(), now)


_UID, _DATE, _COUNT = "0020000D", "00080020", "00201208"
_IDENTITY = ("00100020", "00100021", "00100030", "00100040", "00080050")
_INCLUDED = ("NumberOfStudyRelatedInstances", "IssuerOfPatientID", "PatientBirthDate", "PatientSex")


async def _seen(pacs: ImageArchive, study: dict[str, Any]) -> Seen:
    uid, count = _value(study, _UID), _value(study, _COUNT)
    if not count.isdecimal():  # the count is optional for a server (PS3.18 table 10.6.3-3)
        series = await pacs.search_series(uid, {}, include=("NumberOfSeriesRelatedInstances",))
        count = str(sum(int(_value(one, "00201209") or 0) for one in series) or len(series))
    whose = repr([study.get(tag, {}).get("Value") for tag in _IDENTITY])
    return Seen(uid, int(count), hashlib.sha256(whose.encode()).hexdigest(), _value(study, _DATE))


def _value(headers: dict[str, Any], tag: str) -> str:
    return str(next(iter((headers.get(tag) or {}).get("Value") or ()), "")).strip()


# Orthanc's log of changes


async def _watch_orthanc(systems: Systems, changes: ChangeLog) -> None:
    settings = systems.settings.orthanc_changes
    assert settings is not None
    await _repeat(lambda: _read_changes(systems, changes), settings.interval_s, ORTHANC)


async def _read_changes(systems: Systems, changes: ChangeLog) -> None:
    """Hear of every change since the watermark, which is `epoch:sequence`: the first time from now on, and in a new
    epoch where the log was reset, since its numbers begin again."""
    arrivals, now = systems.arrivals, systems.now
    check_room(systems.settings.data_dir, systems.settings.storage.min_free_mib)
    watermark = await asyncio.to_thread(arrivals.watermark, ORTHANC)
    if not watermark:
        watermark = f"0:{await changes.last_sequence()}"
        await asyncio.to_thread(arrivals.set_watermark, ORTHANC, watermark, now())
    epoch, sequence = map(int, watermark.split(":"))
    is_done = False
    while not is_done:
        page = await changes.changes_since(sequence)
        for change in page.items:
            kind: Hint = "images-stable" if change.kind == "StableStudy" else "images"
            await _hear_change(systems, change.study_instance_uid, kind, f"{epoch}/{change.sequence}")
        epoch, sequence, is_done = epoch + page.reset, page.last, page.done or page.reset
        await asyncio.to_thread(arrivals.set_watermark, ORTHANC, f"{epoch}:{sequence}", now())


async def _hear_change(systems: Systems, study_uid: str, kind: Hint, key: str) -> None:
    try:
        await asyncio.to_thread(
            hear_of_study, systems.arrivals, study_uid, kind, source=ORTHANC, key=key, now=systems.now()
        )
    except ValueError:
        telemetry.log("study not heard of", source=ORTHANC, kind="not a DICOM UID")

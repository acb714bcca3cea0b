"""The watchers of `wetread serve`: what is new in the PACS, and which of the studies that wait are due."""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

from pydicom.uid import UID

from connectors.errors import ConnectorError, Permanent
from mappings.inputs.dicom_json import count_value, first_value
from middleware import telemetry
from middleware.intake.inbox import Hint, hear_of_study, see_studies
from middleware.intake.room import check_room
from middleware.looking import StartReading, look_after_studies
from middleware.ports import ChangeLog, ImageArchive
from middleware.store.arrivals import Seen
from middleware.systems import Systems

SOURCE, ORTHANC = "pacs", "orthanc"
LONGEST_PAUSE_S = 60.0
MOST_ASKED_FOR = 50
"""Studies that seem to be gone and are asked for one by one at a look."""
RECENT_DAYS = 14
"""Of Orthanc's new database, studies of so many days are news."""


@asynccontextmanager
async def watch_studies(systems: Systems, start_reading: StartReading) -> AsyncIterator[None]:
    """Watch the PACS, where that is configured, and the studies that wait, while the block runs. Where nothing was ever
    seen, what is there before the block begins is what changes are told by."""
    await _look_first(systems)
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


async def _look_first(systems: Systems) -> None:
    """Look for the first time before the service says that it is ready: what comes from then on is news. A system that
    does not answer is looked at later, by its watch."""
    for source, look in _first_looks(systems):
        if not await asyncio.to_thread(systems.arrivals.watermark, source):
            with contextlib.suppress(Exception):
                await look()


def _first_looks(systems: Systems) -> Iterator[tuple[str, Callable[[], Awaitable[None]]]]:
    pacs, changes = systems.pacs, systems.changes
    if pacs is not None and systems.settings.pacs_watch is not None:
        yield SOURCE, lambda: _look_at_pacs(systems, pacs, is_whole=True)
    if changes is not None:
        yield ORTHANC, lambda: _read_changes(systems, changes)


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
    seen = [one for study in found if (one := await _seen(pacs, study)) is not None]
    await asyncio.to_thread(see_studies, systems.arrivals, seen, source=SOURCE, first=not watermark, now=now)
    if is_whole:
        await _forget_gone(systems, pacs, {first_value(study, _UID) for study in found}, since)
        await asyncio.to_thread(systems.arrivals.set_watermark, SOURCE, now.isoformat(), now)


_UID, _DATE, _COUNT = "0020000D", "00080020", "00201208"
_IDENTITY = ("00100020", "00100021", "00100030", "00100040", "00080050")
_INCLUDED = ("NumberOfStudyRelatedInstances", "IssuerOfPatientID", "PatientBirthDate", "PatientSex")


async def _seen(pacs: ImageArchive, study: dict[str, Any]) -> Seen | None:
    """What an answer says of one study; None for one that cannot be told, which must not hide the others."""
    uid, count = first_value(study, _UID), count_value(study, _COUNT)
    if not UID(uid).is_valid:
        return None
    if count is None:  # it is optional for a server (PS3.18 table 10.6.3-3)
        try:
            series = await pacs.search_series(uid, {}, include=("NumberOfSeriesRelatedInstances",))
        except Permanent:
            return None
        count = sum(count_value(one, "00201209") or 1 for one in series)
    whose = repr([first_value(study, tag) for tag in _IDENTITY])
    return Seen(uid, count, hashlib.sha256(whose.encode()).hexdigest(), first_value(study, _DATE))


async def _forget_gone(systems: Systems, pacs: ImageArchive, present: set[str], since: str) -> None:
    """Forget what the PACS no longer has. An answer may lack studies for other reasons (an index being made, a cap, a
    filter), so each is asked for by itself, a few at a time."""
    gone = await asyncio.to_thread(systems.arrivals.missing, present, since)
    for uid in gone[:MOST_ASKED_FOR]:
        if not await pacs.search_studies({"StudyInstanceUID": uid}):
            await asyncio.to_thread(systems.arrivals.forget, uid)


# Orthanc's log of changes


async def _watch_orthanc(systems: Systems, changes: ChangeLog) -> None:
    settings = systems.settings.orthanc_changes
    assert settings is not None
    await _repeat(lambda: _read_changes(systems, changes), settings.interval_s, ORTHANC)


async def _read_changes(systems: Systems, changes: ChangeLog) -> None:
    """Hear of every change since the watermark, which is `epoch:sequence`: the first time from now on. Where the log
    was reset its numbers begin again, in a new epoch, with whatever was stored into the new database: all that came
    meanwhile, and old studies too, which are passed over by their date."""
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
            if epoch == 0 or await _is_recent(systems, change.study_instance_uid):
                await _hear_change(systems, change.study_instance_uid, kind, f"{epoch}/{change.sequence}")
        epoch, sequence, is_done = epoch + page.reset, 0 if page.reset else page.last, page.done
        await asyncio.to_thread(arrivals.set_watermark, ORTHANC, f"{epoch}:{sequence}", now())


async def _is_recent(systems: Systems, study_uid: str) -> bool:
    if systems.pacs is None:
        return True
    oldest = f"{systems.now().astimezone(systems.settings.zone).date() - timedelta(days=RECENT_DAYS):%Y%m%d}"
    found = await systems.pacs.search_studies({"StudyInstanceUID": study_uid})
    return any((first_value(study, _DATE) or oldest) >= oldest for study in found)


async def _hear_change(systems: Systems, study_uid: str, kind: Hint, key: str) -> None:
    try:
        await asyncio.to_thread(
            hear_of_study, systems.arrivals, study_uid, kind, source=ORTHANC, key=key, now=systems.now()
        )
    except ValueError:
        telemetry.log("study not heard of", source=ORTHANC, kind="not a DICOM UID")

"""Hearing from the EHR: subscriptions that are kept alive, and readings whenever one of them says that something
changed, at the start, and every while in case it did not.

A callback is a hint only; every resource is read from the EHR with our own credentials. So an EHR that is down, or
that lost our subscription, or notifications that were dropped, cost time and nothing else.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from urllib.parse import parse_qsl

from mappings.outputs.subscription import Wanted
from middleware import telemetry
from middleware.intake.ehr_notices import MAX_NAMED, EhrNotices, Pending
from middleware.intake.ehr_reading import EhrReader, ReadingPolicy, Stream
from middleware.intake.ehr_subscriptions import EhrSubscriptions
from middleware.intake.hearing import Hearing
from middleware.settings import EhrEventSettings, RetrySettings
from middleware.store.ehr_events import EhrEventStore
from middleware.systems import Systems

GATHER_S = 0.1
"""Callbacks that come within so long of each other are one reading."""
SILENT_PERIODS = 2.5
"""Heartbeats are late, and one may be lost; after so many periods without any, a subscription is asked for anew."""


@asynccontextmanager
async def listen_to_ehr(systems: Systems, hearing: Hearing) -> AsyncIterator[EhrNotices | None]:
    """Hear from the EHR while the block runs, where that is configured; gives what takes its callbacks.

    Never fails because the EHR does: it is tried again, with growing waits.
    """
    settings = systems.settings.ehr_events
    if settings is None or systems.ehr is None or systems.settings.ehr is None:
        yield None
        return
    store = systems.ehr_events
    notices = EhrNotices(settings.token.get_secret_value(), store, is_backport=settings.kind == "backport")
    policy = _reading_policy(settings, systems.settings.ehr.name, systems.settings.ehr.url)
    reader = EhrReader(systems.ehr, store, systems.heard, hearing.keep, policy, systems.now)
    subscriptions = EhrSubscriptions(systems.ehr, store, wanted_subscriptions(settings), policy.url)
    listener = _Listener(notices, reader, subscriptions, store, settings, systems.settings.retry)
    tasks = [asyncio.create_task(listener.read_forever()), asyncio.create_task(listener.subscribe_forever())]
    try:
        yield notices
    finally:
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _reading_policy(settings: EhrEventSettings, name: str, url: str) -> ReadingPolicy:
    return ReadingPolicy(
        name=name,
        url=url,
        streams=tuple(Stream(kind, tuple(parse_qsl(settings.filters.get(kind, "")))) for kind in settings.resources),
        overlap=timedelta(seconds=settings.overlap_s),
        first_look_back=timedelta(hours=settings.first_look_back_h),
    )


def wanted_subscriptions(settings: EhrEventSettings) -> list[Wanted]:
    """The subscriptions that the settings ask for: one for orders, one for imaging studies. None for patients: of all
    changes of patients only merges are of interest, and each reading looks for those."""
    token, wanted = settings.token.get_secret_value(), []
    for kind in settings.resources:
        if kind == "Patient":
            continue
        search = f"{kind}?{settings.filters.get(kind, '')}"
        if settings.kind == "classic":
            wanted.append(Wanted(search, settings.callback_url, token))
        else:
            topic_filter = search if kind in settings.filters else ""
            periods = (settings.heartbeat_s, settings.timeout_s)
            wanted.append(Wanted(settings.topics[kind], settings.callback_url, token, topic_filter, *periods))
    return wanted


class _Listener:
    """Two things that go on side by side, so that neither waits for the other: reading, and minding subscriptions."""

    def __init__(
        self,
        notices: EhrNotices,
        reader: EhrReader,
        subscriptions: EhrSubscriptions,
        store: EhrEventStore,
        settings: EhrEventSettings,
        retry: RetrySettings,
    ) -> None:
        self._notices = notices
        self._reader = reader
        self._subscriptions = subscriptions
        self._store = store
        self._settings = settings
        self._retry = retry
        self._asked_at: dict[str, float] = {}
        self._was_active = False

    # Reading

    async def read_forever(self) -> None:
        """Read at once, then whenever something is noticed, and every `poll_s` in any case; after a failure sooner."""
        failures = 0
        while True:
            pending = self._notices.collect()
            wait_s = self._settings.poll_s
            try:
                await self._read(pending)
                failures = 0
            except Exception as error:  # the EHR, the store or what an answer holds: none of them ends the service
                failures += 1
                self._notices.put_back(pending)
                telemetry.log("EHR not read up to now", source="fhir", kind=type(error).__name__, attempt=failures)
                wait_s = min(wait_s, self._retry.wait_s(failures, getattr(error, "retry_after_s", None)))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._notices.wanted.wait(), wait_s)
            await asyncio.sleep(GATHER_S)

    async def _read(self, pending: Pending) -> None:
        count = await self._reader.catch_up() + await self._read_named(pending)
        for reference, number in pending.events.items():
            await asyncio.to_thread(self._store.set_last_event, reference, number)
        if count:
            telemetry.log("EHR read", source="fhir", count=count)

    async def _read_named(self, pending: Pending) -> int:
        """Read what notifications name, and missed ones would have: the search may not show it, where the EHR's clock
        was set back."""
        named = dict(pending.focuses)
        for reference, (first, last) in pending.gaps.items():
            missed = await self._subscriptions.missed_events(reference, first, last)
            named |= dict.fromkeys(missed.focuses[:MAX_NAMED] if missed else ())
        return await self._reader.read_named(named) if named else 0

    # Subscriptions

    async def subscribe_forever(self) -> None:
        """Look at our subscriptions at once, until they are active, and then every `check_s`."""
        unsettled = 0
        while True:
            try:
                is_settled = await self._subscribe()
            except Exception as error:  # as above
                is_settled = False
                telemetry.log("EHR not subscribed to", source="fhir", kind=type(error).__name__, attempt=unsettled + 1)
            unsettled = 0 if is_settled else unsettled + 1
            wait_s = self._retry.wait_s(unsettled) if unsettled else self._look_again_s()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._notices.doubted.wait(), wait_s)

    def _look_again_s(self) -> float:
        """When to look at subscriptions that are all active: now and then, and as soon as one is silent too long."""
        left_s = (self._patience_s - silent_s for silent_s in self._silences_s().values())
        return min([self._settings.check_s, *(max(each, GATHER_S) for each in left_s)])

    async def _subscribe(self) -> bool:
        """Whether all subscriptions are active. Where one was written, events may have been missed before."""
        self._notices.doubted.clear()
        with self._notices.registering():
            silent = [name for name, silent_s in self._silences_s().items() if silent_s > self._patience_s]
            checked = await self._subscriptions.check(silent)
        now = time.monotonic()
        self._asked_at = {name: self._asked_at.get(name, now) for name in checked.references}
        self._asked_at |= dict.fromkeys(checked.written, now)
        if checked.active and (checked.written or not self._was_active):
            self._notices.wanted.set()
        self._was_active = checked.active
        if self._notices.is_backport:
            await self._compare_counts(checked.references)
        return checked.active

    @property
    def _patience_s(self) -> float:
        return self._settings.heartbeat_s * SILENT_PERIODS

    def _silences_s(self) -> dict[str, float]:
        """How long each subscription has been silent, where heartbeats are asked for."""
        if not (self._notices.is_backport and self._settings.heartbeat_s):
            return {}
        now, heard_at = time.monotonic(), self._notices.heard_at
        return {name: now - max(at, heard_at.get(name, at)) for name, at in self._asked_at.items()}

    async def _compare_counts(self, references: tuple[str, ...]) -> None:
        """Notice events of which no notification came: the server's own count says so, whatever callbacks said."""
        for reference in references:
            known = await asyncio.to_thread(self._store.subscription, reference)
            last_event = known.last_event if known else 0
            before = self._notices.last_told(reference, last_event)
            count = await self._subscriptions.count_events(reference)
            # A notification that came between the two is no reason to think that the count begins anew.
            if count is not None and (count < before or count > self._notices.last_told(reference, last_event)):
                self._notices.note_count(reference, last_event, count)

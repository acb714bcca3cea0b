"""What the EHR's callbacks say, until the next reading: that there is something, and which events were missed.

A callback brings nothing into the inbox. It makes us look at the EHR, soon and once for all that came meanwhile, so a
forged or repeated one costs a search at most.
"""

import asyncio
import hmac
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mappings.inputs.fhir_to_notification import Notification, read_notification
from middleware import telemetry
from middleware.store.ehr_events import EhrEventStore

MAX_NAMED = 500
"""Resources that notifications name and that are read by name; beyond it the search finds them."""


class UnknownSubscription(Exception):
    """The notification is of a subscription that is none of ours."""


@dataclass
class Pending:
    """What is to be done at the next reading: resources named, the first and last event that each subscription missed,
    and the event up to which each is read then."""

    focuses: dict[str, None] = field(default_factory=dict)
    gaps: dict[str, tuple[int, int]] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)


class EhrNotices:
    """The callbacks of one EHR. `wanted` is set while something waits to be read, `doubted` while a subscription has
    to be looked at. `heard_at` is when (by the monotonic clock) each subscription was heard of last."""

    def __init__(self, token: str, store: EhrEventStore, *, is_backport: bool) -> None:
        self.is_backport = is_backport
        self.wanted = asyncio.Event()
        self.doubted = asyncio.Event()
        self.heard_at: dict[str, float] = {}
        self._is_registering = False
        self._token = token.encode()
        self._store = store
        self._pending = Pending()
        self._told: dict[str, int] = {}

    def is_signed(self, authorization: str) -> bool:
        """Whether a callback's Authorization header holds our token; it takes as long for any other."""
        scheme, _, token = authorization.partition(" ")
        return hmac.compare_digest(token.strip().encode(), self._token) and scheme.lower() == "bearer"

    @contextmanager
    def registering(self) -> Iterator[None]:
        """While the block runs, a handshake of a subscription that is not known yet may be ours: the server may greet
        us before it has told us what it calls it."""
        self._is_registering = True
        try:
            yield
        finally:
            self._is_registering = False

    async def take_ping(self) -> None:
        """A classic notification: something changed. Raises what the store raises, so that the EHR tries again."""
        await asyncio.to_thread(self._store.ping)
        telemetry.EVENTS.labels("fhir", "notified").inc()
        self.wanted.set()

    async def take_bundle(self, bundle: object) -> None:
        """A notification of the Backport IG. Raises UnreadableNotification, UnknownSubscription, what the store
        raises."""
        told = read_notification(bundle)
        known = await asyncio.to_thread(self._store.subscription, told.subscription)
        if known is None:
            if told.type == "handshake" and self._is_registering:
                return
            raise UnknownSubscription("the notification is of a subscription that is none of ours")
        telemetry.EVENTS.labels("fhir", told.type).inc()
        self.heard_at[told.subscription] = time.monotonic()
        self.note(told, known.last_event)
        if told.status in ("error", "off"):
            self.doubted.set()

    def note(self, told: Notification, last_event: int) -> None:
        """Take in what a notification announces of a subscription whose events were read up to `last_event`."""
        last, latest = self.last_told(told.subscription, last_event), told.latest
        if told.type == "event-notification":
            first = min(told.event_numbers, default=latest)
            self._note_gap(told.subscription, last + 1, (first or 0) - 1)
            self._note_focuses(told.focuses)
            self._note_latest(told.subscription, max(last, latest or 0))
        elif latest is not None:
            self.note_count(told.subscription, last, latest)

    def note_count(self, subscription: str, last_event: int, count: int) -> None:
        """Take in how many events the server counts of a subscription whose events were read up to `last_event`: where
        it is another number than it told, events were missed, or it began to count anew."""
        last = self.last_told(subscription, last_event)
        if count < last:
            telemetry.log("the EHR counts its events anew", source="fhir")
        self._note_gap(subscription, last + 1, count)
        if count != last:
            self._note_latest(subscription, count)

    def last_told(self, subscription: str, last_event: int) -> int:
        """The latest event that is read or about to be."""
        return self._told.get(subscription, last_event)

    def _note_latest(self, subscription: str, number: int) -> None:
        self._told[subscription] = self._pending.events[subscription] = number
        self.wanted.set()

    def _note_gap(self, subscription: str, first: int, last: int) -> None:
        if first <= last:
            telemetry.log("notifications missed", source="fhir", count=last - first + 1)
            self._widen_gap(self._pending, subscription, (first, last))

    def _widen_gap(self, pending: Pending, subscription: str, gap: tuple[int, int]) -> None:
        known = pending.gaps.get(subscription, gap)
        pending.gaps[subscription] = (min(known[0], gap[0]), max(known[1], gap[1]))

    def _note_focuses(self, focuses: tuple[str, ...]) -> None:
        for focus in focuses:
            if len(self._pending.focuses) < MAX_NAMED:
                self._pending.focuses[focus] = None

    def collect(self) -> Pending:
        """What waits; from here on what comes waits for the next reading."""
        self.wanted.clear()
        collected, self._pending = self._pending, Pending()
        return collected

    def put_back(self, pending: Pending) -> None:
        """The reading failed: what was to be read waits on, with what came meanwhile."""
        pending.focuses |= self._pending.focuses
        pending.events |= self._pending.events
        for subscription, gap in self._pending.gaps.items():
            self._widen_gap(pending, subscription, gap)
        self._pending = pending

"""Hearing HL7 v2 and FHIR: a message is on disk before it is acknowledged, and applied once, in the order it came.

`take` answers one message; messages that arrive together share one transaction, so that many senders cost one
fsync. `apply_all` then applies what was kept, now or after a restart.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from functools import partial

from sqlalchemy.exc import DBAPIError
from sqlmodel import Session

from mappings.inputs.er7_to_message import UnreadableMessage, read_message
from mappings.inputs.fhir_to_event import NumberSystems, resources_to_events
from mappings.inputs.hl7_to_event import message_to_events
from mappings.model.ids import derive_control_id
from mappings.model.message import Header, Message, drop_controls
from mappings.outputs.message_to_ack import Outcome, build_ack, build_reject, codes_due
from middleware import telemetry
from middleware.intake.orders import apply_events
from middleware.store.failures import is_out_of_room, is_store_away
from middleware.store.heard import HeardMessage
from middleware.store.hearing import Arrived, HearingStore, Kept

MAX_BATCH = 256
TURNS_WITHOUT_NEWS = 4
"""A batch is closed after so many turns of the event loop in which no further message came."""
READ_AT_ONCE_BYTES = 64 * 1024
"""Up to here reading takes less than a millisecond, which is less than to hand it to a thread is worth."""
APPLY_TOGETHER = 8
"""Messages applied in one transaction: fewer commits, and none that arrives waits for long."""
QUIET_S, GIVE_WAY_S = 0.005, 0.05
"""Applying a message waits until none came for `QUIET_S`, but no longer than `GIVE_WAY_S`: both write to one database,
and the sender of the one that comes is waiting."""
NO_ROOM = "No room to keep this message; send it again later"


@dataclass(frozen=True)
class HearingPolicy:
    """What a site accepts: MSH-11 values, the zone of times without an offset, our own name (MSH-3, MSH-4), by which a
    result of ours that an interface engine sends round is known as no radiologist's report, and the systems of
    identifiers in FHIR."""

    processing_ids: frozenset[str]
    zone: tzinfo
    own_name: tuple[str, str] = ("", "")
    number_systems: NumberSystems = field(default_factory=NumberSystems)
    check_room: Callable[[], None] = lambda: None
    """Raises NoRoom where nothing more can be taken."""


class Hearing:
    """One inbox for all MLLP connections of this process."""

    def __init__(self, store: HearingStore, policy: HearingPolicy, now: Callable[[], datetime]) -> None:
        self._store = store
        self._policy = policy
        self._now = now
        self._waiting: asyncio.Queue[tuple[Arrived, asyncio.Future[Kept]]] = asyncio.Queue()
        self._last_came = 0.0
        self.arrived = asyncio.Event()

    async def take(self, raw: bytes, sender: str) -> tuple[bytes, ...]:
        """Keep one message durably and give the answers that its sender waits for (none is possible in enhanced mode).

        What cannot be read is kept too and answered AR. Where the store is full or read-only, nothing is kept and the
        answer is AR (CR in enhanced mode) with error 207; the sender keeps it and sends again. Raises what else the
        store raises: then nothing is answered, and the sender sends again.
        """
        self._last_came = time.monotonic()
        try:
            message = await _read(raw)
        except UnreadableMessage as unreadable:
            return await self._take_unreadable(raw, sender, unreadable)
        try:
            return await self._take_readable(raw, sender, message)
        except (OSError, DBAPIError) as error:
            if not is_out_of_room(error):
                raise
            return self._turn_away(message.header, error)

    async def _take_unreadable(self, raw: bytes, sender: str, unreadable: UnreadableMessage) -> tuple[bytes, ...]:
        try:
            self._policy.check_room()
            await self._keep(self._arrived(raw, sender, unreadable.header, unreadable.reason))
        except (OSError, DBAPIError) as error:  # it is rejected in any case
            if not is_out_of_room(error):
                raise
        telemetry.EVENTS.labels("hl7", "unreadable").inc()
        return (self._reject(raw, unreadable),)

    def _turn_away(self, header: Header, error: Exception) -> tuple[bytes, ...]:
        telemetry.EVENTS.labels("hl7", "no room").inc()
        telemetry.log("HL7 message turned away", source="hl7", kind=type(error).__name__)
        return self._answers(header, "reject", NO_ROOM, "207")

    async def _take_readable(self, raw: bytes, sender: str, message: Message) -> tuple[bytes, ...]:
        header = message.header
        self._policy.check_room()
        if header.processing_id[:1] not in self._policy.processing_ids:
            telemetry.EVENTS.labels("hl7", "not allowed").inc()
            allowed = ", ".join(sorted(self._policy.processing_ids))
            return self._answers(header, "reject", f"MSH-11 must be one of {allowed} here", "202")
        kept = await self._keep(self._arrived(raw, sender, header, "", *message.warnings))
        telemetry.EVENTS.labels("hl7", kept.outcome).inc()
        return self._answers(header, "accept")

    def _arrived(self, raw: bytes, sender: str, header: Header, unreadable: str = "", *notes: str) -> Arrived:
        return Arrived(
            raw=raw,
            # A header that cannot be read may hold what PostgreSQL does not take.
            sender=drop_controls(f"{sender}|{header.sending_application}|{header.sending_facility}"),
            control_id=drop_controls(header.control_id),
            message_type=drop_controls(header.event),
            state="unreadable" if unreadable else "received",
            notes=[*filter(None, (unreadable,)), *notes],
            received_at=self._now(),
        )

    def _answers(self, header: Header, outcome: Outcome, text: str = "", error_code: str = "") -> tuple[bytes, ...]:
        now = self._now()
        return tuple(
            build_ack(
                header,
                code,
                now=now,
                control_id=derive_control_id("ack", header.control_id, code, now.isoformat()),
                text=text,
                error_code=error_code,
            )
            for code in codes_due(header, outcome)
        )

    def _reject(self, raw: bytes, unreadable: UnreadableMessage) -> bytes:
        now = self._now()
        control_id = derive_control_id("ack", hashlib.sha256(raw).hexdigest(), now.isoformat())
        return build_reject(raw, unreadable.reason, now=now, control_id=control_id, error_code=unreadable.error_code)

    async def keep(self, arrived: Sequence[Arrived]) -> list[Kept]:
        """Keep, durably and in this order, what came by another way than HL7. Raises what the store raises: then some
        may be kept, and keeping them all again is harmless."""
        return list(await asyncio.gather(*map(self._keep, arrived)))

    async def _keep(self, arrived: Arrived) -> Kept:
        done: asyncio.Future[Kept] = asyncio.get_running_loop().create_future()
        await self._waiting.put((arrived, done))
        return await done

    async def write_forever(self) -> None:
        """Commit waiting messages, all that came meanwhile in one transaction, until cancelled."""
        while True:
            batch = await self._next_batch()
            try:
                kept = await asyncio.to_thread(self._store.keep, [arrived for arrived, _ in batch])
            except Exception as error:  # every sender of the batch gets no answer, and sends again
                for _, done in batch:
                    if not done.done():
                        done.set_exception(error)
                continue
            for (_, done), one in zip(batch, kept, strict=True):
                if not done.done():
                    done.set_result(one)
            self.arrived.set()

    async def _next_batch(self) -> list[tuple[Arrived, asyncio.Future[Kept]]]:
        """All messages that are waiting, at least one. Those that the event loop is about to hand over count too: a
        commit costs more than a few turns of the loop, and senders that were answered together send together."""
        batch = [await self._waiting.get()]
        still = 0
        while still < TURNS_WITHOUT_NEWS and len(batch) < MAX_BATCH:
            still += 1
            await asyncio.sleep(0)
            while not self._waiting.empty() and len(batch) < MAX_BATCH:
                batch.append(self._waiting.get_nowait())
                still = 0
        return batch

    def apply_all(self) -> None:
        """Apply every message that was kept and not applied, in the order in which they came. One that cannot be
        applied for a reason of its own is refused and stops none behind it; a database that is away raises."""
        while positions := self._store.pending():
            for first in range(0, len(positions), APPLY_TOGETHER):
                self._give_way()
                self._apply(positions[first : first + APPLY_TOGETHER])

    def _apply(self, positions: Sequence[int]) -> None:
        try:
            self._store.apply(positions, self._apply_one)
        except Exception as error:
            if is_store_away(error):
                raise
            if len(positions) > 1:
                for position in positions:
                    self._apply([position])
                return
            reason = f"this message could not be applied: unexpected {type(error).__name__}"
            telemetry.log("message not applied", source="inbox", kind=type(error).__name__)
            self._store.apply(positions, partial(_refuse, reason))

    def _give_way(self) -> None:
        until = time.monotonic() + GIVE_WAY_S
        while (at := time.monotonic()) < until and at - self._last_came < QUIET_S:
            time.sleep(QUIET_S)

    def _apply_one(self, session: Session, heard: HeardMessage) -> None:
        if self._store.was_control_id_used(session, heard):
            heard.notes = [*heard.notes, "this control id was used before with other content"]
        if heard.format == "fhir":
            resources = [entry["resource"] for entry in json.loads(heard.raw)["entry"]]
            apply_events(session, heard, resources_to_events(resources, self._policy.number_systems), self._now())
        else:
            self._apply_hl7(session, heard)

    def _apply_hl7(self, session: Session, heard: HeardMessage) -> None:
        message: Message = read_message(heard.raw)
        if (message.header.sending_application, message.header.sending_facility) == self._policy.own_name:
            heard.state, heard.notes = "unhandled", [*heard.notes, "a message of our own came back"]
            return
        apply_events(session, heard, message_to_events(message, zone=self._policy.zone), self._now())


async def _read(raw: bytes) -> Message:
    return read_message(raw) if len(raw) <= READ_AT_ONCE_BYTES else await asyncio.to_thread(read_message, raw)


def _refuse(reason: str, _session: Session, heard: HeardMessage) -> None:
    heard.state, heard.notes = "refused", [*heard.notes, reason]

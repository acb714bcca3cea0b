"""Our subscriptions at the EHR: found, made, made again where they are gone, and woken where they stopped."""

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from connectors.errors import ConnectorError
from mappings.inputs.fhir_elements import as_dict, as_list
from mappings.inputs.fhir_to_notification import Notification, UnreadableNotification, read_notification, read_status
from mappings.outputs.subscription import Wanted, build_subscription, differs, is_of
from middleware import telemetry
from middleware.ports import Ehr
from middleware.store.ehr_events import EhrEventStore

Json = dict[str, Any]

_RANK = {"active": 0, "requested": 1, "error": 2, "off": 3}
STOPPED = ("error", "off")


@dataclass(frozen=True)
class Checked:
    """What a look at our subscriptions found: how they are called there, which were written (so that events may have
    been missed before), and whether all that we want are active."""

    references: tuple[str, ...]
    written: tuple[str, ...]
    active: bool


class EhrSubscriptions:
    """The subscriptions that we want of one EHR (`url` is its FHIR base)."""

    def __init__(self, ehr: Ehr, store: EhrEventStore, wanted: Sequence[Wanted], url: str) -> None:
        self._ehr = ehr
        self._store = store
        self._wanted = wanted
        self._url = url

    async def check(self, silent: Collection[str] = ()) -> Checked:
        """Make sure that each of them is there and at work; those of `silent` are asked for anew whatever the server
        says of them. One that the EHR does not let us have stops none of the others."""
        there, written = {}, []
        for wanted in self._wanted:
            try:
                subscription, is_written = await self._check(wanted, silent)
            except ConnectorError as error:
                telemetry.log("EHR not subscribed to", source="fhir", kind=type(error).__name__)
                continue
            there[_name(subscription)] = _status(subscription)
            written += [_name(subscription)] if is_written else []
        active = len(there) == len(self._wanted) and set(there.values()) == {"active"}
        return Checked(tuple(there), tuple(written), active)

    async def _check(self, wanted: Wanted, silent: Collection[str]) -> tuple[Json, bool]:
        """The subscription as the server has it now, and whether we wrote it."""
        found = await self._ehr.search("Subscription", {"url": _escaped(wanted.endpoint)})
        ours = sorted((one for one in found if is_of(one, wanted)), key=lambda one: _RANK.get(_status(one), 9))
        for surplus in ours[1:]:
            await self._turn_off(surplus)
        subscription, is_written = await self._write(wanted, ours[0] if ours else None, silent)
        if is_written:
            state = _status(subscription)
            telemetry.log("subscription written", source="fhir", state=state if state in _RANK else "unknown")
        key = f"{self._url} {wanted.endpoint} {wanted.criteria}"
        await asyncio.to_thread(self._store.remember_subscription, key, _name(subscription))
        return subscription, is_written

    async def _write(self, wanted: Wanted, there: Json | None, silent: Collection[str]) -> tuple[Json, bool]:
        if there is None:
            condition = {"url": _escaped(wanted.endpoint), "criteria:exact": _escaped(wanted.criteria)}
            return await self._ehr.create(build_subscription(wanted), if_none_exist=condition), True
        if _status(there) in STOPPED or differs(there, wanted) or _name(there) in silent:
            return await self._ehr.update(build_subscription(wanted, str(there["id"]))), True
        return there, False

    async def _turn_off(self, surplus: Json) -> None:
        """A second one of the same would tell everything twice."""
        if _status(surplus) != "off":
            await self._ehr.update({**surplus, "status": "off"})

    async def count_events(self, reference: str) -> int | None:
        """How many events the server counts of a subscription (`$status`); None where it does not say."""
        try:
            answer = await self._ehr.operation(reference, "$status", {})
            entries = [as_dict(as_dict(entry).get("resource")) for entry in as_list(answer.get("entry"))]
            counts = [status.events_since_start for status in map(read_status, entries or [answer])]
        except (ConnectorError, UnreadableNotification):  # a server need not have it
            return None
        return next((count for count in counts if count is not None), None)

    async def missed_events(self, reference: str, since: int, until: int) -> Notification | None:
        """Those events, both ends included, as the server kept them (`$events`); None where it does not."""
        numbers = {"eventsSinceNumber": str(since), "eventsUntilNumber": str(until)}
        try:
            return read_notification(await self._ehr.operation(reference, "$events", numbers))
        except (ConnectorError, UnreadableNotification):
            return None


def _status(subscription: Json) -> str:
    return str(subscription.get("status", ""))


def _name(subscription: Json) -> str:
    return f"Subscription/{subscription.get('id', '')}"


def _escaped(value: str) -> str:
    r"""A value of a search parameter (FHIR R4 search.html#escaping): `\`, `,`, `$` and `|` have a meaning there."""
    for character in "\\,$|":
        value = value.replace(character, f"\\{character}")
    return value

"""Our subscriptions at the EHR: found, made, made again where they are gone, and woken where they stopped."""

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from connectors.errors import Permanent
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
    """What a look at our subscriptions found: how they are called there, whether any was written (so that events may
    have been missed before), and whether all of them are active."""

    references: tuple[str, ...]
    wrote: bool
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
        says of them. Raises ConnectorError where the EHR does not let us."""
        checked = [await self._check(wanted, silent) for wanted in self._wanted]
        return Checked(
            tuple(reference for reference, _, _ in checked),
            wrote=any(wrote for _, wrote, _ in checked),
            active=all(status == "active" for _, _, status in checked),
        )

    async def _check(self, wanted: Wanted, silent: Collection[str]) -> tuple[str, bool, str]:
        there = await self._ehr.search("Subscription", {"url": _escaped(wanted.endpoint)})
        ours = sorted((one for one in there if is_of(one, wanted)), key=lambda one: _RANK.get(_status(one), 9))
        for surplus in ours[1:]:
            await self._turn_off(surplus)
        if not ours:
            condition = {"url": _escaped(wanted.endpoint), "criteria:exact": _escaped(wanted.criteria)}
            subscription, wrote = await self._ehr.create(build_subscription(wanted), if_none_exist=condition), True
        else:
            subscription, wrote = ours[0], False
            if _status(subscription) in STOPPED or differs(subscription, wanted) or _name(subscription) in silent:
                subscription = await self._ehr.update(build_subscription(wanted, str(subscription["id"])))
                wrote = True
        if wrote:
            telemetry.log("subscription written", source="fhir", state=_status(subscription))
        key = f"{self._url} {wanted.endpoint} {wanted.criteria}"
        await asyncio.to_thread(self._store.remember_subscription, key, _name(subscription))
        return _name(subscription), wrote, _status(subscription)

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
        except (Permanent, UnreadableNotification):  # a server need not have it
            return None
        return next((count for count in counts if count is not None), None)

    async def missed_events(self, reference: str, since: int, until: int) -> Notification | None:
        """Those events, both ends included, as the server kept them (`$events`); None where it does not."""
        numbers = {"eventsSinceNumber": str(since), "eventsUntilNumber": str(until)}
        try:
            return read_notification(await self._ehr.operation(reference, "$events", numbers))
        except (Permanent, UnreadableNotification):
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

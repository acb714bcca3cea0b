"""Reading what changed in the EHR: from the EHR itself, in the order of its own clock, into the inbox, once.

A search gives how each resource stands now. The watermark of a search is the EHR's `meta.lastUpdated` of the latest
resource that is in the inbox; the next search starts a little before it, since a server may make a resource visible
after one that it dates later. What comes twice is known by its version and content.
"""

import asyncio
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from connectors.errors import ConnectorError
from mappings.inputs.fhir_elements import as_dict, as_text, parse_moment
from mappings.inputs.fhir_to_event import is_merged_away, references_of
from middleware import telemetry
from middleware.ports import ContextSource
from middleware.store.ehr_events import EhrEventStore
from middleware.store.hearing import Arrived, HearingStore, Kept

Json = dict[str, Any]
Keep = Callable[[Sequence[Arrived]], Awaitable[list[Kept]]]

BATCH = 500
"""Resources that are read, and committed, at a time."""
IDS_A_SEARCH = 40
"""So that the URL stays short."""
EARLIEST = datetime(1970, 1, 2, tzinfo=UTC)

_ID = re.compile(r"[A-Za-z0-9\-.]{1,64}")


@dataclass(frozen=True)
class Stream:
    """One search to follow: its type and what else it is narrowed by (search parameters)."""

    resource_type: str
    parameters: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ReadingPolicy:
    """Which EHR (`name` as in its settings, `url` of its FHIR base), what of it, and from when on."""

    name: str
    url: str
    streams: tuple[Stream, ...]
    overlap: timedelta
    first_look_back: timedelta


class EhrReader:
    """Reads every stream up to now, one call at a time."""

    def __init__(
        self,
        ehr: ContextSource,
        marks: EhrEventStore,
        heard: HearingStore,
        keep: Keep,
        policy: ReadingPolicy,
        now: Callable[[], datetime],
    ) -> None:
        self._ehr = ehr
        self._marks = marks
        self._heard = heard
        self._keep = keep
        self._policy = policy
        self._now = now

    async def catch_up(self) -> int:
        """Bring into the inbox what changed since the last time; how many versions were new. Where the EHR does not
        give one kind of resource, the others are read; then raises that ConnectorError."""
        count, errors = 0, []
        for stream in self._policy.streams:
            try:
                count += await self._read_stream(stream)
            except ConnectorError as error:
                telemetry.log("EHR not read", source="fhir", step=stream.resource_type, kind=type(error).__name__)
                errors.append(error)
        if errors:
            raise errors[0]
        return count

    async def read_named(self, references: Collection[str]) -> int:
        """Bring the resources of these `Type/id` into the inbox, as far as they belong to a stream."""
        found: list[Json] = []
        for stream in self._policy.streams:
            found += await self._search_ids(stream.resource_type, references, dict(stream.parameters))
        return await self._take(found)

    async def _read_stream(self, stream: Stream) -> int:
        name = f"{self._policy.url} {stream.resource_type} {json.dumps(stream.parameters)}"
        mark = await asyncio.to_thread(self._marks.read_until, name)
        if mark is None:
            mark = await self._first_mark(stream)
            await asyncio.to_thread(self._marks.move_watermark, name, mark)
        since = mark - self._policy.overlap
        limit, count, is_last = BATCH, 0, False
        while not is_last:
            batch, is_last = await self._search_since(stream, since, limit)
            count += await self._take(batch)
            newest = max(filter(None, map(_updated_at, batch)), default=None)
            if newest is None:
                break
            # Not beyond our own clock: had the EHR's once run ahead, nothing would be found until then.
            await asyncio.to_thread(self._marks.move_watermark, name, min(newest, self._now()))
            # A batch of one and the same moment can only be passed as a whole.
            limit = BATCH if newest > since else limit * 2
            since = newest
        return count

    async def _first_mark(self, stream: Stream) -> datetime:
        """Where to begin in an EHR that was never read: a while before its latest change, by its own clock; where it
        has nothing yet, everything that comes is new."""
        parameters = {**dict(stream.parameters), "_sort": "-_lastUpdated", "_count": "1"}
        found = await self._ehr.search(stream.resource_type, parameters, limit=1)
        latest = _updated_at(found[0]) if found else None
        return min(latest, self._now()) - self._policy.first_look_back if latest else EARLIEST

    async def _search_since(self, stream: Stream, since: datetime, limit: int) -> tuple[list[Json], bool]:
        """The earliest changes from then on, and whether that is all of them."""
        order = {"_lastUpdated": f"ge{_instant(since)}", "_sort": "_lastUpdated", "_count": "100"}
        parameters = {**dict(stream.parameters), **order}
        found = await self._ehr.search(stream.resource_type, parameters, limit=limit)
        if len(found) < limit:
            return found, True
        times = [_updated_at(resource) for resource in found]
        if None in times or times != sorted(filter(None, times)):  # it does not sort: then only all of them will do
            return await self._ehr.search(stream.resource_type, parameters), True
        return found, False

    async def _take(self, resources: Sequence[Json]) -> int:
        """Commit what is not in the inbox yet, with what it refers to; how many that were."""
        keys = {_key(self._policy.name, r): r for r in resources if _is_heard(r)}
        known = await asyncio.to_thread(self._heard.keys_kept, list(keys))
        fresh = {key: resource for key, resource in keys.items() if key not in known}
        if not fresh:
            return 0
        others = await self._resolve(fresh.values())
        kept = await self._keep([self._arrived(key, resource, others) for key, resource in fresh.items()])
        for one in kept:
            telemetry.EVENTS.labels("fhir", one.outcome).inc()
        return len(kept)

    def _arrived(self, key: str, resource: Json, others: Mapping[str, Json]) -> Arrived:
        named = [others[name] for name in self._local(references_of(resource)) if name in others]
        bundle = {
            "resourceType": "Bundle",
            "type": "collection",
            "entry": [{"resource": one} for one in (resource, *named)],
        }
        return Arrived(
            raw=_canonical(bundle),
            sender=self._policy.name,
            control_id=_version_name(resource),
            message_type=str(resource["resourceType"]),
            state="received",
            notes=[],
            received_at=self._now(),
            format="fhir",
            message_key=key,
        )

    async def _resolve(self, resources: Iterable[Json]) -> dict[str, Json]:
        """What these resources refer to, by `Type/id`, as far as the EHR has it."""
        references = {name for resource in resources for name in self._local(references_of(resource))}
        found: list[Json] = []
        for resource_type in ("Patient", "ServiceRequest"):
            found += await self._search_ids(resource_type, references, {})
        return {f"{one['resourceType']}/{one.get('id', '')}": one for one in found}

    async def _search_ids(
        self, resource_type: str, references: Collection[str], parameters: Mapping[str, str]
    ) -> list[Json]:
        named = (reference.partition("/") for reference in references)
        ids = sorted({own for kind, _, own in named if kind == resource_type and _ID.fullmatch(own)})
        found: list[Json] = []
        for first in range(0, len(ids), IDS_A_SEARCH):
            together = ",".join(ids[first : first + IDS_A_SEARCH])
            found += await self._ehr.search(resource_type, {**parameters, "_id": together, "_count": "100"})
        return found

    def _local(self, references: Iterable[str]) -> Iterator[str]:
        """`Type/id` of those references that are the EHR's own; another server's are not followed."""
        for reference in references:
            relative = reference.removeprefix(f"{self._policy.url}/").partition("/_history/")[0]
            if relative.count("/") == 1:
                yield relative


def _is_heard(resource: Json) -> bool:
    """Of patients only merges are of interest."""
    return resource.get("resourceType") != "Patient" or is_merged_away(resource)


def _updated_at(resource: Json) -> datetime | None:
    return parse_moment(as_dict(resource.get("meta")).get("lastUpdated"))


def _instant(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _canonical(resource: Json) -> bytes:
    return json.dumps(resource, sort_keys=True, separators=(",", ":")).encode("ascii")


def _key(sender: str, resource: Json) -> str:
    """One version of one resource of one sender. Its content is part of it: a server that was restored from a backup
    counts the same versions again, for other contents."""
    return hashlib.sha256(sender.encode() + b"\n" + _canonical(resource)).hexdigest()


def _version_name(resource: Json) -> str:
    """`ServiceRequest/12/_history/3`; without what the server does not state."""
    own, version = as_text(resource.get("id")), as_text(as_dict(resource.get("meta")).get("versionId"))
    name = f"{resource['resourceType']}/{own if _ID.fullmatch(own) else ''}"
    return f"{name}/_history/{version}" if _ID.fullmatch(version) else name

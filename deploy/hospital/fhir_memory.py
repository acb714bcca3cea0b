"""FHIR R4 resources in memory: create, read, update, delete, search and transactions.

The storage of the fallback EHR, for machines without Java. It keeps the rules that a client of a real
server relies on (conditional create and update, all-or-nothing transactions, reference rewriting and
integrity, versions) and refuses search parameters it does not know; it indexes nothing.
Source: FHIR R4 4.0.1, "RESTful API" (http.html) and "Search" (search.html).
"""

import copy
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, urlencode

Resource = dict[str, Any]
Key = tuple[str, str]

REFERENCES = {
    "patient": ("subject", "patient"),
    "subject": ("subject",),
    "based-on": ("basedOn",),
    "result": ("result",),
    "target": ("target",),
    "encounter": ("encounter",),
    "derived-from": ("derivedFrom",),
}
TOKENS = {"code": "code", "category": "category", "type": "type", "clinical-status": "clinicalStatus"}
CODES = {"status": "status", "gender": "gender", "intent": "intent"}
DATES = {
    "date": ("effectiveDateTime", "authoredOn", "recordedDate", "onsetDateTime", "issued", "started"),
    "issued": ("issued",),
    "authored": ("authoredOn",),
    "recorded-date": ("recordedDate",),
    "started": ("started",),
}
RESULT_PARAMETERS = {"_sort", "_count", "_offset", "_total", "_format", "_pretty", "_summary", "_elements"}


class Refused(Exception):
    """A request that this server will not carry out: HTTP `status`, FHIR issue `code`, and why."""

    def __init__(self, status: int, code: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.code = code


class Memory:
    """All resources of one server. Stored resources are never changed in place, only replaced."""

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now = now
        self._stored: dict[Key, Resource] = {}
        self._last_id = 1000

    def read(self, kind: str, resource_id: str) -> Resource:
        """The current version. Raises `Refused` 404."""
        try:
            return self._stored[kind, resource_id]
        except KeyError:
            raise Refused(404, "not-found", f"{kind}/{resource_id} is not known") from None

    def search(self, kind: str, parameters: list[tuple[str, str]]) -> list[Resource]:
        """All matches, sorted; paging is the caller's. Raises `Refused` 400 on an unknown parameter."""
        found = [resource for (stored_kind, _), resource in self._stored.items() if stored_kind == kind]
        for name, value in parameters:
            if name not in RESULT_PARAMETERS:
                found = [resource for resource in found if self._matches(resource, name, value)]
        for name, value in parameters:
            if name == "_sort":
                found = _sorted(found, value)
        return found

    def create(self, resource: Resource, if_none_exist: str = "") -> tuple[int, Resource]:
        """Store under a new id, or return the one match of `if_none_exist` unchanged; (status, resource)."""
        if if_none_exist:
            match = self._one_match(resource["resourceType"], if_none_exist)
            if match:
                return 200, match
        self._check_references(resource)
        return 201, self._put(resource, self._next_id())

    def update(self, resource: Resource, resource_id: str, if_match: str = "") -> tuple[int, Resource]:
        """Store as the next version of `resource_id` (or its first); an unchanged one keeps its version."""
        current = self._stored.get((resource["resourceType"], resource_id))
        if if_match and (current is None or _etag(current) != if_match):
            raise Refused(412, "conflict", "If-Match names another version than the current one")
        self._check_references(resource)
        if current and _content(current) == _content({**resource, "id": resource_id}):
            return 200, current
        return (200 if current else 201), self._put(resource, resource_id)

    def conditional_update(self, resource: Resource, query: str) -> tuple[int, Resource]:
        """Update the one match of `query`, or create where nothing matches. Raises `Refused` 412."""
        match = self._one_match(resource["resourceType"], query)
        return self.update(resource, match["id"]) if match else self.create(resource)

    def delete(self, kind: str, resource_id: str) -> None:
        """Forget a resource; deleting what is not there is no error. Raises `Refused` 409 if referred to."""
        target = f"{kind}/{resource_id}"
        if any(target in set(_references(resource)) for resource in self._stored.values()):
            raise Refused(409, "conflict", f"{target} is still referred to")
        self._stored.pop((kind, resource_id), None)

    def transaction(self, bundle: Resource) -> Resource:
        """Carry out all entries or none, and return the transaction-response Bundle. Raises `Refused`."""
        before, last_id = dict(self._stored), self._last_id
        try:
            return {
                "resourceType": "Bundle",
                "type": "transaction-response",
                "entry": self._run_entries(copy.deepcopy(bundle.get("entry", []))),
            }
        except BaseException:
            self._stored, self._last_id = before, last_id
            raise

    def _run_entries(self, entries: list[Resource]) -> list[Resource]:
        targets = [self._target(entry) for entry in entries]
        known = {
            entry["fullUrl"]: f"{target[0]}/{target[1]}"
            for entry, target in zip(entries, targets, strict=True)
            if target and "fullUrl" in entry
        }
        outcomes = [
            self._store_entry(entry, target, known) if target else self._other_entry(entry)
            for entry, target in zip(entries, targets, strict=True)
        ]
        for (_, resource), target in zip(outcomes, targets, strict=True):
            if target and resource:
                self._check_references(resource)
        return [_response(status, resource) for status, resource in outcomes]

    def _target(self, entry: Resource) -> tuple[str, str, bool] | None:
        """Which resource a POST or PUT entry is about: (type, id, whether it is to be stored)."""
        request = entry.get("request") or {}
        method, url = request.get("method"), str(request.get("url", ""))
        kind, _, query = url.partition("?")
        kind, _, resource_id = kind.partition("/")
        if method == "POST":
            query, stores_match = request.get("ifNoneExist", ""), False
        elif method == "PUT":
            stores_match = True
        else:
            return None
        if (entry.get("resource") or {}).get("resourceType") != kind:
            raise Refused(400, "invalid", f"{method} {kind}: the entry's resource is of another type")
        if resource_id:
            return kind, resource_id, True
        match = self._one_match(kind, query) if query else None
        return (kind, match["id"], stores_match) if match else (kind, self._next_id(), True)

    def _store_entry(
        self, entry: Resource, target: tuple[str, str, bool], known: dict[str, str]
    ) -> tuple[int, Resource]:
        kind, resource_id, stores = target
        current = self._stored.get((kind, resource_id))
        if not stores and current:
            return 200, current
        resource = self._rewritten(entry["resource"], known)
        if current and _content(current) == _content({**resource, "id": resource_id}):
            return 200, current
        return (200 if current else 201), self._put(resource, resource_id)

    def _other_entry(self, entry: Resource) -> tuple[int, Resource | None]:
        request = entry.get("request") or {}
        method, url = request.get("method"), str(request.get("url", ""))
        kind, _, resource_id = url.partition("/")
        if method == "DELETE" and resource_id:
            self.delete(kind, resource_id)
            return 204, None
        if method == "GET" and resource_id:
            return 200, self.read(kind, resource_id)
        raise Refused(400, "not-supported", f"entry with method {method} and url {url!r} is not supported")

    def _rewritten(self, value: Any, known: dict[str, str]) -> Any:
        """`value` with every reference to an entry's fullUrl, or by search, turned into Type/id."""
        if isinstance(value, list):
            return [self._rewritten(item, known) for item in value]
        if not isinstance(value, dict):
            return value
        return {
            name: self._resolved(item, known)
            if name == "reference" and isinstance(item, str)
            else self._rewritten(item, known)
            for name, item in value.items()
        }

    def _resolved(self, reference: str, known: dict[str, str]) -> str:
        if reference in known:
            return known[reference]
        kind, _, query = reference.partition("?")
        if not query:
            return reference
        match = self._one_match(kind, query)
        if match is None:
            raise Refused(412, "not-found", f"no {kind} matches a conditional reference")
        return f"{kind}/{match['id']}"

    def _check_references(self, resource: Resource) -> None:
        for reference in _references(resource):
            if reference.startswith(("#", "http://", "https://", "urn:oid:")):
                continue
            kind, _, resource_id = reference.partition("/")
            if (kind, resource_id.split("/")[0]) not in self._stored:
                raise Refused(400, "not-found", f"{resource['resourceType']} refers to an unknown {kind[:40]}")

    def _one_match(self, kind: str, query: str) -> Resource | None:
        found = self.search(kind, parse_qsl(query.removeprefix(f"{kind}?"), strict_parsing=True))
        if len(found) > 1:
            raise Refused(412, "multiple-matches", f"{len(found)} resources of type {kind} match the condition")
        return found[0] if found else None

    def _put(self, resource: Resource, resource_id: str) -> Resource:
        key = (resource["resourceType"], resource_id)
        version = int(self._stored[key]["meta"]["versionId"]) + 1 if key in self._stored else 1
        meta = {
            **resource.get("meta", {}),
            "versionId": str(version),
            "lastUpdated": self._now().isoformat(timespec="milliseconds"),
        }
        self._stored[key] = {**copy.deepcopy(resource), "id": resource_id, "meta": meta}
        return self._stored[key]

    def _next_id(self) -> str:
        self._last_id += 1
        return str(self._last_id)

    def _matches(self, resource: Resource, name: str, value: str) -> bool:
        """Whether one search parameter holds; a comma between values means "or"."""
        base, _, chain = name.partition(".")
        base = base.partition(":")[0]
        if chain:
            targets = [self._stored.get(key) for key in _keys(resource, base)]
            return any(target and self._matches(target, chain, value) for target in targets)
        test = _test_of(name)
        return any(test(resource, alternative) for alternative in value.split(","))


def _test_of(name: str) -> Callable[[Resource, str], bool]:
    if name == "_id":
        return lambda resource, value: bool(resource["id"] == value)
    if name == "identifier":
        return lambda resource, value: any(_token(i, "value", value) for i in _list(resource, "identifier"))
    if name == "_tag":
        return lambda resource, value: any(_token(tag, "code", value) for tag in _list(resource.get("meta", {}), "tag"))
    if name in TOKENS:
        return lambda resource, value: any(_token(c, "code", value) for c in _codings(resource, TOKENS[name]))
    if name in CODES:
        return lambda resource, value: bool(resource.get(CODES[name]) == value.rpartition("|")[2])
    if name in REFERENCES:
        return lambda resource, value: any(value in (key[1], "/".join(key)) for key in _keys(resource, name))
    raise Refused(400, "not-supported", f"unknown search parameter {name!r}")


def _token(item: Resource, member: str, value: str) -> bool:
    """FHIR token matching: `value`, `system|value`, `|value` (no system) or `system|`."""
    system, bar, wanted = value.rpartition("|")
    if bar and item.get("system", "") != system:
        return False
    return not wanted or item.get(member) == wanted


def _keys(resource: Resource, name: str) -> list[Key]:
    if name not in REFERENCES:
        raise Refused(400, "not-supported", f"unknown search parameter {name!r}")
    targets = [item.get("reference", "") for member in REFERENCES[name] for item in _list(resource, member)]
    parts = [target.partition("/") for target in targets]
    return [(kind, resource_id) for kind, slash, resource_id in parts if slash]


def _list(resource: Resource, member: str) -> list[Resource]:
    value = resource.get(member, [])
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]


def _codings(resource: Resource, member: str) -> list[Resource]:
    return [coding for concept in _list(resource, member) for coding in _list(concept, "coding")]


def _sorted(found: list[Resource], order: str) -> list[Resource]:
    for name in reversed(order.split(",")):
        key = name.removeprefix("-")
        if key != "_lastUpdated" and key not in DATES:
            raise Refused(400, "not-supported", f"cannot sort by {key!r}")
        found = sorted(found, key=partial(_sort_key, name=key), reverse=name[0] == "-")
    return found


def _sort_key(resource: Resource, name: str) -> float:
    """Seconds since 1970 of the first date present, minus infinity where there is none."""
    texts = [resource["meta"]["lastUpdated"]] if name == "_lastUpdated" else _dates(resource, DATES[name])
    if not texts:
        return float("-inf")
    text = texts[0] + "-01" * (2 - texts[0].count("-")) if "T" not in texts[0] else texts[0]
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _dates(resource: Resource, members: tuple[str, ...]) -> list[str]:
    return [resource[member] for member in members if isinstance(resource.get(member), str)]


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _references(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name == "reference" and isinstance(item, str):
                yield item
            else:
                yield from _references(item)


def _content(resource: Resource) -> Resource:
    """The resource without what the server itself adds."""
    meta = {k: v for k, v in resource.get("meta", {}).items() if k not in ("versionId", "lastUpdated")}
    rest = {k: v for k, v in resource.items() if k != "meta"}
    return {**rest, "meta": meta} if meta else rest


def _etag(resource: Resource) -> str:
    return f'W/"{resource["meta"]["versionId"]}"'


def _response(status: int, resource: Resource | None) -> Resource:
    names = {200: "200 OK", 201: "201 Created", 204: "204 No Content"}
    if resource is None:
        return {"response": {"status": names[status]}}
    meta = resource["meta"]
    location = f"{resource['resourceType']}/{resource['id']}/_history/{meta['versionId']}"
    answer = {"location": location, "etag": _etag(resource), "lastModified": meta["lastUpdated"]}
    return {"response": {"status": names[status], **answer}}


def searchset(base_url: str, kind: str, found: list[Resource], parameters: list[tuple[str, str]]) -> Resource:
    """One page of a search as a Bundle, with a `next` link while there is more (`_count`, `_offset`)."""
    count = int(next((value for name, value in parameters if name == "_count"), "20"))
    offset = int(next((value for name, value in parameters if name == "_offset"), "0"))
    bundle: Resource = {"resourceType": "Bundle", "id": str(uuid.uuid4()), "type": "searchset"}
    bundle |= {"total": len(found), "link": _links(f"{base_url}/{kind}", parameters, offset, count, len(found))}
    page = found[offset : offset + count]
    if page:
        bundle["entry"] = [
            {"fullUrl": f"{base_url}/{kind}/{r['id']}", "resource": r, "search": {"mode": "match"}} for r in page
        ]
    return bundle


def _links(url: str, parameters: list[tuple[str, str]], offset: int, count: int, total: int) -> list[Resource]:
    links = [{"relation": "self", "url": f"{url}?{urlencode(parameters)}"}]
    if count and offset + count < total:
        kept = [(name, value) for name, value in parameters if name not in ("_offset", "_count")]
        query = urlencode([*kept, ("_count", str(count)), ("_offset", str(offset + count))])
        links.append({"relation": "next", "url": f"{url}?{query}"})
    return links

"""A FHIR R4 server as asyncio calls: search, read, create, update, operation, transaction (FHIR R4 http.html).

Nothing is retried here: Retryable says that the caller may, and after how long.
"""

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from connectors.errors import Ambiguous, ConnectorError, Permanent
from connectors.fhir.config import FhirConfig
from connectors.fhir.outcome import check_transaction, status_error
from connectors.fhir.sign_in import SignIn
from connectors.fhir.wire import Answer, exchange, failures, tls_context, unanswered

Json = dict[str, Any]

MEDIA_TYPE = "application/fhir+json"
_TYPE = re.compile(r"[A-Z][A-Za-z]{1,63}")
_REFERENCE = re.compile(r"[A-Z][A-Za-z]{1,63}/[A-Za-z0-9\-.]{1,64}(/_history/[A-Za-z0-9\-.]{1,64})?")
_INSTANCE = re.compile(r"[A-Z][A-Za-z]{1,63}/[A-Za-z0-9\-.]{1,64}")
_OPERATION = re.compile(r"\$[a-z][a-z\-]{0,63}")
# Without it a server may answer a create with the id alone, and that in a header.
_WHOLE = {"Prefer": "return=representation"}
# The gateway gave up on the server, which may still be at work.
_GATEWAY_STATUS = (502, 504)
# What is kept of an answer that explains a failure.
_MAX_KEPT_BYTES = 1 << 20


class FhirClient:
    """Talks to one FHIR server. Close it with `aclose`."""

    def __init__(self, config: FhirConfig) -> None:
        self._config = config
        self._sign_in = SignIn(config, config.oauth) if config.oauth else None
        self._http = httpx.AsyncClient(
            verify=tls_context(config.name, config.ca_file),
            # How things stand now: HAPI answers a search that it has answered within a minute from memory.
            headers={"Accept": MEDIA_TYPE, "Cache-Control": "no-cache"},
            timeout=httpx.Timeout(config.read_timeout_s, connect=config.connect_timeout_s),
            limits=httpx.Limits(max_connections=8, keepalive_expiry=2.0),
            trust_env=False,
        )

    async def search(
        self, resource_type: str, params: Mapping[str, str | list[str]], *, limit: int | None = None
    ) -> list[Json]:
        """Resources of this type that match, over all pages; `limit` ends it early, and is what is asked for.

        Included resources and outcomes are left out. Pages are followed on the server's own origin only.
        Raises Permanent for a page elsewhere, a page seen before, or more than max_pages or max_resources.
        """
        if not _TYPE.fullmatch(resource_type):
            raise Permanent(f"{self._config.name}: {resource_type!r} is not a FHIR resource type.")
        where = f"{self._config.name}: search of {resource_type}"
        url = httpx.URL(f"{self._config.url}/{resource_type}", params=params)
        found: list[Json] = []
        seen: set[httpx.URL] = set()
        while True:
            self._check_page(url, seen, where)
            seen.add(url)
            page = await self._bundle(url, where)
            found += _matches(page, resource_type)
            if limit is not None and len(found) >= limit:
                return found[:limit]
            self._check_amount(found, where)
            following = _next_link(page)
            if following is None:
                return found
            url = _joined(url, following, where)

    async def read(self, reference: str) -> Json:
        """The resource that `Type/id`, or the same below this server's own URL, refers to."""
        relative = reference.removeprefix(f"{self._config.url}/")
        if not _REFERENCE.fullmatch(relative):
            raise Permanent(f"{self._config.name}: a reference to read is not Type/id on this server.")
        resource_type = relative.partition("/")[0]
        where = f"{self._config.name}: read of {resource_type}"
        resource = await self._exchange("GET", httpx.URL(f"{self._config.url}/{relative}"), where)
        if not isinstance(resource, dict) or resource.get("resourceType") != resource_type:
            raise Permanent(f"{where}: the server answered with another type of resource.")
        return resource

    async def create(self, resource: Json, *, if_none_exist: Mapping[str, str]) -> Json:
        """Creates the resource unless one matches `if_none_exist` (search parameters); the one that is there then.

        Repeating it is harmless, so no answer is Retryable (FHIR R4 http.html#ccreate).
        """
        resource_type = str(resource.get("resourceType", ""))
        if not _TYPE.fullmatch(resource_type) or not if_none_exist:
            raise Permanent(f"{self._config.name}: what is to be created is no resource, or has no condition.")
        headers = {**_WHOLE, "If-None-Exist": str(httpx.QueryParams(if_none_exist))}
        return await self._write("POST", resource_type, resource, headers)

    async def update(self, resource: Json) -> Json:
        """Puts the resource in the place of the one of its id; what the server then has. Repeating it is harmless."""
        reference = f"{resource.get('resourceType', '')}/{resource.get('id', '')}"
        if not _INSTANCE.fullmatch(reference):
            raise Permanent(f"{self._config.name}: what is to be updated has no type or id.")
        return await self._write("PUT", reference, resource, _WHOLE)

    async def operation(self, reference: str, name: str, params: Mapping[str, str]) -> Json:
        """What `[base]/Type/id/$name` answers to GET: for operations that change nothing (FHIR R4 operations.html)."""
        if not (_INSTANCE.fullmatch(reference) and _OPERATION.fullmatch(name)):
            raise Permanent(f"{self._config.name}: an operation is called as $name of Type/id.")
        where = f"{self._config.name}: {name} of {reference.partition('/')[0]}"
        url = httpx.URL(f"{self._config.url}/{reference}/{name}", params=params)
        return _resource(await self._exchange("GET", url, where), where)

    async def _write(self, method: str, path: str, resource: Json, headers: Mapping[str, str]) -> Json:
        where = f"{self._config.name}: {'update' if method == 'PUT' else 'create'} of {resource['resourceType']}"
        body = json.dumps(resource, ensure_ascii=False, allow_nan=False).encode()
        url = httpx.URL(f"{self._config.url}/{path}")
        return _resource(await self._exchange(method, url, where, body=body, headers=headers), where)

    async def transaction(self, bundle: Json) -> Json:
        """Sends a transaction Bundle, and gives the response Bundle once every entry in it says 2xx.

        No answer after sending is Retryable if every entry is conditional (PUT, DELETE, or POST with ifNoneExist):
        repeated, such a transaction has the same effect. With any other entry it is Ambiguous.
        """
        where = f"{self._config.name}: transaction"
        entries = bundle.get("entry")
        if bundle.get("type") != "transaction" or not isinstance(entries, list) or not entries:
            raise Permanent(f"{where}: what is to be sent is not a transaction Bundle with entries.")
        body = json.dumps(bundle, ensure_ascii=False, allow_nan=False).encode()
        url = httpx.URL(self._config.url)
        answer = await self._exchange("POST", url, where, body=body, repeatable=all(map(_is_repeatable, entries)))
        try:
            return check_transaction(answer, len(entries), where)
        except ConnectorError as error:
            error.answer = json.dumps(answer).encode()[:_MAX_KEPT_BYTES]
            raise

    async def probe(self) -> str:
        """Says which server answers and in which FHIR version; Permanent unless that is R4 (4.x)."""
        where = f"{self._config.name}: capability statement"
        statement = await self._exchange("GET", httpx.URL(f"{self._config.url}/metadata"), where)
        if not isinstance(statement, dict) or statement.get("resourceType") != "CapabilityStatement":
            raise Permanent(f"{where}: the server sent none. Check that url is the FHIR base.")
        version = str(statement.get("fhirVersion", "unknown"))
        if not version.startswith("4."):
            raise Permanent(f"{where}: the server speaks FHIR {version}; this connector needs R4 (4.x).")
        software = statement.get("software")
        name = software.get("name", "unnamed software") if isinstance(software, dict) else "unnamed software"
        return f"{self._config.name}: {name}, FHIR {version}"

    async def aclose(self) -> None:
        """Closes all connections."""
        if self._sign_in:
            await self._sign_in.aclose()
        await self._http.aclose()

    def _check_page(self, url: httpx.URL, seen: set[httpx.URL], where: str) -> None:
        base = httpx.URL(self._config.url)
        if _origin(url) != _origin(base):
            raise Permanent(
                f"{where}: the next page is on another origin ({url.scheme}://{url.host}), which is not followed. "
                "Make url and the server's own base URL the same."
            )
        if url in seen:
            raise Permanent(f"{where}: the pages go round in a loop after {len(seen)} of them.")
        if len(seen) >= self._config.max_pages:
            raise Permanent(f"{where}: more than max_pages ({self._config.max_pages}). Narrow it or raise the setting.")

    def _check_amount(self, found: list[Json], where: str) -> None:
        if len(found) > self._config.max_resources:
            raise Permanent(
                f"{where}: more than max_resources ({self._config.max_resources}). Narrow it or raise the setting."
            )

    async def _bundle(self, url: httpx.URL, where: str) -> Json:
        page = await self._exchange("GET", url, where)
        if not isinstance(page, dict) or page.get("resourceType") != "Bundle":
            raise Permanent(f"{where}: the server answered with something else than a Bundle.")
        return page

    async def _exchange(
        self,
        method: str,
        url: httpx.URL,
        where: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        repeatable: bool = True,
    ) -> object:
        """One request; the JSON of its answer, or the error that stands for what came, with the answer kept in it."""
        typed = {"Content-Type": MEDIA_TYPE} if body is not None else {}
        request = self._http.build_request(method, url, content=body, headers={**typed, **(headers or {})})
        answer = await self._signed(request, where, repeatable)
        if not repeatable and answer.status in _GATEWAY_STATUS:
            raise unanswered(where, f"HTTP {answer.status}")
        resource = answer.json() if answer.is_whole else None
        if error := status_error(answer.status, answer.headers, resource, where, self._access(answer.status)):
            error.answer = answer.content[:_MAX_KEPT_BYTES]
            raise error
        if not answer.is_whole:
            limit = self._config.max_answer_bytes
            _refuse(f"{where}: the answer is larger than max_answer_bytes ({limit}).", sent=body)
        if resource is None:
            _refuse(f"{where}: the answer is not JSON ({answer.kind}). Check that url is the FHIR base.", sent=body)
        return resource

    async def _signed(self, request: httpx.Request, where: str, repeatable: bool) -> Answer:
        """The answer to the request with our token; sent again with a fresh one where it met 401.

        A server that answers 401 has not acted, so that this repeats nothing.
        """
        if self._sign_in is None:
            held = self._config.token.get_secret_value() if self._config.token else ""
            return await self._send(request, where, repeatable, held)
        token = await self._sign_in.token()
        answer = await self._send(request, where, repeatable, token)
        if answer.status != 401:
            return answer
        fresh = await self._sign_in.token(rejected=token)
        return await self._send(request, where, repeatable, fresh)

    async def _send(self, request: httpx.Request, where: str, repeatable: bool, token: str) -> Answer:
        with failures(where, repeatable=repeatable):
            async with asyncio.timeout(self._config.request_timeout_s):
                if token:
                    request.headers["Authorization"] = f"Bearer {token}"
                return await exchange(self._http, request, self._config.max_answer_bytes)

    def _access(self, status: int) -> str:
        return self._sign_in.advice(status) if self._sign_in else "Check token and its scopes."


def _refuse(message: str, *, sent: object) -> None:
    """Raises for an unusable answer: Ambiguous where the server may have acted on what was sent."""
    if sent:
        raise Ambiguous(f"{message} The server may have acted; look there before sending it again.")
    raise Permanent(message)


def _resource(answer: object, where: str) -> Json:
    if not isinstance(answer, dict) or not isinstance(answer.get("resourceType"), str):
        raise Permanent(f"{where}: the server answered with something else than a resource.")
    return answer


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _entries(bundle: Json) -> list[Json]:
    entries = bundle.get("entry")
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _matches(bundle: Json, resource_type: str) -> Iterator[Json]:
    """Resources of the asked type that the search matched; an entry without a mode counts as a match."""
    for entry in _entries(bundle):
        resource, search = entry.get("resource"), entry.get("search")
        mode = search.get("mode", "match") if isinstance(search, dict) else "match"
        if mode == "match" and isinstance(resource, dict) and resource.get("resourceType") == resource_type:
            yield resource


def _next_link(bundle: Json) -> str | None:
    links = bundle.get("link")
    for link in links if isinstance(links, list) else []:
        if isinstance(link, dict) and link.get("relation") == "next" and isinstance(link.get("url"), str):
            return str(link["url"])
    return None


def _joined(url: httpx.URL, following: str, where: str) -> httpx.URL:
    try:
        return url.join(following)
    except httpx.InvalidURL as error:
        raise Permanent(f"{where}: the link to the next page is no URL.") from error


def _is_repeatable(entry: object) -> bool:
    request = entry.get("request") if isinstance(entry, dict) else None
    if not isinstance(request, dict):
        return False
    return request.get("method") in ("GET", "HEAD", "PUT", "DELETE") or bool(request.get("ifNoneExist"))

"""An EHR that speaks the Subscriptions R5 Backport IG 1.1.0 on FHIR R4, written from the guide alone, and that fails
where a test asks it to: it drops notifications, forgets events, pages astray, runs its clock wrong.

It shares no code with what it tests. It knows what that needs: search by `_id`, `_lastUpdated` and `url`, `_sort`,
pages, conditional create, update, `$status`, `$events`.
"""

import json
import threading
import urllib.request
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

Json = dict[str, Any]

PROFILE = "http://hl7.org/fhir/uv/subscriptions-backport/StructureDefinition/backport-subscription-status-r4"


class BackportServer(ThreadingHTTPServer):
    """The server; `topics` say which topic (canonical URL) is about which type of resource."""

    daemon_threads = True

    def __init__(self, topics: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/fhir"
        self.topics = topics
        self.resources: dict[str, Json] = {}
        self.counts: dict[str, int] = {}
        self.events: dict[str, list[tuple[int, str]]] = {}
        self.requests: list[str] = []
        self.drops = 0
        self.down = False
        self.refused: set[str] = set()
        self.page_size = 100
        self.next_link = ""
        self.clock = timedelta()
        self.has_status = self.has_events = self.sorts = True
        self.open = threading.Event()
        self.open.set()
        self.lock = threading.RLock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """End it."""
        self.shutdown()
        self.server_close()

    # What happens in the hospital

    def put(self, resource: Json, *, at: datetime | None = None) -> Json:
        """Store the next version of a resource (without id: a new one), and notify of it."""
        with self.lock:
            own = str(resource.get("id") or len(self.resources) + 1)
            name = f"{resource['resourceType']}/{own}"
            version = int(self.resources.get(name, {}).get("meta", {}).get("versionId", "0")) + 1
            moment = (at or datetime.now(UTC) + self.clock).isoformat(timespec="milliseconds")
            meta = {**resource.get("meta", {}), "versionId": str(version), "lastUpdated": moment}
            self.resources[name] = {**resource, "id": own, "meta": meta}
        if resource["resourceType"] != "Subscription":
            self._notify(name)
        return self.resources[name]

    def heartbeat(self) -> None:
        """Send a heartbeat to every subscription."""
        for name in self.subscriptions():
            self.send(name, self.status(name, "heartbeat"))

    def subscriptions(self) -> dict[str, Json]:
        """Every Subscription by its name."""
        return {name: one for name, one in self.resources.items() if name.startswith("Subscription/")}

    def set_status(self, status: str) -> None:
        """Give every subscription this status."""
        for name, one in self.subscriptions().items():
            self.resources[name] = {**one, "status": status}

    def count_anew(self) -> None:
        """Lose the count of all events, and the events."""
        self.counts, self.events = {}, {}

    def _notify(self, focus: str) -> None:
        for name, one in self.subscriptions().items():
            if self.topics.get(one["criteria"]) != focus.partition("/")[0]:
                continue
            with self.lock:
                number = self.counts[name] = self.counts.get(name, 0) + 1
                self.events.setdefault(name, []).append((number, focus))
                dropped, self.drops = self.drops > 0, max(0, self.drops - 1)
            if one["status"] == "active" and not dropped:
                self.send(name, self.status(name, "event-notification", (number, focus)))

    def status(self, name: str, kind: str, *events: tuple[int, str]) -> Json:
        """The status of a subscription as a Parameters."""
        values: list[Json] = [
            {"name": "subscription", "valueReference": {"reference": f"{self.url}/{name}"}},
            {"name": "status", "valueCode": self.resources[name]["status"]},
            {"name": "type", "valueCode": kind},
            {"name": "events-since-subscription-start", "valueString": str(self.counts.get(name, 0))},
        ]
        for number, focus in events:
            parts = [
                {"name": "event-number", "valueString": str(number)},
                {"name": "focus", "valueReference": {"reference": f"{self.url}/{focus}"}},
            ]
            values.append({"name": "notification-event", "part": parts})
        return {"resourceType": "Parameters", "meta": {"profile": [PROFILE]}, "parameter": values}

    def send(self, name: str, status: Json) -> int:
        """Post a notification to where a subscription reports; the answer's status, 0 where there is none."""
        channel = self.resources[name]["channel"]
        request = urllib.request.Request(
            channel["endpoint"],
            json.dumps(notification(status, f"{self.url}/{name}")).encode(),
            {"Content-Type": "application/fhir+json", **dict(h.split(": ", 1) for h in channel["header"])},
        )
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request, timeout=10) as answer:
                return int(answer.status)
        except OSError as error:
            return int(getattr(error, "code", 0))

    def greet(self, name: str) -> None:
        """Send the handshake; the subscription is active once it is accepted, else in error."""
        accepted = 200 <= self.send(name, self.status(name, "handshake")) < 300
        self.resources[name] = {**self.resources[name], "status": "active" if accepted else "error"}

    # What it answers

    def answer(self, method: str, path: str, query: str, body: Json, condition: str) -> tuple[int, Json]:
        """Status and resource for a request below the base."""
        parts = path.removeprefix("/fhir/").split("/")
        if self.down:
            return 503, _outcome("down")
        about = f"{parts[0]} {self.topics.get(body.get('criteria', ''), '')}".strip()
        if about in self.refused:
            return 403, _outcome("not allowed")
        if parts[-1] == "$status" and self.has_status:
            status = self.status("/".join(parts[:2]), "query-status")
            return 200, {"resourceType": "Bundle", "type": "searchset", "entry": [{"resource": status}]}
        if parts[-1] == "$events" and self.has_events:
            return 200, self._events_of("/".join(parts[:2]), dict(parse_qsl(query)))
        if parts[-1].startswith("$"):
            return 400, _outcome("no such operation")
        if method in ("POST", "PUT"):
            return self._write(method, parts, body, condition)
        return self._search(parts[0], query) if len(parts) == 1 else self._read("/".join(parts))

    def _events_of(self, name: str, bounds: dict[str, str]) -> Json:
        first, last = int(bounds["eventsSinceNumber"]), int(bounds["eventsUntilNumber"])
        events = [event for event in self.events.get(name, []) if first <= event[0] <= last]
        return notification(self.status(name, "query-event", *events), f"{self.url}/{name}")

    def _read(self, name: str) -> tuple[int, Json]:
        return (200, self.resources[name]) if name in self.resources else (404, _outcome("not there"))

    def _write(self, method: str, parts: list[str], body: Json, condition: str) -> tuple[int, Json]:
        if method == "POST":
            there = self._matching(parts[0], dict(parse_qsl(condition)))
            if there:
                return 200, there[0]
            body = {key: value for key, value in body.items() if key != "id"}
        made = self.put({**body, "status": "requested"} if body["status"] == "active" else body)
        name = f"Subscription/{made['id']}"
        if made["status"] == "requested":
            threading.Thread(target=self.greet, args=(name,), daemon=True).start()
        return 201 if method == "POST" else 200, made

    def _matching(self, kind: str, wanted: dict[str, str]) -> list[Json]:
        found = [one for name, one in self.resources.items() if name.startswith(f"{kind}/")]
        if "_id" in wanted:
            found = [one for one in found if one["id"] in wanted["_id"].split(",")]
        if "url" in wanted:
            found = [one for one in found if one["channel"]["endpoint"] == wanted["url"]]
        if "criteria:exact" in wanted:
            found = [one for one in found if one["criteria"] == wanted["criteria:exact"]]
        if "_lastUpdated" in wanted:
            since = datetime.fromisoformat(wanted["_lastUpdated"].removeprefix("ge"))
            found = [one for one in found if datetime.fromisoformat(one["meta"]["lastUpdated"]) >= since]
        if "_sort" in wanted and self.sorts:
            found.sort(key=lambda one: one["meta"]["lastUpdated"], reverse=wanted["_sort"].startswith("-"))
        return found

    def _search(self, kind: str, query: str) -> tuple[int, Json]:
        wanted = {name: values[0] for name, values in parse_qs(query).items()}
        page, found = int(wanted.pop("page", "0")), self._matching(kind, wanted)
        shown = found[page * self.page_size : (page + 1) * self.page_size]
        entries = [{"resource": one, "search": {"mode": "match"}} for one in shown]
        bundle: Json = {"resourceType": "Bundle", "type": "searchset", "entry": entries, "link": []}
        following = f"{self.url}/{kind}?{urlencode({**wanted, 'page': str(page + 1)})}"
        if self.next_link and kind != "Subscription":
            bundle["link"] = [{"relation": "next", "url": self.next_link.replace("SELF", f"{self.url}/{kind}?{query}")}]
        elif (page + 1) * self.page_size < len(found):
            bundle["link"] = [{"relation": "next", "url": following}]
        return 200, bundle


def notification(status: Json, subscription_url: str) -> Json:
    """The Bundle of a status, as the guide wants it (`entry.request` is what `history` asks for)."""
    request = {"method": "GET", "url": f"{subscription_url}/$status"}
    entry = {"fullUrl": "urn:uuid:292d3c72-edc1-4d8a-afaa-d85e19c7f563", "resource": status, "request": request}
    return {"resourceType": "Bundle", "type": "history", "entry": [{**entry, "response": {"status": "200"}}]}


def _outcome(text: str) -> Json:
    issue = {"severity": "error", "code": "processing", "diagnostics": text}
    return {"resourceType": "OperationOutcome", "issue": [issue]}


class _Handler(BaseHTTPRequestHandler):
    server: BackportServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Any request."""
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = urlsplit(self.path)
        self.server.requests.append(f"{self.command} {self.path}")
        condition = self.headers.get("If-None-Exist", "")
        self.server.open.wait(30)
        with self.server.lock:
            status, resource = self.server.answer(
                self.command, parts.path, parts.query, json.loads(body or b"{}"), condition
            )
        content = json.dumps(resource).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/fhir+json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

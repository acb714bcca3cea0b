"""A raw HTTP peer in the place of a FHIR server or a token endpoint: it answers whatever a test wants."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from connectors.fhir.client import FhirClient
from connectors.fhir.config import FhirConfig

Json = dict[str, Any]
# (status, headers, body); None hangs up without an answer.
Answer = tuple[int, dict[str, str], bytes] | None


class Peer(ThreadingHTTPServer):
    """Answers with what `script(path)` gives, and remembers the requests."""

    def __init__(self, script: Callable[[str], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []


class Handler(BaseHTTPRequestHandler):
    server: Peer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        self.server.requests.append((self.command, self.path, dict(self.headers), body))
        answer = self.server.script(self.path)
        if answer is None:
            self.close_connection = True
            return
        status, headers, content = answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def peer(script: Callable[[str], Answer] | Answer) -> Iterator[Peer]:
    server = Peer(script if callable(script) else lambda path: script)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def client(server: Peer, **settings: object) -> FhirClient:
    url = f"http://127.0.0.1:{server.server_port}/fhir"
    return FhirClient(FhirConfig.model_validate({"url": url, **settings}))


def said(resource: object, status: int = 200, **headers: str) -> Answer:
    return status, {"Content-Type": "application/fhir+json", **headers}, json.dumps(resource).encode()


class closing:
    """Closes a client at the end of an `async with`."""

    def __init__(self, fhir: FhirClient) -> None:
        self._fhir = fhir

    async def __aenter__(self) -> FhirClient:
        return self._fhir

    async def __aexit__(self, *error: object) -> None:
        await self._fhir.aclose()

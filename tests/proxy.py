"""A reverse proxy in front of a real server, so that a test can make one request of many go wrong."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response

from deploy.hospital.process import LOOPBACK, free_port

Judge = Callable[[str, str, bytes], Response | None]
"""Method, path and body to the answer in the server's place; None lets the request through."""


@dataclass
class Seen:
    """One request that arrived, and the status it was answered with."""

    method: str
    path: str
    body: bytes
    status: int


@dataclass
class Proxy:
    """At `url`; `judge` and `hold` may be changed at any time; `seen` in order of arrival."""

    url: str
    judge: Judge = lambda method, path, body: None
    hold: Callable[[str], bool] = lambda target: False
    """Whether a request (its path and query) has to wait; asked again until it need not."""
    seen: list[Seen] = field(default_factory=list)

    def posts(self) -> list[Seen]:
        """What was sent to be stored."""
        return [one for one in self.seen if one.method == "POST"]


@contextmanager
def open_proxy(upstream: str) -> Iterator[Proxy]:
    """Serve on a free loopback port and pass everything on to `upstream` (scheme://host:port, no path)."""
    port = free_port()
    proxy = Proxy(f"http://{LOOPBACK}:{port}")
    server = uvicorn.Server(
        uvicorn.Config(_app(proxy, upstream), host=LOOPBACK, port=port, log_level="error", access_log=False)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield proxy
    finally:
        server.should_exit = True
        thread.join(10)


def _app(proxy: Proxy, upstream: str) -> FastAPI:
    app = FastAPI(openapi_url=None)
    forward = httpx.AsyncClient(base_url=upstream, timeout=60, trust_env=False)

    async def pass_on(request: Request, path: str) -> Response:
        body = await request.body()
        while proxy.hold(str(request.url)):  # noqa: ASYNC110 - anything may be waited for
            await asyncio.sleep(0.05)
        answer = proxy.judge(request.method, path, body) or await _forward(forward, request, body)
        proxy.seen.append(Seen(request.method, path, body, answer.status_code))
        return answer

    app.add_api_route("/{path:path}", pass_on, methods=["GET", "POST", "PUT", "DELETE"])
    return app


async def _forward(forward: httpx.AsyncClient, request: Request, body: bytes) -> Response:
    kept = {k: v for k, v in request.headers.items() if k not in ("host", "content-length", "accept-encoding")}
    # `raw_path` keeps the escapes of the request as they came.
    target = httpx.URL(raw_path=request.scope["raw_path"] + b"?" + request.scope["query_string"])
    got = await forward.request(request.method, target, headers=kept, content=body)
    headers = {k: v for k, v in got.headers.items() if k in ("content-type", "etag", "location", "retry-after")}
    return Response(got.content, got.status_code, headers)

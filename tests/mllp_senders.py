"""A listener's callbacks and the senders that tests put in front of it."""

import asyncio
import os
import resource
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from connectors.mllp.acknowledgement import control_id_of
from connectors.mllp.framing import encode_frame
from connectors.mllp.listener import MllpListener, MllpListenerConfig, Peer, Problem, ProblemKind

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
MIB = 1 << 20


def order(control_id: str, text: str = "text") -> bytes:
    header = f"MSH|^~\\&|RIS|SITE|WETREAD|SITE|20240101120000+0000||ORM^O01^ORM_O01|{control_id}|P|2.5.1"
    return f"{header}\rPID|1||X\rORC|NW|P1\rNTE|1||{text}\r".encode()


def accept(message: bytes, code: str = "AA") -> bytes:
    control_id = (control_id_of(message) or b"").decode()
    return f"MSH|^~\\&|WETREAD|SITE|RIS|SITE|20240101||ACK|A|P|2.5.1\rMSA|{code}|{control_id}\r".encode()


@dataclass
class Desk:
    """The callbacks of a listener: they note what comes and accept it, in any way a test asks for."""

    delay_s: float = 0.0
    problem_answer: bytes | None = None
    seen: list[tuple[Peer, bytes]] = field(default_factory=list)
    problems: list[tuple[Peer, Problem]] = field(default_factory=list)
    at_work: int = 0
    most_at_work: int = 0

    async def on_message(self, message: bytes, peer: Peer) -> bytes | None:
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        self.seen.append((peer, message))
        try:
            await asyncio.sleep(self.delay_s)
        finally:
            self.at_work -= 1
        return accept(message)

    async def on_problem(self, peer: Peer, problem: Problem) -> bytes | None:
        self.problems.append((peer, problem))
        return self.problem_answer

    @property
    def control_ids(self) -> list[str]:
        return [(control_id_of(message) or b"?").decode() for _, message in self.seen]

    @property
    def kinds(self) -> list[ProblemKind]:
        return [problem.kind for _, problem in self.problems]


@asynccontextmanager
async def listening(desk: Desk, **settings: object) -> AsyncIterator[MllpListener]:
    config = MllpListenerConfig.model_validate({"port": 0, **settings})
    async with MllpListener(config, desk.on_message, desk.on_problem) as listener:
        yield listener


@asynccontextmanager
async def connected(port: int, **options: Any) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **options)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def answer(reader: asyncio.StreamReader) -> str:
    """MSA-1 and MSA-2 of the next answer."""
    frame = await asyncio.wait_for(reader.readuntil(b"\x1c\r"), 5)
    assert frame.startswith(b"\x0bMSH|")
    return frame.split(b"\rMSA|")[1].split(b"\r")[0].decode()


async def exchange(streams: Streams, control_id: str) -> str:
    streams[1].write(encode_frame(order(control_id)))
    return await answer(streams[0])


async def ended(reader: asyncio.StreamReader, within_s: float = 5) -> bytes:
    """What still came before the listener closed the connection."""
    try:
        return await asyncio.wait_for(reader.read(), within_s)
    except ConnectionResetError:
        return b""


async def until(condition: Callable[[], bool], within_s: float = 5) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - anything may be waited for
            await asyncio.sleep(0.01)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))

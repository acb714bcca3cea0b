"""The simulator hospital's RIS: an MLLP peer that keeps what it receives and misbehaves on request.

    async with RisServer(Path("ris.jsonl")) as ris:      in this process, at ris.port
    with ris_process.start_ris(workdir) as ris:          as a process of its own, steered over HTTP
    python -m deploy.hospital.ris --port P --store FILE --control-port Q

Messages are ER7 over MLLP (HL7 v2.5.1, original acknowledgement mode), read with python-hl7. Each is on
disk (fsync) before it is answered. A message is accepted once by its control id (MSH-10): the same bytes
again are answered AA again and counted, other bytes under the same id are refused with AE.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import hl7
import uvicorn
from fastapi import FastAPI

from deploy.hospital.process import LOOPBACK

START_BLOCK, END_BLOCK = b"\x0b", b"\x1c\r"
LARGEST_MESSAGE_BYTES = 64 * 1024 * 1024


class Behaviour(StrEnum):
    """How the RIS answers. All but `AE` and `AR` accept the message, whatever the sender gets to hear."""

    ACCEPT = "AA"
    ERROR = "AE"
    REJECT = "AR"
    SILENT = "silent"
    CLOSE = "close"
    WRONG_ID = "wrong-id"
    SPLIT = "split"
    TWICE = "twice"
    GARBAGE = "garbage"


@dataclass(frozen=True)
class Received:
    """One message as it arrived: when (ISO 8601, UTC), its MSH-10, type, text, and what it was answered.

    `answered` is AA, AE or AR: what the RIS decided, also where that answer then never left it.
    """

    at: str
    control_id: str
    message_type: str
    text: str
    answered: str
    duplicate: bool


class RisServer:
    """An MLLP server at `port` on loopback. An async context manager."""

    def __init__(self, store: Path, port: int = 0) -> None:
        self.port = port
        self._store = store
        self._received: list[Received] = []
        self._accepted: dict[str, Received] = {}
        for line in _lines(store):
            self._remember(Received(**json.loads(line)))
        self._behaviour = Behaviour.ACCEPT
        self._times: int | None = None
        self._delay_s = 0.0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()

    def behave(self, behaviour: Behaviour, *, times: int | None = None, delay_s: float = 0.0) -> None:
        """Answer so from now on, or for the next `times` messages and normally after that.

        `delay_s` passes between storing a message and answering it.
        """
        self._behaviour, self._times, self._delay_s = behaviour, times, delay_s

    def received(self) -> list[Received]:
        """Every message that arrived, repeats and refused ones included, in order of arrival."""
        return list(self._received)

    def accepted(self) -> list[Received]:
        """The distinct messages that were accepted, in order of first arrival."""
        return list(self._accepted.values())

    async def start(self) -> None:
        """Listen; with port 0 the system's choice is in `port` afterwards."""
        self._server = await asyncio.start_server(self._serve, LOOPBACK, self.port, limit=LARGEST_MESSAGE_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and drop the open connections."""
        if self._server is None:
            return
        self._server.close()
        for writer in list(self._connections):
            writer.close()
        await self._server.wait_closed()
        self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            async for frame in _frames(reader):
                await self._handle(frame, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # The sender went away, perhaps in the middle of a frame: nothing of that frame counts.
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _handle(self, frame: bytes, writer: asyncio.StreamWriter) -> None:
        behaviour, delay_s = self._next_behaviour()
        message = self._judge(frame, behaviour)
        self._keep(message)
        await asyncio.sleep(delay_s)
        await _answer(writer, message, behaviour)

    def _next_behaviour(self) -> tuple[Behaviour, float]:
        current = self._behaviour, self._delay_s
        if self._times is not None:
            self._times -= 1
            if self._times <= 0:
                self.behave(Behaviour.ACCEPT)
        return current

    def _judge(self, frame: bytes, behaviour: Behaviour) -> Received:
        text = _decoded(frame)
        at = datetime.now(UTC).isoformat()
        try:
            header = hl7.parse(text).segment("MSH")
            control_id, message_type = str(header[10]), str(header[9])
        except (hl7.HL7Exception, KeyError, IndexError, ValueError):
            return Received(at, "", "", text, "AR", duplicate=False)
        earlier = self._accepted.get(control_id)
        duplicate = earlier is not None and earlier.text == text
        if behaviour in (Behaviour.ERROR, Behaviour.REJECT):
            answered = str(behaviour)
        else:
            answered = "AE" if earlier and not duplicate else "AA"
        return Received(at, control_id, message_type, text, answered, duplicate)

    def _keep(self, message: Received) -> None:
        """On disk before it is answered, as a receiver must: an AA is a promise."""
        self._store.parent.mkdir(parents=True, exist_ok=True)
        with self._store.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(message)) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
        self._remember(message)

    def _remember(self, message: Received) -> None:
        self._received.append(message)
        if message.answered == "AA":
            self._accepted.setdefault(message.control_id, message)


def _lines(store: Path) -> list[str]:
    return store.read_text(encoding="utf-8").splitlines() if store.exists() else []


async def _frames(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The content of each MLLP frame; bytes before a start block are dropped, as MLLP says."""
    while True:
        try:
            chunk = await reader.readuntil(END_BLOCK)
        except asyncio.IncompleteReadError:
            return
        _, start, content = chunk[: -len(END_BLOCK)].partition(START_BLOCK)
        if start:
            yield content


def _decoded(frame: bytes) -> str:
    """UTF-8, or Latin-1 where it is not, with CR between segments."""
    try:
        text = frame.decode("utf-8")
    except UnicodeDecodeError:
        text = frame.decode("latin-1")
    return text.replace("\r\n", "\r").replace("\n", "\r")


async def _answer(writer: asyncio.StreamWriter, message: Received, behaviour: Behaviour) -> None:
    if behaviour is Behaviour.SILENT:
        return
    if behaviour is Behaviour.CLOSE:
        writer.close()
        return
    frame = START_BLOCK + _acknowledgement(message, behaviour).encode() + END_BLOCK
    frame = frame * 2 if behaviour is Behaviour.TWICE else frame
    pieces = [frame[i : i + 1] for i in range(len(frame))] if behaviour is Behaviour.SPLIT else [frame]
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        # Lets each byte leave in a segment of its own.
        await asyncio.sleep(0.001 if len(pieces) > 1 else 0)


def _acknowledgement(message: Received, behaviour: Behaviour) -> str:
    if behaviour is Behaviour.GARBAGE:
        return "this is no HL7 message"
    answers = "OTHER-" + message.control_id if behaviour is Behaviour.WRONG_ID else message.control_id
    stamp = datetime.now(UTC).strftime("%Y%m%d%H%M%S+0000")
    header = f"MSH|^~\\&|RIS|HOSPITAL|WETREAD||{stamp}||ACK|ACK{len(answers)}{stamp[8:14]}|P|2.5.1"
    segments = [header, f"MSA|{message.answered}|{answers}"]
    if message.answered != "AA":
        segments.append("ERR|||207^Application internal error^HL70357|E||||refused by the simulator")
    return "\r".join(segments) + "\r"


def control_app(ris: RisServer) -> FastAPI:
    """`GET /received`, `GET /accepted`, `PUT /behaviour` {"behaviour", "times", "delay_s"} over HTTP."""
    app = FastAPI(title="Simulator RIS", openapi_url=None)

    @app.get("/received")
    async def received() -> list[dict[str, Any]]:
        return [asdict(message) for message in ris.received()]

    @app.get("/accepted")
    async def accepted() -> list[dict[str, Any]]:
        return [asdict(message) for message in ris.accepted()]

    @app.put("/behaviour")
    async def behaviour(wish: dict[str, Any]) -> None:
        ris.behave(Behaviour(wish["behaviour"]), times=wish.get("times"), delay_s=float(wish.get("delay_s", 0.0)))

    return app


async def _run(port: int, store: Path, control_port: int) -> None:
    async with RisServer(store, port) as ris:
        config = uvicorn.Config(control_app(ris), host=LOOPBACK, port=control_port, log_level="warning")
        with contextlib.suppress(asyncio.CancelledError):
            await uvicorn.Server(config).serve()


def main() -> int:
    """Serve MLLP and the control interface on loopback until terminated."""
    parser = argparse.ArgumentParser(description="Simulator RIS")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--control-port", type=int, required=True)
    arguments = parser.parse_args()
    asyncio.run(_run(arguments.port, arguments.store, arguments.control_port))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Inbound HL7 with a durable answer, beside what the disk allows and beside a listener that keeps nothing.

`python -m tests.bench mllp`. All three take the same messages. Ours: the real listener and the real inbox on a real
file, 8 connections from a process of its own, each waiting for its AA before it sends on. The disk: a loop that
inserts one message and commits, one fsync a commit, in the same folder. python-hl7: its asyncio listener with the
same 8 senders, which parses, answers and keeps nothing.

The same with what follows from each message applied meanwhile: answers go first, but both write to one database.
"""

import asyncio
import gc
import multiprocessing
import sqlite3
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import hl7
from hl7.mllp import start_hl7_server

from connectors.mllp.listener import MllpListener, MllpListenerConfig
from middleware.intake.hearing import Hearing, HearingPolicy
from middleware.store.hearing import HearingStore
from middleware.store.queries import open_engine
from tests.bench.bench_parse import ORM
from tests.bench.row import Row

CONNECTIONS = 8
MESSAGES = 1600
ROUNDS = 3
BUDGET = 0.5
"""Times the rate of a bare INSERT+fsync loop that we must reach (DESIGN.md, budgets)."""

Server = AbstractAsyncContextManager[int]
"""A listener while the block runs; gives its port."""


def message(number: int) -> bytes:
    """An order of its own: about 700 bytes."""
    raw = ORM.replace(b"MSG0001", b"M%07d" % number)
    return raw.replace(b"P1^EHR", b"P%d^EHR" % number).replace(b"F1^RIS", b"F%d^RIS" % number).replace(
        b"ACC1", b"A%d" % number
    ).replace(b"1.2.840.99.1.2.3.4.5", b"1.2.840.99.%d" % number)  # fmt: skip


async def _send_all(port: int, numbers: range) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for number in numbers:
        writer.write(b"\x0b" + message(number) + b"\x1c\r")
        answer = await reader.readuntil(b"\x1c\r")
        if b"MSA|AA|M%07d" % number not in answer:
            raise RuntimeError(f"message {number} was not accepted")
    writer.close()


async def _send_over_all(port: int) -> float:
    share = MESSAGES // CONNECTIONS
    began = time.perf_counter()
    await asyncio.gather(*(_send_all(port, range(n * share, (n + 1) * share)) for n in range(CONNECTIONS)))
    return MESSAGES / (time.perf_counter() - began)


def _sender(port: int) -> float:
    """Messages answered per second; runs in a process of its own."""
    return asyncio.run(_send_over_all(port))


@asynccontextmanager
async def our_listener(folder: Path, *, applies: bool = False) -> AsyncIterator[int]:
    """Listener and inbox as `wetread serve` runs them; `applies`: also what follows from each message."""
    store = HearingStore(open_engine(f"sqlite:///{folder}/wetread.sqlite"))
    hearing = Hearing(store, HearingPolicy(frozenset({"P"}), ZoneInfo("UTC")), lambda: datetime.now(UTC))
    gc.collect()
    gc.freeze()  # as bootstrap does before it serves
    tasks = [asyncio.create_task(hearing.write_forever())]
    if applies:
        tasks.append(asyncio.create_task(_apply_forever(hearing)))
    config = MllpListenerConfig(port=0)
    async with MllpListener(config, lambda raw, peer: hearing.take(raw, peer.address)) as listener:
        yield listener.port
    for task in tasks:
        task.cancel()
    kept = sum(store.count_by_state().values())
    if kept != MESSAGES:
        raise RuntimeError(f"{kept} messages are in the inbox, {MESSAGES} were acknowledged")


async def _apply_forever(hearing: Hearing) -> None:
    while True:
        await hearing.arrived.wait()
        hearing.arrived.clear()
        await asyncio.to_thread(hearing.apply_all)


@asynccontextmanager
async def their_listener(_folder: Path) -> AsyncIterator[int]:
    """python-hl7's asyncio listener; it answers with its own ACK and keeps nothing."""

    async def serve(reader: hl7.mllp.HL7StreamReader, writer: hl7.mllp.HL7StreamWriter) -> None:
        try:
            while not writer.is_closing():
                received = await reader.readmessage()
                writer.writemessage(received.create_ack("AA"))
                await writer.drain()
        except asyncio.IncompleteReadError:
            writer.close()

    async with await start_hl7_server(serve, host="127.0.0.1", port=0, encoding="utf-8") as server:
        yield server.sockets[0].getsockname()[1]


async def _rate_of(server: Server) -> float:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        pool.apply(time.time)  # started
        async with server as port:
            return float(await asyncio.to_thread(pool.apply, _sender, (port,)))


def _bare_rate(folder: Path) -> float:
    """Messages per second of one INSERT and one synced commit each, in a write-ahead log like ours."""
    connection = sqlite3.connect(folder / "bare.sqlite", isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE message (position INTEGER PRIMARY KEY, raw BLOB)")
    messages = [message(number) for number in range(MESSAGES)]
    began = time.perf_counter()
    for raw in messages:
        connection.execute("INSERT INTO message (raw) VALUES (?)", (raw,))
    seconds = time.perf_counter() - began
    connection.close()
    return MESSAGES / seconds


def _measure(rate: Callable[[Path], float]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return rate(Path(folder))


def bench_mllp() -> list[Row]:
    """The rates in turn, ROUNDS times; the rows hold the medians."""
    measured: dict[str, list[float]] = {}
    ways: dict[str, Callable[[Path], float]] = {
        "bare": _bare_rate,
        "ours": lambda folder: asyncio.run(_rate_of(our_listener(folder))),
        "applied": lambda folder: asyncio.run(_rate_of(our_listener(folder, applies=True))),
        "theirs": lambda folder: asyncio.run(_rate_of(their_listener(folder))),
    }
    for _ in range(ROUNDS):
        for name, way in ways.items():
            measured.setdefault(name, []).append(_measure(way))
    bare, ours, applied, theirs = (statistics.median(measured[name]) for name in ways)
    what, unit = f"HL7 in, durable answer, {CONNECTIONS} connections", "messages/s"
    return [
        Row(what, unit, ours, f">= {BUDGET:g}x", ours >= BUDGET * bare, bare, "bare INSERT+fsync", ours / bare),
        Row(f"{what}, orders applied", unit, applied, "", None, bare, "bare INSERT+fsync", applied / bare),
        Row(what, unit, ours, "", None, theirs, "python-hl7, keeps nothing", ours / theirs),
    ]


if __name__ == "__main__":
    for row in bench_mllp():
        print(row.line())

"""kill -9 at random moments while messages come in over eight connections: what was acknowledged is in the inbox
once, in its connection's order, and everything is applied in the end.

Short form: 600 messages, 6 kills. `WETREAD_SOAK=1`: 10,000 messages, 200 kills.
"""

import asyncio
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sqlmodel import Session, select

from connectors.mllp.framing import encode_frame
from deploy.hospital.process import LOOPBACK, free_port
from middleware.store.heard import HeardMessage, OrderRecord
from middleware.store.hearing import HearingStore
from middleware.store.queries import open_engine
from tests.commands import environment, zygote
from tests.hl7_inbox import write_order

SOAK = os.environ.get("WETREAD_SOAK") == "1"
MESSAGES, KILLS = (10_000, 200) if SOAK else (600, 6)
CONNECTIONS = 8
STAGES = (("NW", ""), ("SC", "IP"), ("XO", "CM"))
"""What each order goes through, in this order, on one connection: ORC-1 and ORC-5."""
SIGKILLED = -9

pytestmark = pytest.mark.timeout(3600 if SOAK else 300)


@dataclass
class Victim:
    """The hearing process on one data_dir and one port."""

    folder: Path
    port: int = field(default_factory=free_port)
    pid: int = 0

    @property
    def data_dir(self) -> Path:
        return self.folder / "data"

    def start(self) -> None:
        """Fork it; senders find out by themselves when it listens."""
        (self.folder / "tmp").mkdir(exist_ok=True)
        arguments = [str(self.data_dir), str(self.port)]
        self.pid = zygote().start(
            "tests.crash.hearing_victim:main",
            arguments,
            self.folder,
            environment(self.folder / "tmp"),
            self.folder / "out",
            self.folder / "log",
        )

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert zygote().wait(self.pid, 10) == SIGKILLED, self.log()

    def log(self) -> str:
        return (self.folder / "log").read_text()


@dataclass
class Sender:
    """One connection of a sender that waits for each AA, and after a lost connection sends the message again."""

    port: int
    name: int
    acknowledged: list[str] = field(default_factory=list)
    broken: int = 0

    def messages(self) -> list[tuple[str, bytes]]:
        share = MESSAGES // CONNECTIONS
        made = []
        for n in range(share):
            order, stage = divmod(n, len(STAGES))
            numbers = (f"P{self.name}-{order}", f"F{self.name}-{order}", "", "")
            control_id = f"C{self.name}-{n}"
            raw = write_order(control_id, STAGES[stage][0], numbers, status=STAGES[stage][1], patient=f"{self.name}")
            made.append((control_id, raw))
        return made

    async def send_all(self) -> None:
        waiting = self.messages()
        while waiting:
            try:
                reader, writer = await asyncio.open_connection(LOOPBACK, self.port)
            except OSError:
                await asyncio.sleep(0.02)
                continue
            try:
                await self._send_on(reader, writer, waiting)
            except (OSError, asyncio.IncompleteReadError):
                self.broken += 1
            finally:
                writer.transport.abort()

    async def _send_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, waiting: list[tuple[str, bytes]]
    ) -> None:
        while waiting:
            control_id, raw = waiting[0]
            writer.write(encode_frame(raw))
            answer = await asyncio.wait_for(reader.readuntil(b"\x1c\r"), 30)
            assert f"\rMSA|AA|{control_id}".encode() in answer, answer
            self.acknowledged.append(control_id)
            waiting.pop(0)


async def kill_at_random(victim: Victim, senders: list[Sender], chance: random.Random) -> int:
    """Kill it when a random number of messages has come through, at a random moment after, and start it again."""
    for at in sorted(chance.sample(range(MESSAGES // 20, MESSAGES), KILLS)):
        while sum(len(sender.acknowledged) for sender in senders) < at:  # noqa: ASYNC110 - counted, not signalled
            await asyncio.sleep(0.001)
        await asyncio.sleep(chance.uniform(0, 0.02))
        await asyncio.to_thread(victim.kill)
        await asyncio.to_thread(victim.start)
    return KILLS


def wait_until_applied(store: HearingStore, idle_s: float) -> None:
    """Return once nothing is left to apply; fail where it does not go on for so long."""
    left, since = -1, time.monotonic()
    while counts := store.count_by_state().get("received", 0):
        if counts != left:
            left, since = counts, time.monotonic()
        assert time.monotonic() < since + idle_s, store.count_by_state()
        time.sleep(0.1)


async def test_nothing_acknowledged_is_lost_or_doubled(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    victim = Victim(tmp_path)
    senders = [Sender(victim.port, name) for name in range(CONNECTIONS)]
    await asyncio.to_thread(victim.start)
    try:
        sending = [sender.send_all() for sender in senders]
        kills, *_ = await asyncio.gather(kill_at_random(victim, senders, random.Random(seed)), *sending)
        store = HearingStore(open_engine(f"sqlite:///{victim.data_dir}/wetread.sqlite"))
        await asyncio.to_thread(wait_until_applied, store, 30)
    finally:
        victim.kill()
    assert kills == KILLS
    assert sum(sender.broken for sender in senders) >= KILLS
    check_inbox(victim, senders)
    assert "Traceback" not in victim.log()
    assert "failed" not in victim.log()


def check_inbox(victim: Victim, senders: list[Sender]) -> None:
    """Every acknowledged message once, in its connection's order; every order where its messages brought it."""
    with Session(open_engine(f"sqlite:///{victim.data_dir}/wetread.sqlite")) as session:
        heard = list(session.exec(select(HeardMessage).order_by("position")))
        orders = list(session.exec(select(OrderRecord)))
    for sender in senders:
        own = [one.control_id for one in heard if one.control_id.startswith(f"C{sender.name}-")]
        assert own == sender.acknowledged == [control_id for control_id, _ in sender.messages()]
    assert len(heard) == MESSAGES // CONNECTIONS * CONNECTIONS
    assert {one.state for one in heard} == {"applied"}
    per_sender = MESSAGES // CONNECTIONS // len(STAGES)
    ended = [order for order in orders if order.status == "completed"]
    assert len(ended) == per_sender * CONNECTIONS
    rest = bool(MESSAGES // CONNECTIONS % len(STAGES))
    assert len(orders) == len(ended) + rest * CONNECTIONS
    print(f"{len(heard)} messages, {KILLS} kills, {sum(one.repeats for one in heard)} resends of kept messages")

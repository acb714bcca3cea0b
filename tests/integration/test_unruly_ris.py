"""A RIS that drops, delays, splits, doubles and mislabels its answers: nothing counts as delivered without its own AA.

A thousand messages through the real queue; `WETREAD_SOAK=1` sends ten thousand.
"""

import asyncio
import os
import random
from collections import defaultdict
from pathlib import Path

import pytest

from deploy.hospital.ris import Behaviour, RisServer
from mappings.model.ids import derive_control_id
from middleware.store.tables import Delivery
from tests.outgoing import Parcel, send, service, settings_of, until

SOAK = bool(os.environ.get("WETREAD_SOAK"))
MESSAGES = 10_000 if SOAK else 1_000
RESENT_MESSAGES = 1_000 if SOAK else 100
ACK_TIMEOUT_S, LATE_S = 0.25, 0.4
HONEST = (Behaviour.ACCEPT, Behaviour.SPLIT, Behaviour.TWICE)
"""These answer AA to the message itself (and then perhaps too late)."""
SETTLED = {"delivered", "dead", "ambiguous"}


class UnrulyRis(RisServer):
    """Draws a behaviour for each message, most of them good, and keeps what it did about each control id."""

    def __init__(self, store: Path, seed: int) -> None:
        super().__init__(store)
        self.did: dict[str, list[tuple[Behaviour, float]]] = defaultdict(list)
        self._rng = random.Random(seed)

    async def _handle(self, frame: bytes, writer: asyncio.StreamWriter) -> None:
        is_bad = self._rng.random() < 0.15
        (good,) = self._rng.choices(HONEST, (17, 1, 2))  # split into single bytes it takes a while
        behaviour = self._rng.choice(list(Behaviour)) if is_bad else good
        delay_s = LATE_S if is_bad and self._rng.random() < 0.3 else 0.0
        self.behave(behaviour, delay_s=delay_s)
        self.did[frame.split(b"|")[9].decode()].append((behaviour, delay_s))
        await super()._handle(frame, writer)


def settings(tmp_path: Path, ris: UnrulyRis, **more: object) -> object:
    how = {"concurrency": 8, "down_after": 10**6, "longest_wait_s": 0.2}
    peer = {"host": "127.0.0.1", "port": ris.port, "ack_timeout_s": ACK_TIMEOUT_S, **more}
    return settings_of(tmp_path, {"ris": how}, ris=peer)


async def send_all(tmp_path: Path, ris: UnrulyRis, count: int, **more: object) -> list[Delivery]:
    """That many deliveries, once each has settled."""
    async with service(settings(tmp_path, ris, **more)) as systems:  # type: ignore[arg-type]
        send(systems, [Parcel(f"job{n:05}", n) for n in range(count)])
        await until(lambda: {d.state for d in systems.deliveries.search()} <= SETTLED, within_s=1500, look_every_s=1.0)
        return systems.deliveries.search()


def control_id(delivery: Delivery) -> str:
    return derive_control_id(delivery.job_id, 1, "oru")


@pytest.mark.timeout(1800)
async def test_nothing_is_delivered_without_its_own_answer(tmp_path: Path) -> None:
    async with UnrulyRis(tmp_path / "ris.jsonl", seed=4) as ris:
        done = await send_all(tmp_path, ris, MESSAGES)
    states = {d.state for d in done}
    assert states == SETTLED, "the peer was unruly enough to see every end"
    for delivery in done:
        ((behaviour, delay_s),) = ris.did[control_id(delivery)]  # sent once, whatever came of it
        if delivery.state == "delivered":
            assert (behaviour in HONEST, delay_s) == (True, 0.0)
            assert delivery.receipt == f"AA for {control_id(delivery)}"
        if delivery.state == "dead":
            assert behaviour in (Behaviour.ERROR, Behaviour.REJECT)
        if behaviour in (Behaviour.SILENT, Behaviour.CLOSE, Behaviour.WRONG_ID, Behaviour.GARBAGE):
            assert delivery.state == "ambiguous"


@pytest.mark.timeout(1800)
async def test_a_ris_that_drops_duplicates_gets_all_of_them_once(tmp_path: Path) -> None:
    async with UnrulyRis(tmp_path / "ris.jsonl", seed=5) as ris:
        done = await send_all(tmp_path, ris, RESENT_MESSAGES, duplicate_safe=True)
    accepted = [m.control_id for m in ris.accepted()]
    assert len(accepted) == len(set(accepted))
    for delivery in done:
        tries = ris.did[control_id(delivery)]
        assert delivery.state == ("dead" if tries[-1][0] in (Behaviour.ERROR, Behaviour.REJECT) else "delivered")
        assert delivery.attempts == len(tries)
        assert delivery.state == "dead" or tries[-1][0] in HONEST
    assert {d.attempts for d in done} > {1}
    texts = defaultdict(set)
    for message in ris.received():
        texts[message.control_id].add(message.text)
    assert {len(each) for each in texts.values()} == {1}

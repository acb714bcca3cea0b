"""What one dead destination costs the others: the same load with the RIS up, and with it dead for an hour.

`python -m tests.bench destinations`. Results go to EHR and RIS at a steady rate through the real queues; the time from
release to the EHR's answer is taken, round by round in turn. Dead: nobody listens at the RIS' port, and an hour's
results (at ten a minute) wait for it already.
"""

import asyncio
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from deploy.hospital.ehr import RunningEhr, start_fallback
from deploy.hospital.process import free_port
from deploy.hospital.ris_process import start_ris
from middleware.systems import Systems
from tests.bench.row import Row
from tests.outgoing import Parcel, all_in, report, send, service, settings_of, until

RESULTS, EVERY_S, ROUNDS, BACKLOG = 60, 0.25, 3, 600
BUDGET = 1.1
"""Times the p95 with all destinations up (issue 4)."""


async def _measure(folder: Path, ehr: RunningEhr, ris_port: int, backlog: int, name: str) -> list[float]:
    """Seconds from release to the EHR's answer of each result."""
    deliver = {"ris": {"concurrency": 2}, "ehr": {"concurrency": 4}}
    ris = {"host": "127.0.0.1", "port": ris_port}
    async with service(settings_of(folder, deliver, ris=ris, ehr={"url": ehr.url})) as systems:
        send(systems, [Parcel(f"{name}-before{n}", n) for n in range(backlog)])
        if backlog:
            await until(lambda: systems.deliveries.health("ris").down_since is not None)
        released = await _release(systems, name)
        await until(all_in(systems, "ehr", "delivered"), look_every_s=0.5)
        done = systems.deliveries.search(destination="ehr")
        return [(d.updated_at - released[d.job_id]).total_seconds() for d in done]


async def _release(systems: Systems, name: str) -> dict[str, datetime]:
    released = {}
    for n in range(RESULTS):
        job = f"{name}-{n}"
        released[job] = datetime.now(UTC)
        send(systems, [Parcel(job, 10_000 + n, destination="ehr", data=report(job)), Parcel(job, 10_000 + n)])
        await asyncio.sleep(EVERY_S)
    return released


def _p95(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=20)[-1]


def bench_destinations() -> list[Row]:
    """The p95 of the EHR's deliveries with the RIS dead, beside that with it up."""
    up: list[float] = []
    dead: list[float] = []
    with tempfile.TemporaryDirectory() as folder, start_fallback(Path(folder)) as ehr, start_ris(Path(folder)) as ris:
        for turn in range(ROUNDS):
            up += asyncio.run(_measure(Path(folder) / f"up{turn}", ehr, ris.port, 0, f"up{turn}"))
            dead += asyncio.run(_measure(Path(folder) / f"dead{turn}", ehr, free_port(), BACKLOG, f"dead{turn}"))
    ours, rival = _p95(dead), _p95(up)
    return [
        Row(
            "release to EHR's answer, RIS dead, p95",
            "s",
            ours,
            budget=f"<= {BUDGET:g}x",
            within=ours <= BUDGET * rival,
            rival=rival,
            rival_name="RIS up",
            ratio=ours / rival,
        )
    ]

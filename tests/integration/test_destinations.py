"""Destinations that are down, slow, limited or in a hurry: through the real queues, to a real RIS and a real proxy.

What is asserted is what arrived, in which order and how often it was asked, never how long it took.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import Response

from deploy.hospital.ehr import start_fallback
from deploy.hospital.process import free_port
from deploy.hospital.ris import Behaviour, RisServer
from middleware.release.health import reason_of
from tests.outgoing import Parcel, all_in, jobs_of, report, send, service, settings_of, states, until
from tests.proxy import Proxy, open_proxy


@pytest.fixture(scope="module")
def ehr_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with start_fallback(tmp_path_factory.mktemp("ehr")) as ehr, open_proxy(ehr.url.removesuffix("/fhir")) as proxy:
        yield proxy


@pytest.fixture
def ehr(ehr_proxy: Proxy) -> Iterator[Proxy]:
    ehr_proxy.seen.clear()
    yield ehr_proxy
    ehr_proxy.judge = lambda method, path, body: None


def ris_at(port: int, **more: object) -> dict[str, object]:
    return {"host": "127.0.0.1", "port": port, "ack_timeout_s": 5.0, **more}


async def test_a_dead_destination_holds_up_nobody_and_gets_all_in_order_when_it_returns(
    tmp_path: Path, ehr: Proxy
) -> None:
    port = free_port()
    settings = settings_of(tmp_path, {"ris": {"concurrency": 4}}, ris=ris_at(port), ehr={"url": f"{ehr.url}/fhir"})
    jobs = [f"job{n:02}" for n in range(12)]
    async with service(settings) as systems:
        for n, job in enumerate(jobs):
            accession = f"ACC{n % 4}"
            to_ehr = Parcel(job, n, accession, "ehr", data=report(job))
            send(systems, [Parcel(job, n, accession), to_ehr])
        await until(all_in(systems, "ehr", "delivered"))
        assert set(states(systems).values()) <= {"pending", "retrying", "in_flight"}
        await until(lambda: systems.deliveries.health("ris").down_since is not None)
        await asyncio.sleep(2.0)  # several probes
        waiting = systems.deliveries.search(destination="ris")
        tried, healths = sum(d.attempts for d in waiting), systems.deliveries.healths()
        assert all("ris is down since" in reason_of(d, healths) for d in waiting if d.attempts == 0)
        assert tried <= 3 + 4, "three in a row make it down, and four may be under way; then it is only probed"
        async with RisServer(tmp_path / "ris.jsonl", port) as ris:
            await until(all_in(systems, "ris", "delivered"))
            arrived = jobs_of(ris.received(), jobs)
        assert sorted(arrived) == jobs, "each once"
        for accession in range(4):
            own = [job for job in arrived if jobs.index(job) % 4 == accession]
            assert own == sorted(own)
        assert systems.deliveries.health("ris").down_since is None


async def test_stat_goes_first_when_a_destination_returns(tmp_path: Path) -> None:
    port = free_port()
    jobs = [f"routine{n}" for n in range(6)]
    async with service(settings_of(tmp_path, {}, ris=ris_at(port))) as systems:
        send(systems, [Parcel(job, n) for n, job in enumerate(jobs)])
        await until(lambda: systems.deliveries.health("ris").down_since is not None)
        send(systems, [Parcel("stat", 99, priority=1)])
        async with RisServer(tmp_path / "ris.jsonl", port) as ris:
            await until(all_in(systems, "ris", "delivered"))
            assert jobs_of(ris.received(), [*jobs, "stat"])[0] == "stat"


async def test_stat_overtakes_what_is_queued(tmp_path: Path) -> None:
    """The RIS takes its time and gets one message at a time: the queue takes the most urgent next."""
    jobs = [f"routine{n}" for n in range(8)]
    async with (
        RisServer(tmp_path / "ris.jsonl") as ris,
        service(settings_of(tmp_path, {}, ris=ris_at(ris.port))) as systems,
    ):
        ris.behave(Behaviour.ACCEPT, delay_s=0.5)
        send(systems, [Parcel(job, n) for n, job in enumerate(jobs)])
        await until(lambda: bool(ris.received()))
        before = len(ris.received())
        send(systems, [Parcel("stat", 99, priority=1)])
        await until(all_in(systems, "ris", "delivered"))
        arrived = jobs_of(ris.received(), [*jobs, "stat"])
        assert arrived.index("stat") <= before + 2
        assert [job for job in arrived if job != "stat"] == jobs


async def test_the_rate_limit_holds(tmp_path: Path) -> None:
    settings = {"ris": {"per_minute": 3, "concurrency": 4}}
    async with (
        RisServer(tmp_path / "ris.jsonl") as ris,
        service(settings_of(tmp_path, settings, ris=ris_at(ris.port))) as systems,
    ):
        send(systems, [Parcel(f"job{n}", n) for n in range(8)])
        await until(lambda: len(ris.received()) >= 3)
        await asyncio.sleep(3.0)
        assert len(ris.received()) == 3
        assert sorted(states(systems).values()) == ["delivered"] * 3 + ["pending"] * 5


async def test_a_server_that_answers_its_probe_only_is_not_hammered(tmp_path: Path, ehr: Proxy) -> None:
    """It is there, and refuses what is sent with 503: after three in a row one is tried now and then, each another."""
    refuses = [True]

    def judge(method: str, path: str, body: bytes) -> Response | None:
        return Response("later", 503) if method == "POST" and refuses else None

    ehr.judge = judge
    jobs = [f"probed{n}" for n in range(10)]
    deliver = {"ehr": {"concurrency": 2, "probe_every_s": 1.0, "longest_wait_s": 1.0}}
    async with service(settings_of(tmp_path, deliver, ehr={"url": f"{ehr.url}/fhir"})) as systems:
        send(systems, [Parcel(job, n, destination="ehr", data=report(job)) for n, job in enumerate(jobs)])
        await until(lambda: systems.deliveries.health("ehr").failures >= 6)
        tried = {d.job_id: d.attempts for d in systems.deliveries.search(destination="ehr")}
        assert len(ehr.posts()) == sum(tried.values()) <= 8
        assert max(tried.values()) <= 3
        refuses.clear()
        await until(all_in(systems, "ehr", "delivered"))
    stored = [one for one in ehr.posts() if one.status == 200]
    assert len(stored) == len(jobs)


async def test_a_wish_to_be_left_alone_holds_for_everybody(tmp_path: Path, ehr: Proxy) -> None:
    asked: list[float] = []

    def judge(method: str, path: str, body: bytes) -> Response | None:
        if method != "POST":
            return None
        asked.append(asyncio.get_running_loop().time())
        return Response("slow down", 429, {"Retry-After": "3"}) if len(asked) == 1 else None

    ehr.judge = judge
    async with service(settings_of(tmp_path, {"ehr": {"concurrency": 1}}, ehr={"url": f"{ehr.url}/fhir"})) as systems:
        send(systems, [Parcel("first", 0, destination="ehr", data=report("wish1"))])
        await until(lambda: systems.deliveries.health("ehr").hold_until is not None)
        send(systems, [Parcel("second", 1, destination="ehr", data=report("wish2"))])
        await until(all_in(systems, "ehr", "delivered"))
        assert systems.deliveries.health("ehr").down_since is None
    assert min(asked[1:]) - asked[0] >= 3.0, "nothing before it wished"
    assert len(asked) == 3

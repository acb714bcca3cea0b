"""Several workers on one PostgreSQL, each with a spool of its own: what a dead one left is finished once by the living,
two of one name do not run, and work of an older version is neither stranded nor doubled.

Short form: 6 studies, two kills, 3 restarts of PostgreSQL. `WETREAD_SOAK=1`: 100 studies, 40 kills, 60 restarts.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psycopg
import pytest
import sqlalchemy
import yaml

from deploy.hospital.ehr import start_fallback
from deploy.hospital.pacs import RunningOrthanc
from deploy.hospital.postgres import RunningPostgres
from deploy.hospital.ris_process import start_ris
from middleware.intake.inbox import accept_study
from middleware.store.queries import Store, open_engine
from middleware.store.workers import Worker, WorkerStore
from middleware.taking_over import MOST_DEATHS
from tests.commands import run_wetread
from tests.crash.line import Line, settings_for
from tests.crash.several import WorkerProcess, logs, postgres
from tests.crash.small_study import Copy, SmallStudy
from tests.serving import Service

SOAK = os.environ.get("WETREAD_SOAK") == "1"
STUDIES, KILLS, RESTARTS = (100, 40, 60) if SOAK else (6, 2, 3)
SETTLED_WITHIN_S = 120.0
SIGKILLED = -9

pytestmark = pytest.mark.timeout(7200 if SOAK else 400)


@dataclass
class Site:
    """The service and four workers on one database; the service reads nothing itself while `workers` are asked."""

    line: Line
    server: RunningPostgres
    workers: list[WorkerProcess]
    store: WorkerStore
    engine: sqlalchemy.Engine

    def start_all(self) -> None:
        for worker in self.workers:
            if not worker.pid:
                worker.start()
        self.wait_for({worker.name for worker in self.workers})

    def wait_for(self, names: set[str], state: str = "alive") -> None:
        deadline = time.monotonic() + 60
        while not names <= {w.executor_id for w in self.store.workers() if w.state == state}:
            assert time.monotonic() < deadline, f"{self.store.workers()}\n{logs(self.workers)}"
            time.sleep(0.1)

    def worker(self, name: str) -> Worker:
        return next(w for w in self.store.workers() if w.executor_id == name)

    def announce(self, fresh: Copy) -> None:
        """Say that it is there until somebody has written that down: the store may be away."""
        deadline = time.monotonic() + 60
        while (answer := self.line.service.announce(fresh.study_uid)) is None or answer.status_code >= 500:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def set_read_only(self, value: str) -> None:
        """Let every new transaction of the server be read-only, or not."""
        with psycopg.connect(self.server.url, autocommit=True) as connection:
            connection.execute("SET default_transaction_read_only = off")
            connection.execute(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
            connection.execute("SELECT pg_reload_conf()")

    def faults(self, studies: list[Copy]) -> dict[str, list[str]]:
        """What is not as it must be once everything has ended."""
        found = {}
        for fresh in studies:
            self.line.service.wait_until_settled(fresh.study_uid, SETTLED_WITHIN_S)
            found[fresh.study_uid] = self.line.faults(fresh)
        return {uid: faults for uid, faults in found.items() if faults}


def until(is_so: Callable[[], bool], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, study: SmallStudy, orthanc: RunningOrthanc, small_triton: str
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("workers")
    with start_fallback(folder / "ehr") as ehr, start_ris(folder / "ris") as ris, postgres() as server:
        settings = {
            **settings_for(orthanc, ehr, ris, small_triton),
            "database_url": server.url,
            "artifacts_url": f"file://{folder}/artifacts",
            "concurrent_readings": 1,
            "concurrent_inferences": 2,
            "workers": {"heartbeat_s": 0.3, "dead_after_s": 3.0},
        }
        made = Line(Service(folder / "service", settings), study, orthanc, ehr, ris, folder / "arm")
        made.start()
        config = folder / "service" / "wetread.yaml"
        workers = [WorkerProcess(f"worker-{n}", config, folder) for n in range(1, 5)]
        engine = open_engine(server.url.replace("postgresql://", "postgresql+psycopg://"))
        site = Site(made, server, workers, WorkerStore(engine), engine)
        yield site
        codes = [worker.end() for worker in workers]
        made.stop()
        assert codes == [0] * len(workers), logs(workers)
        assert not any("Traceback" in worker.log() for worker in workers), logs(workers)


def test_two_processes_of_one_name_do_not_run(site: Site, tmp_path: Path) -> None:
    config = yaml.safe_load((site.line.service.folder / "wetread.yaml").read_text())
    assert config["executor_id"] == "test"
    second = run_wetread(tmp_path, "worker", WETREAD_CONFIG=str(site.line.service.folder / "wetread.yaml"))
    assert second.code == 2, second.said
    assert "executor_id test: process" in second.err
    assert "WETREAD_EXECUTOR_ID=" in second.err
    assert site.worker("test").state == "alive"


def test_two_of_four_workers_are_killed_at_random(site: Site) -> None:
    """What they were doing goes on elsewhere, on images fetched again; every system got everything once."""
    chance = random.Random(20)
    site.start_all()
    studies = [site.line.bring(f"kill-{n}") for n in range(STUDIES)]
    for fresh in studies:
        site.announce(fresh)
    for _ in range(KILLS):
        time.sleep(chance.uniform(0.2, 1.5))
        alive = [worker for worker in site.workers if worker.pid]
        if len(alive) <= 2:
            site.start_all()
            alive = site.workers
        chance.choice(alive).kill()
    assert site.faults(studies) == {}, logs(site.workers)
    site.wait_for({worker.name for worker in site.workers if not worker.pid}, "gone")
    everybody = site.line.service.log() + "".join(worker.log() for worker in site.workers)
    assert everybody.count('"took over from a worker"') >= KILLS


@pytest.mark.parametrize("point", ["fetch.kept", "infer.before", "render.exit", "ris-send.after"])
def test_a_dead_workers_reading_goes_on_elsewhere(point: str, site: Site, tmp_path: Path) -> None:
    """It dies at a point of a reading that it alone can have begun: its spool is out of reach for the others."""
    for worker in site.workers:
        worker.end()
    site.line.service.stop()
    fresh, arm = site.line.bring(f"left-{point}"), tmp_path / "arm"
    arm.write_text(point)
    now = datetime.now().astimezone()
    accept_study(Store(site.engine), fresh.study_uid, source="test", key=point, now=now)
    lone = site.workers[0]
    lone.start("tests.crash.victim:main", VICTIM_ARM=str(arm))
    assert lone.wait_for_death(60) == SIGKILLED
    site.line.start()
    assert site.faults([fresh]) == {}, logs(site.workers)
    assert "took over from a worker" in site.line.service.log()
    (job,) = site.line.service.jobs(fresh.study_uid)
    spool = site.line.service.data_dir / "spool" / f"{job['job_id']}.run-1"
    assert spool.is_dir() == (point != "ris-send.after"), "fetched again where images were still needed"


def test_a_study_that_kills_its_workers_is_given_up(site: Site, tmp_path: Path) -> None:
    """Five workers die of it, one after the other; the sixth process lets it be and says why."""
    for worker in site.workers:
        worker.end()
    site.line.service.stop()
    fresh, arm = site.line.bring("poison"), tmp_path / "arm"
    arm.write_text("infer.before")
    store = Store(site.engine)
    accept_study(store, fresh.study_uid, source="test", key="poison", now=datetime.now().astimezone())
    for number in range(MOST_DEATHS):
        mortal = WorkerProcess(f"mortal-{number}", site.line.service.folder / "wetread.yaml", tmp_path)
        mortal.start("tests.crash.victim:main", VICTIM_ARM=str(arm))
        assert mortal.wait_for_death(90) == SIGKILLED
    site.line.start()
    ended = site.line.service.wait_until_settled(fresh.study_uid, SETTLED_WITHIN_S)
    assert ended["state"] == "failed"
    assert f"{MOST_DEATHS} workers died while they read this study" in ended["reasons"][0]


def test_a_read_only_database_stops_intake_and_nothing_is_lost(site: Site) -> None:
    """As after a failover to a standby: 503 and not ready, with the reason; then all goes on by itself."""
    fresh = site.line.bring("read-only")
    http = site.line.service.http
    site.set_read_only("on")
    try:
        until(lambda: http.get("/ready").status_code == 503)
        assert http.get("/ready").json()["store"] == "is full or read-only"
        answer = site.line.service.announce(fresh.study_uid)
        assert answer is not None
        assert answer.status_code == 503
    finally:
        site.set_read_only("off")
    until(lambda: http.get("/ready").status_code == 200)
    site.announce(fresh)
    assert site.faults([fresh]) == {}, logs(site.workers)


def test_postgresql_is_restarted_every_few_seconds_under_load(site: Site) -> None:
    chance = random.Random(21)
    site.start_all()
    studies = [site.line.bring(f"restart-{n}") for n in range(STUDIES)]
    for fresh in studies[: STUDIES // 2]:
        site.announce(fresh)
    for _ in range(RESTARTS):
        time.sleep(chance.uniform(1.0, 3.0))
        site.server.restart(chance.choice((signal.SIGINT, signal.SIGQUIT)))
    for fresh in studies[STUDIES // 2 :]:
        site.announce(fresh)
    site.wait_for({worker.name for worker in site.workers})
    assert site.faults(studies) == {}, logs(site.workers)

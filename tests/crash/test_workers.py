"""Several workers on one PostgreSQL, each with a spool of its own: what a dead one left is finished once by the living,
two of one name do not run, and work of an older version is neither stranded nor doubled.

Short form: 6 studies, two kills, 3 restarts of PostgreSQL. `WETREAD_SOAK=1`: 100 studies, 40 kills, 60 restarts.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy
import yaml

from deploy.hospital.ehr import start_fallback
from deploy.hospital.pacs import RunningOrthanc
from deploy.hospital.postgres import RunningPostgres
from deploy.hospital.ris_process import start_ris
from middleware.store.queries import open_engine
from middleware.store.workers import Worker, WorkerStore
from tests.commands import run_wetread
from tests.crash.line import Line, settings_for
from tests.crash.several import WorkerProcess, logs, postgres
from tests.crash.small_study import Copy, SmallStudy
from tests.serving import Service

SOAK = os.environ.get("WETREAD_SOAK") == "1"
STUDIES, KILLS, RESTARTS = (100, 40, 60) if SOAK else (6, 2, 3)
SETTLED_WITHIN_S = 120.0

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

    def executors(self, state: str = "PENDING") -> dict[str, str]:
        """Which executor has which workflow."""
        query = sqlalchemy.text("SELECT workflow_uuid, executor_id FROM dbos.workflow_status WHERE status = :state")
        with self.engine.connect() as connection:
            return {str(uid): str(executor) for uid, executor in connection.execute(query, {"state": state})}

    def faults(self, studies: list[Copy]) -> dict[str, list[str]]:
        """What is not as it must be once everything has ended."""
        found = {}
        for fresh in studies:
            self.line.service.wait_until_settled(fresh.study_uid, SETTLED_WITHIN_S)
            found[fresh.study_uid] = self.line.faults(fresh)
        return {uid: faults for uid, faults in found.items() if faults}


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


def test_a_dead_workers_reading_goes_on_elsewhere(site: Site) -> None:
    """Killed in the middle of a reading that it alone can have begun: its spool is out of reach, its turn is free."""
    site.start_all()
    fresh = site.line.bring("left-behind")
    victim = {worker.name: worker for worker in site.workers}
    for worker in site.workers:
        worker.end()
    site.line.service.kill()
    lone = victim["worker-1"]
    lone.start(VICTIM_ARM=str(site.line.arm))
    site.wait_for({"worker-1"})
    site.line.start()
    site.announce(fresh)
    deadline = time.monotonic() + 60
    while "worker-1" not in site.executors().values():
        assert time.monotonic() < deadline
        if site.line.service.jobs(fresh.study_uid)[0]["state"] not in ("accepted", "reading"):
            break  # the service itself was faster; what is judged below holds all the same
        time.sleep(0.01)
    lone.kill()
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

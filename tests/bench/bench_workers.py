"""Several workers on one PostgreSQL with a model that only waits: studies a minute for 1, 2 and 4 processes, how soon
work goes on after a kill, and what a study costs in the databases. Run: `python -m tests.bench workers`.

Each process is a real one (`wetread serve`, and `wetread worker` beside it) with a spool of its own; PACS and Triton
are real too. The model waits MODEL_WAIT_S and needs no core meanwhile, so that what does not scale is Wetread itself.
"""

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

import httpx
import sqlalchemy
import yaml

from connectors.dicomweb.client import DicomwebClient
from connectors.dicomweb.config import DicomwebConfig
from deploy.hospital import process
from deploy.hospital.pacs import start_orthanc
from deploy.hospital.postgres import RunningPostgres, start_postgres
from deploy.triton.bundled import BundledTriton
from middleware.store.queries import Store, open_engine
from middleware.store.workers import WorkerStore
from tests.bench.row import Row
from tests.crash.small_study import SmallStudy, build_small_truth

WORKERS = (1, 2, 4)
STUDIES = 16
MODEL_WAIT_S = 4.0
MODEL_INSTANCES = 8
RESUME_BUDGET_S = 5.0
READY_WITHIN_S, DONE_WITHIN_S = 120.0, 300.0


class Site:
    """PostgreSQL, PACS and Triton, and as many processes of ours as are asked for."""

    def __init__(self, folder: Path, database: RunningPostgres, dicomweb_url: str, triton_url: str) -> None:
        self.folder = folder
        self.study = SmallStudy(folder / "phantom")
        self._dicomweb_url = dicomweb_url
        self.engine = open_engine(database.url.replace("postgresql://", "postgresql+psycopg://"))
        self.store, self.workers = Store(self.engine), WorkerStore(self.engine)
        self.port = process.free_port()
        settings = {
            "artifacts_url": f"file://{folder}/artifacts",
            "api": {"port": self.port},
            "pacs": {"url": dicomweb_url},
            "triton": {"url": triton_url},
        }
        (folder / "wetread.yaml").write_text(yaml.safe_dump(settings))
        self._env = {"WETREAD_DATABASE_URL": database.url, "WETREAD_CONFIG": str(folder / "wetread.yaml")}
        self._brought = 0

    def start(self, number: int) -> process.ServerProcess:
        """Process number 0 is the service, every other one a worker."""
        name = f"wetread-{number}"
        own = {"WETREAD_EXECUTOR_ID": name, "WETREAD_DATA_DIR": str(self.folder / name)}
        command = [sys.executable, "-m", "middleware.cli", "worker" if number else "serve"]
        return process.start(name, command, self.folder / f"{name}.log", env={**os.environ, **self._env, **own})

    @contextmanager
    def running(self, count: int) -> Iterator[list[process.ServerProcess]]:
        """So many processes that are at work."""
        with ExitStack() as stack:
            running = [stack.enter_context(self.start(number)) for number in range(count)]
            names = {f"wetread-{number}" for number in range(count)}
            running[0].wait_until(lambda: names <= self._alive() and self.is_ready(), READY_WITHIN_S)
            time.sleep(2.0)  # until each has loaded what is loaded once
            yield running

    def is_ready(self) -> bool:
        return process.answers(f"http://127.0.0.1:{self.port}/ready", 5.0)

    def _alive(self) -> set[str]:
        return {worker.executor_id for worker in self.workers.workers() if worker.state == "alive"}

    def bring(self, count: int) -> list[str]:
        """So many new studies in the PACS; their UIDs."""
        copies = [self.study.copy(f"bench-{self._brought + n}") for n in range(count)]
        self._brought += count

        async def store() -> None:
            client = DicomwebClient(DicomwebConfig(url=self._dicomweb_url))
            for fresh in copies:
                await client.store(fresh.instances, fresh.study_uid)
            await client.aclose()

        asyncio.run(store())
        return [fresh.study_uid for fresh in copies]

    def announce(self, studies: Sequence[str]) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=60) as client:
            for uid in studies:
                client.post("/events/study", json={"study_instance_uid": uid}).raise_for_status()

    def wait_until_released(self, studies: Sequence[str]) -> None:
        deadline = time.monotonic() + DONE_WITHIN_S
        while len(done := [j for j in self.store.jobs_in_state("released") if j.study_instance_uid in studies]) < len(
            studies
        ):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{len(done)} of {len(studies)} studies were released in {DONE_WITHIN_S:g} s")
            time.sleep(0.2)

    def first_step_after(self, study: str, at: datetime) -> float:
        """Seconds from then to the study's first step that began later."""
        (job,) = self.store.jobs_of_study(study)
        deadline = time.monotonic() + 60
        while not (later := [run.started_at for run in self.store.step_runs(job.job_id) if run.started_at > at]):
            if time.monotonic() > deadline:
                raise RuntimeError("no step was resumed within 60 s")
            time.sleep(0.05)
        return (min(later) - at).total_seconds()

    def wait_until_asked(self, study: str) -> None:
        """Until the study's images were routed: the model is being asked."""
        (job,) = self.store.jobs_of_study(study)
        deadline = time.monotonic() + 60
        while not any(run.step == "priors" for run in self.store.step_runs(job.job_id)):
            if time.monotonic() > deadline:
                raise RuntimeError("the model was not asked within 60 s")
            time.sleep(0.02)
        time.sleep(0.5)

    def table_bytes(self) -> dict[str, int]:
        """What each table of the workflow engine, and ours together, take on disk with their indices."""
        query = (
            "SELECT CASE schemaname WHEN 'dbos' THEN 'dbos.' || relname ELSE 'Wetread''s own tables' END AS name, "
            "sum(pg_total_relation_size(relid)) FROM pg_stat_user_tables GROUP BY 1"
        )
        with self.engine.connect() as connection:
            return {str(name): int(size) for name, size in connection.execute(sqlalchemy.text(query))}


@contextmanager
def open_site() -> Iterator[Site]:
    """Everything but our own processes."""
    with tempfile.TemporaryDirectory(prefix="wetread-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        models = build_small_truth(folder / "models", sleep_s=MODEL_WAIT_S, instances=MODEL_INSTANCES)
        triton = stack.enter_context(BundledTriton(models))
        orthanc = stack.enter_context(start_orthanc(folder / "pacs"))
        database = stack.enter_context(start_postgres(folder / "postgres"))
        yield Site(folder, database, orthanc.dicomweb_url, triton.grpc_url)


def measure_throughput(site: Site, count: int) -> tuple[float, dict[str, int]]:
    """Studies a minute with so many processes, and what each study added to each table (bytes)."""
    studies = site.bring(STUDIES)
    with site.running(count):
        before, began = site.table_bytes(), time.monotonic()
        site.announce(studies)
        site.wait_until_released(studies)
        took_s = time.monotonic() - began
        after = site.table_bytes()
    grown = {name: (size - before.get(name, 0)) // STUDIES for name, size in after.items()}
    return STUDIES / took_s * 60, grown


def measure_restart(site: Site) -> float:
    """Seconds from starting a killed process again to the first step it resumes."""
    (study,) = site.bring(1)
    with site.running(1) as running:
        site.announce([study])
        site.wait_until_asked(study)
        running[0].kill()
        at = datetime.now().astimezone()
        with site.start(0):
            resumed_s = site.first_step_after(study, at)
            site.wait_until_released([study])
    return resumed_s


def measure_takeover(site: Site) -> float:
    """Seconds from a kill to the first step that another process resumes, with the default settings."""
    studies = site.bring(4)
    with site.running(2) as running:
        site.announce(studies)
        site.wait_until_asked(studies[0])
        busy = [study for study in studies if _executor(site, study) == "wetread-1"]
        os.kill(running[1].pid, signal.SIGKILL)
        at = datetime.now().astimezone()
        taken_s = min(site.first_step_after(study, at) for study in busy) if busy else float("nan")
        site.wait_until_released(studies)
    return taken_s


def _executor(site: Site, study: str) -> str:
    (job,) = site.store.jobs_of_study(study)
    query = sqlalchemy.text("SELECT executor_id FROM dbos.workflow_status WHERE workflow_uuid = :uid")
    with site.engine.connect() as connection:
        return str(connection.execute(query, {"uid": f"{job.job_id}/run-1"}).scalar())


def bench_workers() -> list[Row]:
    """The rows of the table."""
    rows, rates = [], {}
    with open_site() as site:
        for count in WORKERS:
            rates[count], grown = measure_throughput(site, count)
            ratio = rates[count] / rates[WORKERS[0]]
            what = f"{count} process(es), {STUDIES} studies, model waits {MODEL_WAIT_S:g} s"
            rows.append(Row(what, "studies/min", rates[count], rival=rates[1], rival_name="1 process", ratio=ratio))
        restart_s, takeover_s = measure_restart(site), measure_takeover(site)
    kept = restart_s <= RESUME_BUDGET_S
    budget = f"<= {RESUME_BUDGET_S:g} s"
    rows.append(Row("restart after kill -9 to the first resumed step", "s", restart_s, budget=budget, within=kept))
    rows.append(Row("kill -9 to the first step resumed elsewhere (dead_after_s=10)", "s", takeover_s))
    tables = sorted(((size, name) for name, size in grown.items() if size), reverse=True)
    rows += [Row(f"    {name}, growth a study, with indices", "bytes", size) for size, name in tables]
    return [*rows, Row("both databases, growth a study", "bytes", sum(size for size, _ in tables))]


def main() -> int:
    """Print each row."""
    for row in bench_workers():
        print(row.line())
    return 0


if __name__ == "__main__":
    sys.exit(main())

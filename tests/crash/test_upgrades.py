"""Work in flight while another version starts: a worker of its own version finishes it or, where none lives, it is
read anew in the new version; it is never left, and nobody gets anything twice."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest
import sqlalchemy

from deploy.hospital.ehr import start_fallback
from deploy.hospital.pacs import RunningOrthanc
from deploy.hospital.ris_process import start_ris
from middleware.bootstrap import WORKFLOW_VERSION
from middleware.intake.inbox import accept_study
from middleware.store.queries import Store, open_engine
from middleware.store.workers import WorkerStore
from tests.commands import run_wetread
from tests.crash.line import Line, settings_for
from tests.crash.several import WorkerProcess, postgres
from tests.crash.small_study import Copy, SmallStudy
from tests.serving import Service

OLD = "an older order of steps"
SIGKILLED = -9

pytestmark = pytest.mark.timeout(400)


@dataclass
class Upgrade:
    """A site on PostgreSQL, whose service is of the new version, and what was told of workflows."""

    line: Line
    store: Store
    workers: WorkerStore
    engine: sqlalchemy.Engine
    folder: Path

    def old_worker(self, name: str, armed: str = "") -> WorkerProcess:
        """A worker of the old version; where `armed`, it kills itself at that point."""
        arm = self.folder / f"arm-{name}"
        if armed:
            arm.write_text(armed)
        worker = WorkerProcess(name, self.line.service.folder / "wetread.yaml", self.folder)
        worker.start("tests.crash.old_version:main", OTHER_VERSION=OLD, VICTIM_ARM=str(arm))
        return worker

    def leave_behind(self, name: str, point: str) -> Copy:
        """A study that a worker of the old version was doing when it was killed."""
        fresh = self.line.bring(name)
        accept_study(self.store, fresh.study_uid, source="test", key=name, now=datetime.now().astimezone())
        assert self.old_worker(f"old-{name}", point).wait_for_death(90) == SIGKILLED
        return fresh

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 60
        while not any(w.executor_id == name and w.state == "alive" for w in self.workers.workers()):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def versions(self, fresh: Copy) -> set[str]:
        """The versions that the study's workflows (its reading and deliveries) are recorded under."""
        (job,) = self.store.jobs_of_study(fresh.study_uid)
        query = "SELECT application_version FROM dbos.workflow_status WHERE workflow_uuid LIKE :of_job"
        with self.engine.connect() as connection:
            return set(connection.execute(sqlalchemy.text(query), {"of_job": f"{job.job_id}/%"}).scalars())


@pytest.fixture
def site(tmp_path: Path, study: SmallStudy, orthanc: RunningOrthanc, small_triton: str) -> Iterator[Upgrade]:
    with start_fallback(tmp_path / "ehr") as ehr, start_ris(tmp_path / "ris") as ris, postgres() as server:
        settings = {
            **settings_for(orthanc, ehr, ris, small_triton),
            "database_url": server.url,
            "artifacts_url": f"file://{tmp_path}/artifacts",
            "workers": {"heartbeat_s": 0.3, "dead_after_s": 3.0},
        }
        line = Line(Service(tmp_path / "service", settings), study, orthanc, ehr, ris, tmp_path / "arm")
        engine = open_engine(server.url.replace("postgresql://", "postgresql+psycopg://"))
        yield Upgrade(line, Store(engine), WorkerStore(engine), engine, tmp_path)
        engine.dispose()
        if line.service.pid:
            line.stop()


@pytest.mark.parametrize("point", ["infer.before", "plan.after", "ehr-transaction.after"])
def test_left_by_a_version_that_is_gone(point: str, site: Upgrade, tmp_path: Path) -> None:
    """`wetread check` names it; the new version reads it from the beginning, and everybody got one result."""
    fresh = site.leave_behind(f"gone-{point}", point)
    config = str(site.line.service.folder / "wetread.yaml")
    time.sleep(3.5)  # until then it may be alive
    checked = run_wetread(tmp_path / "check", "check", WETREAD_CONFIG=config)
    assert checked.code == 1, checked.said
    assert f"unfinished workflow(s) of version {OLD}" in checked.out
    assert "none is running" in checked.out
    site.line.start()
    assert site.line.faults(fresh) == []
    assert WORKFLOW_VERSION in site.versions(fresh)
    checked = run_wetread(tmp_path / "check", "check", WETREAD_CONFIG=config)
    assert checked.code == 0, checked.said
    assert "nothing is stranded" in checked.out


def test_left_to_a_living_worker_of_its_own_version(site: Upgrade) -> None:
    """The new version leaves it alone, as long as it takes."""
    fresh = site.leave_behind("drained", "infer.before")
    other = site.old_worker("old-other")
    site.wait_for("old-other")
    site.line.start()
    assert site.line.faults(fresh) == []
    assert site.versions(fresh) == {OLD}
    assert other.end() == 0

"""The same line on PostgreSQL: a reading, a kill and a restart, and a second worker on the same database."""

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from deploy.hospital.ehr import start_fallback
from deploy.hospital.pacs import RunningOrthanc
from deploy.hospital.ris import Behaviour
from deploy.hospital.ris_process import start_ris
from tests.commands import environment, run_wetread, zygote
from tests.crash.line import Line, settings_for
from tests.crash.several import postgres
from tests.crash.small_study import SmallStudy
from tests.serving import Service
from tests.unit.test_delivery_store import NOW, Desk, at_once, delivery

SIGKILLED = -9


@pytest.fixture(scope="module")
def database_url() -> Iterator[str]:
    """A PostgreSQL server of this module alone, on loopback, in a folder that goes away."""
    with postgres() as server:
        yield server.url


@pytest.fixture(scope="module")
def line(
    tmp_path_factory: pytest.TempPathFactory,
    study: SmallStudy,
    orthanc: RunningOrthanc,
    small_triton: str,
    database_url: str,
) -> Iterator[Line]:
    folder = tmp_path_factory.mktemp("postgres")
    with start_fallback(folder / "ehr") as ehr, start_ris(folder / "ris") as ris:
        settings = {**settings_for(orthanc, ehr, ris, small_triton), "database_url": database_url}
        made = Line(Service(folder / "service", settings), study, orthanc, ehr, ris, folder / "arm")
        made.start()
        yield made
        made.stop()


def test_a_study_is_read_and_delivered(line: Line) -> None:
    fresh = line.bring("postgres")
    answer = line.service.announce(fresh.study_uid)
    assert answer is not None
    assert answer.status_code == 202
    assert line.faults(fresh) == []
    assert sorted(p.name for p in line.service.data_dir.glob("*.sqlite")) == []


def test_what_is_kept_is_explained_and_replayed_beside_the_service(line: Line, tmp_path: Path) -> None:
    fresh = line.bring("explained")
    line.service.announce(fresh.study_uid)
    assert line.faults(fresh) == []
    config = str(line.service.folder / "wetread.yaml")
    told = run_wetread(tmp_path, "explain", fresh.study_uid, WETREAD_CONFIG=config)
    assert (told.code, "version 1 reads it" in told.out, "delivered" in told.out) == (0, True, True), told.said
    replayed = run_wetread(tmp_path, "protocols", "dry-run", "--past", "1", "--all", WETREAD_CONFIG=config)
    assert (replayed.code, fresh.study_uid in replayed.out) == (0, True), replayed.said
    assert "0 would differ, 0 cannot be decided" in replayed.out


@pytest.mark.parametrize("point", ["accept.after", "render.exit", "plan.after", "ehr-transaction.after"])
def test_killed_and_restarted(point: str, line: Line) -> None:
    fresh = line.bring(f"postgres-{point}")
    line.arm.write_text(point)
    answer = line.service.announce(fresh.study_uid)
    assert line.service.wait_for_death(60) == SIGKILLED
    line.start()
    if answer is None:
        line.service.announce(fresh.study_uid)
    assert line.faults(fresh) == []


def test_a_second_worker_takes_readings_too(line: Line, tmp_path: Path) -> None:
    """Eight studies; every one is read once, and the worker has done some of them."""
    folder = line.service.folder
    env = environment(folder / "tmp", WETREAD_EXECUTOR_ID="worker-2")
    out, log = tmp_path / "out", tmp_path / "log"
    worker = zygote().start("middleware.cli:main", ["worker"], folder, env, out, log)
    try:
        studies = [line.bring(f"many-{n}") for n in range(8)]
        for fresh in studies:
            assert line.service.announce(fresh.study_uid) is not None
        assert {fresh.study_uid: line.faults(fresh) for fresh in studies} == {s.study_uid: [] for s in studies}
        assert log.read_text().count('"reading ended"') >= 1
    finally:
        os.kill(worker, 15)
        assert zygote().wait(worker, 30) == 0, log.read_text()[-2000:]


def test_a_delivery_that_failed_is_tried_again(line: Line) -> None:
    fresh = line.bring("tried-again")
    line.ris.behave(Behaviour.CLOSE, times=1)
    line.service.announce(fresh.study_uid)
    assert line.faults(fresh) == []
    assert len([m for m in line.ris.received() if fresh.study_uid in m.text]) == 2


def test_of_many_claims_at_once_the_first_of_its_accession_goes(line: Line, database_url: str) -> None:
    """Rows of a destination that no service knows, so that only this test claims them."""
    desk = Desk(database_url.replace("postgresql://", "postgresql+psycopg://"))
    names = [f"pg{n}" for n in range(6)]
    for n, name in enumerate(names):
        at = NOW + timedelta(seconds=n)
        desk.plan(delivery(name, job_id=name, key="ACC", destination="test", created_at=at))
    for n, name in enumerate(names):
        allowed = at_once(6, lambda m: desk.claim(names[m], f"w{m}"))
        assert allowed == [m == n for m in range(6)]
        desk.deliveries.settle(name, NOW, "delivered")
    desk.store.close()


@pytest.mark.parametrize("path", ["/jobs/%00", "/jobs/a%00b/deliveries", "/studies/1.2%00/jobs"])
def test_what_postgresql_cannot_hold_is_not_found(path: str, line: Line) -> None:
    assert line.service.http.get(path).status_code in (200, 404, 422)

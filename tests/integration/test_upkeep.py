"""The service keeps its own house: history is pruned, and a reading that lost its workflow is named and tried again."""

from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from middleware.bootstrap import open_history
from middleware.retention import Pruning
from middleware.settings import Settings
from middleware.store.artifacts import ArtifactStore
from middleware.store.queries import Store, open_engine
from middleware.store.retention import RetentionStore
from middleware.store.workers import WorkerStore
from tests.commands import run_wetread
from tests.serving import Service

UID = "1.2.826.0.1.99.8"


def test_the_history_of_what_ended_is_pruned(tmp_path: Path) -> None:
    service = Service(tmp_path / "service", {"retry": {"attempts": 1}})
    service.start()
    service.announce(f"{UID}.5")
    service.wait_until_settled(f"{UID}.5")
    config = str(service.folder / "wetread.yaml")
    young = run_wetread(tmp_path / "dry", "prune", "--dry-run", WETREAD_CONFIG=config)
    assert young.code == 0, young.said
    assert "0 ended workflows would be removed" in young.out
    assert run_wetread(tmp_path / "wet", "prune", WETREAD_CONFIG=config).code == 0
    settings = Settings(data_dir=service.data_dir)
    engine = open_engine(settings.store_url)
    later = datetime.now().astimezone() + timedelta(days=15)
    pruning = Pruning(settings, RetentionStore(engine), ArtifactStore(settings.artifacts_place), later)
    with open_history(settings) as history:
        assert history is not None
        assert replace(pruning, dry_run=True).prune_history(history).count == 1
        assert pruning.prune_history(history).count == 1
        assert history.list_workflows() == []
    again = service.announce(f"{UID}.5", **{"Idempotency-Key": "again"})
    assert again is not None
    assert again.status_code == 202
    assert service.wait_until_settled(f"{UID}.5")["state"] == "failed"
    assert service.stop() == 0
    engine.dispose()


def test_a_reading_without_a_workflow_is_named_and_tried_again(tmp_path: Path) -> None:
    """As where the disk was full to the last byte when its workflow ended."""
    service = Service(tmp_path / "service", {"retry": {"attempts": 1}, "workers": {"dead_after_s": 3.0}})
    service.start()
    service.announce(f"{UID}.6")
    job_id = service.wait_until_settled(f"{UID}.6")["job_id"]
    assert service.stop() == 0
    engine = open_engine(f"sqlite:///{service.data_dir}/wetread.sqlite")
    store = Store(engine)
    store.update_job(job_id, datetime.now().astimezone() - timedelta(minutes=5), state="reading")
    assert [worker.state for worker in WorkerStore(engine).workers()] == ["stopped"]
    config = str(service.folder / "wetread.yaml")
    checked = run_wetread(tmp_path / "check", "check", WETREAD_CONFIG=config)
    assert f"1 reading(s) whose workflow has ended, such as job {job_id}" in checked.out
    assert checked.code == 1
    service.start()
    assert service.wait_until_settled(f"{UID}.6")["state"] == "failed"
    assert "its workflow ended before its end was written down" in " ".join(store.job(job_id).reasons)
    assert store.job(job_id).look_at is not None
    assert service.stop() == 0
    engine.dispose()


def test_one_machine_goes_on_under_another_name(tmp_path: Path) -> None:
    """A container that is replaced has another host name; on SQLite, where one writer at a time is all there is."""
    service = Service(tmp_path / "service", {"retry": {"attempts": 1}, "workers": {"dead_after_s": 3.0}})
    arm = tmp_path / "arm"
    service.start("tests.crash.victim:main", VICTIM_ARM=str(arm))
    arm.write_text("job-updated.after")
    service.announce(f"{UID}.7")
    assert service.wait_for_death(60) == -9
    service.start(WETREAD_EXECUTOR_ID="another-name")
    ended = service.wait_until_settled(f"{UID}.7")
    assert ended["state"] == "failed"
    assert "set pacs in wetread.yaml" in ended["reasons"][0]
    assert service.stop() == 0
    assert "took over from a worker" in service.log()
    assert "not looked after" not in service.log()

"""Logs hold the listed fields and nothing of a patient, whatever goes wrong; steps are timed, counted and told."""

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from middleware import telemetry
from middleware.errors import Stopped
from middleware.intake.images import read_study
from middleware.intake.inbox import accept_study
from middleware.store.queries import Store, open_engine
from tests.builders import NOW
from tests.dicom_sources import build_sources

CANARY = "Canary^Carl"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Loggers, filters and listeners as they were."""
    logger = logging.getLogger("wetread")
    handlers, level, propagate, listeners = logger.handlers, logger.level, logger.propagate, list(telemetry._listeners)
    with warnings.catch_warnings():
        yield
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)
    telemetry._listeners[:] = listeners


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_log_line_is_json_with_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging()
    telemetry.log("delivery", job_id="j", destination="pacs", state="delivered", attempt=2)
    (line,) = lines(capsys)
    assert set(line) == {"at", "level", "event", "job_id", "destination", "state", "attempt"}
    assert (line["event"], line["destination"], line["attempt"]) == ("delivery", "pacs", 2)


@pytest.mark.parametrize("field", ["patient_name", "patient_id", "study_instance_uid", "accession_number", "reason"])
def test_field_that_is_not_listed_raises_and_writes_nothing(field: str, capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging()
    with pytest.raises(ValueError, match=f"not a log field: {field}"):
        telemetry.log("event", job_id="j", **{field: CANARY})
    assert capsys.readouterr().err == ""


def test_listed_fields_hold_no_patient_data() -> None:
    assert not {f for f in telemetry.LOG_FIELDS if "patient" in f or "name" in f or "study" in f or "accession" in f}


def test_field_that_json_cannot_hold_is_written_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging()
    telemetry.log("event", source=Path("spool"))
    assert lines(capsys)[0]["source"] == "PosixPath('spool')"


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_step_is_timed_counted_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging()
    told: list[telemetry.Progress] = []
    telemetry.listen(told.append)
    before = sample("wetread_step_seconds_count", step="test-step", outcome="done")
    with telemetry.watch_step("test-step", "j") as watch:
        assert sample("wetread_steps_in_progress", step="test-step") == 1
        watch.detail = f"patient {CANARY}"
    assert sample("wetread_step_seconds_count", step="test-step", outcome="done") == before + 1
    assert sample("wetread_steps_in_progress", step="test-step") == 0
    assert [(p.state, p.detail) for p in told] == [("started", ""), ("done", f"patient {CANARY}")]
    assert watch.duration_s > 0
    (line,) = lines(capsys)
    assert (line["step"], line["state"], line["job_id"]) == ("test-step", "done", "j")
    assert "Canary" not in json.dumps(line), "what a person is told is not logged"


def test_failing_step_is_counted_and_its_error_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging()
    before = sample("wetread_step_seconds_count", step="test-step", outcome="failed")
    with pytest.raises(Stopped), telemetry.watch_step("test-step", "j"):
        raise Stopped("held", (f"about {CANARY}",))
    assert sample("wetread_step_seconds_count", step="test-step", outcome="failed") == before + 1
    (line,) = lines(capsys)
    assert line["state"] == "failed"
    assert "Canary" not in json.dumps(line)


def write_canary(folder: Path) -> None:
    """A damaged study whose every text names the patient, with values that pydicom finds odd."""
    for number, ds in enumerate(build_sources((3, 4, 4), PatientName=CANARY)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for keyword in ("PatientBirthDate", "PatientID", "AccessionNumber", "Modality", "EchoTime", "StudyTime"):
                _set(ds, keyword, f"Canary{number}\x07^Carl" + "x" * 70)
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.save_as(folder / f"{number}.dcm", enforce_file_format=False, implicit_vr=False, little_endian=True)


def _set(ds: Dataset, keyword: str, value: str) -> None:
    try:
        setattr(ds, keyword, value)
    except ValueError:
        ds.add_new(keyword, "LO", value)


def test_a_canary_patient_is_never_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    write_canary(folder)
    with warnings.catch_warnings(record=True) as warned:  # outside of pytest they go to standard error
        warnings.simplefilter("always")
        telemetry.configure_logging("DEBUG")
        store = Store(open_engine(f"sqlite:///{tmp_path}/w.sqlite"))
        accept_study(store, "1.2.3", source="pacs", key=CANARY, now=NOW)
        with pytest.raises(ValueError, match="not a DICOM UID"):
            accept_study(store, CANARY, source="pacs", key="k", now=NOW)
        with pytest.raises(Stopped), telemetry.watch_step("fetch", "j"):
            read_study(folder)
        store.close()
    assert [str(w.message) for w in warned] == []
    written = capfd.readouterr()
    assert len(written.err.splitlines()) == 2, written.err
    assert "Canary" not in written.err + written.out


def test_quiet_logging_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.quiet_logging()
    telemetry.log("event", job_id="j")
    assert capsys.readouterr().err == ""

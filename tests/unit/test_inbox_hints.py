"""What a hint about a known study comes to: nothing, another look, or another reading."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from mappings.inputs.dicom_to_study import datasets_to_study
from mappings.model.study import PatientIdentity
from middleware.intake.headers import outline_beside
from middleware.intake.inbox import accept_study, hear_of_study, run_started_at
from middleware.store.arrivals import ArrivalStore
from middleware.store.queries import Store, open_engine
from middleware.store.tables import StudyJob

NOW = datetime(2026, 3, 4, 10, 30, tzinfo=UTC)
LATER = NOW + timedelta(minutes=5)
STUDY = "1.2.840.113619.2.1"
Kept = tuple[Store, ArrivalStore]


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    engine = open_engine(f"sqlite:///{tmp_path}/wetread.sqlite")
    yield Store(engine), ArrivalStore(engine)
    engine.dispose()


def ended(store: Store, state: str) -> StudyJob:
    """The job of a study whose first run was accepted at NOW and ended so."""
    job, _ = accept_study(store, STUDY, source="pacs", key="first", now=NOW)
    store.update_job(job.job_id, NOW, state="reading")
    store.conclude_job(job.job_id, NOW, state, [])
    return store.job(job.job_id)


def announce(store: Store, *, is_request: bool) -> StudyJob:
    job, _ = accept_study(store, STUDY, source="http", key="second", now=LATER, is_request=is_request)
    return store.job(job.job_id)


def test_announcing_what_was_read_asks_for_a_look_only(kept: Kept) -> None:
    ended(kept[0], "released")
    job = announce(kept[0], is_request=False)
    assert (job.state, job.look_at, run_started_at(job)) == ("released", LATER, NOW)


def test_asking_for_what_was_read_reads_it_again(kept: Kept) -> None:
    ended(kept[0], "released")
    job = announce(kept[0], is_request=True)
    assert (job.state, job.facts["run"]) == ("accepted", 2)


@pytest.mark.parametrize("state", ["failed", "held", "unusable", "unmatched"])
def test_announcing_what_has_no_result_reads_it_again(kept: Kept, state: str) -> None:
    ended(kept[0], state)
    assert announce(kept[0], is_request=False).state == "accepted"


def test_announcing_what_is_being_read_asks_for_a_look_afterwards(kept: Kept) -> None:
    job = ended(kept[0], "released")
    kept[0].update_job(job.job_id, NOW, state="reading")
    announce(kept[0], is_request=False)
    assert kept[1].due(LATER) == []
    assert not kept[0].conclude_job(job.job_id, LATER, "released", [])
    assert [one.job_id for one in kept[1].due(LATER)] == [job.job_id]


@pytest.mark.parametrize(
    ("state", "changed_at", "becomes"),
    [
        ("held", LATER, "waiting"),
        ("unmatched", LATER, "waiting"),
        ("held", NOW, "held"),
        ("unmatched", NOW - timedelta(minutes=1), "unmatched"),
        ("released", LATER, "released"),
    ],
)
def test_order_has_a_study_looked_at_where_it_changed_since_the_run(
    kept: Kept, state: str, changed_at: datetime, becomes: str
) -> None:
    ended(kept[0], state)
    job, is_new = hear_of_study(
        kept[1], STUDY, "order", source="order", key="o", now=LATER + timedelta(minutes=1), changed_at=changed_at
    )
    assert (job.state, is_new, job.facts.get("run", 1)) == (becomes, True, 1)
    (note,) = [event.note for event in kept[0].events_of_job(job.job_id) if event.source == "order"]
    assert bool(note) == (becomes == state)


def test_outline_of_a_result_series_says_nothing_of_the_patient() -> None:
    image = Dataset()
    image.StudyInstanceUID, image.SeriesInstanceUID, image.SOPInstanceUID = STUDY, f"{STUDY}.1", f"{STUDY}.1.1"
    image.PatientID, image.IssuerOfPatientID, image.PatientBirthDate = "4711", "SITEA", "19500101"
    found = {
        "0020000E": {"vr": "UI", "Value": [f"{STUDY}.2"]},
        "00080060": {"vr": "CS", "Value": ["SEG"]},
        "00100020": {"vr": "LO", "Value": ["4711"]},
        "00100030": {"vr": "DA", "Value": ["19610203"]},  # the other site's person of this number
        "00201209": {"vr": "IS", "Value": [1]},
    }
    study = datasets_to_study([("seg", outline_beside(image, STUDY, found)), ("image", image)])
    assert (study.patient.patient_id, study.patient.issuer, study.problems) == ("4711", "SITEA", ())
    assert study.patient.birth_date is not None
    assert study.patient == PatientIdentity("4711", "SITEA", birth_date=study.patient.birth_date)
    assert study.patient.birth_date.year == 1950

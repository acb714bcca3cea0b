"""Studies start by themselves: as soon as what is required is there, once, and again only for what matters."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy.hospital.pacs import RunningOrthanc, start_orthanc
from deploy.hospital.phantom_dicom import derived_uid
from tests.arrivals import LONGEST_WAIT_S, Watching, changed, count_in, of_series, read, store_in, until
from tests.crash.small_study import Copy, SmallStudy

T2W, ADC, HBV = 4, 7, 8


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningOrthanc]:
    with start_orthanc(tmp_path_factory.mktemp("orthanc"), stable_age_s=60) as server:
        yield server


@pytest.fixture(scope="module")
def old(pacs: RunningOrthanc, small_study: SmallStudy) -> Copy:
    """A study that the PACS has before Wetread first looks."""
    fresh = small_study.copy("old")
    store_in(pacs.dicomweb_url, fresh.study_uid, fresh.instances)
    return fresh


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, pacs: RunningOrthanc, small_triton: str, old: Copy
) -> Iterator[Watching]:
    made = Watching(tmp_path_factory.mktemp("site"), pacs, triton={"url": small_triton})
    made.start()
    yield made
    made.stop()


def without(fresh: Copy, *numbers: int) -> list[bytes]:
    return [one for one in fresh.instances if int(read(one).SeriesNumber) not in numbers]


def test_study_that_arrives_in_pieces_and_any_order_is_read_once(site: Watching, small_study: SmallStudy) -> None:
    fresh = small_study.copy("pieces")
    pieces = list(fresh.instances)
    random.Random(5).shuffle(pieces)
    for first in range(0, len(pieces), 6):
        site.send(fresh.study_uid, pieces[first : first + 6])
        time.sleep(0.4)
    job = site.settled(fresh.study_uid)
    assert (job.state, job.revision, job.facts["run"]) == ("released", 1, 1)
    assert site.steps(fresh.study_uid).count("fetch") == 1
    until(lambda: count_in(site.orthanc, fresh.study_uid) > len(fresh.instances), what="to deliver the results")
    # They are images of the study to the watcher, and change nothing.
    until(lambda: "no protocol uses" in site.events(fresh.study_uid)[-1].note, what="to look at the results")
    until(lambda: (job := site.job(fresh.study_uid)) is not None and job.look_at is None, what="to have looked")
    again = site.job(fresh.study_uid)
    assert again is not None
    assert (again.state, again.facts["run"], again.look_at) == ("released", 1, None)
    assert {event.source for event in site.events(fresh.study_uid)} == {"pacs"}


def test_what_is_missing_is_named_while_it_waits_and_read_when_it_comes(
    site: Watching, small_study: SmallStudy
) -> None:
    fresh = small_study.copy("adc-late")
    site.send(fresh.study_uid, without(fresh, ADC))
    waiting = site.settled(fresh.study_uid, "waiting")
    time.sleep(1.5)  # longer than everything required has to rest
    waiting = site.settled(fresh.study_uid, "waiting")
    assert any("Apparent diffusion coefficient map" in reason for reason in waiting.reasons)
    site.send(fresh.study_uid, of_series(fresh.instances, ADC))
    assert site.settled(fresh.study_uid).state == "released"
    assert site.steps(fresh.study_uid).count("fetch") == 1


def test_study_that_stays_incomplete_ends_with_the_reason_and_goes_on_when_the_rest_comes(
    site: Watching, small_study: SmallStudy
) -> None:
    fresh = small_study.copy("incomplete")
    t2w = of_series(fresh.instances, T2W)
    site.send(fresh.study_uid, [*without(fresh, T2W), *t2w[:3], *t2w[4:]])
    job = site.settled(fresh.study_uid)
    assert job.state == "unusable"
    assert "missing" in " ".join(job.reasons)
    site.send(fresh.study_uid, t2w[3:4])
    job = site.settled(fresh.study_uid, "released", runs=2)
    assert (job.revision, job.reasons) == (1, [])


def test_late_series_that_no_role_uses_is_noted(site: Watching, small_study: SmallStudy) -> None:
    fresh = small_study.copy("sagittal")
    site.send(fresh.study_uid, fresh.instances)
    site.settled(fresh.study_uid, "released")
    until(lambda: count_in(site.orthanc, fresh.study_uid) == len(fresh.instances) + 4, what="to deliver the results")
    until(lambda: site.instances_seen(fresh.study_uid) == len(fresh.instances) + 4, what="to see the results")
    before = len(site.events(fresh.study_uid))
    late = [
        changed(
            one,
            SeriesInstanceUID=derived_uid("late-sagittal"),
            SeriesNumber=31,
            SeriesDescription="localizer",
            ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
            SOPInstanceUID=derived_uid(f"late-sagittal/{n}"),
        )
        for n, one in enumerate(of_series(fresh.instances, T2W))
    ]
    site.send(fresh.study_uid, late)
    until(lambda: len(site.events(fresh.study_uid)) > before, what="to hear of it")
    until(lambda: "no protocol uses" in site.events(fresh.study_uid)[-1].note, what="to look at it")
    assert site.settled(fresh.study_uid).facts["run"] == 1


def test_late_series_that_matters_makes_a_new_revision(site: Watching, small_study: SmallStudy) -> None:
    fresh = small_study.copy("repeat")
    site.send(fresh.study_uid, fresh.instances)
    site.settled(fresh.study_uid, "released")
    repeated = [
        changed(
            one,
            SeriesInstanceUID=derived_uid("repeated-t2"),
            SeriesNumber=44,
            SOPInstanceUID=derived_uid(f"repeated-t2/{n}"),
        )
        for n, one in enumerate(of_series(fresh.instances, T2W))
    ]
    site.send(fresh.study_uid, repeated)
    job = site.settled(fresh.study_uid, "released", runs=2)
    assert job.revision == 2


def test_study_of_another_modality_is_explained_without_being_fetched(site: Watching, small_study: SmallStudy) -> None:
    fresh = small_study.copy("ct")
    site.send(fresh.study_uid, [changed(one, Modality="CT") for one in fresh.instances[:3]])
    job = site.settled(fresh.study_uid)
    assert (job.state, site.steps(fresh.study_uid)) == ("unmatched", [])
    assert job.reasons == ["prostate_mri: the study holds no MR images (CT)"]


def test_what_the_pacs_had_before_the_first_look_is_no_news_until_it_changes(
    site: Watching, old: Copy, small_study: SmallStudy
) -> None:
    assert site.job(old.study_uid) is None
    extra = changed(old.instances[0], SOPInstanceUID=derived_uid("old/extra"), SeriesInstanceUID=derived_uid("old/s"))
    site.send(old.study_uid, [extra])
    assert site.settled(old.study_uid).state == "released"


def test_what_came_while_the_service_was_down_is_read_after_its_start(site: Watching, small_study: SmallStudy) -> None:
    copies = [small_study.copy(f"while-down-{n}") for n in range(3)]
    site.send(copies[0].study_uid, copies[0].instances[:5])  # in the middle of an arrival
    site.settled(copies[0].study_uid, "waiting")
    site.service.kill()
    site.send(copies[0].study_uid, copies[0].instances[5:])
    for fresh in copies[1:]:
        site.send(fresh.study_uid, fresh.instances)
    site.start()
    for fresh in copies:
        job = site.settled(fresh.study_uid)
        assert (job.state, job.facts["run"]) == ("released", 1)


def test_asked_for_while_it_waits_it_is_read_at_once(site: Watching, small_study: SmallStudy) -> None:
    fresh = small_study.copy("asked")
    site.send(fresh.study_uid, without(fresh, ADC))
    site.settled(fresh.study_uid, "waiting")
    began = time.monotonic()
    answer = site.service.announce(fresh.study_uid)
    assert answer is not None
    assert answer.status_code == 202
    job = site.settled(fresh.study_uid, "unusable")
    assert "Apparent diffusion coefficient map" in " ".join(job.reasons)
    assert time.monotonic() - began < LONGEST_WAIT_S


def test_deleted_and_sent_again_is_looked_at_again(site: Watching, small_study: SmallStudy) -> None:
    fresh = small_study.copy("again")
    site.send(fresh.study_uid, fresh.instances)
    site.settled(fresh.study_uid, "released")
    until(lambda: site.instances_seen(fresh.study_uid) > len(fresh.instances), what="to see the results")
    before = len(site.events(fresh.study_uid))
    _delete(site.orthanc, fresh.study_uid)
    until(lambda: not site.instances_seen(fresh.study_uid), what="to find it gone")
    site.send(fresh.study_uid, fresh.instances)
    until(lambda: len(site.events(fresh.study_uid)) > before, what="to hear of it again")
    assert site.settled(fresh.study_uid, "released").facts["run"] == 1


def _delete(orthanc: RunningOrthanc, study_uid: str) -> None:
    with httpx.Client(base_url=orthanc.http_url, trust_env=False, timeout=30) as http:
        query = {"Level": "Study", "Query": {"StudyInstanceUID": study_uid}}
        (found,) = http.post("/tools/find", json=query).json()
        http.delete(f"/studies/{found}").raise_for_status()


@pytest.fixture(scope="module")
def by_log(tmp_path_factory: pytest.TempPathFactory, orthanc: RunningOrthanc, small_triton: str) -> Iterator[Watching]:
    """A service that hears by Orthanc's log only, and would wait for long."""
    made = Watching(
        tmp_path_factory.mktemp("by-log"),
        orthanc,
        pacs_watch=None,
        orthanc_changes={"url": orthanc.http_url, "interval_s": 0.3},
        completeness={"quiet_s": 600, "longest_wait_s": 900, "look_every_s": 0.2},
        triton={"url": small_triton},
    )
    made.start("orthanc")
    yield made
    made.stop()


def test_study_that_orthanc_calls_stable_is_read_without_waiting(by_log: Watching, small_study: SmallStudy) -> None:
    fresh = small_study.copy("stable")
    by_log.send(fresh.study_uid, fresh.instances)
    job = by_log.settled(fresh.study_uid)
    assert (job.state, job.facts["run"]) == ("released", 1)
    assert {event.kind for event in by_log.events(fresh.study_uid)} == {"images", "images-stable"}


def test_log_is_read_on_after_a_restart(by_log: Watching, small_study: SmallStudy, tmp_path: Path) -> None:
    fresh = small_study.copy("stable-while-down")
    by_log.service.kill()
    by_log.send(fresh.study_uid, fresh.instances)
    time.sleep(1.5)
    by_log.start("orthanc")
    assert by_log.settled(fresh.study_uid).state == "released"

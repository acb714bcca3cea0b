"""Held studies and the people who decide: real commands beside the running service, and what becomes of the study."""

import asyncio
import base64
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from deploy.hospital.chart import MRN_SYSTEM, chart_bundle
from deploy.hospital.pacs import RunningOrthanc
from deploy.hospital.phantom_dicom import derived_uid
from middleware.bootstrap import open_systems
from middleware.settings import load_settings
from middleware.store.tables import StudyJob
from middleware.trace import build_trace
from tests.arrivals import changed, count_in, store_in, until
from tests.commands import finish, start_wetread
from tests.crash.small_study import Copy, SmallStudy
from tests.gates import Hospital, open_hospital
from tests.hl7_inbox import write_order

SEX = "the sex in the images differs from the one in ehr"
CANCELLED = "the order of this study is cancelled"
REJECTED = "nothing: a person rejected this study"


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory, orthanc: RunningOrthanc) -> Iterator[Hospital]:
    with open_hospital(tmp_path_factory.mktemp("held"), orthanc) as made:
        yield made


def hold(hospital: Hospital, small: SmallStudy, name: str) -> tuple[Copy, StudyJob]:
    """A study that is held since the EHR has another sex."""
    fresh = small.copy(f"held-{name}")
    job = hospital.read(hospital.admit(fresh, chart=chart_bundle(replace(fresh.spec, sex="F"))), "held")
    assert job.reasons == [SEX]
    return fresh, job


def decisions(hospital: Hospital, job: StudyJob) -> list[tuple[str, str, str]]:
    return [(d.action, d.person, d.reason) for d in hospital.site.store.decisions(job.job_id)]


def release(hospital: Hospital, job: str, *more: str, person: str = "Anna B.") -> str:
    ended = hospital.run("release", job, "--reason", "asked the ward", "--person", person, *more)
    assert ended.code == 0, ended.said
    return " ".join(ended.out.split())


def reject(hospital: Hospital, job: str) -> str:
    ended = hospital.run("reject", job, "--reason", "a test patient", "--person", "Ben")
    assert ended.code == 0, ended.said
    return " ".join(ended.out.split())


def cancel(hospital: Hospital, fresh: Copy) -> None:
    numbers = (f"P-{fresh.spec.patient_id}", "", fresh.spec.accession, "")
    raw = write_order(f"c-{fresh.spec.patient_id}", "CA", numbers, patient=fresh.spec.patient_id)
    assert hospital.hear(raw).state == "applied"


def trace_of(hospital: Hospital, job: StudyJob) -> dict[str, Any]:
    settings = load_settings(hospital.site.service.folder / "wetread.yaml")
    settings = settings.model_copy(update={"data_dir": hospital.site.service.data_dir})

    async def build() -> dict[str, Any]:
        async with open_systems(settings) as systems:
            return build_trace(systems, job.job_id)

    return asyncio.run(build())


def test_release_reads_the_study_and_every_output_says_who_and_in_spite_of_what(
    hospital: Hospital, small_study: SmallStudy
) -> None:
    fresh, job = hold(hospital, small_study, "release")
    hospital.assert_nothing_left(fresh)
    listed = hospital.run("held", COLUMNS="100")
    assert job.job_id in listed.out
    assert fresh.study_uid in listed.out
    assert f"- {SEX}" in listed.out
    assert "wetread release JOB --reason" in listed.out
    assert fresh.spec.patient_id not in listed.out
    assert "accepted, decided by Anna B.: the service reads it now" in release(hospital, fresh.study_uid)
    job = hospital.site.settled(fresh.study_uid, "released", within_s=60)
    assert hospital.settle_deliveries(job.job_id) == {d: {"delivered"} for d in ("pacs", "ehr", "ris")}
    said = f"Released by Anna B. although {SEX}."
    assert said in hospital.report_text(job)
    assert said in hospital.sr_text(job)
    assert said in hospital.artifact(job, "report.html").decode()
    rows = [row.split("|") for row in hospital.artifact(job, "oru.hl7").decode().split("\r")]
    assert said in " ".join(row[5].strip() for row in rows if row[0] == "OBX" and row[2] == "TX")
    entries = json.loads(hospital.artifact(job, "fhir-bundle.json"))["entry"]
    (report,) = [e["resource"] for e in entries if e["resource"]["resourceType"] == "DiagnosticReport"]
    assert said in base64.b64decode(report["presentedForm"][0]["data"]).decode()
    assert decisions(hospital, job) == [("release", "Anna B.", "asked the ward")]
    told = " ".join(hospital.run("explain", fresh.study_uid).out.split())
    assert re.search(r"release by Anna B\. at \S+ \S+ UTC: asked the ward", told)
    (kept,) = trace_of(hospital, job)["decisions"]
    assert (kept["action"], kept["person"], kept["reason"]) == ("release", "Anna B.", "asked the ward")
    assert job.job_id not in hospital.run("held").out


def test_a_further_disagreement_holds_again(hospital: Hospital, small_study: SmallStudy) -> None:
    fresh, job = hold(hospital, small_study, "further")
    cancel(hospital, fresh)
    release(hospital, job.job_id)
    job = hospital.site.settled(fresh.study_uid, "held", runs=2, within_s=60)
    assert job.reasons == [SEX, CANCELLED]
    hospital.assert_nothing_left(fresh)
    release(hospital, job.job_id)
    job = hospital.site.settled(fresh.study_uid, "released", within_s=60)
    assert f"Released by Anna B. although {CANCELLED}." in hospital.report_text(job)


def test_a_disagreement_that_comes_up_after_the_release_while_it_is_read_holds_again(
    hospital: Hospital, small_study: SmallStudy
) -> None:
    fresh, job = hold(hospital, small_study, "meanwhile")
    hospital.gate.touch()
    release(hospital, job.job_id)
    until(lambda: "priors" in hospital.site.steps(fresh.study_uid), 60)
    cancel(hospital, fresh)
    hospital.gate.unlink()
    job = hospital.site.settled(fresh.study_uid, "held", runs=2, within_s=60)
    assert job.reasons == [SEX, CANCELLED]
    hospital.assert_nothing_left(fresh)


def test_another_identity_holds_again_for_the_same_reason(hospital: Hospital, small_study: SmallStudy) -> None:
    fresh, job = hold(hospital, small_study, "changed")
    (patient,) = hospital.find_in_ehr("Patient", identifier=f"{MRN_SYSTEM}|{fresh.spec.patient_id}")
    hospital.put_in_ehr({**patient, "name": [{"family": "Somebody", "given": ["Else"]}]})
    release(hospital, job.job_id)
    job = hospital.site.settled(fresh.study_uid, "held", runs=2, within_s=60)
    assert job.reasons == [SEX]
    hospital.assert_nothing_left(fresh)


def test_no_event_reads_what_was_rejected_only_a_release_that_says_so(
    hospital: Hospital, small_study: SmallStudy
) -> None:
    fresh, job = hold(hospital, small_study, "rejected")
    assert "nothing reads it from now on" in reject(hospital, job.job_id)
    numbers = (f"P-{fresh.spec.patient_id}", "", fresh.spec.accession, fresh.study_uid)
    raw = write_order("reject-order", "XO", numbers, status="CM", patient=fresh.spec.patient_id)
    assert hospital.hear(raw).state == "applied"
    extra = changed(
        fresh.instances[0], SOPInstanceUID=derived_uid("reject/extra"), SeriesInstanceUID=derived_uid("reject/series")
    )
    store_in(hospital.orthanc.dicomweb_url, fresh.study_uid, [extra])
    answer = hospital.site.service.announce(fresh.study_uid, **{"Idempotency-Key": "rejected-1"})
    assert answer is not None
    assert (answer.status_code, answer.json()["state"]) == (202, "rejected")
    heard = {"pacs", "order", "http"}
    noted: set[str] = set()

    def all_noted() -> bool:
        noted.update(e.source for e in hospital.site.events(fresh.study_uid) if e.note == REJECTED)
        return heard <= noted

    until(all_noted, 60, f"hearing {heard}, not only {noted},")
    hospital.site.service.kill()
    hospital.site.start()
    hospital.site.service.announce(fresh.study_uid, **{"Idempotency-Key": "rejected-2"})
    kept = hospital.site.job(fresh.study_uid)
    assert kept is not None
    assert (kept.state, kept.facts.get("run", 1), kept.look_at) == ("rejected", 1, None)
    assert kept.reasons == ["rejected by Ben: a test patient", SEX]
    refused = hospital.run("release", job.job_id, "--reason", "why not")
    assert refused.code == 2
    assert "last decision: reject by Ben" in " ".join(refused.err.split())
    release(hospital, job.job_id, "--overrule")
    job = hospital.site.settled(fresh.study_uid, "released", within_s=60)
    assert f"Released by Anna B. although {SEX}." in hospital.report_text(job)
    assert [action for action, _, _ in decisions(hospital, job)] == ["reject", "release"]


def test_commands_that_cannot_be_are_refused_with_the_reason(hospital: Hospital, small_study: SmallStudy) -> None:
    fresh, job = hold(hospital, small_study, "refused")
    agreed = hospital.read(hospital.admit(small_study.copy("held-agreed")), "released")
    hospital.settle_deliveries(agreed.job_id)
    for arguments, words in (
        (("release", "nobody", "--reason", "x"), "there is no job and no study 'nobody'"),
        (("reject", "2.25.1", "--reason", "x"), "there is no job and no study '2.25.1'"),
        (("release", job.job_id, "--reason", "  "), "a decision needs a reason"),
        (("reject", job.job_id), "Missing option '--reason'"),
        (("release", job.job_id, "--reason", "x" * 1001), "the reason must be printable text of 1000 characters"),
        (("release", job.job_id, "--reason", "x", "--person", "a" * 65), "the person must be printable text"),
        (("release", agreed.job_id, "--reason", "x"), "the study is released, not held"),
        (("reject", agreed.job_id, "--reason", "x"), "the study is released: there is nothing to reject"),
    ):
        ended = hospital.run(*arguments, COLUMNS="100")
        said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", ended.err).split())
        assert ended.code == 2, arguments
        assert words in said, said
    assert decisions(hospital, job) == decisions(hospital, agreed) == []
    assert hospital.site.settled(fresh.study_uid).state == "held"


@pytest.mark.parametrize("killed", ["before", "after"])
def test_decision_outlives_a_power_cut(hospital: Hospital, small_study: SmallStudy, killed: str) -> None:
    fresh, job = hold(hospital, small_study, f"cut-{killed}")
    if killed == "before":
        hospital.site.service.kill()
    release(hospital, job.job_id)
    if killed == "after":
        hospital.site.service.kill()
    hospital.site.start()
    job = hospital.site.settled(fresh.study_uid, "released", within_s=90)
    assert job.facts["run"] == 2
    assert f"Released by Anna B. although {SEX}." in hospital.report_text(job)
    assert len(decisions(hospital, job)) == 1
    assert hospital.settle_deliveries(job.job_id)["pacs"] == {"delivered"}
    assert count_in(hospital.orthanc, fresh.study_uid) > len(fresh.instances)


def test_of_two_people_at_once_one_decides_and_the_other_is_told(hospital: Hospital, small_study: SmallStudy) -> None:
    fresh, job = hold(hospital, small_study, "two")
    config = str(hospital.site.service.folder / "wetread.yaml")
    folder = hospital.site.service.folder.parent
    both = [
        start_wetread(folder / action, action, job.job_id, "--reason", "me", "--person", action, WETREAD_CONFIG=config)
        for action in ("release", "reject")
    ]
    ends = [finish(each) for each in both]
    assert sorted(ended.code for ended in ends) == [0, 2], [ended.said for ended in ends]
    ((winner, _, _),) = decisions(hospital, job)
    (told,) = [" ".join(ended.err.split()) for ended in ends if ended.code == 2]
    assert f"last decision: {winner} by {winner}" in told
    hospital.site.settled(fresh.study_uid, "released" if winner == "release" else "rejected", within_s=60)

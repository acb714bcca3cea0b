"""What people do to a released result, by real commands: the next revision is in PACS, EHR and RIS, and no status goes
back, whatever comes in between."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from deploy.hospital.pacs import RunningOrthanc
from deploy.hospital.phantom_dicom import derived_uid
from middleware.store.tables import StudyJob
from tests.arrivals import changed, of_series, until
from tests.crash.small_study import Copy, SmallStudy
from tests.gates import Hospital, open_hospital
from tests.hl7_inbox import write_message

SIGNER = ("--person", "Ferrer^Rosa", "--organisation", "Simulator Hospital")
T2W = 4


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory, orthanc: RunningOrthanc) -> Iterator[Hospital]:
    with open_hospital(tmp_path_factory.mktemp("corrections"), orthanc) as made:
        yield made


def read(hospital: Hospital, small: SmallStudy, name: str) -> tuple[Copy, StudyJob]:
    fresh = small.copy(f"correct-{name}")
    job = hospital.read(hospital.admit(fresh), "released")
    settle(hospital, fresh)
    return fresh, job


def settle(hospital: Hospital, fresh: Copy, revision: int = 1, state: str = "released") -> StudyJob:
    """The job once it has this revision and nothing of it is under way."""

    def look() -> Any:
        job = hospital.site.job(fresh.study_uid)
        assert job is not None
        open_ones = [
            d for d in hospital.site.store.deliveries(job_id=job.job_id) if d.state in ("pending", "in_flight")
        ]
        return job if (job.revision, job.state) == (revision, state) and not open_ones else None

    try:
        found: StudyJob = until(look, within_s=60)
    except AssertionError as error:
        job = hospital.site.job(fresh.study_uid)
        known = job and (job.state, job.revision, job.reasons)
        raise AssertionError(f"{known}\n{hospital.site.service.log()[-2000:]}") from error
    return found


def report_of(hospital: Hospital, fresh: Copy) -> dict[str, Any]:
    """The only report of the study in the EHR."""
    reports = hospital.find_in_ehr("DiagnosticReport", identifier=f"{fresh.study_uid}:prostate_mri")
    (report,) = reports
    return report


def oru_of(hospital: Hospital, fresh: Copy) -> list[str]:
    """OBR-25 of every message of the study that the RIS accepted, in their order."""
    texts = [m.text for m in hospital.ris.accepted() if fresh.study_uid in m.text]
    return [next(s for s in text.split("\r") if s.startswith("OBR")).split("|")[25] for text in texts]


def newest_sr(hospital: Hospital, fresh: Copy) -> dict[str, Any]:
    """Headers of the SR with the latest content time in the PACS."""
    base = f"{hospital.orthanc.dicomweb_url}/studies/{fresh.study_uid}"
    with httpx.Client(trust_env=False, timeout=60) as http:
        series = http.get(f"{base}/series", params={"Modality": "SR"}).json()
        found = [http.get(f"{base}/series/{s['0020000E']['Value'][0]}/metadata").json()[0] for s in series]
    return max(found, key=lambda one: len(json.dumps(one.get("0040A360", {}))))


def test_signed_it_is_final_in_every_system(hospital: Hospital, small_study: SmallStudy) -> None:
    fresh, _ = read(hospital, small_study, "sign")
    assert (report_of(hospital, fresh)["status"], oru_of(hospital, fresh)) == ("preliminary", ["P"])
    ended = hospital.run("sign", fresh.study_uid, *SIGNER)
    assert ended.code == 0, ended.said
    job = settle(hospital, fresh, 2)
    assert report_of(hospital, fresh)["status"] == "final"
    assert oru_of(hospital, fresh) == ["P", "F"]
    sr = newest_sr(hospital, fresh)
    assert sr["0040A493"]["Value"] == ["VERIFIED"]
    assert "Ferrer^Rosa" in json.dumps(sr["0040A073"])
    assert [(d.action, d.person) for d in hospital.site.store.decisions(job.job_id)] == [("sign", "Ferrer^Rosa")]
    explained = hospital.run("explain", fresh.study_uid)
    assert "sign by Ferrer^Rosa" in explained.out


def test_changed_signed_and_withdrawn(hospital: Hospital, small_study: SmallStudy, tmp_path: Any) -> None:
    fresh, _ = read(hospital, small_study, "all")
    edits = tmp_path / "edits.json"
    edits.write_text(json.dumps([{"kind": "score", "tracking_id": "lesion-1", "key": "DWI score", "value": "3"}]))
    ended = hospital.run(
        "edit", fresh.study_uid, "--person", "Ferrer^Rosa", "--edits", edits, "--reason", "restriction is mild"
    )
    assert ended.code == 0, ended.said
    settle(hospital, fresh, 2)
    assert report_of(hospital, fresh)["status"] == "preliminary"
    hospital.run("sign", fresh.study_uid, *SIGNER)
    settle(hospital, fresh, 3)
    again = tmp_path / "again.json"
    again.write_text(json.dumps([{"kind": "score", "tracking_id": "lesion-1", "key": "DWI score", "value": "5"}]))
    hospital.run("sign", fresh.study_uid, *SIGNER, "--edits", again)
    settle(hospital, fresh, 4)
    assert report_of(hospital, fresh)["status"] == "corrected"
    ended = hospital.run("withdraw", fresh.study_uid, "--person", "Ferrer^Rosa", "--reason", "wrong patient scanned")
    assert ended.code == 0, ended.said
    settle(hospital, fresh, 5)
    assert report_of(hospital, fresh)["status"] == "entered-in-error"
    assert oru_of(hospital, fresh)[:4] == ["P", "P", "F", "C"]
    assert len(oru_of(hospital, fresh)) == 5
    refused = hospital.run("sign", fresh.study_uid, *SIGNER)
    assert refused.code == 2
    assert "withdrawn as entered in error" in " ".join(refused.said.split())


def test_new_reading_does_not_take_the_place_of_a_signed_result(hospital: Hospital, small_study: SmallStudy) -> None:
    fresh, _ = read(hospital, small_study, "rerun")
    hospital.run("sign", fresh.study_uid, *SIGNER)
    settle(hospital, fresh, 2)
    repeated = [
        changed(
            one,
            SeriesInstanceUID=derived_uid(f"{fresh.study_uid}/repeat"),
            SeriesNumber=44,
            SOPInstanceUID=derived_uid(f"{fresh.study_uid}/repeat/{n}"),
        )
        for n, one in enumerate(of_series(fresh.instances, T2W))
    ]
    hospital.site.send(fresh.study_uid, repeated)
    hospital.site.service.announce(fresh.study_uid, **{"Idempotency-Key": f"again-{fresh.study_uid}"})
    job = hospital.site.settled(fresh.study_uid, "held", within_s=60)
    assert "a person signed it" in " ".join(job.reasons)
    assert report_of(hospital, fresh)["status"] == "final"
    ended = hospital.run("sign", fresh.study_uid, *SIGNER, "--adopt")
    assert ended.code == 0, ended.said
    settle(hospital, fresh, 3)
    # The phantom's truth is the same on both series: no value changed, so the second signature leaves the status.
    assert report_of(hospital, fresh)["status"] == "final"
    assert oru_of(hospital, fresh) == ["P", "F", "F"]


def own_report(fresh: Copy) -> bytes:
    obr = f"OBR|1|P-{fresh.spec.accession}|F-{fresh.spec.accession}|MRPRO{'|' * 14}{fresh.spec.accession}{'|' * 7}F"
    segments = (obr, "OBX|1|TX|18782-3^^LN||normal gland||||||F", f"ZDS|{fresh.study_uid}")
    return write_message("ORU^R01", f"own-{fresh.spec.patient_id}", *segments, patient=fresh.spec.patient_id)


def test_own_report_that_comes_first_keeps_the_ris_from_a_preliminary_one(
    hospital: Hospital, small_study: SmallStudy
) -> None:
    fresh = small_study.copy("correct-own-first")
    assert hospital.hear(own_report(fresh)).state == "applied"
    hospital.read(hospital.admit(fresh), "released")
    job = settle(hospital, fresh)
    assert oru_of(hospital, fresh) == []
    (withheld,) = [d for d in hospital.site.store.deliveries(job_id=job.job_id) if d.destination == "ris"]
    assert (withheld.state, withheld.attempts) == ("dead", 0)
    assert "own final report is there" in withheld.reason
    assert report_of(hospital, fresh)["status"] == "preliminary"


def test_own_report_that_comes_after_is_told_by_the_next_revision(hospital: Hospital, small_study: SmallStudy) -> None:
    fresh, _ = read(hospital, small_study, "own-after")
    assert hospital.hear(own_report(fresh)).state == "applied"
    settle(hospital, fresh, 2)
    assert oru_of(hospital, fresh) == ["P"]
    assert report_of(hospital, fresh)["status"] == "preliminary"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sign", "1.2.3", *SIGNER), "no study and no job"),
        (("sign", "STUDY", "--person", "^", "--organisation", "H"), "needs the person's name"),
        (("edit", "STUDY", "--person", "A^B", "--reason", "r"), "No change was given"),
        (("withdraw", "STUDY", "--person", "A^B", "--reason", " "), "needs a reason"),
    ],
)
def test_what_cannot_be_is_said_at_once(
    hospital: Hospital, small_study: SmallStudy, words: tuple[str, ...], said: str
) -> None:
    fresh = small_study.copy("correct-refused")
    if hospital.site.job(fresh.study_uid) is None:
        hospital.read(hospital.admit(fresh), "released")
    ended = hospital.run(*(fresh.study_uid if word == "STUDY" else word for word in words))
    assert ended.code == 2
    assert said in " ".join(ended.said.replace("│", " ").split())
    job = hospital.site.job(fresh.study_uid)
    assert job is not None
    assert (job.state, job.revision) == ("released", 1)


def test_killed_while_a_change_is_made_it_is_made_once(hospital: Hospital, small_study: SmallStudy) -> None:
    fresh, _ = read(hospital, small_study, "killed")
    hospital.site.service.kill()
    hospital.run("sign", fresh.study_uid, *SIGNER)
    hospital.site.start("")
    settle(hospital, fresh, 2)
    assert oru_of(hospital, fresh) == ["P", "F"]

"""Priors end to end: a real Orthanc, the running service, and two sittings of a patient whose lesion grew as known."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pydicom
import pytest
from fastapi import Response

from deploy.hospital.pacs import RunningOrthanc
from middleware.store.tables import StudyJob
from tests.arrivals import store_in
from tests.crash.small_study import Copy
from tests.gates import Hospital, open_hospital
from tests.hl7_inbox import write_message
from tests.proxy import Proxy, open_proxy
from tests.sittings import GROWTH_PERCENT, Sitting, build_sittings

BIN = Path(sys.executable).parent
NO_PRIOR = "No prior study was found."
NOT_READ = "no findings of it are known here"


@pytest.fixture(scope="module")
def sittings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sitting, Sitting, Path]:
    return build_sittings(tmp_path_factory.mktemp("sittings"))


@pytest.fixture(scope="module")
def first(sittings: tuple[Sitting, Sitting, Path]) -> Sitting:
    return sittings[0]


@pytest.fixture(scope="module")
def second(sittings: tuple[Sitting, Sitting, Path]) -> Sitting:
    return sittings[1]


@pytest.fixture(scope="module")
def pacs_proxy(orthanc: RunningOrthanc) -> Iterator[Proxy]:
    with open_proxy(orthanc.http_url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def hospital(
    tmp_path_factory: pytest.TempPathFactory,
    orthanc: RunningOrthanc,
    sittings: tuple[Sitting, Sitting, Path],
    pacs_proxy: Proxy,
) -> Iterator[Hospital]:
    settings = {
        "pacs": {"url": f"{pacs_proxy.url}/dicom-web"},
        "site": {"issuers": [["HOSPITAL", "HOSP"], ["ELSEWHERE"]]},
        "pacs_watch": {"interval_s": 2.0},
    }
    with open_hospital(tmp_path_factory.mktemp("priors"), orthanc, sittings[2], **settings) as made:
        yield made


def read(hospital: Hospital, fresh: Copy) -> StudyJob:
    """The released job of a study that was given to the hospital and announced."""
    job = hospital.read(hospital.admit(fresh), "released")
    assert set.union(*hospital.settle_deliveries(job.job_id).values()) == {"delivered"}
    return job


def comparison(hospital: Hospital, job: StudyJob) -> str:
    """The section of the text draft."""
    text = hospital.report_text(job)
    return text.partition("COMPARISON")[2].partition("IMPRESSION")[0]


def retrieved(hospital: Hospital, study_uid: str, modality: str) -> bytes:
    """The only instance of this modality that the PACS has of a study."""
    (series,) = httpx.get(
        f"{hospital.orthanc.dicomweb_url}/studies/{study_uid}/series", params={"Modality": modality}, trust_env=False
    ).json()
    uid = series["0020000E"]["Value"][0]
    query = {"Level": "Instance", "Query": {"SeriesInstanceUID": uid}}
    (found,) = httpx.post(f"{hospital.orthanc.http_url}/tools/find", json=query, trust_env=False).json()
    return httpx.get(f"{hospital.orthanc.http_url}/instances/{found}/file", trust_env=False).content


def read_with_dcmqi(report: bytes, folder: Path) -> list[dict[str, Any]]:
    """The measurement groups that dcmqi reads."""
    (folder / "sr.dcm").write_bytes(report)
    command = [BIN / "tid1500reader", "--inputDICOM", folder / "sr.dcm", "--outputMetadata", folder / "sr.json"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    groups: list[dict[str, Any]] = json.loads((folder / "sr.json").read_text())["Measurements"]
    return groups


def test_two_sittings_report_the_known_growth_in_everything_that_was_delivered(
    hospital: Hospital, first: Sitting, second: Sitting, tmp_path: Path
) -> None:
    earlier, later = first.copy("grow-1", "PRIOR-GROW"), second.copy("grow-2", "PRIOR-GROW")
    assert comparison(hospital, read(hospital, earlier)).strip().endswith(NO_PRIOR)
    job = read(hospital, later)
    said = re.search(r"Volume: before .*?difference .*?\(\+([0-9.]+)%\)", comparison(hospital, job))
    assert said is not None, comparison(hospital, job)
    groups = read_with_dcmqi(retrieved(hospital, later.study_uid, "SR"), tmp_path)
    (lesion,) = [group for group in groups if group["TrackingIdentifier"] == "lesion-1"]
    in_sr = [
        item["value"]
        for item in lesion["measurementItems"]
        if item["units"]["CodeValue"] == "%" and "olume" in str(item)
    ]
    (patient,) = hospital.find_in_ehr("Patient", identifier="PRIOR-GROW")
    observations = hospital.find_in_ehr("Observation", patient=f"Patient/{patient['id']}", _count="200")
    lesions = [o for o in observations if o["code"].get("text") == "Lesion 1"]
    components = [c for o in lesions for c in o.get("component", [])]
    in_fhir = [c["valueQuantity"]["value"] for c in components if c["code"]["coding"][-1]["code"] == "volume_percent"]
    (message,) = [m.text for m in hospital.ris.accepted() if later.spec.accession in m.text]
    rows = [row.split("|") for row in re.split(r"[\r\n]", message) if row.startswith("OBX|")]
    in_oru = [row[5] for row in rows if row[3].startswith("volume_percent^")]
    found = [float(value) for value in (said[1], *in_sr, *in_fhir, *in_oru)]
    assert len(found) == 4, (said[1], in_sr, in_fhir, in_oru)
    assert len(set(found)) == 1, found
    assert found[0] == pytest.approx(GROWTH_PERCENT, rel=0.02)
    assert "Prior study: 2025-03-02, 365 days before" in comparison(hospital, job)
    report = pydicom.dcmread(BytesIO(retrieved(hospital, later.study_uid, "SR")))
    assert earlier.study_uid in str(report)


def test_second_sitting_after_a_merge_finds_the_first(hospital: Hospital, first: Sitting, second: Sitting) -> None:
    read(hospital, first.copy("merge-1", "PRIOR-OLD", IssuerOfPatientID="HOSPITAL"))
    merge = write_message("ADT^A40", "prior-merge", "MRG|PRIOR-OLD^^^HOSP", patient="PRIOR-NEW")
    assert hospital.hear(merge.replace(b"19610203|F", b"19580412|M")).state == "applied"
    job = read(hospital, second.copy("merge-2", "PRIOR-NEW", IssuerOfPatientID="HOSPITAL"))
    assert "Prior study: 2025-03-02" in comparison(hospital, job)


def test_prior_that_was_never_read_is_named_and_not_compared(
    hospital: Hospital, first: Sitting, second: Sitting
) -> None:
    unread = first.copy("unread-1", "PRIOR-UNREAD")
    store_in(hospital.orthanc.dicomweb_url, unread.study_uid, unread.instances)
    said = comparison(hospital, read(hospital, second.copy("unread-2", "PRIOR-UNREAD")))
    assert "No prior study could be compared." in said
    assert f"Not compared: 2025-03-02, MR prostate multiparametric, accession number {unread.spec.accession}" in said
    assert f"found in pacs: {NOT_READ}" in said


@pytest.mark.parametrize(
    ("name", "values"), [("issuer", {"IssuerOfPatientID": "ELSEWHERE"}), ("birth", {"PatientBirthDate": "19580413"})]
)
def test_study_of_another_patient_with_the_same_id_is_no_prior(
    hospital: Hospital, first: Sitting, second: Sitting, name: str, values: dict[str, str]
) -> None:
    patient_id = f"PRIOR-SAME-{name}"
    other = first.copy(f"{name}-1", patient_id, **values)
    if name == "issuer":
        read(hospital, other)
    else:
        store_in(hospital.orthanc.dicomweb_url, other.study_uid, other.instances)
    mine = second.copy(f"{name}-2", patient_id, IssuerOfPatientID="HOSPITAL")
    assert comparison(hospital, read(hospital, mine)).strip().endswith(NO_PRIOR)


def test_later_study_is_never_a_prior(hospital: Hospital, first: Sitting, second: Sitting) -> None:
    read(hospital, second.copy("later-2", "PRIOR-LATER"))
    assert comparison(hospital, read(hospital, first.copy("later-1", "PRIOR-LATER"))).strip().endswith(NO_PRIOR)


def test_wildcard_in_the_patient_id_finds_nobody_else(hospital: Hospital, second: Sitting) -> None:
    url = f"{hospital.orthanc.dicomweb_url}/studies?PatientID=PRIOR-*"
    assert len(httpx.get(url, trust_env=False, timeout=30).json()) > 1  # Orthanc takes it for a wildcard
    assert comparison(hospital, read(hospital, second.copy("wild", "PRIOR-*"))).strip().endswith(NO_PRIOR)


@contextmanager
def refusing(proxy: Proxy, is_refused: Callable[[str, str], bool]) -> Iterator[None]:
    """The server behind the proxy answers these requests (method, path) with 503."""
    proxy.judge = lambda method, path, body: Response("down", 503) if is_refused(method, path) else None
    try:
        yield
    finally:
        proxy.judge = lambda method, path, body: None


def test_silent_pacs_is_named_and_stops_nothing(
    hospital: Hospital, pacs_proxy: Proxy, first: Sitting, second: Sitting
) -> None:
    read(hospital, first.copy("silent-1", "PRIOR-SILENT"))
    with refusing(pacs_proxy, lambda method, path: (method, path) == ("GET", "dicom-web/studies")):
        job = read(hospital, second.copy("silent-2", "PRIOR-SILENT"))
    assert "Priors were not looked for in the PACS: it did not answer." in hospital.report_text(job)
    assert "Priors were not looked for in the PACS: it did not answer." in hospital.sr_text(job)
    assert "Prior study: 2025-03-02" in comparison(hospital, job)  # out of our own memory


def test_silent_ehr_is_named_and_stops_nothing(hospital: Hospital, second: Sitting) -> None:
    asked = iter(range(100))
    # The first search is for the study itself, with the context; the second is for priors.
    with refusing(hospital.proxy, lambda method, path: path == "fhir/ImagingStudy" and next(asked) == 1):
        job = read(hospital, second.copy("mute", "PRIOR-MUTE"))
    assert "Priors were not looked for in the EHR: it did not answer." in hospital.report_text(job)
    assert comparison(hospital, job).strip().endswith(NO_PRIOR)


def test_prior_that_only_the_ehr_knows_is_named(hospital: Hospital, second: Sitting) -> None:
    fresh = hospital.admit(second.copy("ehr", "PRIOR-EHR"))
    (patient,) = hospital.find_in_ehr("Patient", identifier="PRIOR-EHR")
    study = {
        "resourceType": "ImagingStudy",
        "status": "available",
        "identifier": [{"system": "urn:dicom:uid", "value": "urn:oid:2.25.4242"}],
        "subject": {"reference": f"Patient/{patient['id']}"},
        "started": (fresh.spec.study_date - timedelta(days=30)).isoformat(),
        "description": "MRI prostate elsewhere",
        "modality": [{"code": "MR"}],
    }
    url = f"{hospital.ehr.url}/ImagingStudy"
    httpx.post(url, json=study, trust_env=False, timeout=30).raise_for_status()
    job = hospital.read(fresh, "released")
    assert "MRI prostate elsewhere" in comparison(hospital, job)
    assert f"found in ehr: {NOT_READ}" in comparison(hospital, job)

"""WADO-RS metadata and the counts of QIDO-RS: a real Orthanc with the real study, and servers that misbehave."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset

from connectors.dicomweb.client import DicomwebClient
from connectors.dicomweb.config import DicomwebConfig
from connectors.errors import NotThere, Permanent, Retryable
from deploy.hospital.pacs import RunningOrthanc, start_orthanc
from tests.contract.test_dicomweb_faults import Script, answer, hostile, then_silent

IMAGES = Path(__file__).parents[3] / "shared" / "data" / "prostatex-0000" / "images"
GEOMETRY = ("Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")
KIND = ("ImageType", "ScanningSequence", "SequenceName", "EchoTime", "RepetitionTime", "SeriesDescription", "Modality")
SIEMENS_B_VALUE = "0019100C"


def series_files() -> dict[str, list[Path]]:
    """The real study's files by Series Instance UID."""
    files: dict[str, list[Path]] = {}
    for path in sorted(IMAGES.rglob("*.dcm")):
        header = pydicom.dcmread(path, specific_tags=["SeriesInstanceUID"], stop_before_pixels=True)
        files.setdefault(str(header.SeriesInstanceUID), []).append(path)
    return files


SERIES = series_files()
STUDY_UID = str(pydicom.dcmread(next(iter(SERIES.values()))[0], stop_before_pixels=True).StudyInstanceUID)


@pytest.fixture
async def client(orthanc: RunningOrthanc) -> AsyncIterator[DicomwebClient]:
    opened = DicomwebClient(DicomwebConfig(url=orthanc.dicomweb_url))
    yield opened
    await opened.aclose()


@pytest.fixture
async def loaded(client: DicomwebClient) -> DicomwebClient:
    """A client of an Orthanc that has the whole real study."""
    files = [path for some in SERIES.values() for path in some]
    uids = [str(pydicom.dcmread(path, specific_tags=["SOPInstanceUID"]).SOPInstanceUID) for path in files]
    if len(await client.present(STUDY_UID, uids)) < len(uids):  # other tests may have brought a part of it
        await client.store(files, STUDY_UID)
    return client


def by_sop_uid(data_sets: list[Dataset]) -> dict[str, Dataset]:
    return {str(one.SOPInstanceUID): one for one in data_sets}


async def test_metadata_says_what_the_files_say(loaded: DicomwebClient) -> None:
    compared = 0
    for series_uid, files in SERIES.items():
        told = by_sop_uid([Dataset.from_json(one) for one in await loaded.retrieve_metadata(STUDY_UID, series_uid)])
        real = by_sop_uid([pydicom.dcmread(path, stop_before_pixels=True) for path in files])
        assert told.keys() == real.keys()
        for uid, header in real.items():
            for keyword in (*GEOMETRY, *KIND):
                assert (keyword in told[uid]) == (keyword in header), keyword
                if keyword in header:
                    assert told[uid][keyword].value == header[keyword].value, keyword
                    compared += 1
    assert compared > 164 * len(GEOMETRY)


async def test_metadata_holds_no_bulk_data_and_so_no_private_b_value(loaded: DicomwebClient) -> None:
    """The study states it as OB, and Orthanc gives every OB as bulk data: only the file itself tells it."""
    for series_uid in SERIES:
        for one in await loaded.retrieve_metadata(STUDY_UID, series_uid):
            assert "BulkDataURI" not in json.dumps(one)
            assert not {"7FE00010", SIEMENS_B_VALUE} & one.keys()
    assert any((0x0019, 0x100C) in pydicom.dcmread(files[0], stop_before_pixels=True) for files in SERIES.values())


async def test_what_is_stated_in_standard_elements_comes_through(client: DicomwebClient, tmp_path: Path) -> None:
    header = pydicom.dcmread(next(iter(SERIES.values()))[0])
    header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID = "1.2.3.10", "1.2.3.11", "1.2.3.12"
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    header.DiffusionBValue, header.NumberOfFrames = 1400.0, 1
    header.add_new((0x0019, 0x100C), "IS", "1400")
    header.save_as(tmp_path / "one.dcm")
    await client.store([tmp_path / "one.dcm"], "1.2.3.10")
    (told,) = await client.retrieve_metadata("1.2.3.10", "1.2.3.11")
    read = Dataset.from_json(told)
    assert (read.DiffusionBValue, read.NumberOfFrames, read[0x0019, 0x100C].value) == (1400.0, 1, 1400)


async def test_what_is_not_there_any_more_is_told_apart(loaded: DicomwebClient, tmp_path: Path) -> None:
    series_uid = next(iter(SERIES))
    for study, series in ((STUDY_UID, "1.2.3"), ("1.2.3", series_uid)):
        with pytest.raises(NotThere, match=r"any more.*404"):
            await loaded.retrieve_metadata(study, series)
    with pytest.raises(NotThere):
        await loaded.fetch_study("1.2.3", tmp_path / "study")
    with pytest.raises(Permanent, match="not a DICOM UID"):
        await loaded.retrieve_metadata(STUDY_UID, "../../instances")


async def test_counts_come_with_a_date_range_and_rise_as_instances_arrive(tmp_path: Path) -> None:
    (first, *others), second, *_ = SERIES.values()
    with start_orthanc(tmp_path / "pacs") as server:
        client = DicomwebClient(DicomwebConfig(url=server.dicomweb_url))
        counts = []
        for arrived in ([first], others, second[:3]):
            await client.store(arrived, STUDY_UID)
            counts += await found_counts(client, "20110101-20111231")
        outside = await found_counts(client, "20120101-")
        await client.aclose()
    assert counts == [(1, 1), (1, 1 + len(others)), (2, 4 + len(others))]
    assert outside == []


async def found_counts(client: DicomwebClient, dates: str) -> list[tuple[int, int]]:
    found = await client.search_studies({"StudyDate": dates}, include=["00201206", "00201208"])
    return [(one["00201206"]["Value"][0], one["00201208"]["Value"][0]) for one in found]


# Servers that misbehave.


def instance(**changes: Any) -> dict[str, Any]:
    """A data set of series 1.2.4 of study 1.2.3 by tag (t0020000D=...), None leaves an attribute out."""
    attributes = {"t0020000D": "1.2.3", "t0020000E": "1.2.4", "t00080018": "1.2.5", **changes}
    return {
        tag[1:]: value if isinstance(value, dict) else {"vr": "UI", "Value": [value]}
        for tag, value in attributes.items()
        if value is not None
    }


def listed(*data_sets: object) -> Script:
    return answer("200 OK", body=json.dumps(data_sets).encode())


def nested(depth: int) -> Any:
    attribute: Any = {"vr": "SQ"}
    for _ in range(depth):
        attribute = {"vr": "SQ", "Value": [{"00081115": attribute}]}
    return attribute


@pytest.mark.parametrize(
    ("script", "error", "told"),
    [
        (answer("200 OK", body=b"<html>"), Permanent, "not DICOM JSON"),
        (answer("200 OK", body=b"[" * 100_000), Permanent, "not DICOM JSON"),
        (answer("200 OK", body=b'{"a": 1}'), Permanent, "not a list"),
        (listed(instance(), 7), Permanent, "not a list"),
        (answer("200 OK", body=b"[" + b" " * 200_000 + b"]"), Permanent, "max_json_bytes"),
        (listed(instance(), instance(t0020000D="1.2.9")), Permanent, "data set 2 .* another study or series"),
        (listed(instance(t0020000E="1.2.9")), Permanent, "another study or series"),
        (listed(instance(t0020000E=None)), Permanent, "another study or series"),
        (listed(instance(t00080018=None)), Permanent, "no SOP Instance UID"),
        (listed(instance(t00080018={"vr": "UI", "Value": [None]})), Permanent, "no SOP Instance UID"),
        (listed(instance(t00280010={"Value": [3]})), Permanent, "data set 1 .* is not DICOM JSON"),
        (listed(instance(t00280010={"vr": "US", "Value": 3})), Permanent, "is not DICOM JSON"),
        (listed(instance(t00081115={"vr": "SQ", "Value": [3]})), Permanent, "is not DICOM JSON"),
        (listed(instance(tRows={"vr": "US"})), Permanent, "is not DICOM JSON"),
        (answer("200 OK", body=b"[]"), NotThere, "no instance of it"),
        (answer("204 No Content"), NotThere, "no instance of it"),
        (answer("410 Gone"), NotThere, "HTTP 410"),
        (answer("403 Forbidden"), Permanent, "Check token"),
        (answer("503 Busy"), Retryable, "HTTP 503"),
        (then_silent, Retryable, "time limit"),
    ],
)
async def test_faults_are_named(script: Script, error: type[Exception], told: str) -> None:
    with hostile(script) as url:
        client = DicomwebClient(DicomwebConfig(url=url, read_timeout_s=0.4, max_json_bytes=150_000))
        with pytest.raises(error, match=told):
            await client.retrieve_metadata("1.2.3", "1.2.4")
        await client.aclose()


async def test_odd_answers_that_hold_what_was_asked_are_taken() -> None:
    elsewhere = {"vr": "OW", "BulkDataURI": "http://elsewhere.invalid/x"}
    item = {"00420011": elsewhere, "00280010": {"vr": "US", "Value": [5]}}
    sequence = {"vr": "SQ", "Value": [item, None]}
    odd = instance(t7FE00010=elsewhere, t00081115=sequence, t00081140={"vr": "SQ"})
    twice = instance(t00280010={"vr": "US", "Value": [7]})
    with hostile(listed(odd, odd, twice, instance(t00081115=nested(30)))) as url:
        client = DicomwebClient(DicomwebConfig(url=url))
        found = await client.retrieve_metadata("1.2.3", "1.2.4")
        await client.aclose()
    assert len(found) == 3
    assert "7FE00010" not in found[0]
    assert found[0]["00081115"]["Value"] == [{"00280010": {"vr": "US", "Value": [5]}}, {}]
    assert Dataset.from_json(found[0]).SOPInstanceUID == "1.2.5"
    assert found[1]["00280010"]["Value"] == [7]

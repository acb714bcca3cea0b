"""The DICOMweb connector and its folder twin, against Orthanc and the real study."""

import asyncio
import io
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset

from connectors.dicomweb.client import DicomwebClient
from connectors.dicomweb.config import DicomwebConfig
from connectors.dicomweb.folder import FolderClient
from connectors.errors import Permanent

STUDY = Path(__file__).parents[3] / "shared" / "data" / "prostatex-0000" / "images"
DICOMWEB_PLUGIN = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"
USER, PASSWORD = "wetread", "synthetic"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def orthanc(folder: Path) -> Iterator[str]:
    port = free_port()
    settings = {
        "HttpPort": port,
        "HttpBindAddresses": ["127.0.0.1"],
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: PASSWORD},
        "DicomServerEnabled": False,
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "index"),
        "Plugins": [DICOMWEB_PLUGIN],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(["Orthanc", str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        wait_until_up(f"http://127.0.0.1:{port}/system")
        yield f"http://127.0.0.1:{port}/dicom-web"
    finally:
        server.terminate()
        server.wait(20)


def wait_until_up(url: str) -> None:
    for _ in range(300):
        with suppress(httpx.TransportError):
            httpx.get(url, trust_env=False)
            return
        time.sleep(0.1)
    raise RuntimeError(f"{url} did not come up within 30 s")


@pytest.fixture(scope="module")
def sources() -> dict[str, FileDataset]:
    """The real study by SOP Instance UID."""
    read = [pydicom.dcmread(path) for path in sorted(STUDY.rglob("*.dcm"))]
    assert len(read) == 164
    return {str(one.SOPInstanceUID): one for one in read}


@pytest.fixture(scope="module")
def study_uid(sources: dict[str, FileDataset]) -> str:
    return str(next(iter(sources.values())).StudyInstanceUID)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with orthanc(tmp_path_factory.mktemp("orthanc")) as url:
        yield url


def config(url: str, **settings: object) -> DicomwebConfig:
    return DicomwebConfig.model_validate({"url": url, "user": USER, "password": PASSWORD, **settings})


@pytest.fixture(scope="module")
def loaded(root: str, study_uid: str) -> str:
    """Orthanc with the real study, stored by our own STOW-RS."""

    async def load() -> None:
        client = DicomwebClient(config(root))
        outcomes = await client.store(sorted(STUDY.rglob("*.dcm")), study_uid)
        await client.aclose()
        assert len(outcomes) == 164
        assert all(outcome.stored for outcome in outcomes)

    asyncio.run(load())
    return root


def variant(source: Path, **changes: str) -> bytes:
    """A copy of an instance with other attribute values."""
    dataset = pydicom.dcmread(source)
    for keyword, value in changes.items():
        setattr(dataset, keyword, value)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    out = io.BytesIO()
    dataset.save_as(out)
    return out.getvalue()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def one_file() -> Path:
    return min(STUDY.rglob("*.dcm"))


async def test_fetched_study_equals_the_source(
    loaded: str, study_uid: str, sources: dict[str, FileDataset], tmp_path: Path
) -> None:
    client = DicomwebClient(config(loaded))
    told: list[tuple[int, int]] = []
    into = tmp_path / "study"
    fetched = await client.fetch_study(study_uid, into, on_progress=lambda n, size: told.append((n, size)))
    await client.aclose()
    assert [path.name for path in fetched.files] == [f"{n:06d}.dcm" for n in range(1, 165)]
    assert names(tmp_path) == ["study"]
    assert names(into) == [path.name for path in fetched.files]
    assert fetched.bytes_received == sum(path.stat().st_size for path in fetched.files)
    assert told[-1] == (164, fetched.bytes_received)
    got = {str(one.SOPInstanceUID): one for one in map(pydicom.dcmread, fetched.files)}
    assert got.keys() == sources.keys()
    for uid, source in sources.items():
        assert np.array_equal(got[uid].pixel_array, source.pixel_array)


@pytest.mark.parametrize("page_size", [50, 164, 1000])
async def test_search_gives_every_match_once_over_any_paging(loaded: str, study_uid: str, page_size: int) -> None:
    client = DicomwebClient(config(loaded, page_size=page_size))
    instances = await client.search_instances(study_uid)
    series = await client.search_series(study_uid, include=["SeriesDescription"])
    one = await client.search_instances(study_uid, series_uid=series[0]["0020000E"]["Value"][0])
    studies = await client.search_studies({"StudyInstanceUID": study_uid})
    none = await client.search_studies({"PatientID": "nobody-of-this-id"})
    await client.aclose()
    assert len({match["00080018"]["Value"][0] for match in instances}) == len(instances) == 164
    assert (len(series), len(studies), none) == (7, 1, [])
    assert 0 < len(one) < 164
    assert all("0008103E" in match for match in series)


async def test_present_tells_only_what_is_there(loaded: str, study_uid: str, sources: dict[str, FileDataset]) -> None:
    client = DicomwebClient(config(loaded))
    few = [*list(sources)[:2], "1.2.3.4"]
    assert await client.present(study_uid, few) == set(few[:2])
    assert await client.present(study_uid, [*sources, "1.2.3.4"]) == set(sources)
    assert await client.present("1.2.3.9", few) == set()
    await client.aclose()


async def test_storing_twice_leaves_one_instance(loaded: str, study_uid: str) -> None:
    client = DicomwebClient(config(loaded))
    for _ in range(2):
        outcomes = await client.store([one_file()], study_uid)
        assert [outcome.stored for outcome in outcomes] == [True]
    assert len(await client.search_instances(study_uid)) == 164
    await client.aclose()


async def test_missing_study_is_permanent_and_leaves_nothing(loaded: str, tmp_path: Path) -> None:
    client = DicomwebClient(config(loaded))
    with pytest.raises(Permanent, match=r"does not have it.*404"):
        await client.fetch_study("1.2.3.4", tmp_path / "study")
    assert names(tmp_path) == []
    await client.aclose()


async def test_wrong_password_is_permanent_and_names_the_setting(loaded: str, study_uid: str, tmp_path: Path) -> None:
    client = DicomwebClient(config(loaded, password="wrong"))
    for call in (client.probe(), client.fetch_study(study_uid, tmp_path / "s"), client.store([one_file()], study_uid)):
        with pytest.raises(Permanent, match="Check token, or user and password"):
            await call
    await client.aclose()


async def test_probe_names_the_server(loaded: str) -> None:
    client = DicomwebClient(config(loaded, name="archive"))
    assert (await client.probe()).startswith("archive: DICOMweb answers")
    await client.aclose()


async def test_bad_input_to_store_is_refused_before_sending(study_uid: str) -> None:
    client = DicomwebClient(config(f"http://127.0.0.1:{free_port()}"))
    bad: list[tuple[list[Path | bytes], str]] = [
        ([], "no instances"),
        ([b"junk"], "instance 1 is not a readable DICOM file"),
        ([one_file(), one_file()], "same SOP Instance UID"),
        ([one_file(), variant(one_file(), StudyInstanceUID="1.2.3")], "instance 2 belongs to another study"),
        ([Path("nowhere.dcm")], "not a readable DICOM file"),
    ]
    for instances, told in bad:
        with pytest.raises(Permanent, match=told):
            await client.store(instances, study_uid)
    with pytest.raises(Permanent, match="not a DICOM UID"):
        await client.fetch_study("../../etc", Path("nowhere"))
    await client.aclose()


# The folder behind the same calls.


async def test_folder_answers_like_the_server(loaded: str, study_uid: str, tmp_path: Path) -> None:
    server, folder = DicomwebClient(config(loaded)), FolderClient(STUDY.parent)
    for filters in ({"StudyInstanceUID": study_uid}, {"ModalitiesInStudy": "MR"}, {"PatientID": "no*"}):
        ours, theirs = await folder.search_studies(filters), await server.search_studies(filters)
        assert [one["0020000D"] for one in ours] == [one["0020000D"] for one in theirs]
        assert [one["00201208"] for one in ours] == [one["00201208"] for one in theirs]
    for uid_tag, ours, theirs in (
        ("0020000E", await folder.search_series(study_uid), await server.search_series(study_uid)),
        ("00080018", await folder.search_instances(study_uid), await server.search_instances(study_uid)),
    ):
        assert {one[uid_tag]["Value"][0] for one in ours} == {one[uid_tag]["Value"][0] for one in theirs}
    await server.aclose()


async def test_folder_fetch_gives_the_same_bytes_and_names_what_it_skipped(study_uid: str, tmp_path: Path) -> None:
    folder = FolderClient(STUDY.parent)
    fetched = await folder.fetch_study(study_uid, tmp_path / "study")
    want = sorted(path.read_bytes() for path in STUDY.rglob("*.dcm"))
    assert sorted(path.read_bytes() for path in fetched.files) == want
    assert {one.path.name for one in folder.skipped} == {"gland.nii.gz", "lesion.nii.gz", "zones.nii.gz"}
    assert not any(one.is_dicom for one in folder.skipped)
    with pytest.raises(Permanent, match="holds no instance"):
        await folder.fetch_study("1.2.3", tmp_path / "other")


async def test_folder_names_broken_and_doubled_instances(study_uid: str, tmp_path: Path) -> None:
    pacs = tmp_path / "pacs"
    pacs.mkdir()
    whole = one_file().read_bytes()
    (pacs / "a.dcm").write_bytes(whole)
    (pacs / "copy.dcm").write_bytes(whole)
    (pacs / "conflict.dcm").write_bytes(variant(one_file(), SeriesDescription="other"))
    (pacs / "cut.dcm").write_bytes(whole[:400])
    folder = FolderClient(pacs)
    fetched = await folder.fetch_study(study_uid, tmp_path / "study")
    assert len(fetched.files) == 2
    assert [(one.path.name, one.is_dicom) for one in folder.skipped] == [("cut.dcm", True)]


async def test_folder_stores_each_instance_once(study_uid: str, tmp_path: Path) -> None:
    folder = FolderClient(tmp_path)
    source = one_file().read_bytes()
    first, second = await folder.store([source], study_uid), await folder.store([one_file()], study_uid)
    changed = await folder.store([variant(one_file(), SeriesDescription="other")], study_uid)
    uid = first[0].sop_instance_uid
    assert [first[0].stored, second[0].stored, changed[0].stored] == [True, True, True]
    assert [bool(one[0].warning) for one in (first, second, changed)] == [False, False, True]
    assert (names(tmp_path), names(tmp_path / study_uid)) == ([study_uid], [f"{uid}.dcm"])
    assert (tmp_path / study_uid / f"{uid}.dcm").read_bytes() == source
    assert await folder.present(study_uid, [uid, "1.2"]) == {uid}


async def test_folder_that_is_not_there_is_permanent(tmp_path: Path) -> None:
    for call in (FolderClient(tmp_path / "no").probe(), FolderClient(tmp_path / "no").search_studies({})):
        with pytest.raises(Permanent, match="is not a folder"):
            await call
    assert "can be read" in await FolderClient(tmp_path).probe()


def test_orthanc_is_really_there() -> None:
    assert shutil.which("Orthanc")
    assert Path(DICOMWEB_PLUGIN).exists()

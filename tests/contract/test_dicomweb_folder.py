"""The folder PACS while it is watched: what comes, changes and goes is seen, and the rest is not read again."""

import base64
import json
import os
import shutil
import time
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset

from connectors.dicomweb.folder import FolderClient
from connectors.dicomweb.headers import Headers
from connectors.dicomweb.metadata import value_of
from connectors.dicomweb.scan import FolderScan
from connectors.errors import NotThere, Permanent

IMAGES = Path(__file__).parents[3] / "shared" / "data" / "prostatex-0000" / "images"
LONG_AGO_S = 1_000_000_000
COUNTS = ["00201206", "00201208"]
B_VALUE = "0019100C"


def real_files() -> list[Path]:
    return sorted(IMAGES.rglob("*.dcm"))


def header_of(path: Path) -> Dataset:
    return pydicom.dcmread(path, stop_before_pixels=True)


STUDY_UID = str(header_of(real_files()[0]).StudyInstanceUID)


def put(source: Path, target: Path) -> Path:
    """A copy that looks as if it had been there for long."""
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(source, target)
    os.utime(target, (LONG_AGO_S, LONG_AGO_S))
    return target


def rewrite(path: Path, old: bytes, new: bytes, *, mtime_s: float = LONG_AGO_S) -> None:
    """Other content in place: the same file, size and time of change."""
    content = path.read_bytes()
    assert content.count(old) >= 1
    assert len(old) == len(new)
    with path.open("r+b") as file:
        file.write(content.replace(old, new))
    os.utime(path, (mtime_s, mtime_s))


async def counts(folder: FolderClient) -> list[tuple[int, int]]:
    found = await folder.search_studies({"StudyDate": "20110101-20111231"}, include=COUNTS)
    return [(one[COUNTS[0]]["Value"][0], one[COUNTS[1]]["Value"][0]) for one in found]


async def test_metadata_is_the_header_without_pixels_and_with_the_private_b_value() -> None:
    folder = FolderClient(IMAGES)
    told = {}
    for series in await folder.search_series(STUDY_UID):
        metadata = await folder.retrieve_metadata(STUDY_UID, value_of(series, "0020000E"))
        assert series["00201209"]["Value"] == [len(metadata)]
        told |= {value_of(one, "00080018"): one for one in metadata}
    real = {str(header.SOPInstanceUID): header for header in map(header_of, real_files())}
    assert told.keys() == real.keys()
    for uid, header in real.items():
        assert len(json.dumps(told[uid])) < 50_000
        assert Dataset.from_json(told[uid]).ImagePositionPatient == header.ImagePositionPatient
        if (0x0019, 0x100C) in header:
            assert base64.b64decode(told[uid][B_VALUE]["InlineBinary"]) == header[0x0019, 0x100C].value
    assert sum(B_VALUE in one for one in told.values()) > 50


async def test_large_binary_elements_are_left_out_of_metadata(tmp_path: Path) -> None:
    header = pydicom.dcmread(real_files()[0])
    header.add_new((0x0029, 0x1010), "OB", b"\x01" * 5000)
    header.add_new((0x0029, 0x100C), "OB", b"\x01" * 500)
    inner = Dataset()
    inner.EncapsulatedDocument = b"\x01" * 5000
    inner.Rows = 3
    header.ReferencedImageSequence = [inner]
    header.save_as(tmp_path / "one.dcm")
    (told,) = await FolderClient(tmp_path).retrieve_metadata(STUDY_UID, str(header.SeriesInstanceUID))
    assert "00291010" not in told
    assert "0029100C" in told
    assert list(told["00081140"]["Value"][0]) == ["00280010"]


async def test_what_comes_and_goes_is_seen(tmp_path: Path) -> None:
    folder = FolderClient(tmp_path)
    first, second, *_ = real_files()
    seen = [await counts(folder)]
    put(first, tmp_path / "a.dcm")
    seen.append(await counts(folder))
    put(second, tmp_path / "later" / "b.dcm")
    put(second, tmp_path / "later" / "copy.dcm")
    seen.append(await counts(folder))
    series = str(header_of(first).SeriesInstanceUID)
    assert len(await folder.retrieve_metadata(STUDY_UID, series)) == 2
    (tmp_path / "a.dcm").unlink()
    shutil.rmtree(tmp_path / "later")
    seen.append(await counts(folder))
    assert seen == [[], [(1, 1)], [(1, 2)], []]
    with pytest.raises(NotThere, match="any more"):
        await folder.retrieve_metadata(STUDY_UID, series)
    with pytest.raises(NotThere):
        await folder.fetch_study(STUDY_UID, tmp_path / "into")
    with pytest.raises(Permanent, match="not a DICOM UID"):
        await folder.retrieve_metadata(STUDY_UID, "..")


async def test_a_file_that_is_still_being_written_is_damaged_only_until_it_is_whole(tmp_path: Path) -> None:
    folder = FolderClient(tmp_path)
    whole = real_files()[0].read_bytes()
    growing = tmp_path / "growing.dcm"
    states = []
    for size in (0, 100, 400, len(whole)):
        growing.write_bytes(whole[:size])
        found = await counts(folder)
        states.append((found, [one.path.name for one in folder.skipped if one.is_dicom]))
    damaged = ([], ["growing.dcm"])
    assert states == [damaged, damaged, damaged, ([(1, 1)], [])]


async def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    folder = FolderClient(tmp_path)
    path = put(real_files()[0], tmp_path / "one.dcm")
    series = str(header_of(path).SeriesInstanceUID)
    before = await folder.retrieve_metadata(STUDY_UID, series)
    rewrite(path, b"t2_tse_sag", b"t2_tse_xyz", mtime_s=LONG_AGO_S + 1)
    (found,) = await folder.search_series(STUDY_UID)
    after = await folder.retrieve_metadata(STUDY_UID, series)
    assert [value_of(one, "0008103E") for one in (*before, found, *after)] == ["t2_tse_sag", "t2_tse_xyz", "t2_tse_xyz"]


async def test_an_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    folder = FolderClient(tmp_path)
    path = put(real_files()[0], tmp_path / "one.dcm")
    series = str(header_of(path).SeriesInstanceUID)
    await folder.retrieve_metadata(STUDY_UID, series)
    rewrite(path, b"t2_tse_sag", b"t2_tse_xyz")
    (found,) = await folder.search_series(STUDY_UID, include=COUNTS)
    (told,) = await folder.retrieve_metadata(STUDY_UID, series)
    assert [value_of(one, "0008103E") for one in (found, told)] == ["t2_tse_sag"] * 2
    (asked_for_more,) = await folder.search_series(STUDY_UID, include=["EchoTime"])
    assert (value_of(asked_for_more, "0008103E"), value_of(asked_for_more, "00180081")) == ("t2_tse_xyz", "101.0")


async def test_a_file_that_changed_a_moment_ago_is_read_again_whatever_its_time_says(tmp_path: Path) -> None:
    folder = FolderClient(tmp_path)
    path = put(real_files()[0], tmp_path / "one.dcm")
    just_now_s = time.time() + 60
    os.utime(path, (just_now_s, just_now_s))
    await folder.search_series(STUDY_UID)
    rewrite(path, b"t2_tse_sag", b"t2_tse_xyz", mtime_s=just_now_s)
    (found,) = await folder.search_series(STUDY_UID)
    assert value_of(found, "0008103E") == "t2_tse_xyz"


def test_memory_of_whole_headers_is_bounded(tmp_path: Path) -> None:
    paths = [put(source, tmp_path / f"{n}.dcm") for n, source in enumerate(real_files()[:3])]
    entries, _ = FolderScan(tmp_path, "folder").entries([])
    one = len(json.dumps(Headers().of(entries[0])))
    roomy, narrow = Headers(), Headers(max_bytes=2 * one)
    for entry in entries:
        assert roomy.of(entry) is not None
        assert narrow.of(entry) is not None
    for path in paths:
        path.unlink()
    assert [roomy.of(entry) is not None for entry in entries] == [True, True, True]
    assert [narrow.of(entry) is not None for entry in entries] == [False, True, True]

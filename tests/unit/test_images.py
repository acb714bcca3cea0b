"""Files in the spool: what is damaged, mixed or contradictory is refused naming the file; the rest becomes volumes."""

import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from mappings.model.ids import derive_uid
from mappings.model.protocol import GeometryPolicy, Protocol
from mappings.model.study import Study
from mappings.reading.series_to_roles import choose_series
from middleware.errors import Stopped
from middleware.intake.images import MAX_REASONS, RoleImages, check_roles, load_roles, read_study
from middleware.intake.protocols import load_protocols
from tests.dicom_sources import build_sources

PROTOCOL = load_protocols()["prostate_mri"].protocol
SHAPE = (6, 8, 10)
CANARY = "Canary^Carl"


def build_series(number: int, description: str, **changes: Any) -> list[Dataset]:
    """One oblique axial series with pixels: ten times the slice plus the column."""
    uid = derive_uid("test-images", number)
    named = {"SeriesInstanceUID": uid, "SeriesNumber": number, "SeriesDescription": description}
    datasets = build_sources(SHAPE, **named, **changes)
    for index, ds in enumerate(datasets):
        ds.SOPInstanceUID = f"{uid}.{index}"[:64]
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
        ds.PixelData = np.broadcast_to(10 * index + np.arange(SHAPE[2]), SHAPE[1:]).astype("<u2").tobytes()
    return datasets


def build_study() -> list[Dataset]:
    return [
        *build_series(4, "t2_tse_tra", ScanningSequence="SE"),
        *build_series(7, "ADC", ScanningSequence="EP", ImageType=["DERIVED", "PRIMARY", "ADC"]),
        *build_series(8, "DWI", ScanningSequence="EP", DiffusionBValue=1400.0),
    ]


def write(ds: Dataset, file: Path, syntax: str = ExplicitVRLittleEndian) -> None:
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = UID(syntax)
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.save_as(file, enforce_file_format=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    for n, ds in enumerate(build_study()):
        write(ds, folder / f"{n:02}.dcm")
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "study"))


def refused(folder: Path) -> tuple[str, ...]:
    with pytest.raises(Stopped) as stopped:
        read_study(folder)
    assert stopped.value.state == "unusable"
    assert not any("Canary" in r for r in stopped.value.reasons)
    return stopped.value.reasons


def edit(file: Path, **changes: Any) -> None:
    ds = pydicom.dcmread(file)
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
    ds.save_as(file, enforce_file_format=False)


def test_whole_study_is_read(folder: Path) -> None:
    study = read_study(folder)
    assert [(s.series_number, len(s.instances)) for s in study.series] == [(4, 6), (7, 6), (8, 6)]
    assert study.series[0].instances[0].file == "00.dcm"


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(len(data) * share)]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-1], id="one byte short"),
        pytest.param(cut(0.95), id="pixels cut"),
        pytest.param(cut(0.6), id="header cut"),
        pytest.param(cut(0.3), id="cut early"),
        pytest.param(lambda data: data[:100], id="preamble cut"),
        pytest.param(lambda data: b"", id="zero bytes"),
        pytest.param(lambda data: b"%PDF-1.7 not an image" * 50, id="not DICOM"),
        pytest.param(lambda data: data[:132] + b"\xff" * (len(data) - 132), id="garbage after the prefix"),
        pytest.param(lambda data: bytes(len(data)), id="zeros"),
    ],
)
def test_damaged_file_is_refused_naming_it(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    file = folder / "03.dcm"
    file.write_bytes(damage(file.read_bytes()))
    (reason,) = refused(folder)
    assert reason.startswith("03.dcm: cannot be read as DICOM, or is cut short (")


def test_a_file_cut_anywhere_is_never_taken_for_whole(folder: Path, tmp_path: Path) -> None:
    data = (folder / "03.dcm").read_bytes()
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    for length in range(0, len(data), 13):
        (lonely / "cut.dcm").write_bytes(data[:length])
        (reason,) = refused(lonely)
        assert reason.startswith("cut.dcm: ")


@pytest.mark.parametrize("syntax", [DeflatedExplicitVRLittleEndian, RLELossless])
def test_compressed_file_cut_short_is_refused(folder: Path, syntax: str) -> None:
    file = folder / "03.dcm"
    ds = pydicom.dcmread(file)
    if syntax == RLELossless:
        ds.compress(RLELossless)
    write(ds, file, syntax)
    assert len(read_study(folder).series) == 3
    file.write_bytes(file.read_bytes()[:-40])
    assert refused(folder)[0].startswith("03.dcm: ")


def test_deflate_errors_are_named_too(folder: Path) -> None:
    file = folder / "03.dcm"
    write(pydicom.dcmread(file), file, DeflatedExplicitVRLittleEndian)
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = b"\xff" * 200
    file.write_bytes(data)
    with pytest.raises(zlib.error):
        pydicom.dcmread(file)
    assert refused(folder)[0].startswith("03.dcm: ")


def test_text_object_cut_inside_its_last_element_is_refused(folder: Path) -> None:
    ds = build_sources((1, 4, 4), SOPInstanceUID="1.2.3", SeriesInstanceUID="1.2", Modality="SR")[0]
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.33"
    ds.DocumentTitle = "A title that is long enough to be cut"
    file = folder / "sr.dcm"
    write(ds, file)
    assert len(read_study(folder).series) == 4
    file.write_bytes(file.read_bytes()[:-10])
    assert "ends inside element" in refused(folder)[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"SOPInstanceUID": ""}, "states no SOP Instance UID or Study Instance UID"),
        ({"StudyInstanceUID": ""}, "states no SOP Instance UID or Study Instance UID"),
        ({"Rows": 4000}, "pixel data holds 160 bytes, its matrix needs 80000"),
        ({"StudyInstanceUID": "1.2.3"}, "03.dcm belongs to another study"),
        ({"PatientID": "OTHER", "PatientName": CANARY}, "03.dcm belongs to another patient"),
        ({"PatientBirthDate": "19700101"}, "the instances state 2 different birth dates"),
        ({"PatientSex": "F"}, "the instances state 2 different sexes"),
        ({"AccessionNumber": "ACC-2"}, "the instances state 2 different accession numbers"),
    ],
)
def test_mixed_and_contradicting_files_are_refused(folder: Path, changes: dict[str, Any], says: str) -> None:
    edit(folder / "03.dcm", **changes)
    (reason,) = refused(folder)
    assert says in reason


def test_repeated_instance_is_refused_naming_both_files(folder: Path) -> None:
    shutil.copy(folder / "03.dcm", folder / "copy.dcm")
    (reason,) = refused(folder)
    assert reason.startswith("copy.dcm repeats SOP Instance UID ")
    assert reason.endswith(" of 03.dcm")


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "holds no DICOM instance" in refused(tmp_path)[0]


def test_long_lists_of_damage_are_counted(folder: Path) -> None:
    for file in folder.iterdir():
        file.write_bytes(b"")
    reasons = refused(folder)
    assert len(reasons) == MAX_REASONS + 1
    assert reasons[-1] == "and 8 more of this kind"


def test_our_own_results_beside_the_images_do_no_harm(folder: Path) -> None:
    for number, (kind, modality) in enumerate((("88.33", "SR"), ("66.4", "SEG"))):
        ds = build_sources((1, 4, 4), SOPInstanceUID=f"1.2.{number}", SeriesInstanceUID=f"1.3.{number}")[0]
        ds.SOPClassUID, ds.Modality = f"1.2.840.10008.5.1.4.1.1.{kind}", modality
        write(ds, folder / f"{modality}.dcm")
    study = read_study(folder)
    assert len(study.series) == 5
    check_roles(study, PROTOCOL, choose_series(study, PROTOCOL))


# Roles


def load(folder: Path, protocol: Protocol = PROTOCOL, study: Study | None = None) -> RoleImages:
    study = study or read_study(folder)
    roles = choose_series(study, protocol)
    check_roles(study, protocol, roles)
    return load_roles(folder, study, protocol, roles)


def test_roles_are_decoded_on_the_reference_grid(folder: Path) -> None:
    found = load(folder)
    assert set(found.volumes) == {"t2w", "adc", "hbv"}
    assert {v.geometry for v in found.volumes.values()} == {found.volumes["t2w"].geometry}
    assert found.volumes["hbv"].array[2, 3].tolist() == [20 + c for c in range(10)]
    assert [ds.SOPInstanceUID for ds in found.sources["t2w"]] == list(found.volumes["t2w"].sop_instance_uids)


SYNTAXES = [RLELossless, JPEGLSLossless, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian]


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_other_transfer_syntaxes_give_the_same_volume(folder: Path, syntax: str) -> None:
    plain = load(folder).volumes["t2w"].array
    for file in folder.iterdir():
        ds = pydicom.dcmread(file)
        if syntax in (RLELossless, JPEGLSLossless):
            ds.compress(syntax, generate_instance_uid=False)
        write(ds, file, syntax)
    np.testing.assert_array_equal(load(folder).volumes["t2w"].array, plain)


def stopped(folder: Path, protocol: Protocol = PROTOCOL) -> str:
    with pytest.raises(Stopped) as stop:
        load(folder, protocol)
    assert stop.value.state == "unusable"
    return "; ".join(stop.value.reasons)


def test_required_role_without_a_series_says_why_each_was_refused(folder: Path) -> None:
    for file in folder.iterdir():
        edit(file, DiffusionBValue=400.0)
    reason = stopped(folder)
    assert reason.startswith("no series can be the High b-value diffusion (hbv): ")
    assert "series 8 DWI refused: the highest b-value is 400 s/mm2, under 800" in reason


def test_required_role_with_a_missing_slice_is_refused_or_accepted_as_the_protocol_says(folder: Path) -> None:
    (folder / "14.dcm").unlink()
    assert "High b-value diffusion (hbv), series 8 DWI: 1 slice(s) missing between 13.dcm and 15.dcm" in stopped(folder)
    accept = GeometryPolicy(missing_slices="accept")
    roles = tuple(replace(r, geometry=accept) if r.name == "hbv" else r for r in PROTOCOL.roles)
    found = load(folder, replace(PROTOCOL, roles=roles)).volumes["hbv"]
    assert found.array[2, 3, 4] == pytest.approx(24)
    assert "1 slice(s) missing" in found.notes[0]


def test_series_in_another_frame_of_reference_is_refused(folder: Path) -> None:
    for number in range(6, 12):
        edit(folder / f"{number:02}.dcm", FrameOfReferenceUID="1.2.3.4")
    assert "(adc), series 7 ADC: the series has another frame of reference" in stopped(folder)


def test_pixels_that_cannot_be_decoded_stop_the_study(folder: Path) -> None:
    study = read_study(folder)
    ds = pydicom.dcmread(folder / "03.dcm")
    ds.compress(RLELossless, generate_instance_uid=False)
    ds.PixelData = pydicom.encaps.encapsulate([b"\x01" * 90])
    write(ds, folder / "03.dcm", RLELossless)
    with pytest.raises(
        Stopped, match=r"T2-weighted axial \(t2w\), series 4 t2_tse_tra: 03.dcm: pixels cannot be decoded"
    ):
        load(folder, study=study)


def test_optional_role_that_is_unusable_does_not_stop_the_study(folder: Path) -> None:
    for n, ds in enumerate(build_series(12, "dyn", ScanningSequence="GR", ContrastBolusAgent="Gd")):
        ds.ImagePositionPatient = [0, 0, 0]
        write(ds, folder / f"dce{n}.dcm")
    assert set(load(folder).volumes) == {"t2w", "adc", "hbv"}

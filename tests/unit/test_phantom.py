"""The phantom is what its truth says, and its DICOM files hold it."""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from deploy.hospital.phantom import (
    Grid,
    PhantomSpec,
    diffusion_grid,
    left_transition_lesion,
    right_peripheral_lesion,
    t2_axial_grid,
    truth,
    truth_masks,
)
from deploy.hospital.phantom_dicom import study_instance_uid, write_phantom
from deploy.hospital.phantom_image import volumes

DCIODVFY = Path(sys.executable).with_name("dciodvfy")
SPEC = PhantomSpec(lesions=(right_peripheral_lesion(), left_transition_lesion()))


@pytest.fixture(scope="module")
def painted() -> dict[str, tuple[Grid, NDArray[np.uint16]]]:
    return volumes(SPEC)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(SPEC, tmp_path_factory.mktemp("phantom"))


def _series(study: Path, number: int) -> list[pydicom.Dataset]:
    [folder] = study.glob(f"{number}-*")
    return [pydicom.dcmread(path) for path in sorted(folder.glob("*.dcm"))]


def _centroid(mask: NDArray[np.bool_], grid: Grid) -> NDArray[np.float64]:
    z, y, x = np.argwhere(mask).mean(axis=0)
    offset = y * grid.spacing_mm[1] * grid.column + x * grid.spacing_mm[2] * grid.row
    return np.asarray(grid.slice_origin(z) + offset, np.float64)


def test_masks_have_the_volumes_and_places_of_the_truth() -> None:
    grid, expected = t2_axial_grid(SPEC), truth(SPEC)
    masks = truth_masks(SPEC, grid)
    voxel_ml = math.prod(grid.spacing_mm) / 1000
    assert masks["gland"].sum() * voxel_ml == pytest.approx(expected.gland_volume_ml, rel=0.01)
    assert _centroid(masks["gland"] == 1, grid) == pytest.approx(expected.gland_centroid_lps_mm, abs=0.2)
    for number, lesion in enumerate(expected.lesions, start=1):
        inside = masks["lesions"] == number
        assert inside.sum() * voxel_ml == pytest.approx(lesion.volume_ml, rel=0.05)
        assert _centroid(inside, grid) == pytest.approx(lesion.centroid_lps_mm, abs=0.3)


def test_lesions_lie_wholly_in_their_zone_and_on_their_side() -> None:
    grid, expected = t2_axial_grid(SPEC), truth(SPEC)
    masks = truth_masks(SPEC, grid)
    assert [(lesion.side, lesion.zone) for lesion in expected.lesions] == [("right", "PZ"), ("left", "TZ")]
    assert set(masks["zones"][masks["lesions"] == 1]) == {1}
    assert set(masks["zones"][masks["lesions"] == 2]) == {2}
    middle = expected.gland_centroid_lps_mm[0]
    assert expected.lesions[0].centroid_lps_mm[0] < middle < expected.lesions[1].centroid_lps_mm[0]


def test_the_sign_of_x_alone_would_name_the_wrong_side() -> None:
    [right] = truth(PhantomSpec()).lesions
    assert right.side == "right"
    assert right.centroid_lps_mm[0] > 0


def test_growth_scales_every_diameter() -> None:
    before, after = truth(SPEC).lesions[0], truth(replace(SPEC, growth_factor=1.25)).lesions[0]
    assert after.diameters_mm == (15.0, 15.0, 15.0)
    assert after.volume_ml == pytest.approx(before.volume_ml * 1.25**3)
    assert after.centroid_lps_mm == before.centroid_lps_mm


def test_lesions_look_as_cancer_does(painted: dict[str, tuple[Grid, NDArray[np.uint16]]]) -> None:
    masks = truth_masks(SPEC, diffusion_grid(SPEC))
    lesion = masks["lesions"] == 1
    peripheral = (masks["zones"] == 1) & (masks["lesions"] == 0)
    adc, high_b = painted["adc"][1], painted["hbv"][1]
    assert np.median(adc[peripheral]) == pytest.approx(1600, rel=0.07)
    assert np.percentile(adc[lesion], 25) == pytest.approx(620, rel=0.15)
    assert np.median(high_b[lesion]) > 2 * np.median(high_b[peripheral])

    masks = truth_masks(SPEC, t2_axial_grid(SPEC))
    t2 = painted["t2w"][1]
    peripheral = (masks["zones"] == 1) & (masks["lesions"] == 0)
    transition = (masks["zones"] == 2) & (masks["lesions"] == 0)
    assert np.median(t2[masks["lesions"] == 1]) < 0.5 * np.median(t2[peripheral])
    assert np.median(t2[transition]) < 0.6 * np.median(t2[peripheral])


def test_the_same_spec_gives_the_same_bytes(study: Path, tmp_path: Path) -> None:
    again = write_phantom(SPEC, tmp_path)
    for path in study.rglob("*.dcm"):
        assert path.read_bytes() == (again / path.relative_to(study)).read_bytes()


def test_another_accession_is_another_study() -> None:
    assert study_instance_uid(SPEC) != study_instance_uid(replace(SPEC, accession="ACC-0002"))


@pytest.mark.parametrize(("number", "grid"), [(4, t2_axial_grid), (7, diffusion_grid), (8, diffusion_grid)])
def test_files_place_their_slices_where_the_grid_is(
    study: Path, number: int, grid: Callable[[PhantomSpec], Grid]
) -> None:
    expected = grid(SPEC)
    series = _series(study, number)
    assert (len(series), series[0].Rows, series[0].Columns) == expected.shape
    for index, dataset in enumerate(series):
        assert list(dataset.ImagePositionPatient) == pytest.approx(expected.slice_origin(index), abs=1e-5)
    orientation = np.array(series[0].ImageOrientationPatient, float)
    assert orientation == pytest.approx(np.concatenate([expected.row, expected.column]), abs=1e-7)
    assert orientation[3:] @ orientation[:3] == pytest.approx(0, abs=1e-7)
    assert orientation[5] < -0.3


def test_files_hold_the_painted_pixels(study: Path, painted: dict[str, tuple[Grid, NDArray[np.uint16]]]) -> None:
    for number, role in ((3, "t2w_sagittal"), (4, "t2w"), (7, "adc"), (8, "hbv")):
        pixels = np.stack([dataset.pixel_array for dataset in _series(study, number)])
        np.testing.assert_array_equal(pixels, painted[role][1])


def test_series_say_what_they_are(study: Path) -> None:
    t2, adc, high_b = (_series(study, number)[9] for number in (4, 7, 8))
    assert list(t2.ImageType) == ["ORIGINAL", "PRIMARY", "M", "NORM", "DIS2D"]
    assert list(adc.ImageType) == ["DERIVED", "PRIMARY", "DIFFUSION", "ADC", "DIS2D"]
    assert list(high_b.ImageType) == ["DERIVED", "PRIMARY", "DIFFUSION", "TRACEW", "DIS2D"]
    assert (0x0019, 0x100C) not in t2
    assert int(high_b[0x0019, 0x100C].value) == high_b.DiffusionBValue == SPEC.high_b_s_mm2
    assert len({dataset.FrameOfReferenceUID for dataset in (t2, adc, high_b)}) == 1
    assert len({dataset.SOPInstanceUID for dataset in _series(study, 4)}) == 19
    assert t2.PatientAge == "067Y"


def test_files_are_valid_dicom(study: Path) -> None:
    for folder in study.iterdir():
        done = subprocess.run([DCIODVFY, sorted(folder.iterdir())[0]], capture_output=True, text=True, check=False)
        assert "MRImage" in done.stderr
        assert "Error" not in done.stderr

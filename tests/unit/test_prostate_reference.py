"""The reference prostate algorithm on the real study, on distortions of it, and on what is no prostate at all."""

import importlib.util
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from deploy.hospital.phantom import (
    Grid,
    PhantomLesion,
    PhantomSpec,
    left_transition_lesion,
    right_peripheral_lesion,
    truth_masks,
)
from deploy.hospital.phantom_image import volumes as phantom_volumes
from tests.fixtures.triton_truth import REFERENCE
from tests.fixtures.triton_truth.study import RealStudy, on_grid, real_study

Array = np.ndarray[Any, np.dtype[Any]]


def _load_algorithm() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prostate_reference", REFERENCE / "1" / "algorithm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


algorithm = _load_algorithm()


@pytest.fixture(scope="module")
def study() -> RealStudy:
    return real_study()


@pytest.fixture(scope="module")
def answer(study: RealStudy) -> Any:
    return _read(study.inputs)


def _read(inputs: dict[str, Array]) -> Any:
    return algorithm.read_prostate(**{name: array.astype(float) for name, array in inputs.items()})


def _dice(one: Array, other: Array) -> float:
    return 2 * float((one & other).sum()) / float(one.sum() + other.sum())


def _warped(volume: Array, spacing: Array, zoom: float, shift_mm: tuple[float, float, float], order: Any) -> Array:
    """The volume with its anatomy enlarged about its middle and moved (z, y, x)."""
    middle = (np.array(volume.shape) - 1) / 2
    offset = middle - (middle + np.array(shift_mm) / spacing) / zoom
    return np.asarray(
        ndimage.affine_transform(np.nan_to_num(volume), np.full(3, 1 / zoom), offset, order=order, mode="nearest")
    )


def test_gland_lies_on_the_gland_of_the_real_study(study: RealStudy, answer: Any) -> None:
    assert _dice(answer.gland > 0, study.gland > 0) > 0.84
    assert answer.gland.sum() * study.voxel_ml == pytest.approx(44.3, rel=0.1)


def test_zones_divide_the_gland_and_resemble_the_truth(study: RealStudy, answer: Any) -> None:
    assert np.array_equal(answer.zones > 0, answer.gland > 0)
    assert _dice(answer.zones == 1, study.zones == 1) > 0.7
    assert _dice(answer.zones == 2, study.zones == 2) > 0.7


def test_lesion_of_the_real_study_is_hit_on_its_own_side(study: RealStudy, answer: Any) -> None:
    overlap = ((answer.lesions == 1) & (study.lesion > 0)).sum() / (study.lesion > 0).sum()
    assert overlap > 0.5
    columns = np.nonzero(answer.lesions == 1)[2]
    assert columns.mean() < np.nonzero(study.gland)[2].mean(), "the patient's right lies at low columns"


def test_scores_keep_the_contract(answer: Any) -> None:
    assert answer.scores.shape == (answer.lesions.max(), 4)
    assert answer.scores.dtype == np.float32
    assert np.isin(answer.scores[:, :2], [1, 2, 3, 4, 5]).all()
    assert np.isnan(answer.scores[:, 2]).all(), "dynamic contrast is not an input"
    assert ((answer.scores[:, 3] > 0) & (answer.scores[:, 3] < 1)).all()


def test_lesions_lie_in_the_gland_and_are_numbered_without_gaps(answer: Any) -> None:
    assert not (answer.lesions[answer.gland == 0]).any()
    assert sorted(np.unique(answer.lesions)) == list(range(len(answer.scores) + 1))


def test_same_input_same_answer(study: RealStudy, answer: Any) -> None:
    again = _read(study.inputs)
    for name in ("gland", "zones", "lesions", "scores"):
        assert np.array_equal(getattr(again, name), getattr(answer, name), equal_nan=name == "scores")


@pytest.mark.parametrize(
    ("zoom", "shift_mm"),
    [(0.8, (0, 0, 0)), (1.25, (0, 0, 0)), (1.0, (8, 0, 0)), (1.0, (0, 14, 0)), (1.0, (0, -14, 0)), (1.0, (0, 0, 10))],
)
def test_gland_is_found_in_other_sizes_and_places(
    study: RealStudy, zoom: float, shift_mm: tuple[float, float, float]
) -> None:
    spacing = study.inputs["spacing"]
    inputs = {n: _warped(study.inputs[n], spacing, zoom, shift_mm, 1) for n in ("t2w", "adc", "hbv")}
    truth = _warped(study.gland, spacing, zoom, shift_mm, 0) > 0
    found = _read({**inputs, "spacing": spacing}).gland
    assert _dice(found > 0, truth) > 0.78
    assert ndimage.label(found)[1] == 1
    assert 10 <= found.sum() * study.voxel_ml <= 250


@pytest.mark.parametrize("lesions", [(), (right_peripheral_lesion(),), (left_transition_lesion(),)])
def test_phantom_of_the_demo_is_read_as_painted(lesions: tuple[PhantomLesion, ...]) -> None:
    spec = PhantomSpec(lesions=lesions)
    painted = phantom_volumes(spec)
    grid = painted["t2w"][0]
    t2w, adc, hbv = (_image(*painted[name]) for name in ("t2w", "adc", "hbv"))
    inputs = {"t2w": t2w, "adc": on_grid(adc, t2w), "hbv": on_grid(hbv, t2w)}
    arrays = {name: np.asarray(sitk.GetArrayFromImage(image)) for name, image in inputs.items()}
    answer = _read({**arrays, "spacing": np.array(grid.spacing_mm)})
    truth = truth_masks(spec, grid)
    assert _dice(answer.gland > 0, truth["gland"] > 0) > 0.93
    assert len(answer.scores) == len(lesions)
    assert all(_dice(answer.lesions == n, truth["lesions"] == n) > 0.6 for n in range(1, len(lesions) + 1))


def _image(grid: Grid, array: Array) -> sitk.Image:
    image = sitk.GetImageFromArray(array.astype(np.float32))
    image.SetSpacing(grid.spacing_mm[::-1])
    image.SetOrigin([float(each) for each in grid.origin_lps_mm])
    image.SetDirection(np.stack([grid.row, grid.column, grid.normal], axis=1).ravel().tolist())
    return image


def test_scanner_scale_of_t2_and_high_b_does_not_matter(study: RealStudy, answer: Any) -> None:
    scaled = {**study.inputs, "t2w": study.inputs["t2w"] * 7.3, "hbv": study.inputs["hbv"] * 0.11}
    assert _dice(_read(scaled).gland > 0, answer.gland > 0) > 0.98


def test_noise_is_not_taken_for_a_gland(study: RealStudy) -> None:
    random = np.random.default_rng(0)
    shape = study.gland.shape
    inputs: dict[str, Array] = {
        "t2w": np.asarray(random.normal(300, 50, shape)),
        "adc": np.asarray(random.normal(1300, 500, shape)),
        "hbv": np.asarray(random.normal(20, 5, shape)),
        "spacing": study.inputs["spacing"],
    }
    nothing = _read(inputs)
    assert not nothing.gland.any()
    assert nothing.scores.shape == (0, 4)


def test_diffusion_with_a_missing_part_is_no_data_rather_than_dark(study: RealStudy) -> None:
    cut = {name: array.copy() for name, array in study.inputs.items()}
    for name in ("adc", "hbv"):
        cut[name][:, :, 232:] = np.nan  # the left edge of the gland lies at column 253
    answer = _read(cut)
    assert _dice(answer.gland > 0, study.gland > 0) > 0.75
    assert (answer.gland[:, :, 236:] > 0).any()


def _blank() -> dict[str, Array]:
    image = np.random.default_rng(1).normal(100, 10, (12, 60, 60))
    return {"t2w": image, "adc": image.copy(), "hbv": image.copy(), "spacing": np.array([3.0, 1.0, 1.0])}


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("t2w", np.zeros((12, 60, 60)), "t2w is 0 everywhere"),
        ("adc", np.full((12, 60, 60), np.nan), "adc has no finite value"),
        ("hbv", np.ones((12, 60, 30)), r"hbv has shape \(12, 60, 30\), t2w has \(12, 60, 60\)"),
        ("hbv", np.ones((60, 60)), "hbv must be .z,y,x., got 2 dimensions"),
        ("spacing", np.array([3.0, 0.0, 1.0]), "spacing must be three positive mm values"),
        ("spacing", np.array([3.0, np.nan, 1.0]), "spacing must be three positive mm values"),
        ("spacing", np.array([3.0, 0.5, 0.5]), "too little for a prostate"),
    ],
)
def test_unusable_input_is_refused_by_name(name: str, array: Array, message: str) -> None:
    with pytest.raises(algorithm.UnusableInput, match=message):
        _read({**_blank(), name: array})


def test_one_slice_is_refused() -> None:
    inputs = {name: array[:1] if array.ndim == 3 else array for name, array in _blank().items()}
    with pytest.raises(algorithm.UnusableInput, match="t2w has 1 slices, at least 5 are needed"):
        _read(inputs)


def test_longest_diameter_of_a_known_bar() -> None:
    mask = np.zeros((5, 40, 40), bool)
    mask[2, 10:30, 20] = True
    assert algorithm.longest_diameter_mm(mask, np.array([3.0, 0.5, 0.5])) == pytest.approx(10.0)

"""Series to stack and volume: order, grid and every way in which a series is not one regular volume."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from mappings.inputs.dicom_to_study import datasets_to_study
from mappings.model.protocol import GeometryPolicy
from mappings.model.study import Geometry, Instance, Series, Vector, Volume
from mappings.reading.series_to_volume import SeriesUnusable, Stack, series_to_stack, stack_to_volume
from mappings.reading.volumes_to_tensors import FramesDiffer, resample

REFUSE = GeometryPolicy()
DATA = Path(__file__).parents[3] / "shared" / "data"
ROWS, COLUMNS = 4, 6
AXIAL = ((1, 0, 0), (0, 1, 0))
OBLIQUE = ((0.98, 0.0, -0.199), (0.0602, 0.9532, 0.2964))
"""Tilted about two axes, as printed in a header: not exactly unit vectors."""
CORONAL = ((1, 0, 0), (0, 0, -1))
DESCENDING = ((-1, 0, 0), (0, 1, 0))
"""Rows run to the patient's right, so the normal points to the feet."""

Axes = tuple[Sequence[float], Sequence[float]]


def unit(axes: Axes) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    row, column = (np.array(a, float) / np.linalg.norm(a) for a in axes)
    normal = np.cross(row, column)
    return row, column, normal / np.linalg.norm(normal)


def as_vector(values: NDArray[np.float64]) -> Vector:
    x, y, z = (float(v) for v in values)
    return (x, y, z)


def build_instances(
    positions_mm: Sequence[float] = (0, 3, 6, 9, 12), axes: Axes = AXIAL, **changes: Any
) -> list[Instance]:
    """One instance a position along the slice normal; its name tells its place in `positions_mm`."""
    origin, normal = np.array([-30.0, 12.0, 5.0]), unit(axes)[2]
    made = [
        Instance(
            sop_instance_uid=f"1.2.{number}",
            sop_class_uid="1.2.840.10008.5.1.4.1.1.4",
            file=f"slice{number}",
            patient_id="P1",
            frame_of_reference_uid="1.9",
            instance_number=100 - number,
            rows=ROWS,
            columns=COLUMNS,
            pixel_spacing_mm=(0.5, 0.7),
            position_mm=as_vector(origin + normal * position),
            orientation=(*axes[0], *axes[1]),  # type: ignore[arg-type]
        )
        for number, position in enumerate(positions_mm)
    ]
    return [replace(i, **changes) for i in made]


def stack(instances: Sequence[Instance], policy: GeometryPolicy = REFUSE) -> Stack:
    return series_to_stack(Series("1.5", "MR", tuple(instances)), policy, patient_id="P1")


def refusals(instances: Sequence[Instance], policy: GeometryPolicy = REFUSE) -> list[tuple[str, str]]:
    with pytest.raises(SeriesUnusable) as refused:
        stack(instances, policy)
    return [(p.code, p.where) for p in refused.value.problems]


def build_pixels(instances: Sequence[Instance], **changes: Any) -> dict[str, Dataset]:
    """Each instance's pixels hold ten times the number in its name, plus the column."""
    made = {}
    for instance in instances:
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPInstanceUID, ds.Rows, ds.Columns = instance.sop_instance_uid, ROWS, COLUMNS
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
        value = 10 * int(instance.file.removeprefix("slice"))
        ds.PixelData = np.broadcast_to(value + np.arange(COLUMNS), (ROWS, COLUMNS)).astype("<u2").tobytes()
        for keyword, new in changes.items():
            setattr(ds, keyword, new)
        made[instance.sop_instance_uid] = ds
    return made


def volume(instances: Sequence[Instance], policy: GeometryPolicy = REFUSE, **changes: Any) -> Volume:
    return stack_to_volume(
        Series("1.5", "MR", tuple(instances)), stack(instances, policy), build_pixels(instances, **changes)
    )


# Order and grid


@pytest.mark.parametrize("axes", [AXIAL, OBLIQUE, CORONAL, DESCENDING])
@pytest.mark.parametrize("seed", range(3))
def test_order_is_by_position_whatever_the_file_order_and_numbers(axes: Axes, seed: int) -> None:
    instances = build_instances(axes=axes)
    shuffled = random.Random(seed).sample(instances, len(instances))
    numbers = random.Random(seed + 9).sample(range(50), len(instances))
    shuffled = [replace(i, instance_number=n) for i, n in zip(shuffled, numbers, strict=True)]
    found = stack(shuffled)
    assert [i.file for i in found.instances] == ["slice0", "slice1", "slice2", "slice3", "slice4"]
    assert found.geometry == stack(instances).geometry


@pytest.mark.parametrize("axes", [AXIAL, OBLIQUE, CORONAL, DESCENDING])
def test_affine_puts_each_voxel_where_the_header_says(axes: Axes) -> None:
    instances = build_instances(axes=axes)
    grid = stack(instances).geometry
    row, column, normal = unit(axes)
    assert grid.shape == (5, ROWS, COLUMNS)
    assert grid.spacing_mm == pytest.approx((3.0, 0.5, 0.7))
    assert grid.normal == pytest.approx(normal)
    assert np.linalg.det(grid.matrix) > 0
    for z, y, x in ((0, 0, 0), (4, 0, 0), (2, 3, 5), (1, 0, 5), (3, 3, 0)):
        wanted = np.array(instances[z].position_mm) + column * 0.5 * y + row * 0.7 * x
        assert grid.to_lps_mm((z, y, x))[0] == pytest.approx(wanted, abs=0.02)


def test_feet_first_and_descending_stacks_ascend_along_their_own_normal() -> None:
    grid = stack(build_instances(axes=DESCENDING)).geometry
    assert grid.normal == pytest.approx((0, 0, -1))
    assert grid.to_lps_mm((4, 0, 0))[0][2] < grid.to_lps_mm((0, 0, 0))[0][2]


def test_direction_cosines_rounded_to_two_digits_are_one_direction() -> None:
    assert stack(build_instances(axes=((0.98, 0, -0.2), (0.06, 0.95, 0.3)))).geometry.shape[0] == 5


def test_small_jitter_of_positions_is_no_gap() -> None:
    found = stack(build_instances((0, 3.02, 5.97, 9.01, 12)))
    assert found.notes == ()
    assert found.geometry.spacing_mm[0] == pytest.approx(3.0)


# What is refused, by code and instance


def test_refusals_name_code_and_instance() -> None:
    base = build_instances()

    def change(number: int, **changes: Any) -> list[Instance]:
        return [replace(i, **changes) if n == number else i for n, i in enumerate(base)]

    two = ("1.2.2",)
    assert refusals(change(2, patient_id="P2")) == [("other-patient", *two)]
    assert refusals(change(2, number_of_frames=20)) == [("multi-frame", *two)]
    assert refusals(change(2, position_mm=None)) == [("no-geometry", *two)]
    assert refusals(change(2, orientation=None)) == [("no-geometry", *two)]
    assert refusals(change(2, pixel_spacing_mm=None)) == [("no-geometry", *two)]
    assert refusals(change(2, frame_of_reference_uid="")) == [("no-geometry", *two)]
    assert refusals(change(2, pixel_spacing_mm=(0.5, 0.0))) == [("no-geometry", *two)]
    assert refusals(change(2, orientation=(0.0,) * 6)) == [("no-geometry", *two)]
    assert refusals(change(2, orientation=(1.0, 0, 0, 1, 0, 0))) == [("no-geometry", *two)]
    assert refusals(change(2, rows=8)) == [("mixed-geometry", *two)]
    assert refusals(change(2, pixel_spacing_mm=(0.5, 0.8))) == [("mixed-geometry", *two)]
    assert refusals(change(2, frame_of_reference_uid="1.8")) == [("mixed-geometry", *two)]
    assert refusals(change(2, orientation=(1.0, 0, 0, 0, 0, -1))) == [("mixed-geometry", *two)]
    assert refusals(change(2, position_mm=base[1].position_mm))[0] == ("duplicate-slice", *two)


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 8},
        {"frame_of_reference_uid": "1.8"},
        {"orientation": (1.0, 0, 0, 0, 0, -1)},
        {"position_mm": None, "orientation": None, "pixel_spacing_mm": None},
        {"pixel_spacing_mm": None},
        {"number_of_frames": 2, "orientation": None},
    ],
)
def test_an_odd_first_instance_is_named_and_not_the_rest(changes: dict[str, Any]) -> None:
    first, *rest = build_instances()
    assert [where for _, where in refusals([replace(first, **changes), *rest])] == ["1.2.0"]


def test_no_position_anywhere_names_every_instance() -> None:
    found = refusals(build_instances(position_mm=None))
    assert found == [("no-geometry", f"1.2.{n}") for n in range(5)]


@pytest.mark.parametrize(
    ("positions_mm", "codes"),
    [
        ((0, 3, 9, 12, 15), ["missing-slice"]),
        ((0, 3, 12, 15, 18), ["missing-slice"]),
        ((0, 6, 9, 12, 18), ["missing-slice", "missing-slice"]),
        ((0, 3, 6, 10.5, 13.5), ["uneven-spacing"]),
        ((0, 3, 6, 7, 10), ["uneven-spacing"]),
        ((0, 3, 3, 6, 9), ["duplicate-slice"]),
        ((0, 0, 0, 0, 0), ["duplicate-slice"] * 4 + ["too-few-slices"]),
        ((0, 3), ["too-few-slices"]),
        ((0,), ["too-few-slices"]),
    ],
)
def test_gaps_and_repeats_are_found(positions_mm: Sequence[float], codes: list[str]) -> None:
    assert [code for code, _ in refusals(build_instances(positions_mm))] == codes


def test_missing_slices_are_counted_and_placed() -> None:
    with pytest.raises(SeriesUnusable, match=r"2 slice\(s\) missing between slice1 and slice2 \(gap 9.0 mm, not 3.0"):
        stack(build_instances((0, 3, 12, 15, 18)))


def test_one_slice_makes_no_volume_whatever_the_policy_accepts() -> None:
    assert refusals(build_instances((0,)), GeometryPolicy(minimum_slices=1)) == [("too-few-slices", "1.2.0")]


def test_sheared_stack_is_refused() -> None:
    def shear(by_mm: float) -> list[Instance]:
        moved = [(i, np.add(np.array(i.position_mm), (by_mm * n, 0, 0))) for n, i in enumerate(build_instances())]
        return [replace(i, position_mm=as_vector(position)) for i, position in moved]

    assert {code for code, _ in refusals(shear(0.4))} == {"sheared-stack"}
    assert stack(shear(0.05)).geometry.shape[0] == 5


def test_several_b_values_are_refused_or_the_highest_is_used() -> None:
    both = [*build_instances(b_value_s_mm2=50.0), *build_instances(b_value_s_mm2=800.0, frame_of_reference_uid="1.7")]
    with pytest.raises(SeriesUnusable, match=r"several b-values in one series \(50, 800 s/mm2\)"):
        stack(both)
    found = stack(both, GeometryPolicy(several_b_values="highest"))
    assert {i.b_value_s_mm2 for i in found.instances} == {800.0}
    assert found.notes == ("b-value 800 of 50, 800 s/mm2 used",)
    assert found.is_regular


def test_every_problem_is_named_at_once() -> None:
    instances = build_instances((0, 3, 3, 9, 12, 15))
    assert refusals(instances) == [("duplicate-slice", "1.2.2"), ("missing-slice", "1.2.3")]


# What a policy accepts


def test_accepted_gap_is_filled_by_interpolation_and_said() -> None:
    found = volume(build_instances((0, 3, 12, 15)), GeometryPolicy(missing_slices="accept"))
    assert found.geometry.shape[0] == 6
    assert found.array[:, 0, 0] == pytest.approx([0, 10, 10 + 10 / 3, 10 + 20 / 3, 20, 30])
    assert found.sop_instance_uids == ("1.2.0", "1.2.1", "", "", "1.2.2", "1.2.3")
    assert "2 slice(s) missing" in found.notes[0]


def test_accepted_uneven_spacing_is_interpolated() -> None:
    found = volume(build_instances((0, 3, 6, 10, 12)), GeometryPolicy(uneven_spacing="accept"))
    assert found.geometry.spacing_mm[0] == pytest.approx(3.0)
    assert found.array[:, 0, 0] == pytest.approx([0, 10, 20, 27.5, 40])


def test_accepting_gaps_does_not_accept_uneven_spacing() -> None:
    policy = GeometryPolicy(missing_slices="accept")
    assert refusals(build_instances((0, 3, 6, 10.5, 13.5)), policy) == [("uneven-spacing", "1.2.3")]


def test_first_of_duplicates_is_used_when_accepted() -> None:
    policy = GeometryPolicy(duplicate_slices="first")
    found = volume(build_instances((0, 3.02, 3.02, 5.97, 9)), policy)
    assert found.sop_instance_uids == ("1.2.0", "1.2.1", "1.2.3", "1.2.4")
    assert found.array[:, 0, 0].tolist() == [0, 10, 30, 40], "pixels stay as they are"
    assert found.notes == ("1 duplicate slices left out",)


# Pixels


def test_volume_has_modality_values_in_order() -> None:
    instances = build_instances()
    found = volume(instances[::-1], RescaleSlope="2", RescaleIntercept="-5")
    assert found.array.dtype == np.float32
    assert found.array[3, 1].tolist() == [2 * (30 + c) - 5 for c in range(COLUMNS)]
    assert found.sop_instance_uids == tuple(i.sop_instance_uid for i in instances)


@pytest.mark.parametrize(
    "changes",
    [{"PixelData": b"\0\0"}, {"Rows": 9}, {"RescaleSlope": ["1", "2"]}, {"BitsAllocated": 7}, {"SamplesPerPixel": 3}],
)
def test_pixels_that_cannot_be_decoded_name_the_instance(changes: dict[str, Any]) -> None:
    with pytest.raises(SeriesUnusable, match="slice0: ") as refused:
        volume(build_instances(), **changes)
    assert refused.value.problems[0].code == "unreadable-pixels"


# Resampling


def test_resampling_keeps_places_and_marks_what_was_not_seen() -> None:
    source = volume(build_instances(tuple(range(0, 30, 3))))
    target = stack(build_instances((6, 7.5, 9, 10.5))).geometry
    found = resample(source, target)
    assert found.array[:, 1, 1] == pytest.approx([21, 26, 31, 36], abs=1e-3)
    assert (found.geometry, found.sop_instance_uids) == (target, ())
    outside = resample(source, stack(build_instances((24, 27, 30, 33))).geometry)
    assert np.isnan(outside.array[2:]).all()
    assert not np.isnan(outside.array[:2]).any()
    assert resample(source, source.geometry) is source


def test_frames_that_differ_are_not_compared() -> None:
    source = volume(build_instances())
    other = Geometry(source.geometry.shape, source.geometry.affine, "1.8")
    with pytest.raises(FramesDiffer):
        resample(source, other)


# The real incomplete series


def test_real_series_with_a_missing_slice_is_refused_naming_the_gap() -> None:
    files = sorted((DATA / "missing-slice").rglob("*.dcm"))
    study = datasets_to_study((f.name, pydicom.dcmread(f)) for f in files)
    (series,) = study.series
    with pytest.raises(SeriesUnusable) as refused:
        series_to_stack(series, REFUSE, patient_id=study.patient.patient_id)
    (problem,) = refused.value.problems
    assert problem.code == "missing-slice"
    assert problem.message.startswith("1 slice(s) missing between ")
    found = series_to_stack(series, GeometryPolicy(missing_slices="accept"), patient_id=study.patient.patient_id)
    assert (len(found.instances), found.geometry.shape[0], found.is_regular) == (18, 19, False)

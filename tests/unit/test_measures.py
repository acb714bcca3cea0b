"""Measures against shapes whose size is known by formula, on anisotropic and rotated grids."""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mappings.model.study import Geometry, Vector
from mappings.reading.masks_to_measures import (
    centroid_lps_mm,
    extents,
    longest_diameter_3d_mm,
    longest_diameter_in_plane_mm,
    volume_ml,
)

Rotation = NDArray[np.float64]
STRAIGHT: Rotation = np.eye(3)


def turn(x_rad: float, y_rad: float, z_rad: float) -> Rotation:
    """The rotation about x, then y, then z."""
    cx, sx, cy, sy, cz, sz = (f(a) for a in (x_rad, y_rad, z_rad) for f in (math.cos, math.sin))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x)


TURNED = turn(0.3, -0.2, 0.5)


def build_grid(shape: tuple[int, int, int], spacing_zyx_mm: Vector, rotation: Rotation = STRAIGHT) -> Geometry:
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * np.array(spacing_zyx_mm)[::-1]
    matrix[:3, 3] = (-31.0, 17.0, 44.0)
    return Geometry(shape, tuple((a, b, c, d) for a, b, c, d in matrix.tolist()), "1.9")


def draw_ellipsoid(grid: Geometry, semi_xyz_mm: Vector) -> NDArray[np.bool_]:
    """An ellipsoid along the image axes around the grid's centre."""
    z, y, x = (
        (np.arange(n) - (n - 1) / 2) * step / semi
        for n, step, semi in zip(grid.shape, grid.spacing_mm, semi_xyz_mm[::-1], strict=True)
    )
    return np.asarray(z[:, None, None] ** 2 + y[None, :, None] ** 2 + x[None, None, :] ** 2 <= 1)


def draw_voxels(shape: tuple[int, int, int], *voxels: tuple[int, int, int]) -> NDArray[np.bool_]:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(np.array(voxels).T)] = True
    return mask


GRIDS: list[Any] = [
    pytest.param((41, 41, 41), (1.0, 1.0, 1.0), STRAIGHT, id="isotropic"),
    pytest.param((15, 81, 81), (3.0, 0.5, 0.5), STRAIGHT, id="anisotropic"),
    pytest.param((15, 61, 45), (3.0, 0.7, 0.9), TURNED, id="rotated"),
]


@pytest.mark.parametrize(("shape", "spacing", "rotation"), GRIDS)
def test_sphere(shape: tuple[int, int, int], spacing: Vector, rotation: Rotation) -> None:
    grid = build_grid(shape, spacing, rotation)
    mask = draw_ellipsoid(grid, (15.0, 15.0, 15.0))
    step = max(spacing)
    assert volume_ml(mask, grid) == pytest.approx(4 / 3 * math.pi * 1.5**3, rel=0.02)
    assert longest_diameter_3d_mm(mask, grid) == pytest.approx(30, abs=step)
    assert longest_diameter_in_plane_mm(mask, grid) == pytest.approx(30, abs=max(spacing[1:]) * 1.5)
    assert centroid_lps_mm(mask, grid) == pytest.approx(grid.to_lps_mm((np.array(shape) - 1) / 2)[0])


@pytest.mark.parametrize(("shape", "spacing", "rotation"), GRIDS)
def test_ellipsoid_extents_and_volume(shape: tuple[int, int, int], spacing: Vector, rotation: Rotation) -> None:
    grid = build_grid(shape, spacing, rotation)
    mask = draw_ellipsoid(grid, (18.0, 12.0, 16.0))
    found = extents(mask, grid)
    assert found.transverse_mm == pytest.approx(36, abs=spacing[2] * 1.5)
    assert found.anteroposterior_mm == pytest.approx(24, abs=spacing[1] * 1.5)
    assert found.craniocaudal_mm == pytest.approx(32, abs=spacing[0] * 1.5)
    product_mm3 = found.transverse_mm * found.anteroposterior_mm * found.craniocaudal_mm
    assert found.ellipsoid_ml == pytest.approx(product_mm3 * 0.52 / 1000)
    assert volume_ml(mask, grid) == pytest.approx(math.pi / 6 * 3.6 * 2.4 * 3.2, rel=0.03)


def test_box_measures_exactly_its_outer_faces() -> None:
    grid = build_grid((6, 10, 12), (3.0, 0.5, 0.7), TURNED)
    mask = np.zeros(grid.shape, dtype=bool)
    mask[1:4, 2:8, 3:10] = True
    found = extents(mask, grid)
    assert (found.craniocaudal_mm, found.anteroposterior_mm, found.transverse_mm) == pytest.approx((9.0, 3.0, 4.9))
    assert volume_ml(mask, grid) == pytest.approx(9.0 * 3.0 * 4.9 / 1000)


@pytest.mark.parametrize("rotation", [STRAIGHT, TURNED])
def test_one_voxel_is_as_long_as_it_is(rotation: Rotation) -> None:
    grid = build_grid((5, 5, 5), (3.0, 0.5, 0.7), rotation)
    mask = draw_voxels(grid.shape, (2, 2, 2))
    assert longest_diameter_in_plane_mm(mask, grid) == pytest.approx(0.7)
    assert longest_diameter_3d_mm(mask, grid) == pytest.approx(3.0)
    assert volume_ml(mask, grid) == pytest.approx(3.0 * 0.5 * 0.7 / 1000)


def test_row_column_and_stack_of_voxels_measure_their_count() -> None:
    grid = build_grid((9, 9, 9), (3.0, 0.5, 0.7))
    row = draw_voxels(grid.shape, *((4, 4, x) for x in range(2, 7)))
    column = draw_voxels(grid.shape, *((4, y, 4) for y in range(2, 7)))
    pile = draw_voxels(grid.shape, *((z, 4, 4) for z in range(2, 7)))
    assert longest_diameter_in_plane_mm(row, grid) == pytest.approx(3.5)
    assert longest_diameter_in_plane_mm(column, grid) == pytest.approx(2.5, abs=0.1)
    assert longest_diameter_in_plane_mm(pile, grid) == pytest.approx(0.7)
    assert longest_diameter_3d_mm(pile, grid) == pytest.approx(15.0)


def test_thin_diagonal_is_as_long_as_its_ends_are_apart() -> None:
    grid = build_grid((20, 20, 20), (1.0, 1.0, 1.0))
    flat = draw_voxels(grid.shape, *((5, n, n) for n in range(10)))
    solid = draw_voxels(grid.shape, *((n, n, n) for n in range(10)))
    between_centres = 9 * math.sqrt(2)
    assert between_centres <= longest_diameter_in_plane_mm(flat, grid) <= between_centres + 1
    assert 9 * math.sqrt(3) <= longest_diameter_3d_mm(solid, grid) <= 9 * math.sqrt(3) + 1
    assert longest_diameter_in_plane_mm(solid, grid) == pytest.approx(1.0)


def test_in_plane_takes_the_slice_with_the_longest_line_and_not_a_line_across_slices() -> None:
    grid = build_grid((6, 30, 30), (3.0, 1.0, 1.0))
    mask = draw_voxels(grid.shape, *((1, 5, x) for x in range(4)), *((2, 20, x) for x in range(9)))
    assert longest_diameter_in_plane_mm(mask, grid) == pytest.approx(9.0)
    assert longest_diameter_3d_mm(mask, grid) > 15


def test_two_separate_parts_in_one_slice_are_spanned() -> None:
    grid = build_grid((3, 30, 30), (3.0, 1.0, 1.0))
    mask = draw_voxels(grid.shape, (1, 5, 2), (1, 5, 21))
    assert longest_diameter_in_plane_mm(mask, grid) == pytest.approx(20.0)


voxels = st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=25)
spacings = st.tuples(st.floats(0.3, 5), st.floats(0.3, 3), st.floats(0.3, 3))
angles = st.tuples(*[st.floats(-3, 3)] * 3)


@settings(max_examples=60, deadline=None)
@given(voxels=voxels, spacing=spacings, angles=angles)
def test_sizes_hold_for_any_mask_and_do_not_turn_with_the_patient(
    voxels: list[tuple[int, int, int]], spacing: Vector, angles: Vector
) -> None:
    mask = draw_voxels((6, 6, 6), *voxels)
    straight, turned = build_grid(mask.shape, spacing), build_grid(mask.shape, spacing, turn(*angles))
    in_plane, solid = longest_diameter_in_plane_mm(mask, turned), longest_diameter_3d_mm(mask, turned)
    assert in_plane == pytest.approx(longest_diameter_in_plane_mm(mask, straight))
    assert solid == pytest.approx(longest_diameter_3d_mm(mask, straight))
    assert in_plane <= solid + 1e-9
    centres = np.argwhere(mask) * np.array(spacing)
    span = max(float(np.linalg.norm(a - b)) for a, b in product(centres, centres))
    assert span <= solid <= span + max(spacing) + 1e-9, "between the centres and half a voxel beyond at each end"
    size = extents(mask, turned)
    diagonal = math.dist((0, 0, 0), (size.transverse_mm, size.anteroposterior_mm, size.craniocaudal_mm))
    assert max(size.transverse_mm, size.anteroposterior_mm, size.craniocaudal_mm) <= solid + 1e-6
    assert solid <= diagonal + 1e-9
    assert volume_ml(mask, turned) == pytest.approx(mask.sum() * math.prod(spacing) / 1000)

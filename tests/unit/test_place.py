"""Where a lesion lies: anatomy is painted in patient coordinates on grids of any orientation, and must be read back
from patient coordinates. The gland's centre is away from x = 0, so the sign of x alone is always a wrong side."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mappings.model import codes
from mappings.model.codes import Code
from mappings.model.study import Geometry, Vector
from mappings.reading.masks_to_place import Place, find_place, find_zone

CENTRE: Vector = (38.0, 20.0, -40.0)
SEMI_AXES: Vector = (24.0, 18.0, 21.0)
OTHER_SIDE = {codes.RIGHT: codes.LEFT, codes.LEFT: codes.RIGHT, codes.BILATERAL: codes.BILATERAL}


def build_grid(tilt_rad: float = 0.0, turn_rad: float = 0.0, *, to_feet: bool = False) -> Geometry:
    """An axial grid around the gland, tilted about x and turned about z; `to_feet`: rows run to the patient's right
    and slices ascend to the feet."""
    ct, st_, cz, sz = math.cos(tilt_rad), math.sin(tilt_rad), math.cos(turn_rad), math.sin(turn_rad)
    about_x = np.array([[1, 0, 0], [0, ct, -st_], [0, st_, ct]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    axes = about_z @ about_x @ (np.diag([-1, 1, -1]) if to_feet else np.eye(3))
    shape, spacing = (23, 40, 40), np.array([1.6, 1.5, 3.0])
    matrix = np.eye(4)
    matrix[:3, :3] = axes * spacing
    matrix[:3, 3] = np.array(CENTRE) - matrix[:3, :3] @ ((np.array(shape[::-1]) - 1) / 2)
    return Geometry(shape, tuple((a, b, c, d) for a, b, c, d in matrix.tolist()), "1.9")


def paint(grid: Geometry, centre: Vector, semi: Vector) -> NDArray[np.bool_]:
    """An ellipsoid along the patient's axes."""
    index = np.indices(grid.shape).reshape(3, -1).T
    distance = ((grid.to_lps_mm(index) - np.array(centre)) / np.array(semi)) ** 2
    return np.asarray(distance.sum(axis=1) <= 1).reshape(grid.shape)


def at(x: float, y: float, z: float) -> Vector:
    """A place given from the gland's centre in patient directions (left, back, head)."""
    return (CENTRE[0] + x, CENTRE[1] + y, CENTRE[2] + z)


def place(where: Vector, grid: Geometry, zone: str | None = "PZ", radius_mm: float = 4.0) -> Place:
    gland = paint(grid, CENTRE, SEMI_AXES)
    inner = paint(grid, at(0, -5, 2), (14.0, 11.0, 15.0))
    zones = gland.astype(np.uint8) * np.where(inner, 2, 1).astype(np.uint8)
    lesion = paint(grid, where, (radius_mm,) * 3)
    found = find_place(lesion, gland, zones, zone, grid)  # type: ignore[arg-type]
    assert found is not None
    return found


def named(found: Place) -> tuple[Code, str, str]:
    return found.laterality, found.level, found.sector.meaning if found.sector else ""


GRIDS = [
    build_grid(),
    build_grid(0.35),
    build_grid(-0.35),
    build_grid(to_feet=True),
    build_grid(0.3, 0.2, to_feet=True),
]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("offset", "zone", "wanted"),
    [
        ((-15, 8, 0), "PZ", (codes.RIGHT, "mid", "Right posterolateral middle peripheral zone of prostate")),
        ((15, 8, 0), "PZ", (codes.LEFT, "mid", "Left posterolateral middle peripheral zone of prostate")),
        ((-6, 13, 0), "PZ", (codes.RIGHT, "mid", "Right posteromedial middle peripheral zone of prostate")),
        ((-19, -6, 0), "PZ", (codes.RIGHT, "mid", "Right anterior middle peripheral zone of prostate")),
        ((7, -12, 2), "TZ", (codes.LEFT, "mid", "Left anterior middle transition zone of prostate")),
        ((-7, -2.5, 2), "TZ", (codes.RIGHT, "mid", "Right posterior middle transition zone of prostate")),
        ((-9, 4, 16), "PZ", (codes.RIGHT, "base", "")),
        ((9, 4, -16), "PZ", (codes.LEFT, "apex", "")),
    ],
)
def test_place_is_the_patients_whatever_the_grid(
    grid: Geometry, offset: Vector, zone: str, wanted: tuple[Code, str, str]
) -> None:
    side, level, sector = named(place(at(*offset), grid, zone))
    assert (side, level) == wanted[:2]
    if wanted[2]:
        assert sector == wanted[2]
    else:
        assert {"base": "basal", "apex": "apical"}[level] in sector


@settings(max_examples=40, deadline=None)
@given(
    x=st.floats(6, 19),
    y=st.floats(-8, 8),
    z=st.floats(-10, 10),
    tilt=st.floats(-0.4, 0.4),
    turn=st.floats(-0.25, 0.25),
    to_feet=st.booleans(),
)
def test_mirrored_anatomy_changes_side_and_nothing_else(
    x: float, y: float, z: float, tilt: float, turn: float, to_feet: bool
) -> None:
    grid, mirrored_grid = build_grid(tilt, turn, to_feet=to_feet), build_grid(tilt, -turn, to_feet=to_feet)
    left, right = place(at(x, y, z), grid, radius_mm=5), place(at(-x, y, z), mirrored_grid, radius_mm=5)
    assert left.laterality == codes.LEFT
    assert right.laterality == codes.RIGHT
    assert left.level == right.level
    assert left.sector is not None
    assert right.sector is not None
    assert left.sector.meaning.removeprefix("Left") == right.sector.meaning.removeprefix("Right")
    assert left.sector.value != right.sector.value


@settings(max_examples=25, deadline=None)
@given(
    x=st.floats(1, 10) | st.floats(-18, -14),
    y=st.floats(1.5, 8),
    z=st.floats(-5, 5) | st.floats(10, 16),
    tilt=st.floats(-0.3, 0.3),
)
def test_reversing_the_slices_moves_nothing(x: float, y: float, z: float, tilt: float) -> None:
    there, back = build_grid(tilt), build_grid(tilt, to_feet=True)
    assert there.normal[2] > 0 > back.normal[2]
    first, second = place(at(x, y, z), there, radius_mm=5), place(at(x, y, z), back, radius_mm=5)
    assert first == second, "places away from the borders, where rounding decides"


@pytest.mark.parametrize("grid", GRIDS)
def test_lesion_across_the_midline_is_bilateral(grid: Geometry) -> None:
    assert place(at(0.3, 10, 0), grid, radius_mm=6).laterality == codes.BILATERAL
    assert place(at(5, 10, 0), grid, radius_mm=6).laterality == codes.LEFT


def test_levels_are_thirds_of_the_gland_from_apex_to_base() -> None:
    for grid in (build_grid(), build_grid(to_feet=True)):
        levels = [place(at(-8, 5, z), grid, radius_mm=4).level for z in (-17, -9, -4, 0, 4, 9, 17)]
        assert levels == ["apex", "apex", "mid", "mid", "mid", "base", "base"]


def test_no_gland_no_place_and_no_zone_no_sector() -> None:
    grid = build_grid()
    lesion = paint(grid, CENTRE, (5.0,) * 3)
    empty = np.zeros(grid.shape, dtype=np.uint8)
    assert find_place(lesion, empty.astype(bool), empty, "PZ", grid) is None
    found = place(at(-12, 5, 0), grid, zone=None)
    assert (found.laterality, found.level, found.sector) == (codes.RIGHT, "mid", None)


def test_lesion_wholly_outside_the_gland_still_has_its_side_and_nearest_level() -> None:
    found = place(at(-28, 5, 30), build_grid(), radius_mm=4)
    assert (found.laterality, found.level) == (codes.RIGHT, "base")


def test_transition_zone_without_any_voxels_is_placed_by_the_gland() -> None:
    grid = build_grid()
    gland = paint(grid, CENTRE, SEMI_AXES)
    found = find_place(paint(grid, at(-8, 10, 0), (4.0,) * 3), gland, gland.astype(np.uint8), "TZ", grid)
    assert found is not None
    assert found.sector is not None
    assert found.sector.meaning == "Right posterior middle transition zone of prostate"


# Zones


def zones_of(pz: int, tz: int, neither: int = 0) -> tuple[NDArray[np.bool_], NDArray[np.uint8]]:
    row = np.array([1] * pz + [2] * tz + [0] * neither, dtype=np.uint8).reshape(1, 1, -1)
    return np.ones(row.shape, dtype=bool), row


@pytest.mark.parametrize(
    ("pz", "tz", "neither", "zone", "noted"),
    [
        (10, 0, 0, "PZ", False),
        (0, 10, 0, "TZ", False),
        (7, 3, 0, "PZ", False),
        (6, 3, 0, "PZ", True),
        (4, 6, 0, "TZ", True),
        (1, 0, 9, "PZ", False),
        (5, 5, 0, "PZ", True),
    ],
)
def test_zone_is_that_of_most_voxels_and_the_other_is_named_from_a_third(
    pz: int, tz: int, neither: int, zone: str, noted: bool
) -> None:
    found, notes = find_zone(*zones_of(pz, tz, neither))
    assert found == zone
    assert [("Reaches into the other zone" in n) for n in notes] == ([True] if noted else [])


def test_touching_neither_zone_is_said_and_no_zone_is_guessed() -> None:
    found, notes = find_zone(*zones_of(0, 0, 8))
    assert found is None
    assert "neither zone" in notes[0]

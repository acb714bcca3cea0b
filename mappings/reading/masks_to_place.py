"""Where a lesion lies: zone, side, level and sector, from patient coordinates (x left, y back, z head)."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mappings.model import codes
from mappings.model.codes import Code
from mappings.model.study import Geometry
from mappings.reading.masks_to_measures import Mask
from mappings.rules.pirads_sectors_v2_1 import choose_level, choose_sector
from mappings.rules.pirads_v2_1 import Zone

ZONES: dict[int, tuple[Zone, Code]] = {1: ("PZ", codes.PERIPHERAL_ZONE), 2: ("TZ", codes.TRANSITION_ZONE)}
"""The zone that each label of the model's `zones` mask stands for."""
MINORITY_SHARE = 1 / 3
"""From this share of its voxels on, the other side (or zone) of a lesion is named too."""


def find_zone(mask: Mask, zones: npt.NDArray[Any]) -> tuple[Zone | None, list[str]]:
    """The zone that holds most of the lesion, and a note where the other one holds a third or more."""
    counts = {number: int((zones[mask] == number).sum()) for number in ZONES}
    number = max(counts, key=lambda n: counts[n])
    if counts[number] == 0:
        return None, ["Touches neither zone that the model drew; no category table applies. Please check."]
    zone = ZONES[number][0]
    share = min(counts.values()) / int(mask.sum())
    return zone, [f"Reaches into the other zone ({share:.0%} of its volume)."] if share >= MINORITY_SHARE else []


@dataclass(frozen=True)
class Place:
    """Side, level and PI-RADS sector of a lesion."""

    laterality: Code
    level: Literal["base", "mid", "apex"]
    sector: Code | None


def find_place(mask: Mask, gland: Mask, zones: npt.NDArray[Any], zone: Zone | None, grid: Geometry) -> Place | None:
    """Side (against the gland's centre), level and sector; None without a gland. The sector is None without a zone."""
    if not gland.any():
        return None
    points, gland_points = grid.to_lps_mm(np.argwhere(mask)), grid.to_lps_mm(np.argwhere(gland))
    centre, midline_x = points.mean(axis=0), float(gland_points[:, 0].mean())
    left_share = float((points[:, 0] > midline_x).mean())
    side = "L" if centre[0] > midline_x else "R"
    crosses = min(left_share, 1 - left_share) >= MINORITY_SHARE
    laterality = codes.BILATERAL if crosses else codes.LEFT if side == "L" else codes.RIGHT
    level = choose_level(_height(mask, gland, grid))
    if zone is None:
        return Place(laterality, level, None)
    section = np.asarray(mask.any(axis=(1, 2)))
    across = _within(grid, gland, section, centre, axis=0)
    frame = (zones == 2) if zone == "TZ" else gland
    posterior = _within(grid, frame if frame.any() else gland, section, centre, axis=1)
    return Place(laterality, level, choose_sector(zone, side, level, abs(across - 0.5) * 2, posterior))


def _height(mask: Mask, gland: Mask, grid: Geometry) -> float:
    """Where the lesion's centre lies between the gland's lowest (0) and highest (1) end along the slice normal."""
    slices = np.flatnonzero(gland.any(axis=(1, 2)))
    fraction = (np.argwhere(mask)[:, 0].mean() - slices[0] + 0.5) / (slices[-1] - slices[0] + 1)
    upwards = grid.normal[2] > 0
    return float(np.clip(fraction if upwards else 1 - fraction, 0, 1))


def _within(
    grid: Geometry, frame: Mask, section: npt.NDArray[np.bool_], point: npt.NDArray[np.float64], axis: int
) -> float:
    """Where `point` lies between the ends of `frame` along a patient axis, in the slices of `section` if the
    frame reaches there; 0 is right or front, 1 is left or back."""
    here = frame & section[:, None, None]
    ends = grid.to_lps_mm(np.argwhere(here if here.any() else frame))[:, axis]
    low, high = float(ends.min()), float(ends.max())
    return 0.5 if high == low else float(np.clip((point[axis] - low) / (high - low), 0, 1))

"""Sizes and places of masks `(z, y, x)` on a grid in patient space."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import pdist

from mappings.model.study import Geometry, Vector

Mask = npt.NDArray[np.bool_]

ELLIPSOID_FACTOR = 0.52
"""pi/6 rounded as PI-RADS v2.1 rounds it: volume = length x width x height x 0.52."""


@dataclass(frozen=True)
class Extents:
    """Full extents of a mask along the image axes in mm: across columns, across rows, across slices."""

    transverse_mm: float
    anteroposterior_mm: float
    craniocaudal_mm: float

    @property
    def ellipsoid_ml(self) -> float:
        """Ellipsoid volume by PI-RADS' formula."""
        return self.transverse_mm * self.anteroposterior_mm * self.craniocaudal_mm * ELLIPSOID_FACTOR / 1000


def volume_ml(mask: Mask, grid: Geometry) -> float:
    """Voxel count times voxel volume."""
    return float(mask.sum()) * float(np.prod(grid.spacing_mm)) / 1000


def extents(mask: Mask, grid: Geometry) -> Extents:
    """How far the mask reaches along each image axis, outer voxel faces included. The mask is not empty."""
    spans = [np.ptp(np.flatnonzero(mask.any(axis=_others(axis)))) + 1 for axis in range(3)]
    z, y, x = (float(n) * s for n, s in zip(spans, grid.spacing_mm, strict=True))
    return Extents(transverse_mm=x, anteroposterior_mm=y, craniocaudal_mm=z)


def _others(axis: int) -> tuple[int, ...]:
    return tuple(a for a in range(3) if a != axis)


def centroid_lps_mm(mask: Mask, grid: Geometry) -> Vector:
    """The mean position of the mask's voxels in LPS mm."""
    x, y, z = grid.to_lps_mm(np.argwhere(mask).mean(axis=0))[0]
    return (float(x), float(y), float(z))


def longest_diameter_in_plane_mm(mask: Mask, grid: Geometry) -> float:
    """The longest straight line inside one slice (RECIST's sense), measured between voxel faces."""
    _, y, x = grid.spacing_mm
    slices = [np.argwhere(mask[k]) * (y, x) for k in np.flatnonzero(mask.any(axis=(1, 2)))]
    return max(_feret(points, np.array([y, x])) for points in slices)


def longest_diameter_3d_mm(mask: Mask, grid: Geometry) -> float:
    """The longest straight line through the mask, measured between voxel faces."""
    spacing = np.array(grid.spacing_mm)
    return _feret(np.argwhere(mask) * spacing, spacing)


def _feret(centres: npt.NDArray[np.floating], spacing: npt.NDArray[np.floating]) -> float:
    """The largest distance between points on the faces of voxels: each centre is spread to its face centres,
    so that n voxels in a row measure n voxels, and a diagonal is not stretched to the far corners."""
    faces = np.concatenate([centres + sign * offset for sign in (-0.5, 0.5) for offset in np.diag(spacing)])
    try:
        faces = faces[ConvexHull(faces).vertices]
    except QhullError:
        faces = np.unique(faces, axis=0)
    return float(pdist(faces).max())

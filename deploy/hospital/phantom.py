"""A synthetic multi-parametric prostate MRI study whose truth is known.

`truth(spec)` says what is in it, `phantom_image.volumes` paints it, `phantom_dicom.write_phantom` writes it as a
DICOM study. Everything is a function of the spec: the same spec gives the same bytes.

Anatomy is described in mm from the gland's centre along the image axes of the axial series:
x along the rows (to the patient's left), y along the columns (to the back), z along the slice normal
(to the head). The axial series are oblique (tilted about the left-right axis), as real ones are, and the
gland's centre lies well to the left of the coordinate origin: a side read off the sign of x is wrong.
"""

import math
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Point = tuple[float, float, float]


@dataclass(frozen=True)
class PhantomLesion:
    """An ellipsoid: centre in LPS mm, and its diameters in mm along image rows, columns and normal."""

    centre_lps_mm: Point
    diameters_mm: Point
    adc_um2_s: float = 620.0


@dataclass(frozen=True)
class PhantomSpec:
    """What the phantom is: the patient, the study, and the anatomy (mm, LPS)."""

    patient_id: str = "WETREAD-0001"
    patient_name: str = "Phantom^Peter"
    birth_date: date = date(1958, 4, 12)
    sex: str = "M"
    accession: str = "ACC-0001"
    study_date: date = date(2026, 3, 2)
    study_time: str = "101500"
    gland_centre_lps_mm: Point = (20.0, 14.0, -32.0)
    gland_semi_axes_mm: Point = (26.0, 19.5, 19.0)
    tilt_deg: float = 18.0
    lesions: tuple[PhantomLesion, ...] = field(default_factory=lambda: (right_peripheral_lesion(),))
    growth_factor: float = 1.0
    """Multiplies every lesion's diameters: a prior or a follow-up study of the same patient."""
    high_b_s_mm2: int = 1400
    noise_seed: int = 20260302


@dataclass(frozen=True)
class LesionTruth:
    """One lesion as painted. `side` is the patient's, `zone` PZ or TZ by the lesion's centre."""

    volume_ml: float
    diameters_mm: Point
    longest_diameter_mm: float
    centroid_lps_mm: Point
    side: str
    zone: str
    adc_um2_s: float


@dataclass(frozen=True)
class PhantomTruth:
    """The gland (volume of the ellipsoid, diameters along rows, columns, normal) and the lesions."""

    gland_volume_ml: float
    gland_diameters_mm: Point
    gland_centroid_lps_mm: Point
    lesions: tuple[LesionTruth, ...]


@dataclass(frozen=True)
class Grid:
    """Where a series' voxels are: `shape` (slices, rows, columns), LPS mm of voxel (0, 0, 0), unit vectors
    along a row, a column and the normal, and spacing in mm (slice, row, column)."""

    shape: tuple[int, int, int]
    origin_lps_mm: Floats
    row: Floats
    column: Floats
    spacing_mm: Point

    @property
    def normal(self) -> Floats:
        """Row direction x column direction."""
        normal: Floats = np.cross(self.row, self.column)
        return normal

    def slice_origin(self, index: float) -> Floats:
        """LPS mm of the first voxel of slice `index` (ImagePositionPatient)."""
        origin: Floats = self.origin_lps_mm + index * self.spacing_mm[0] * self.normal
        return origin

    def slice_points(self, index: float) -> Floats:
        """LPS mm of every voxel centre of slice `index`: (rows, columns, 3)."""
        rows = np.arange(self.shape[1])[:, None, None] * self.spacing_mm[1]
        columns = np.arange(self.shape[2])[None, :, None] * self.spacing_mm[2]
        points: Floats = self.slice_origin(index) + rows * self.column + columns * self.row
        return points


def right_peripheral_lesion() -> PhantomLesion:
    """12 mm, wholly inside the right peripheral zone of the default gland, mid-gland, posterolateral."""
    return PhantomLesion(_default_lps(-14.5, 9.0, 0.0), (12.0, 12.0, 12.0))


def left_transition_lesion() -> PhantomLesion:
    """10 x 8 x 9 mm, wholly inside the left transition zone of the default gland."""
    return PhantomLesion(_default_lps(7.0, -5.5, 2.0), (10.0, 8.0, 9.0), 680.0)


def _default_lps(x: float, y: float, z: float) -> Point:
    """LPS mm of a point given in the default phantom's axes."""
    angle = math.radians(18.0)
    lps = (20.0 + x, 14.0 + y * math.cos(angle) + z * math.sin(angle))
    return (*lps, -32.0 - y * math.sin(angle) + z * math.cos(angle))


def axes(spec: PhantomSpec) -> Floats:
    """Rows: the unit vectors x, y, z of the phantom in LPS; x and y are ImageOrientationPatient."""
    c, s = math.cos(math.radians(spec.tilt_deg)), math.sin(math.radians(spec.tilt_deg))
    return np.array([(1.0, 0.0, 0.0), (0.0, c, -s), (0.0, s, c)])


def truth(spec: PhantomSpec) -> PhantomTruth:
    """What is in the phantom, from its geometry and not from its voxels."""
    return PhantomTruth(
        gland_volume_ml=_ellipsoid_ml(_doubled(spec.gland_semi_axes_mm)),
        gland_diameters_mm=_doubled(spec.gland_semi_axes_mm),
        gland_centroid_lps_mm=spec.gland_centre_lps_mm,
        lesions=tuple(_lesion_truth(spec, lesion) for lesion in spec.lesions),
    )


def _lesion_truth(spec: PhantomSpec, lesion: PhantomLesion) -> LesionTruth:
    diameters = _grown(spec, lesion)
    centre = local_mm(spec, np.array(lesion.centre_lps_mm))
    return LesionTruth(
        volume_ml=_ellipsoid_ml(diameters),
        diameters_mm=diameters,
        longest_diameter_mm=max(diameters),
        centroid_lps_mm=lesion.centre_lps_mm,
        side="right" if centre[0] < 0 else "left",
        zone="TZ" if in_transition(spec, centre) else "PZ",
        adc_um2_s=lesion.adc_um2_s,
    )


def _doubled(semi: Point) -> Point:
    return 2 * semi[0], 2 * semi[1], 2 * semi[2]


def _grown(spec: PhantomSpec, lesion: PhantomLesion) -> Point:
    a, b, c = lesion.diameters_mm
    return a * spec.growth_factor, b * spec.growth_factor, c * spec.growth_factor


def _ellipsoid_ml(diameters_mm: Point) -> float:
    return math.pi / 6 * math.prod(diameters_mm) / 1000


def axial_grid(spec: PhantomSpec, shape: tuple[int, int, int], spacing_mm: Point, shift_mm: Point) -> Grid:
    """An oblique axial grid whose centre lies `shift_mm` (x, y, z of the phantom) from the gland's."""
    x, y, z = axes(spec)
    half = [(n - 1) / 2 * step for n, step in zip(shape, spacing_mm, strict=True)]
    offset = (shift_mm[0] - half[2]) * x + (shift_mm[1] - half[1]) * y + (shift_mm[2] - half[0]) * z
    return Grid(shape, np.array(spec.gland_centre_lps_mm) + offset, x, y, spacing_mm)


def t2_axial_grid(spec: PhantomSpec) -> Grid:
    """384 x 384 x 19 at 0.5 x 0.5 x 3 mm."""
    return axial_grid(spec, (19, 384, 384), (3.0, 0.5, 0.5), (0.0, -4.0, 1.2))


def diffusion_grid(spec: PhantomSpec) -> Grid:
    """84 columns x 128 rows x 19 at 2 x 2 x 3 mm; its voxels do not line up with those of T2."""
    return axial_grid(spec, (19, 128, 84), (3.0, 2.0, 2.0), (0.7, -3.6, 1.2))


def t2_sagittal_grid(spec: PhantomSpec) -> Grid:
    """160 x 160 x 13 at 1.125 x 1.125 x 3.6 mm, straight sagittal (rows to the back, columns down)."""
    back, down = np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, -1.0])
    left = np.cross(back, down)
    corner = -79.5 * 1.125 * (back + down) - 6 * 3.6 * left
    return Grid((13, 160, 160), np.array(spec.gland_centre_lps_mm) + corner, back, down, (3.6, 1.125, 1.125))


def truth_masks(spec: PhantomSpec, grid: Grid) -> dict[str, NDArray[np.uint8]]:
    """`gland` (1), `zones` (1 PZ, 2 TZ; lesions belong to their zone) and `lesions` (1..n) on a grid."""
    gland, zones, lesions = (np.zeros(grid.shape, np.uint8) for _ in range(3))
    for index in range(grid.shape[0]):
        local = local_mm(spec, grid.slice_points(index))
        gland[index] = ellipsoid(local, (0, 0, 0), spec.gland_semi_axes_mm) <= 1
        zones[index] = gland[index] * np.where(in_transition(spec, local), 2, 1)
        for number, lesion in enumerate(spec.lesions, start=1):
            lesions[index][in_lesion(spec, local, lesion)] = number
    return {"gland": gland, "zones": zones, "lesions": lesions}


def local_mm(spec: PhantomSpec, points_lps: Floats) -> Floats:
    """x, y, z of the phantom of points given in LPS mm (last axis)."""
    local: Floats = (points_lps - np.array(spec.gland_centre_lps_mm)) @ axes(spec).T
    return local


def ellipsoid(local: Floats, centre: Point, semi: Point) -> Floats:
    """Squared distance from the centre in units of the ellipsoid: 1 on its surface, less inside."""
    total: Floats = sum(
        (((local[..., i] - centre[i]) / semi[i]) ** 2 for i in range(3)), start=np.zeros(local.shape[:-1])
    )
    return total


def transition_distance(spec: PhantomSpec, local: Floats) -> Floats:
    """Of the transition zone: an ellipsoid in the gland's front half, ending above its apex."""
    a, b, c = spec.gland_semi_axes_mm
    return ellipsoid(local, (0, -0.27 * b, 0.12 * c), (0.62 * a, 0.62 * b, 0.78 * c))


def in_transition(spec: PhantomSpec, local: Floats) -> NDArray[np.bool_]:
    """Whether each point belongs to the transition zone."""
    return transition_distance(spec, local) <= 1


def in_lesion(spec: PhantomSpec, local: Floats, lesion: PhantomLesion) -> NDArray[np.bool_]:
    """Whether each point belongs to this lesion, grown as the spec says."""
    a, b, c = _grown(spec, lesion)
    x, y, z = local_mm(spec, np.array(lesion.centre_lps_mm))
    return ellipsoid(local, (x, y, z), (a / 2, b / 2, c / 2)) <= 1

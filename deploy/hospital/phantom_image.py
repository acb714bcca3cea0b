"""Paints the phantom: which tissue is where, and what each series makes of it.

Anatomy is described in mm from the gland's centre along the phantom's axes (see `phantom.axes`). Signals
were set to resemble a real 3 T study (PROSTATEx): T2 in its units, ADC in 1e-6 mm2/s, high-b from the
mono-exponential model S0 exp(-b ADC).
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from deploy.hospital.phantom import (
    Floats,
    Grid,
    PhantomSpec,
    diffusion_grid,
    ellipsoid,
    in_lesion,
    in_transition,
    local_mm,
    t2_axial_grid,
    t2_sagittal_grid,
    transition_distance,
)

Image = NDArray[np.uint16]
Tissues = NDArray[np.uint8]


class Tissue(IntEnum):
    """What a point is made of; the row of `SIGNALS`."""

    AIR = 0
    FAT = 1
    MUSCLE = 2
    MARROW = 3
    CORTEX = 4
    URINE = 5
    WALL = 6
    VEINS = 7
    PERIPHERAL = 8
    TRANSITION = 9
    CAPSULE = 10
    LESION = 11


# T2 signal, b=0 signal of the (fat-suppressed) diffusion series, ADC in 1e-6 mm2/s.
SIGNALS = np.array(
    [
        (4, 0, 0),
        (430, 4, 0),
        (62, 62, 1350),
        (300, 3, 0),
        (30, 2, 0),
        (700, 330, 2850),
        (85, 70, 1250),
        (300, 60, 1700),
        (355, 190, 1620),
        (165, 105, 1260),
        (70, 90, 1250),
        (115, 135, 620),
    ],
    np.float32,
)


def volumes(spec: PhantomSpec) -> dict[str, tuple[Grid, Image]]:
    """The series by role (`t2w`, `t2w_sagittal`, `adc`, `hbv`), each with its grid: (z, y, x) 12-bit."""
    random = np.random.default_rng(spec.noise_seed)
    t2, sagittal, diffusion = t2_axial_grid(spec), t2_sagittal_grid(spec), diffusion_grid(spec)
    adc, high_b = _diffusion(spec, diffusion, random)
    return {
        "t2w": (t2, _t2(spec, t2, random)),
        "t2w_sagittal": (sagittal, _t2(spec, sagittal, random)),
        "adc": (diffusion, adc),
        "hbv": (diffusion, high_b),
    }


def _t2(spec: PhantomSpec, grid: Grid, random: np.random.Generator) -> Image:
    image = np.stack([_t2_slice(spec, grid, index) for index in range(grid.shape[0])])
    sharp = ndimage.gaussian_filter(image, (0, 0.7, 0.7))
    return _stored(_rician(sharp, 13.0, random))


def _t2_slice(spec: PhantomSpec, grid: Grid, index: int) -> Floats:
    """The mean of two sub-slices, for the partial volume that a 3 mm slice has."""
    mean: Floats = np.mean([_t2_signal(spec, grid, index + part) for part in (-0.25, 0.25)], axis=0)
    return mean


def _t2_signal(spec: PhantomSpec, grid: Grid, index: float) -> Floats:
    local = _single(local_mm(spec, grid.slice_points(index)))
    tissue = _tissue(spec, local)
    signal = SIGNALS[tissue, 0]
    for kind, strength in ((Tissue.TRANSITION, 70.0), (Tissue.PERIPHERAL, 45.0), (Tissue.FAT, 34.0)):
        where = tissue == kind
        signal[where] += strength * _texture(local[where], coarse=kind == Tissue.FAT)
    # The receiving coils lie on the skin, in front and behind: the middle is a little darker.
    received: Floats = np.clip(signal, 0, None) * (0.93 + 0.25 * (local[..., 1] / 96) ** 2)
    return received


def _diffusion(spec: PhantomSpec, grid: Grid, random: np.random.Generator) -> tuple[Image, Image]:
    """ADC (1e-6 mm2/s) and calculated high-b; both 0 where the signal drowns in noise, as scanners do."""
    b0, adc = (np.stack(parts) for parts in zip(*(_diffusion_slice(spec, grid, i) for i in range(19)), strict=True))
    b0, adc = (ndimage.gaussian_filter(part, (0, 0.35, 0.35)) for part in (b0, adc))
    signal = b0 * np.exp(-spec.high_b_s_mm2 * adc * 1e-6)
    lost = b0 + random.normal(0, 6, b0.shape) < 26
    noisy_adc = adc + random.normal(0, 70, adc.shape)
    noisy_signal = _rician(signal, 1.2, random)
    return _stored(np.where(lost, 0, noisy_adc)), _stored(np.where(lost, 0, noisy_signal))


def _diffusion_slice(spec: PhantomSpec, grid: Grid, index: int) -> tuple[Floats, Floats]:
    """b=0 signal and ADC of one slice, each voxel the mean of 2 x 2 x 2 points in it."""
    b0, weighted = np.zeros(grid.shape[1:]), np.zeros(grid.shape[1:])
    for part in (-0.25, 0.25):
        centres = grid.slice_points(index + part)
        for down in (-0.25, 0.25):
            for across in (-0.25, 0.25):
                points = centres + 2.0 * (down * grid.column + across * grid.row)
                signal, adc = _diffusion_signal(spec, _single(local_mm(spec, points)))
                b0 += signal / 8
                weighted += signal * adc / 8
    return b0, weighted / np.maximum(b0, 1e-6)


def _diffusion_signal(spec: PhantomSpec, local: Floats) -> tuple[Floats, Floats]:
    tissue = _tissue(spec, local)
    adc = SIGNALS[tissue, 2]
    for lesion in spec.lesions:
        adc[in_lesion(spec, local, lesion)] = lesion.adc_um2_s
    for kind, strength in ((Tissue.TRANSITION, 60.0), (Tissue.PERIPHERAL, 90.0)):
        where = tissue == kind
        adc[where] += strength * _texture(local[where], coarse=False)
    return SIGNALS[tissue, 1], adc


def _tissue(spec: PhantomSpec, local: Floats) -> Tissues:
    """The `Tissue` at each point (x, y, z in the last axis); later structures cover earlier ones."""
    x, y, z = _bent(local)
    tissue = np.full(x.shape, Tissue.AIR, np.uint8)
    tissue[(x / 190) ** 2 + ((y - 32) / 118) ** 2 <= 1] = Tissue.FAT
    _paint_walls(tissue, x, y, z)
    _paint_bones(tissue, x, y, z)
    _paint_bladder(tissue, np.stack((x, y, z), axis=-1))
    _paint_rectum(tissue, x, y, z)
    _paint_gland(tissue, spec, local)
    return tissue


def _bent(local: Floats) -> tuple[Floats, Floats, Floats]:
    """|x|, y and z with gentle waves, for bodies are not drawn with compasses; the gland stays unbent."""
    x, y, z = local[..., 0], local[..., 1], local[..., 2]
    bent_x = x + 2.4 * np.sin(y / 15 + z / 21) + 1.1 * np.sin(y / 6.1 + 1.3)
    bent_y = y + 2.0 * np.sin(x / 14 + z / 17) + 0.9 * np.sin(x / 5.3 - 0.4)
    return np.abs(bent_x), bent_y, z


def _paint_walls(tissue: Tissues, x: Floats, y: Floats, z: Floats) -> None:
    """Obturator internus at both sides, levator ani inside it, rectus in front, gluteus behind."""
    side = (x / (59 + 0.12 * z)) ** 2 + ((y - 2) / 72) ** 2
    inner = (x / (44 + 0.25 * z)) ** 2 + ((y - 2) / 66) ** 2
    tissue[(side <= 1) & (inner > 1) & (x > 20) & (y < 52)] = Tissue.MUSCLE
    sling = (x / 33) ** 2 + ((y - 14) / 44) ** 2
    tissue[(sling <= 1) & (sling > 0.86) & (y > -8) & (z < 12)] = Tissue.MUSCLE
    tissue[((x - 14) / 13) ** 2 + ((y + 74) / 5.5) ** 2 <= 1] = Tissue.MUSCLE
    tissue[((x - 82) / 52) ** 2 + ((y - 84) / 20) ** 2 <= 1] = Tissue.MUSCLE
    tissue[((x - 84) / 16) ** 2 + ((y + 52) / 13) ** 2 <= 1] = Tissue.MUSCLE


def _paint_bones(tissue: Tissues, x: Floats, y: Floats, z: Floats) -> None:
    """Femoral head with its cortex at each side, ischium behind it, and the pubis in front, low down."""
    for centre_x, centre_y, radius in ((92, -4, 24), (80, 42, 13)):
        distance = np.hypot(x - centre_x, y - centre_y)
        tissue[distance <= radius + 2.5] = Tissue.CORTEX
        tissue[distance <= radius] = Tissue.MARROW
    pubis = ((x - 17) / 19) ** 2 + ((y + 50) / 11) ** 2 + ((z + 26) / 20) ** 2
    tissue[pubis <= 1.25] = Tissue.CORTEX
    tissue[(pubis <= 1) & (x > 2.5)] = Tissue.MARROW


def _paint_bladder(tissue: Tissues, local: Floats) -> None:
    centre = (0.0, -25.0, 31.0)
    tissue[ellipsoid(local, centre, (38, 28, 25)) <= 1] = Tissue.WALL
    tissue[ellipsoid(local, centre, (34, 24, 21)) <= 1] = Tissue.URINE


def _paint_rectum(tissue: Tissues, x: Floats, y: Floats, z: Floats) -> None:
    """A tube with a muscular wall and air in it, running backwards on its way up."""
    middle = 37 + 0.15 * z
    tissue[np.hypot(x / 15.5, (y - middle) / 14) <= 1] = Tissue.WALL
    tissue[np.hypot(x / 10, (y - middle) / 8.5) <= 1] = Tissue.AIR


def _paint_gland(tissue: Tissues, spec: PhantomSpec, local: Floats) -> None:
    """Veins around it, a thin dark capsule, the bright peripheral and the dark transition zone, lesions."""
    semi = spec.gland_semi_axes_mm
    distance = ellipsoid(local, (0, 0, 0), semi)
    near = (distance <= 1.28) & (local[..., 1] < 12) & (tissue == Tissue.FAT)
    tissue[near] = Tissue.VEINS
    gland = distance <= 1
    transition = gland & in_transition(spec, local)
    tissue[gland] = Tissue.CAPSULE
    tissue[distance <= 0.93] = Tissue.PERIPHERAL
    tissue[transition] = Tissue.CAPSULE
    tissue[transition & (transition_distance(spec, local) <= 0.9)] = Tissue.TRANSITION
    for lesion in spec.lesions:
        tissue[in_lesion(spec, local, lesion)] = Tissue.LESION


def _texture(local: Floats, *, coarse: bool) -> Floats:
    """A smooth, fixed pattern of about -1..1 in space, the same in every series."""
    waves = np.random.default_rng(7).normal(0, 0.12 if coarse else 0.55, (6, 3))
    phases = np.arange(6) * 1.7
    pattern: Floats = np.sin(local @ waves.T + phases).sum(axis=-1) / 2.4
    return pattern


def _single(local: Floats) -> Floats:
    """In single precision: micrometres are exact enough here, and it halves the time."""
    return local.astype(np.float32)


def _rician(signal: Floats, sigma: float, random: np.random.Generator) -> Floats:
    """Magnitude of the signal with Gaussian noise in both channels, as MR images have."""
    real, imaginary = random.normal(0, sigma, (2, *signal.shape))
    magnitude: Floats = np.hypot(signal + real, imaginary)
    return magnitude


def _stored(image: Floats) -> Image:
    return np.clip(np.rint(image), 0, 4095).astype(np.uint16)

"""Finds the prostate, its zones and suspicious spots on a multi-parametric MRI with a classical method.

REFERENCE FOR WIRING ONLY. Not a cleared medical device, not validated, not for clinical use.

Arrays are [z, y, x] on the T2 grid: z ascends along the slice normal (towards the head), rows (y) run towards
the patient's back and columns (x) towards the patient's left, as in every axial series stored the usual way
(ImageOrientationPatient near 1,0,0,0,1,0). `spacing` is (z, y, x) in mm. ADC is in 1e-6 mm2/s. NaN means
"no data here" (outside a resampled field of view) and counts neither for nor against the gland.

1. Evidence. On a grid of about 2 mm, each voxel gets two numbers in -1..1 from fuzzy limits on ADC, high-b
   signal and T2: how much it looks like any prostate tissue, and how much like normal peripheral zone.
2. Gland. A sheared ellipsoid with an inner, forward-shifted ellipsoid (the transition zone) is fitted so that
   tissue and peripheral-zone evidence inside differ most from those in a shell around it, with a weak prior on
   place (middle of the stack) and size. The surface then moves up to about a sixth of the radius to the evidence.
3. Zones. The inner ellipsoid, moved by peripheral-zone evidence.
4. Candidates. Low ADC and high high-b signal as robust z-scores within each zone; connected, limited in size.
5. Scores. Fixed thresholds on contrast with the zone's median, and the 15 mm limit of PI-RADS v2.1.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize, spatial

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Volumes = tuple[Array, Array, Array]  # T2, ADC, high-b

COARSE_GRID_MM, SEARCH_GRID_MM = 4.0, 2.0
SEARCH_HALF_Y_MM = 60.0
SEARCH_HALF_X_MM = 55.0
MIN_SLICES = 5
MIN_EXTENT_MM = (12.0, 40.0, 40.0)
MIN_CONTRAST = 1.0  # of at most 5; a fit below this found no gland
GLAND_ML = (10.0, 250.0)

# Centre z, y, x (mm from the middle of the stack), log of the half axes z, y, x (mm), shear dy/dz.
# Half axes of a 40 mL gland; the spread covers about 15 to 150 mL.
SHAPE_MEAN = np.array([0.0, 0.0, 0.0, np.log(18.0), np.log(18.0), np.log(25.0), 0.0])
SHAPE_SPREAD = np.array([12.0, 15.0, 8.0, 0.3, 0.3, 0.25, 0.4])
PRIOR_WEIGHT = 0.05

PERIPHERAL_FLOOR = -0.5  # a dark rim moves a surface only half as far

LESION_ML = (0.1, 25.0)
LESION_Z = 1.6  # mean of the ADC and high-b robust z-scores
LESION_CORE = 0.6  # of the spot's peak
LESION_MEAN_Z = 2.1  # of the core that is left
LESION_ADC_MAX = 1250.0
MAX_LESIONS = 9
LARGE_MM = 15.0  # PI-RADS v2.1: category 5 from 15 mm
MARKED, MODERATE = 0.25, 0.12  # relative contrast with the zone's median


class UnusableInput(ValueError):
    """The arrays cannot be read; the message names the tensor and what is wrong with it."""


@dataclass(frozen=True)
class Answer:
    """uint8 masks [z,y,x] (gland 1; zones 1 peripheral, 2 transition; lesions 1..n) and float32 scores [n,4]."""

    gland: NDArray[np.uint8]
    zones: NDArray[np.uint8]
    lesions: NDArray[np.uint8]
    scores: NDArray[np.float32]


@dataclass(frozen=True)
class Grid:
    """Broadcastable mm coordinates (z, y, x) of a grid's voxel centres, from the middle of the T2 stack."""

    z: Array
    y: Array
    x: Array


def read_prostate(t2w: Array, adc: Array, hbv: Array, spacing: Array) -> Answer:
    """Gland, zones, lesion candidates and their scores. Deterministic. Raises `UnusableInput`."""
    check(t2w, adc, hbv, spacing)
    shape = fit_gland(t2w, adc, hbv, spacing)
    empty = np.zeros(t2w.shape, np.uint8)
    if shape is None:
        return Answer(empty, empty, empty, np.zeros((0, 4), np.float32))
    gland, zones = outline(shape, t2w, adc, hbv, spacing)
    if not gland.any():
        return Answer(empty, empty, empty, np.zeros((0, 4), np.float32))
    lesions, scores = candidates(zones, t2w, adc, hbv, spacing)
    return Answer(gland.astype(np.uint8), zones, lesions, scores)


def check(t2w: Array, adc: Array, hbv: Array, spacing: Array) -> None:
    """Refuses what cannot be a prostate study, naming the tensor."""
    if spacing.shape != (3,) or not np.all(np.isfinite(spacing)) or np.any(spacing <= 0):
        raise UnusableInput(f"spacing must be three positive mm values (z, y, x), got {spacing.tolist()}")
    for name, array in (("t2w", t2w), ("adc", adc), ("hbv", hbv)):
        if array.ndim != 3:
            raise UnusableInput(f"{name} must be [z,y,x], got {array.ndim} dimensions")
        if array.shape != t2w.shape:
            raise UnusableInput(f"{name} has shape {array.shape}, t2w has {t2w.shape}; all must share the T2 grid")
    if t2w.shape[0] < MIN_SLICES:
        raise UnusableInput(f"t2w has {t2w.shape[0]} slices, at least {MIN_SLICES} are needed")
    extent = np.array(t2w.shape) * spacing
    if np.any(extent < MIN_EXTENT_MM):
        raise UnusableInput(f"t2w covers {extent.round(1).tolist()} mm (z, y, x), too little for a prostate")
    for name, array in (("t2w", t2w), ("adc", adc), ("hbv", hbv)):
        _check_values(name, array)


def _check_values(name: str, array: Array) -> None:
    finite = np.isfinite(array)
    if not finite.any():
        raise UnusableInput(f"{name} has no finite value")
    values = array[finite]
    if values.min() == values.max():
        raise UnusableInput(f"{name} is {values[0]:g} everywhere, there is no image in it")


def fit_gland(t2w: Array, adc: Array, hbv: Array, spacing: Array) -> Array | None:
    """The seven shape parameters (see SHAPE_MEAN) that set the gland off best, or None when nothing does."""
    coarse = _search_grid((t2w, adc, hbv), spacing, COARSE_GRID_MM)
    first = [_best_shape(start, *coarse) for start in _starts()]
    volumes, grid = _search_grid((t2w, adc, hbv), spacing, SEARCH_GRID_MM)
    shape, _ = _best_shape(min(first, key=lambda fit: fit[1])[0], volumes, grid)
    return shape if contrast(shape, *evidence(*volumes, grid), grid) >= MIN_CONTRAST else None


def _best_shape(start: Array, volumes: Volumes, grid: Grid) -> tuple[Array, float]:
    """The nearest best shape and its cost: the weak prior less the contrast."""
    tissue, peripheral = evidence(*volumes, grid)

    def cost(shape: Array) -> float:
        prior = float((((shape - SHAPE_MEAN) / SHAPE_SPREAD) ** 2).sum())
        return 0.5 * PRIOR_WEIGHT * prior - contrast(shape, tissue, peripheral, grid)

    fit = optimize.minimize(cost, start, method="Powell", options={"maxiter": 8, "xtol": 1e-2, "ftol": 1e-3})
    return np.asarray(fit.x), float(fit.fun)


def _starts() -> list[Array]:
    offsets = [(dz, dy, size) for dz in (-8.0, 8.0) for dy in (-10.0, 10.0) for size in (0.0, 0.3)]
    return [SHAPE_MEAN + np.array([dz, dy, 0, size, size, size, 0]) for dz, dy, size in offsets]


def contrast(shape: Array, tissue: Array, peripheral: Array, grid: Grid) -> float:
    """How far the evidence inside the shape, and in its zones, exceeds that of the shell around it (at most 5)."""
    radius, inner, back = radii(shape, grid)
    inside = _step(1 - radius, 14)
    shell = _step(1.3 - radius, 14) - inside
    transition = inside * _step(1 - inner, 10)
    rim = (inside - transition) * _step(back + 0.5, 8)
    outer_rim = shell * _step(back + 0.2, 8)
    return (
        _mean(peripheral, rim)
        - _mean(peripheral, outer_rim)
        + _mean(tissue, inside)
        - _mean(tissue, shell)
        + 0.5 * _mean(tissue, transition)
    )


def radii(shape: Array, grid: Grid) -> tuple[Array, Array, Array]:
    """Ellipsoid radius (1 on the surface), the same for the transition zone, and the backward coordinate."""
    depth, height, width = np.exp(shape[3:6])
    up = (grid.z - shape[0]) / depth
    back = (grid.y - shape[1] - shape[6] * (grid.z - shape[0])) / height
    left = (grid.x - shape[2]) / width
    dent = 0.25 * np.clip(back - 0.5, 0, None) * np.exp(-((left / 0.4) ** 2))  # the rectum's
    outer = np.sqrt(up**2 + back**2 + left**2) + dent
    inner = np.sqrt((up / 0.8) ** 2 + ((back + 0.3) / 0.75) ** 2 + (left / 0.62) ** 2)
    return outer, inner, back


def evidence(t2w: Array, adc: Array, hbv: Array, grid: Grid) -> tuple[Array, Array]:
    """Fuzzy likeness, -1..1, to prostate tissue and to normal peripheral zone; 0 where the diffusion is missing.

    ADC limits are quantitative: muscle and cancer lie above 600, peripheral zone around 1500 to 2200, urine
    above 2600 (1e-6 mm2/s). High-b is relative to the middle of the stack, T2 to its dark (muscle) end.
    """
    known = np.isfinite(adc) & np.isfinite(hbv) & np.isfinite(t2w)
    smooth_adc, smooth_hbv = (ndimage.gaussian_filter(np.nan_to_num(v), (0, 0.7, 0.7)) for v in (adc, hbv))
    middle = radii(SHAPE_MEAN, grid)[0] < 0.8
    relative_b = smooth_hbv / _reference(hbv[middle], 50)
    high_b = _fuzzy(relative_b, 0.3, 0.7, 2.5, 5)
    bright = np.nan_to_num(t2w) / _reference(t2w, 15)
    tissue = np.minimum(_fuzzy(smooth_adc, 600, 950, 2200, 2600), _fuzzy(bright, 0, 1.2, 9, 14))
    peripheral = np.minimum(_fuzzy(smooth_adc, 1150, 1550, 2200, 2600), _fuzzy(bright, 1, 4, 20, 30))
    # A cancer at the rim must not be cut out of the gland: low ADC with high high-b signal is tissue too.
    cancer = np.minimum(_fuzzy(smooth_adc, 200, 500, 2200, 2600), _fuzzy(relative_b, 1.2, 1.7, 6, 12))
    tissue = np.maximum(np.minimum(tissue, high_b), cancer)
    return np.where(known, tissue, 0), np.where(known, np.minimum(peripheral, high_b), 0)


def outline(shape: Array, t2w: Array, adc: Array, hbv: Array, spacing: Array) -> tuple[Mask, NDArray[np.uint8]]:
    """Gland mask and zones on the T2 grid: the fitted shape, its surface moved a little to the evidence."""
    volumes, coarse = _search_grid((t2w, adc, hbv), spacing, SEARCH_GRID_MM)
    whole = _grid(t2w.shape, spacing)
    box = _box(shape, whole)
    fine = Grid(whole.z[box[0]], whole.y[:, box[1]], whole.x[:, :, box[2]])
    tissue, peripheral = (
        _to_fine(ndimage.gaussian_filter(v, (0.5, 1, 1)), coarse, fine) for v in evidence(*volumes, coarse)
    )
    radius, inner, _ = radii(shape, fine)
    rim = np.maximum(peripheral, PERIPHERAL_FLOOR)
    # Tissue evidence is as high in the rectal wall and levator, so it may only take away.
    inside = _one_piece((1 - radius) + 0.08 * (tissue - 1) + 0.06 * (rim + 0.5) > 0)
    volume_ml = inside.sum() * float(np.prod(spacing)) / 1000
    if not GLAND_ML[0] <= volume_ml <= GLAND_ML[1]:
        inside[:] = False
    gland, zones = np.zeros(t2w.shape, bool), np.zeros(t2w.shape, np.uint8)
    gland[box] = inside
    zones[box] = np.where(inside, np.where((1 - inner) - 0.2 * rim > 0, 2, 1), 0)
    return gland, zones


def _box(shape: Array, grid: Grid) -> tuple[slice, slice, slice]:
    """The slices that hold the shape and a margin."""
    radius = radii(shape, grid)[0]
    near = np.argwhere(radius <= max(1.3, float(radius.min())))
    low, high = near.min(axis=0), near.max(axis=0) + 1
    return slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2])


def _one_piece(mask: Mask) -> Mask:
    """The largest connected part, holes in its slices filled."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    largest = labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    return np.stack([ndimage.binary_fill_holes(each) for each in largest])


def candidates(
    zones: NDArray[np.uint8], t2w: Array, adc: Array, hbv: Array, spacing: Array
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Labels 1..n (most conspicuous first) and their scores [n,4]; n is at most MAX_LESIONS."""
    box = ndimage.find_objects((zones > 0).astype(np.uint8))[0]
    inside = zones[box], t2w[box], adc[box], hbv[box]
    conspicuity = _conspicuity(inside[0], inside[2], inside[3], spacing)
    found = _spots(conspicuity, spacing)[:MAX_LESIONS]
    labels = np.zeros(zones.shape, np.uint8)
    scores = np.zeros((len(found), 4), np.float32)
    for index, (strength, mask) in enumerate(found):
        labels[box][mask] = index + 1
        scores[index] = _scores(mask, strength, *inside, spacing)
    return labels, scores


def _spots(conspicuity: Array, spacing: Array) -> list[tuple[float, Mask]]:
    """Connected conspicuous spots of a plausible size, each cut at a share of its own peak; strongest first."""
    voxel_ml = float(np.prod(spacing)) / 1000
    labels, count = ndimage.label(conspicuity > LESION_Z)
    found = []
    for label in range(1, count + 1):
        values = np.where(labels == label, conspicuity, -np.inf)
        core = _one_piece(values > max(LESION_Z, LESION_CORE * values.max()))
        strength = float(conspicuity[core & np.isfinite(conspicuity)].mean())
        if strength >= LESION_MEAN_Z and LESION_ML[0] <= core.sum() * voxel_ml <= LESION_ML[1]:
            found.append((strength, core))
    return sorted(found, key=lambda each: -each[0])


def _conspicuity(zones: NDArray[np.uint8], adc: Array, hbv: Array, spacing: Array) -> Array:
    """Mean robust z-score of low ADC and high high-b signal within the voxel's own zone; -inf elsewhere."""
    sigma = (0, 1.5 / spacing[1], 1.5 / spacing[2])
    smooth_adc, smooth_hbv = (ndimage.gaussian_filter(np.nan_to_num(v), sigma) for v in (adc, hbv))
    known = np.isfinite(adc) & np.isfinite(hbv)
    result = np.full(zones.shape, -np.inf)
    for zone in (1, 2):
        here = (zones == zone) & known
        if here.sum() < 100:
            continue
        low_adc, high_b = -_robust_z(smooth_adc, here), _robust_z(smooth_hbv, here)
        both = np.minimum(low_adc, high_b) > 0.5
        result[here] = np.where(both, np.clip(low_adc, -5, 5) + np.clip(high_b, -5, 5), -np.inf)[here] / 2
    rim_mm = ndimage.distance_transform_edt(zones > 0, sampling=spacing)
    result[(smooth_adc > LESION_ADC_MAX) | (smooth_adc <= 0) | (rim_mm < 1.0)] = -np.inf
    return result


def _scores(
    mask: Mask, strength: float, zones: NDArray[np.uint8], t2w: Array, adc: Array, hbv: Array, spacing: Array
) -> tuple[float, float, float, float]:
    """T2W score, DWI score, NaN for the DCE that is not an input, confidence 0..1."""
    zone = 1 if 2 * np.count_nonzero(zones[mask] == 1) >= mask.sum() else 2
    around = (zones == zone) & ~mask
    if not around.any():
        around = zones > 0
    dark_t2, dark_adc, bright_b = (
        sign * (float(np.nanmean(v[mask])) / _reference(v[around], 50) - 1)
        for v, sign in ((t2w, -1), (adc, -1), (hbv, 1))
    )
    large = longest_diameter_mm(mask, spacing) >= LARGE_MM
    dwi = _grade(min(dark_adc, bright_b), large)
    confidence = 1 / (1 + np.exp(-(strength - 2.5)))
    return _grade(dark_t2, large), dwi, float("nan"), float(confidence)


def _grade(relative_contrast: float, large: bool) -> float:
    """2 mild, 3 moderate, 4 marked, 5 marked and at least 15 mm; 1 no contrast."""
    if relative_contrast >= MARKED:
        return 5.0 if large else 4.0
    if relative_contrast >= MODERATE:
        return 3.0
    return 2.0 if relative_contrast > 0 else 1.0


def longest_diameter_mm(mask: Mask, spacing: Array) -> float:
    """The longest distance between two voxel centres of the mask, plus one in-plane voxel."""
    points = np.argwhere(mask & ~ndimage.binary_erosion(mask)) * spacing
    points = points[:: max(1, len(points) // 2000)]
    return float(spatial.distance.pdist(points).max(initial=0.0)) + float(spacing[1])


def _search_grid(volumes: Volumes, spacing: Array, step_mm: float) -> tuple[Volumes, Grid]:
    """Block means on a grid of about `step_mm`, cut to the middle of the field of view."""
    blocks = tuple(max(1, round(step_mm / float(s))) for s in spacing)
    fine = _grid(volumes[0].shape, spacing)
    z, y, x = (_block_mean(axis.reshape(-1), (b,)) for axis, b in zip((fine.z, fine.y, fine.x), blocks, strict=True))
    rows, columns = np.abs(y) < SEARCH_HALF_Y_MM, np.abs(x) < SEARCH_HALF_X_MM
    t2w, adc, hbv = (_block_mean(v, blocks)[:, rows][:, :, columns] for v in volumes)
    return (t2w, adc, hbv), Grid(z[:, None, None], y[rows][None, :, None], x[columns][None, None, :])


def _block_mean(volume: Array, blocks: tuple[int, ...]) -> Array:
    cut = volume[tuple(slice(0, n // b * b) for n, b in zip(volume.shape, blocks, strict=True))]
    shape = [size for n, b in zip(cut.shape, blocks, strict=True) for size in (n // b, b)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a block without data is NaN, as it should be
        return np.asarray(np.nanmean(cut.reshape(shape), axis=tuple(range(1, len(shape), 2))))


def _grid(shape: tuple[int, ...], spacing: Array) -> Grid:
    z, y, x = ((np.arange(n, dtype=np.float64) - (n - 1) / 2) * float(s) for n, s in zip(shape, spacing, strict=True))
    return Grid(z[:, None, None], y[None, :, None], x[None, None, :])


def _to_fine(volume: Array, grid: Grid, fine: Grid) -> Array:
    """Linear interpolation of a search-grid volume to a finer grid; the nearest value outside it."""
    result = volume
    for axis, (coarse, wanted) in enumerate(((grid.z, fine.z), (grid.y, fine.y), (grid.x, fine.x))):
        result = _interpolate(result, coarse.reshape(-1), wanted.reshape(-1), axis)
    return result


def _interpolate(volume: Array, known: Array, wanted: Array, axis: int) -> Array:
    place = np.interp(wanted, known, np.arange(len(known)))
    low = np.minimum(place.astype(int), max(len(known) - 2, 0))
    weight = np.expand_dims(place - low, tuple(a for a in range(volume.ndim) if a != axis))
    high = np.minimum(low + 1, len(known) - 1)
    return np.asarray(np.take(volume, low, axis) * (1 - weight) + np.take(volume, high, axis) * weight)


def _fuzzy(values: Array, low: float, full: float, still_full: float, high: float) -> Array:
    return np.interp(values, [low, full, still_full, high], [-1.0, 1.0, 1.0, -1.0])


def _step(values: Array, steepness: float) -> Array:
    return np.asarray(1 / (1 + np.exp(np.clip(-steepness * values, -60, 60))))


def _mean(values: Array, weights: Array) -> float:
    return float((values * weights).sum() / (weights.sum() + 1e-6))


def _reference(values: Array, percent: float) -> float:
    """A percentile of the positive values, never zero."""
    positive = values[np.isfinite(values) & (values > 0)]
    return float(np.percentile(positive, percent)) if positive.size else 1.0


def _robust_z(values: Array, where: Mask) -> Array:
    sample = values[where]
    middle = np.median(sample)
    spread = 1.4826 * np.median(np.abs(sample - middle))
    return np.asarray((values - middle) / max(float(spread), 1e-6))

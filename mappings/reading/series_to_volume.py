"""One series to one volume: geometry is checked, slices are ordered by position, never by number or file name.

Everything here is DICOM patient space (PS3.3 C.7.6.2.1.1): LPS millimetres.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from mappings.model.protocol import GeometryPolicy
from mappings.model.study import Geometry, InputProblem, Instance, Series, Volume

_SAME_DIRECTION_COSINE = 1 - 1e-5
"""Two unit vectors this close (0.26 degrees) count as one direction; scanners round direction cosines."""
_DIRECTION_TOLERANCE = 0.01
"""How far rounded direction cosines may be from two perpendicular unit vectors."""
_SAME_POSITION_MM = 0.01
_SIDEWAYS_TOLERANCE_MM = 0.5
_FEWEST_SLICES = 2
"""One slice alone says nothing about the distance to the next, so it makes no volume whatever a policy accepts."""

Placed = tuple[float, Instance]
"""An instance with its position along the slice normal in mm."""


class SeriesUnusable(ValueError):
    """The series cannot stand for one regular volume; `problems` names each reason and instance."""

    def __init__(self, problems: Sequence[InputProblem]) -> None:
        super().__init__("; ".join(p.message for p in problems))
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Stack:
    """Instances ordered along the slice normal with the grid they make. `notes` says what was accepted;
    `is_regular`: every slice of the grid has its instance."""

    instances: tuple[Instance, ...]
    positions_mm: tuple[float, ...]
    geometry: Geometry
    notes: tuple[str, ...] = ()
    is_regular: bool = True


def series_to_stack(series: Series, policy: GeometryPolicy, *, patient_id: str) -> Stack:
    """Order the instances and prove that they make one regular grid.

    Raises SeriesUnusable naming every problem that `policy` does not accept.
    """
    instances, notes = _choose_b_value(series.instances, policy)
    problems = [*_foreign(instances, patient_id), *_misfits(instances)]
    if problems:
        raise SeriesUnusable(problems)
    placed = _place(instances)
    placed, problems, repeats = _without_repeats(placed, policy)
    gap_problems, gap_notes = _check_gaps(placed, policy)
    problems += [*gap_problems, *_sideways(placed), *_too_few(placed, policy)]
    if problems:
        raise SeriesUnusable(problems)
    return Stack(
        instances=tuple(i for _, i in placed),
        positions_mm=tuple(p for p, _ in placed),
        geometry=_grid(placed),
        notes=(*notes, *repeats, *gap_notes),
        is_regular=not gap_notes,
    )


def _problem(code: str, instance: Instance, message: str) -> InputProblem:
    return InputProblem(code, instance.sop_instance_uid, f"{instance.file}: {message}")


def _choose_b_value(
    instances: tuple[Instance, ...], policy: GeometryPolicy
) -> tuple[tuple[Instance, ...], tuple[str, ...]]:
    b_values = sorted({i.b_value_s_mm2 for i in instances if i.b_value_s_mm2 is not None})
    if len(b_values) < 2:
        return instances, ()
    listed = ", ".join(f"{b:g}" for b in b_values)
    if policy.several_b_values == "refuse":
        message = f"several b-values in one series ({listed} s/mm2)"
        raise SeriesUnusable([InputProblem("several-b-values", instances[0].sop_instance_uid, message)])
    chosen = tuple(i for i in instances if i.b_value_s_mm2 == b_values[-1])
    return chosen, (f"b-value {b_values[-1]:g} of {listed} s/mm2 used",)


def _foreign(instances: Sequence[Instance], patient_id: str) -> list[InputProblem]:
    return [
        _problem("other-patient", i, "belongs to another patient than the rest of the study")
        for i in instances
        if i.patient_id != patient_id
    ]


def _misfits(instances: Sequence[Instance]) -> list[InputProblem]:
    """Instances without a place in space, or with another matrix, spacing, direction or frame of reference
    than most of the series."""
    problems, sound = [], []
    for instance in instances:
        if instance.number_of_frames > 1:
            problems.append(
                _problem("multi-frame", instance, "is a multi-frame image; only single-frame MR is read so far")
            )
        elif (lack := _lack(instance)) is not None:
            problems.append(_problem("no-geometry", instance, lack))
        else:
            sound.append(instance)
    usual = _most_usual(sound) if sound else None
    for instance in sound:
        if usual is not None and (message := _unlike(usual, instance)) is not None:
            problems.append(_problem("mixed-geometry", instance, message))
    return problems


def _lack(instance: Instance) -> str | None:
    """What keeps an instance from being placed at all."""
    if instance.position_mm is None or instance.orientation is None or instance.pixel_spacing_mm is None:
        return "states no position, orientation or pixel spacing"
    if not instance.frame_of_reference_uid:
        return "states no frame of reference"
    if min(instance.pixel_spacing_mm) <= 0:
        return "states a pixel spacing that is not positive"
    axes = np.asarray(instance.orientation, dtype=np.float64).reshape(2, 3)
    if not np.allclose(axes @ axes.T, np.eye(2), atol=_DIRECTION_TOLERANCE):
        return "states an orientation that is not two perpendicular unit vectors"
    return None


def _most_usual(instances: Sequence[Instance]) -> Instance:
    """An instance of the largest group with one geometry, so that a single odd one is named and not the rest."""

    def geometry(i: Instance) -> tuple[object, ...]:
        rounded = np.round((*(i.pixel_spacing_mm or ()), *(i.orientation or ())), 2)
        return (i.rows, i.columns, i.frame_of_reference_uid, *rounded)

    (usual, _count), *_ = Counter(map(geometry, instances)).most_common(1)
    return next(i for i in instances if geometry(i) == usual)


def _unlike(usual: Instance, other: Instance) -> str | None:
    if (other.rows, other.columns) != (usual.rows, usual.columns):
        return f"has {other.rows}x{other.columns} pixels where the series has {usual.rows}x{usual.columns}"
    if other.frame_of_reference_uid != usual.frame_of_reference_uid:
        return "has another frame of reference than the rest of the series"
    if not np.allclose(other.pixel_spacing_mm or (), usual.pixel_spacing_mm or (), rtol=1e-3):
        return "has another pixel spacing than the rest of the series"
    here, there = _axes(other), _axes(usual)
    if here[0] @ there[0] < _SAME_DIRECTION_COSINE or here[1] @ there[1] < _SAME_DIRECTION_COSINE:
        return "has another orientation than the rest of the series (mixed orientations)"
    return None


def _axes(instance: Instance) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Unit vectors of increasing column index, of increasing row index, and of their cross product."""
    values = np.asarray(instance.orientation, dtype=np.float64)
    row, column = values[:3] / np.linalg.norm(values[:3]), values[3:] / np.linalg.norm(values[3:])
    normal = np.cross(row, column)
    return row, column, normal / np.linalg.norm(normal)


def _place(instances: Sequence[Instance]) -> list[Placed]:
    normal = _axes(instances[0])[2]
    return sorted(((float(normal @ np.asarray(i.position_mm)), i) for i in instances), key=lambda p: p[0])


def _without_repeats(
    placed: list[Placed], policy: GeometryPolicy
) -> tuple[list[Placed], list[InputProblem], tuple[str, ...]]:
    kept: list[Placed] = [placed[0]]
    problems: list[InputProblem] = []
    for position, instance in placed[1:]:
        last_position, last = kept[-1]
        if position - last_position > _SAME_POSITION_MM:
            kept.append((position, instance))
        else:
            problems.append(_problem("duplicate-slice", instance, f"lies at the same position as {last.file}"))
    if problems and policy.duplicate_slices == "first":
        return kept, [], (f"{len(problems)} duplicate slices left out",)
    return kept, problems, ()


def _usual_gap(gaps: npt.NDArray[np.float64]) -> float:
    """The middle gap in mm, the smaller of two: a mean of two would be a spacing that no slice has."""
    return float(np.sort(gaps)[(len(gaps) - 1) // 2])


def _check_gaps(placed: Sequence[Placed], policy: GeometryPolicy) -> tuple[list[InputProblem], tuple[str, ...]]:
    gaps = np.diff([p for p, _ in placed])
    if len(gaps) == 0:
        return [], ()
    spacing = _usual_gap(gaps)
    problems: list[InputProblem] = []
    notes: list[str] = []
    for gap, ((_, before), (_, after)) in zip(gaps, pairwise(placed), strict=True):
        if abs(gap - spacing) <= policy.spacing_tolerance_mm:
            continue
        missing = round(gap / spacing) - 1
        if missing >= 1 and abs(gap - (missing + 1) * spacing) <= policy.spacing_tolerance_mm * (missing + 1):
            between = f"between {before.file} and {after.file}"
            text = f"{missing} slice(s) missing {between} (gap {gap:.1f} mm, not {spacing:.1f} mm)"
            accepted, code = policy.missing_slices == "accept", "missing-slice"
        else:
            text = f"uneven spacing: {gap:.2f} mm between {before.file} and {after.file}, {spacing:.2f} mm elsewhere"
            accepted, code = policy.uneven_spacing == "accept", "uneven-spacing"
        if accepted:
            notes.append(text)
        else:
            problems.append(InputProblem(code, after.sop_instance_uid, text))
    return problems, tuple(notes)


def _sideways(placed: Sequence[Placed]) -> list[InputProblem]:
    """Slices that do not lie above each other (a sheared stack is not the grid that its affine would say)."""
    normal = _axes(placed[0][1])[2]
    origin = np.asarray(placed[0][1].position_mm)
    problems = []
    for position, instance in placed:
        offset = np.asarray(instance.position_mm) - origin - normal * (position - placed[0][0])
        if np.linalg.norm(offset) > _SIDEWAYS_TOLERANCE_MM:
            problems.append(
                _problem("sheared-stack", instance, f"lies {np.linalg.norm(offset):.1f} mm beside the stack's axis")
            )
    return problems


def _too_few(placed: Sequence[Placed], policy: GeometryPolicy) -> list[InputProblem]:
    fewest = max(policy.minimum_slices, _FEWEST_SLICES)
    if len(placed) >= fewest:
        return []
    text = f"only {len(placed)} slice(s); at least {fewest} are needed"
    return [InputProblem("too-few-slices", placed[0][1].sop_instance_uid, text)]


def _grid(placed: Sequence[Placed]) -> Geometry:
    """The regular grid from the first to the last slice at the usual spacing."""
    first, positions = placed[0][1], np.array([p for p, _ in placed])
    count = round((positions[-1] - positions[0]) / _usual_gap(np.diff(positions))) + 1
    spacing = (positions[-1] - positions[0]) / (count - 1)
    row, column, normal = _axes(first)
    row_spacing, column_spacing = first.pixel_spacing_mm or (1.0, 1.0)
    matrix = np.eye(4)
    matrix[:3, 0], matrix[:3, 1], matrix[:3, 2] = row * column_spacing, column * row_spacing, normal * spacing
    matrix[:3, 3] = np.asarray(first.position_mm)
    affine = tuple(tuple(float(v) for v in line) for line in matrix)
    return Geometry((count, first.rows, first.columns), affine, first.frame_of_reference_uid)  # type: ignore[arg-type]


def stack_to_volume(series: Series, stack: Stack, datasets: Mapping[str, Dataset]) -> Volume:
    """Decode the pixels of a stack into a volume of modality values (rescale slope and intercept applied).

    `datasets` maps SOP Instance UID to the instance with its pixel data. Where slices were accepted as
    missing or uneven, the regular grid is filled by linear interpolation between neighbours.
    Raises SeriesUnusable naming the instance whose pixels cannot be decoded.
    """
    slices = np.stack([_decode(i, datasets[i.sop_instance_uid]) for i in stack.instances])
    grid = stack.geometry
    if stack.is_regular:
        uids = tuple(i.sop_instance_uid for i in stack.instances)
        return Volume(slices, grid, series.series_instance_uid, uids, stack.notes)
    wanted = stack.positions_mm[0] + np.arange(grid.shape[0]) * grid.spacing_mm[0]
    filled = _interpolate(slices, np.asarray(stack.positions_mm), wanted)
    near = [int(np.argmin(np.abs(np.asarray(stack.positions_mm) - w))) for w in wanted]
    uids = tuple(
        stack.instances[n].sop_instance_uid if abs(stack.positions_mm[n] - w) < 0.1 else ""
        for n, w in zip(near, wanted, strict=True)
    )
    return Volume(filled, grid, series.series_instance_uid, uids, stack.notes)


def _interpolate(
    slices: npt.NDArray[np.float32], have: npt.NDArray[np.float64], wanted: npt.NDArray[np.floating]
) -> npt.NDArray[np.float32]:
    upper = np.clip(np.searchsorted(have, wanted), 1, len(have) - 1)
    weight = np.clip((wanted - have[upper - 1]) / (have[upper] - have[upper - 1]), 0, 1)[:, None, None]
    return (slices[upper - 1] * (1 - weight) + slices[upper] * weight).astype(np.float32)


def _decode(instance: Instance, dataset: Dataset) -> npt.NDArray[np.float32]:
    try:
        pixels = dataset.pixel_array
    except Exception as error:  # pydicom's decoders raise many kinds; each means the pixels cannot be read
        message = f"pixels cannot be decoded ({type(error).__name__}: {error})"
        raise SeriesUnusable([_problem("unreadable-pixels", instance, message)]) from error
    if pixels.shape != (instance.rows, instance.columns):
        message = f"pixels are {pixels.shape}, not {(instance.rows, instance.columns)}"
        raise SeriesUnusable([_problem("unreadable-pixels", instance, message)])
    slope, intercept = _rescale(instance, dataset)
    return pixels.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _rescale(instance: Instance, dataset: Dataset) -> tuple[float, float]:
    """Slope and intercept of the modality values; 1 and 0 where they are not stated."""
    try:
        slope, intercept = float(dataset.get("RescaleSlope") or 1), float(dataset.get("RescaleIntercept") or 0)
    except (TypeError, ValueError) as error:
        raise SeriesUnusable([_problem("unreadable-pixels", instance, "its rescale values are no numbers")]) from error
    if not np.isfinite([slope, intercept]).all():
        raise SeriesUnusable([_problem("unreadable-pixels", instance, "its rescale values are not finite")])
    return slope, intercept

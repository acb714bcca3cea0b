"""Reads a segmentation back: what each segment is, and its voxels, placed by plane position alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.uid import SegmentationStorage

from mappings.model import codes
from mappings.model.findings import Finding, Findings, Segment
from mappings.outputs.read_dicom import (
    DOCUMENT,
    expect_header,
    expect_model,
    items_of,
    merge,
    read_code,
    read_header,
    text_of,
)
from mappings.outputs.read_facts import Facts, compare, head, name_of, prose

CENTROID_TOLERANCE_MM = 0.5
"""The findings' centroids are rounded to 0.1 mm, and a grid may differ from its slices by its tolerance of 0.1 mm
a slice gap; no slice is as thin as this."""

Bits = npt.NDArray[np.bool_]
Point = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame that is not empty: its segment, voxels, plane position (LPS mm), and the instance it names."""

    segment: int
    bits: Bits
    position_mm: Point
    source_uid: str


@dataclass(frozen=True, eq=False)
class Grid:
    """Directions (unit vectors), spacing of rows and columns in mm, and the slice normal."""

    along_row: Point
    along_column: Point
    row_mm: float
    column_mm: float

    @property
    def normal(self) -> Point:
        """Unit vector along which slices ascend."""
        return np.cross(self.along_row, self.along_column)


def check_seg(seg: Dataset, findings: Findings, masks: Mapping[str, npt.NDArray[Any]] | None) -> list[str]:
    """Everything in which the segmentation disagrees with the findings and the masks `(z, y, x)`."""
    name = "seg.dcm"
    expected = merge(expect_header(findings, SegmentationStorage, "seg", "seg-series"), _expect_segments(findings))
    messages = compare(name, expected, merge(read_header(seg, findings), _read_segments(seg)))
    frames, grid = read_frames(seg), _read_grid(seg)
    slips = _check_centroids(findings, frames, grid)
    if masks is not None:
        slips += _check_voxels(findings, frames, grid, masks)
    return messages + [f"{name}: {slip}" for slip in slips]


def _read_segments(seg: Dataset) -> Facts:
    facts = Facts()
    facts.add(DOCUMENT, "FrameOfReferenceUID", text_of(seg, "FrameOfReferenceUID"))
    for item in items_of(seg, "SegmentSequence"):
        where = f"segment {text_of(item, 'SegmentNumber')}"
        facts.add(where, "label", prose(head(text_of(item, "SegmentLabel"))))
        facts.add(where, "tracking id", text_of(item, "TrackingID"))
        facts.add(where, "tracking UID", text_of(item, "TrackingUID"))
        facts.add(where, "category", read_code(item, "SegmentedPropertyCategoryCodeSequence"))
        facts.add(where, "type", read_code(item, "SegmentedPropertyTypeCodeSequence"))
        facts.add(where, "drawn", text_of(item, "SegmentAlgorithmType"))
        for algorithm in items_of(item, "SegmentationAlgorithmIdentificationSequence"):
            label = f"{head(text_of(algorithm, 'AlgorithmName'))} {head(text_of(algorithm, 'AlgorithmVersion'))}"
            facts.add(where, "model", label)
        for region in items_of(item, "AnatomicRegionSequence"):
            facts.add(where, "site", read_code(item, "AnatomicRegionSequence"))
            facts.add(where, "side", read_code(region, "AnatomicRegionModifierSequence"))
        facts.add(where, "sector or zone", read_code(item, "PrimaryAnatomicStructureSequence"))
    return facts


def _expect_segments(findings: Findings) -> Facts:
    facts = Facts()
    facts.add(DOCUMENT, "FrameOfReferenceUID", findings.reference_frame_uid)
    for segment in findings.segments:
        where = f"segment {segment.number}"
        facts.add(where, "label", prose(head(segment.name)))
        facts.add(where, "tracking id", segment.tracking_id)
        facts.add(where, "tracking UID", segment.tracking_uid)
        facts.add(where, "category", name_of(segment.category))
        facts.add(where, "type", name_of(segment.type))
        facts.add(where, "drawn", "AUTOMATIC")
        facts.add(where, "model", expect_model(findings))
        _expect_place(facts, where, segment, findings)
    return facts


def _expect_place(facts: Facts, where: str, segment: Segment, findings: Findings) -> None:
    finding = next((f for f in findings.findings if f.segment_number == segment.number), None)
    lesion = finding if segment.mask == "lesions" else None
    structure = (lesion.sector or lesion.zone) if lesion else None
    facts.add(where, "sector or zone", name_of(structure) if structure else "")
    if lesion is not None:
        facts.add(where, "site", name_of(lesion.site))
        facts.add(where, "side", name_of(lesion.laterality) if lesion.laterality else "")
    elif segment.mask == "zones":
        facts.add(where, "site", name_of(codes.PROSTATE))
        facts.add(where, "side", "")


def _macro(seg: Dataset, group: Dataset, keyword: str) -> Dataset:
    """A functional group's item: the frame's own, else the shared one (PS3.3 C.7.6.16.1 leaves it to the writer)."""
    own = items_of(group, keyword)
    item: Dataset = own[0] if own else seg.SharedFunctionalGroupsSequence[0][keyword].value[0]
    return item


def _read_grid(seg: Dataset) -> Grid:
    first = seg.PerFrameFunctionalGroupsSequence[0]
    orientation = _macro(seg, first, "PlaneOrientationSequence").ImageOrientationPatient
    directions = np.array(orientation, dtype=np.float64)
    row_mm, column_mm = (float(v) for v in _macro(seg, first, "PixelMeasuresSequence").PixelSpacing)
    return Grid(directions[:3], directions[3:], row_mm, column_mm)


def read_frames(seg: Dataset) -> list[Frame]:
    """Every frame that holds a voxel."""
    groups = items_of(seg, "PerFrameFunctionalGroupsSequence")
    pixels = _unpack(seg, len(groups))
    return [_read_frame(seg, bits, group) for bits, group in zip(pixels, groups, strict=True) if bits.any()]


def _unpack(seg: Dataset, count: int) -> Bits:
    """PS3.5 8.1.1: one bit a voxel, the first in the lowest bit, frames without padding between them."""
    shape = (count, int(seg.Rows), int(seg.Columns))
    packed = np.frombuffer(seg.PixelData, dtype=np.uint8)
    return np.unpackbits(packed, count=int(np.prod(shape)), bitorder="little").reshape(shape).view(np.bool_)


def _read_frame(seg: Dataset, bits: Bits, group: Dataset) -> Frame:
    number = int(_macro(seg, group, "SegmentIdentificationSequence").ReferencedSegmentNumber)
    position = np.array(_macro(seg, group, "PlanePositionSequence").ImagePositionPatient, dtype=np.float64)
    sources = items_of(_macro(seg, group, "DerivationImageSequence"), "SourceImageSequence")
    return Frame(number, bits, position, text_of(sources[0], "ReferencedSOPInstanceUID") if sources else "")


def _check_centroids(findings: Findings, frames: Sequence[Frame], grid: Grid) -> list[str]:
    """Each finding's segment lies where the findings say, in patient coordinates."""
    slips = []
    for finding in findings.findings:
        own = [frame for frame in frames if frame.segment == finding.segment_number]
        if finding.centroid_lps_mm is None or not own:
            continue
        centre = _centroid_mm(own, grid)
        distance_mm = float(np.linalg.norm(centre - finding.centroid_lps_mm))
        if distance_mm > CENTROID_TOLERANCE_MM:
            there = ", ".join(f"{v:.1f}" for v in centre)
            stated = ", ".join(f"{v:.1f}" for v in finding.centroid_lps_mm)
            slips.append(f"{finding.tracking_id}: centroid: expected ({stated}) mm LPS, found ({there})")
    return slips


def _centroid_mm(frames: Sequence[Frame], grid: Grid) -> Point:
    total, voxels = np.zeros(3), 0
    for frame in frames:
        in_rows, in_columns = frame.bits.sum(axis=1, dtype=np.int64), frame.bits.sum(axis=0, dtype=np.int64)
        count = int(in_rows.sum())
        down_mm = float(in_rows @ np.arange(len(in_rows))) * grid.row_mm
        across_mm = float(in_columns @ np.arange(len(in_columns))) * grid.column_mm
        total += count * frame.position_mm + down_mm * grid.along_column + across_mm * grid.along_row
        voxels += count
    return np.asarray(total / voxels, dtype=np.float64)


def _check_voxels(
    findings: Findings, frames: Sequence[Frame], grid: Grid, masks: Mapping[str, npt.NDArray[Any]]
) -> list[str]:
    """Voxel for voxel against the masks. The planes, in order along the normal, are the slices in which any
    segment has a voxel; evenly spaced planes and the findings' evidence pin them to slice numbers."""
    wanted = {s.number: masks[s.mask] == s.label for s in findings.segments}
    occupied = {number: np.flatnonzero(mask.any(axis=(1, 2))) for number, mask in wanted.items()}
    slices = sorted({int(z) for indices in occupied.values() for z in indices})
    planes = _find_planes(frames, grid)
    slips = _check_counts(frames, wanted)
    if len(planes) != len(slices):
        return [*slips, f"planes: expected {len(slices)} slices with a segment, found {len(planes)}"]
    by_slice = {
        z: [f for f in frames if abs(float(f.position_mm @ grid.normal) - d) < 0.01]
        for z, d in zip(slices, planes, strict=True)
    }
    slips += _check_spacing(slices, planes)
    slips += _check_evidence(findings.findings, by_slice)
    for z, here in by_slice.items():
        slips += _check_slice(z, here, wanted, occupied)
    return slips


def _find_planes(frames: Sequence[Frame], grid: Grid) -> list[float]:
    """The distinct plane positions along the normal, ascending, in mm."""
    distances = sorted(float(frame.position_mm @ grid.normal) for frame in frames)
    return [d for i, d in enumerate(distances) if i == 0 or d - distances[i - 1] >= 0.01]


def _check_counts(frames: Sequence[Frame], wanted: Mapping[int, Bits]) -> list[str]:
    slips = []
    for number in sorted({*wanted, *(frame.segment for frame in frames)}):
        found = sum(int(np.count_nonzero(f.bits)) for f in frames if f.segment == number)
        expected = int(np.count_nonzero(wanted[number])) if number in wanted else 0
        if found != expected:
            slips.append(f"segment {number}: voxels: expected {expected}, found {found}")
    return slips


def _check_spacing(slices: Sequence[int], planes: Sequence[float]) -> list[str]:
    """Planes lie as far apart as their slice numbers say, within half a slice."""
    if len(slices) < 2:
        return []
    steps = np.diff(planes) / np.diff(slices)
    spacing = float(np.median(steps))
    offsets = np.abs(np.array(planes) - planes[0] - (np.array(slices) - slices[0]) * spacing)
    wrong = [i for i, offset in enumerate(offsets) if offset > spacing / 2]
    return [
        f"slice {slices[i]}: plane position: expected within half a slice of its place, found {offsets[i]:.1f} mm away"
        for i in wrong
    ]


def _check_evidence(findings: Sequence[Finding], by_slice: Mapping[int, Sequence[Frame]]) -> list[str]:
    """The slice that shows a finding is drawn on the instance that the finding names."""
    slips = []
    for finding in findings:
        for seen in finding.evidence:
            for frame in by_slice.get(seen.frame_index, []):
                if frame.segment == finding.segment_number and frame.source_uid != seen.sop_instance_uid:
                    slips.append(
                        f"{finding.tracking_id}: source of slice {seen.frame_index}: expected "
                        f"'{seen.sop_instance_uid}', found '{frame.source_uid}'"
                    )
    return slips


def _check_slice(
    z: int, frames: Sequence[Frame], wanted: Mapping[int, Bits], occupied: Mapping[int, npt.NDArray[np.intp]]
) -> list[str]:
    slips = []
    sources = {frame.source_uid for frame in frames}
    if len(sources) > 1:
        slips.append(f"slice {z}: source: expected one instance, found {len(sources)}")
    for number in sorted({*(n for n, indices in occupied.items() if z in indices), *(f.segment for f in frames)}):
        drawn = [frame.bits for frame in frames if frame.segment == number]
        if len(drawn) != 1:
            slips.append(f"segment {number}: slice {z}: expected one frame, found {len(drawn)}")
        elif number in wanted and drawn[0].shape != wanted[number][z].shape:
            slips.append(f"segment {number}: matrix: expected {wanted[number][z].shape}, found {drawn[0].shape}")
        elif number in wanted and (differing := int(np.count_nonzero(drawn[0] != wanted[number][z]))):
            slips.append(f"segment {number}: slice {z}: expected the model's mask, found {differing} other voxel(s)")
    return slips

"""Findings and the model's masks -> DICOM Segmentation (PS3.3 A.51), BINARY, on the source's own grid."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from highdicom import AlgorithmIdentificationSequence
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes as dicom_codes
from pydicom.uid import ExplicitVRLittleEndian

from mappings.model import codes
from mappings.model.findings import Finding, Findings, Segment
from mappings.model.ids import derive_uid
from mappings.outputs.dicom_display import segment_rgb, to_cielab
from mappings.outputs.dicom_header import (
    MANUFACTURER,
    PRODUCT,
    add_study,
    concept,
    copy_image_header,
    describe_model,
    local_time,
    private_schemes,
    serial_number,
    set_times,
    shorten,
    software_versions,
    verification_words,
)

SERIES_NUMBER = 1001
Mask = npt.NDArray[np.uint8]


def findings_to_seg(findings: Findings, masks: Mapping[str, Mask], sources: Sequence[Dataset]) -> Dataset | None:
    """Writes one segment for each of `findings.segments`; None where there is none to write.

    `masks` are `(slices, rows, columns)` on the grid of `sources`, the single-frame instances of the reference
    series ascending along the slice normal (headers are enough). Segments may overlap. Frames without a voxel
    are left out. Raises ValueError, naming the segment or the instance, where numbers are not 1..n, a segment is
    empty, or masks and sources do not fit together. Equal arguments give equal bytes.
    """
    if not findings.segments:
        return None
    _check_numbers(findings.segments)
    _check_sources(masks, findings.segments, sources)
    header = _reference_header(sources)
    segmentation = Segmentation(
        source_images=[header, *sources[1:]],
        pixel_array=_stack(findings.segments, masks),
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=[_describe_segment(findings, segment) for segment in findings.segments],
        series_instance_uid=derive_uid(findings.job_id, findings.revision, "seg-series"),
        series_number=SERIES_NUMBER,
        sop_instance_uid=derive_uid(findings.job_id, findings.revision, "seg"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=PRODUCT,
        software_versions=software_versions(findings),  # type: ignore[arg-type]  # highdicom takes lists
        device_serial_number=serial_number(findings),
        content_label="AI_SEGMENTATION",
        content_description=verification_words(findings),
        transfer_syntax_uid=ExplicitVRLittleEndian,
        contributing_equipment=[describe_model(findings)],
        series_description=shorten(f"{verification_words(findings)}: segmentation, {findings.protocol_title}"),
        coding_schemes=private_schemes([segment.type for segment in findings.segments]),
    )
    segmentation.ContentCreatorName = ""  # type 2, and highdicom leaves it out: no person made this
    add_study(segmentation, sources[0])
    _derive_dimension_uid(segmentation, findings)
    set_times(segmentation, local_time(findings, sources[0]))
    return segmentation


def _check_numbers(segments: Sequence[Segment]) -> None:
    """PS3.3 C.8.20.2: Segment Number starts at 1 and increases by 1."""
    for expected, segment in enumerate(segments, 1):
        if segment.number != expected:
            raise ValueError(f"segment '{segment.name}' has number {segment.number}, expected {expected}")


def _check_sources(masks: Mapping[str, Mask], segments: Sequence[Segment], sources: Sequence[Dataset]) -> None:
    if not sources:
        raise ValueError("a segmentation needs the instances that it was drawn on; none were given")
    if int(sources[0].get("NumberOfFrames", 1) or 1) > 1:
        raise ValueError(f"instance {sources[0].SOPInstanceUID} is multi-frame; give single-frame instances")
    expected = (len(sources), int(sources[0].Rows), int(sources[0].Columns))
    for name in sorted({segment.mask for segment in segments}):
        if masks[name].shape != expected:
            raise ValueError(f"mask '{name}' has shape {masks[name].shape}, the source images {expected}")
    gaps = np.diff(_slice_positions_mm(sources))
    if len(gaps) and gaps.min() <= 0:
        where = sources[int(np.argmin(gaps)) + 1].SOPInstanceUID
        raise ValueError(f"source images do not ascend along the slice normal at instance {where}")


def _slice_positions_mm(sources: Sequence[Dataset]) -> npt.NDArray[np.float64]:
    """Each slice's position along the slice normal (row x column direction), in mm."""
    orientation = np.array(sources[0].ImageOrientationPatient, dtype=np.float64)
    normal = np.cross(orientation[:3], orientation[3:])
    positions = np.array([source.ImagePositionPatient for source in sources], dtype=np.float64)
    result: npt.NDArray[np.float64] = positions @ normal
    return result


def _reference_header(sources: Sequence[Dataset]) -> Dataset:
    """The first source's header; where it has no slice thickness (type 2), the slices' distance stands in."""
    header = copy_image_header(sources[0])
    if header.get("SliceThickness") in (None, ""):
        gaps = np.diff(_slice_positions_mm(sources))
        header.SliceThickness = f"{float(np.median(gaps)) if len(gaps) else 1.0:.6g}"
    return header


def _stack(segments: Sequence[Segment], masks: Mapping[str, Mask]) -> Mask:
    """All segments as `(slices, rows, columns, segments)` of 0 and 1; ValueError for an empty one."""
    first = masks[segments[0].mask]
    stack = np.empty((len(segments), *first.shape), np.uint8)
    for plane, segment in zip(stack, segments, strict=True):
        np.equal(masks[segment.mask], segment.label, out=plane.view(np.bool_))
        if not plane.any():
            raise ValueError(
                f"segment {segment.number} '{segment.name}' is empty: label {segment.label} is not in mask "
                f"'{segment.mask}'"
            )
    return np.moveaxis(stack, 0, -1)


def _describe_segment(findings: Findings, segment: Segment) -> SegmentDescription:
    """The item of the Segment Sequence: what it is, which model drew it, how to track and colour it."""
    description = SegmentDescription(
        segment_number=segment.number,
        segment_label=shorten(segment.name),
        segmented_property_category=concept(segment.category),
        segmented_property_type=concept(segment.type),
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=_identify_algorithm(findings),
        tracking_uid=segment.tracking_uid,
        tracking_id=segment.tracking_id,
        display_color=to_cielab(segment_rgb(segment)),
    )
    _add_anatomy(description, findings, segment)
    return description


def _identify_algorithm(findings: Findings) -> AlgorithmIdentificationSequence:
    """Name, version and maker of the model; family from CID 7162."""
    model = findings.model
    return AlgorithmIdentificationSequence(
        name=shorten(model.name),
        version=shorten(model.version),
        family=dicom_codes.DCM.ArtificialIntelligence,
        source=shorten(model.manufacturer) or None,
    )


def _add_anatomy(description: SegmentDescription, findings: Findings, segment: Segment) -> None:
    """Says where the segment lies, unless the segment's type is the anatomy itself."""
    finding = _find_finding(findings, segment)
    if finding is not None and segment.mask == "lesions":
        region = concept(finding.site)
        if finding.laterality is not None:
            region.AnatomicRegionModifierSequence = [concept(finding.laterality)]
        structure = finding.sector or finding.zone
        if structure is not None:
            description.PrimaryAnatomicStructureSequence = [concept(structure)]
        description.AnatomicRegionSequence = [region]
    elif segment.mask == "zones":
        description.AnatomicRegionSequence = [concept(codes.PROSTATE)]


def _find_finding(findings: Findings, segment: Segment) -> Finding | None:
    return next((f for f in findings.findings if f.segment_number == segment.number), None)


def _derive_dimension_uid(segmentation: Dataset, findings: Findings) -> None:
    """Replaces the Dimension Organization UID that highdicom draws at random by a derived one."""
    uid = derive_uid(findings.job_id, findings.revision, "seg-dimensions")
    segmentation.DimensionOrganizationSequence[0].DimensionOrganizationUID = uid
    for index in segmentation.DimensionIndexSequence:
        index.DimensionOrganizationUID = uid

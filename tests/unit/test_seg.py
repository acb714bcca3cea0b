"""findings_to_seg: what the SEG says, what it refuses, and that it is a pure function of its arguments."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from mappings.model import codes
from mappings.model.ids import derive_uid
from mappings.outputs.dicom_header import write_dicom
from mappings.outputs.findings_to_seg import findings_to_seg
from tests.builders import build_findings, build_masks, build_segments
from tests.dicom_sources import build_sources

JAPANESE = "Yamada^Tarou=山田^太郎=やまだ^たろう"


def render_bytes(sources: Sequence[Dataset]) -> bytes:
    """The file of the builders' findings on these sources."""
    seg = findings_to_seg(build_findings(), build_masks(), sources)
    assert seg is not None
    return write_dicom(seg)


def render(**changes: Any) -> Dataset:
    """The SEG of the builders' study, written and read again; `changes` go to the source headers."""
    return pydicom.dcmread(BytesIO(render_bytes(build_sources(**changes))))


def read_segment(seg: Dataset, number: int, shape: tuple[int, int, int]) -> np.ndarray:
    """The segment's voxels placed by ImagePositionPatient, independently of highdicom's reader."""
    positions = [source.ImagePositionPatient for source in build_sources(shape)]
    result = np.zeros(shape, np.uint8)
    for frame, group in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        if group.SegmentIdentificationSequence[0].ReferencedSegmentNumber == number:
            where = group.PlanePositionSequence[0].ImagePositionPatient
            result[[np.allclose(where, position, atol=1e-4) for position in positions].index(True)] = frame
    return result


def test_every_segment_holds_exactly_its_label_and_overlaps_are_kept() -> None:
    seg, masks = render(), build_masks()
    for segment in build_findings().segments:
        expected = (masks[segment.mask] == segment.label).astype(np.uint8)
        assert np.array_equal(read_segment(seg, segment.number, masks["gland"].shape), expected), segment.name
    assert seg.SegmentsOverlap == "YES"


def test_segments_say_what_they_are_who_drew_them_and_how_to_track_them() -> None:
    seg, findings = render(), build_findings()
    for item, segment in zip(seg.SegmentSequence, findings.segments, strict=True):
        assert (item.SegmentNumber, item.SegmentLabel) == (segment.number, segment.name)
        assert (item.TrackingID, item.TrackingUID) == (segment.tracking_id, segment.tracking_uid)
        assert item.SegmentAlgorithmType == "AUTOMATIC"
        algorithm = item.SegmentationAlgorithmIdentificationSequence[0]
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("prostate_reference", "1")
        assert algorithm.AlgorithmFamilyCodeSequence[0].CodeValue == "123110"
        assert item.SegmentedPropertyTypeCodeSequence[0].CodeValue == segment.type.value
    lesion = seg.SegmentSequence[3]
    region = lesion.AnatomicRegionSequence[0]
    assert region.CodeValue == codes.PROSTATE.value
    assert region.AnatomicRegionModifierSequence[0].CodeValue == codes.RIGHT.value
    assert lesion.PrimaryAnatomicStructureSequence[0].CodeValue == "716921007"


def test_display_colours_are_distinct() -> None:
    colours = [tuple(item.RecommendedDisplayCIELabValue) for item in render().SegmentSequence]
    assert len(set(colours)) == len(colours) == 5


def test_study_frame_of_reference_and_model_are_stated() -> None:
    seg, source = render(), build_sources()[0]
    for keyword in [
        "PatientName",
        "PatientID",
        "PatientBirthDate",
        "PatientSex",
        "StudyInstanceUID",
        "StudyDate",
        "StudyTime",
        "AccessionNumber",
        "StudyID",
        "StudyDescription",
        "ReferringPhysicianName",
        "FrameOfReferenceUID",
    ]:
        assert seg[keyword].value == source[keyword].value, keyword
    assert seg.SOPInstanceUID == derive_uid("test-job", 1, "seg")
    assert seg.SeriesNumber > 1000
    assert "not verified" in seg.SeriesDescription
    models = [item.get("ManufacturerModelName") for item in seg.ContributingEquipmentSequence]
    assert "prostate_reference" in models
    assert (seg.ContentDate, seg.ContentTime) == ("20260304", "103000")


def test_frames_reference_the_source_slice_they_were_drawn_on() -> None:
    seg = render()
    by_position = {tuple(map(float, s.ImagePositionPatient)): s.SOPInstanceUID for s in build_sources()}
    for group in seg.PerFrameFunctionalGroupsSequence:
        position = tuple(map(float, group.PlanePositionSequence[0].ImagePositionPatient))
        source = group.DerivationImageSequence[0].SourceImageSequence[0]
        assert source.ReferencedSOPInstanceUID == by_position[position]


def test_equal_arguments_give_equal_bytes_and_nothing_is_taken_from_the_clock() -> None:
    first, second = (render_bytes(build_sources()) for _ in range(2))
    assert first == second
    assert datetime.now().strftime("%Y%m%d").encode() not in first


def test_arguments_are_left_as_they_were() -> None:
    sources, masks = build_sources(), build_masks()
    before = [write_dicom(source) for source in sources]
    findings_to_seg(build_findings(), masks, sources)
    assert [write_dicom(source) for source in sources] == before
    assert all(np.array_equal(masks[name], build_masks()[name]) for name in masks)


def test_another_revision_has_other_uids() -> None:
    first, second = (
        findings_to_seg(build_findings(revision=revision), build_masks(), build_sources()) for revision in (1, 2)
    )
    assert first is not None
    assert second is not None
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID"):
        assert first[keyword].value != second[keyword].value


@pytest.mark.parametrize(
    ("charset", "name"),
    [("ISO_IR 100", "Müller^Jürgen"), (["", "ISO 2022 IR 87"], JAPANESE), ("ISO_IR 192", "Σωκράτης^Σ")],
)
def test_names_stay_readable(charset: object, name: str) -> None:
    source = build_sources(SpecificCharacterSet=charset, PatientName=name)
    again = [pydicom.dcmread(BytesIO(write_dicom(item))) for item in source]
    seg = pydicom.dcmread(BytesIO(render_bytes(again)))
    assert seg.SpecificCharacterSet == "ISO_IR 192"
    assert str(seg.PatientName) == name


def test_missing_or_odd_header_values_are_no_obstacle_and_no_warning_names_the_patient() -> None:
    odd = {"StudyID": None, "AccessionNumber": None, "PatientBirthDate": None, "SliceThickness": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seg = render(**odd, PatientName="Onepart", PatientSex="O", StudyTime=None)
    assert (seg.StudyID, seg.AccessionNumber, str(seg.PatientName)) == ("", "", "Onepart")
    thickness = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness
    assert float(thickness) == pytest.approx(3.0, abs=1e-3)


def test_times_are_on_the_clock_of_the_source() -> None:
    seg = render(TimezoneOffsetFromUTC="+0900")
    assert (seg.ContentDate, seg.ContentTime, seg.TimezoneOffsetFromUTC) == ("20260304", "193000", "+0900")
    late = build_findings(created_at=datetime(2026, 3, 4, 20, 0, tzinfo=UTC))
    seg2 = findings_to_seg(late, build_masks(), build_sources(TimezoneOffsetFromUTC="+0900"))
    assert seg2 is not None
    assert (seg2.ContentDate, seg2.ContentTime) == ("20260305", "050000")


def test_no_segments_gives_none() -> None:
    assert findings_to_seg(build_findings(segments=()), build_masks(), build_sources()) is None


def test_empty_segment_is_named() -> None:
    masks = build_masks()
    masks["lesions"][masks["lesions"] == 2] = 0
    with pytest.raises(ValueError, match=r"segment 5 'Lesion 2' is empty: label 2 is not in mask 'lesions'"):
        findings_to_seg(build_findings(), masks, build_sources())


def test_numbers_that_are_not_consecutive_are_refused() -> None:
    segments = list(build_segments(build_findings().lesions))
    segments[2] = replace(segments[2], number=9)
    with pytest.raises(ValueError, match=r"Transition zone.* has number 9, expected 3"):
        findings_to_seg(build_findings(segments=tuple(segments)), build_masks(), build_sources())


def test_sources_that_do_not_fit_are_refused() -> None:
    sources = build_sources()
    with pytest.raises(ValueError, match="shape"):
        findings_to_seg(build_findings(), build_masks(), sources[:-1])
    with pytest.raises(ValueError, match="do not ascend"):
        findings_to_seg(build_findings(), build_masks(), sources[::-1])
    with pytest.raises(ValueError, match="multi-frame"):
        findings_to_seg(build_findings(), build_masks(), build_sources(NumberOfFrames=11))
    with pytest.raises(ValueError, match="none were given"):
        findings_to_seg(build_findings(), build_masks(), [])

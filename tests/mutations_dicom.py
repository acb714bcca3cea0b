"""Ways in which a DICOM rendering could be wrong: each breaks one thing in the bytes of the default result."""

import re
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from mappings.model import codes
from mappings.outputs.dicom_header import write_dicom
from tests.dicom_sources import build_sources

Contents = dict[str, bytes]
Change = Callable[[Contents], None]
SEG, SR, KEY = "seg.dcm", "sr.dcm", "key-images/lesion-1.dcm"
LEFT = codes.LEFT
OTHER = "2.25.7"
CATEGORY_5 = codes.Code("RID50300", "RADLEX", "PI-RADS 5 - Very high (lesion)")


def edit_dicom(name: str, edit: Callable[[Dataset], None]) -> Change:
    def change(contents: Contents) -> None:
        dataset = pydicom.dcmread(BytesIO(contents[name]))
        edit(dataset)
        if "SOPInstanceUID" in dataset:
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        contents[name] = write_dicom(dataset)

    return change


def set_value(name: str, keyword: str, value: object) -> Change:
    return edit_dicom(name, lambda dataset: setattr(dataset, keyword, value))


def name_of_item(item: Dataset) -> str:
    """The code value of an item's concept name, long or short."""
    name = item.ConceptNameCodeSequence[0]
    return str(name.get("CodeValue") or name.LongCodeValue)


def content_items(dataset: Dataset, tracking_id: str, concept: str, below: str = "") -> list[Dataset]:
    """Items of the group with this tracking id whose name has this code value; `below`, their children's."""
    measurements = next(i for i in dataset.ContentSequence if i.ConceptNameCodeSequence[0].CodeValue == "126010")
    for group in measurements.ContentSequence:
        if any(i.get("TextValue") == tracking_id for i in group.ContentSequence):
            found = [i for i in group.ContentSequence if name_of_item(i) == concept]
            children = [c for i in found for c in i.get("ContentSequence", [])]
            return [c for c in children if name_of_item(c) == below] if below else found
    raise AssertionError(f"no group {tracking_id}")


def edit_sr(tracking_id: str, concept: str, edit: Callable[[Dataset], None], below: str = "") -> Change:
    return edit_dicom("sr.dcm", lambda dataset: edit(content_items(dataset, tracking_id, concept, below)[0]))


def set_number(text: str) -> Callable[[Dataset], None]:
    return lambda item: setattr(item.MeasuredValueSequence[0], "NumericValue", text)


def set_unit(value: str) -> Callable[[Dataset], None]:
    return lambda item: setattr(item.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0], "CodeValue", value)


def set_answer(code: codes.Code) -> Callable[[Dataset], None]:
    def edit(item: Dataset) -> None:
        item.ConceptCodeSequence[0].CodeValue = code.value
        item.ConceptCodeSequence[0].CodeMeaning = code.meaning

    return edit


def measurement_groups(dataset: Dataset) -> Any:
    return next(
        i for i in dataset.ContentSequence if i.ConceptNameCodeSequence[0].CodeValue == "126010"
    ).ContentSequence


def drop_group(dataset: Dataset) -> None:
    groups = measurement_groups(dataset)
    del groups[1]


def double_group(dataset: Dataset) -> None:
    groups = measurement_groups(dataset)
    groups.append(groups[1])


def flip_voxel(dataset: Dataset) -> None:
    pixels = bytearray(dataset.PixelData)
    pixels[len(pixels) // 3] ^= 4
    dataset.PixelData = bytes(pixels)


def shift_planes(dataset: Dataset) -> None:
    """Every frame one slice higher; the instances that they name stay."""
    for group in dataset.PerFrameFunctionalGroupsSequence:
        x, y, z = map(float, group.PlanePositionSequence[0].ImagePositionPatient)
        group.PlanePositionSequence[0].ImagePositionPatient = [f"{v:.6f}" for v in (x, y + 0.88656, z + 2.866009)]


def shift_sources(dataset: Dataset) -> None:
    """Every frame names the instance of the next slice; positions stay."""
    sources = build_source_uids()
    for group in dataset.PerFrameFunctionalGroupsSequence:
        item = group.DerivationImageSequence[0].SourceImageSequence[0]
        item.ReferencedSOPInstanceUID = sources[sources.index(item.ReferencedSOPInstanceUID) + 1]


def build_source_uids() -> list[str]:
    return [str(source.SOPInstanceUID) for source in build_sources()]


def shift_and_rename(dataset: Dataset) -> None:
    shift_planes(dataset)
    shift_sources(dataset)


def swap_segments(dataset: Dataset) -> None:
    for group in dataset.PerFrameFunctionalGroupsSequence:
        item = group.SegmentIdentificationSequence[0]
        item.ReferencedSegmentNumber = {4: 5, 5: 4}.get(item.ReferencedSegmentNumber, item.ReferencedSegmentNumber)


def drop_segment(dataset: Dataset) -> None:
    del dataset.SegmentSequence[4]


def mirror(dataset: Dataset) -> None:
    shared = dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
    shared.ImageOrientationPatient = ["-1", *shared.ImageOrientationPatient[1:]]


def paint(dataset: Dataset) -> None:
    pixels = np.frombuffer(dataset.PixelData, np.uint8).copy()
    pixels[3000:6000] = 255
    dataset.PixelData = pixels.tobytes()


DICOM_MUTATIONS: dict[str, tuple[str, Change, str]] = {
    # SEG
    "seg: a voxel flipped": (SEG, edit_dicom(SEG, flip_voxel), r"voxel"),
    "seg: planes one slice up": (SEG, edit_dicom(SEG, shift_planes), r"lesion-1: centroid"),
    "seg: other instances named": (SEG, edit_dicom(SEG, shift_sources), r"lesion-1: source of slice"),
    "seg: one slice up, instances too": (SEG, edit_dicom(SEG, shift_and_rename), r"gland: centroid"),
    "seg: mirrored": (SEG, edit_dicom(SEG, mirror), r"centroid"),
    "seg: lesions exchanged": (SEG, edit_dicom(SEG, swap_segments), r"segment 4: .*"),
    "seg: segment dropped": (SEG, edit_dicom(SEG, drop_segment), r"segment 5: label: expected 'Lesion 2', found noth"),
    "seg: segment number": (
        SEG,
        edit_dicom(SEG, lambda d: setattr(d.SegmentSequence[3], "SegmentNumber", 6)),
        r"segment 6: label",
    ),
    "seg: label": (SEG, edit_dicom(SEG, lambda d: setattr(d.SegmentSequence[3], "SegmentLabel", "Lesion 2")), "label"),
    "seg: tracking id": (
        SEG,
        edit_dicom(SEG, lambda d: setattr(d.SegmentSequence[3], "TrackingID", "lesion-2")),
        "tracking id",
    ),
    "seg: tracking UID": (
        SEG,
        edit_dicom(SEG, lambda d: setattr(d.SegmentSequence[3], "TrackingUID", OTHER)),
        "segment 4: tracking UID",
    ),
    "seg: side": (
        SEG,
        edit_dicom(
            SEG,
            lambda d: setattr(
                d.SegmentSequence[3].AnatomicRegionSequence[0].AnatomicRegionModifierSequence[0],
                "CodeValue",
                LEFT.value,
            ),
        ),
        "segment 4: side",
    ),
    "seg: type": (
        SEG,
        edit_dicom(
            SEG,
            lambda d: setattr(
                d.SegmentSequence[1].SegmentedPropertyTypeCodeSequence[0], "CodeValue", codes.TRANSITION_ZONE.value
            ),
        ),
        "segment 2: type",
    ),
    "seg: model version": (
        SEG,
        edit_dicom(
            SEG,
            lambda d: setattr(
                d.SegmentSequence[3].SegmentationAlgorithmIdentificationSequence[0], "AlgorithmVersion", "2"
            ),
        ),
        "segment 4: model",
    ),
    "seg: study": (SEG, set_value(SEG, "StudyInstanceUID", OTHER), "StudyInstanceUID"),
    "seg: frame of reference": (SEG, set_value(SEG, "FrameOfReferenceUID", OTHER), "FrameOfReferenceUID"),
    "seg: patient id": (SEG, set_value(SEG, "PatientID", "TEST-002"), "PatientID"),
    "seg: patient name": (SEG, set_value(SEG, "PatientName", "Other^Name"), "PatientName"),
    "seg: accession": (SEG, set_value(SEG, "AccessionNumber", "ACC-2"), "AccessionNumber"),
    "seg: instance": (SEG, set_value(SEG, "SOPInstanceUID", OTHER), "SOPInstanceUID"),
    "seg: not called unverified": (SEG, set_value(SEG, "SeriesDescription", "Segmentation"), "series description"),
    "seg: made later": (SEG, set_value(SEG, "ContentTime", "103100"), "made at"),
    # SR
    "sr: last digit": (SR, edit_sr("lesion-1", "118565006", set_number("0.32")), r"lesion-1: Volume.*0\.31.*0\.32"),
    "sr: more digits": (SR, edit_sr("lesion-1", "118565006", set_number("0.310")), r"lesion-1: Volume"),
    "sr: unit": (SR, edit_sr("lesion-1", "103339001", set_unit("cm")), r"lesion-1: Long axis.*9\.5 mm.*9\.5 cm"),
    "sr: method": (
        SR,
        edit_sr("gland", "118565006", set_answer(codes.ELLIPSOID), "370129005"),
        "gland: Volume .*44.3.*LWH",
    ),
    "sr: derivation": (
        SR,
        edit_sr("lesion-1", "113041", set_answer(codes.TENTH_PERCENTILE), "121401"),
        "lesion-1: Apparent",
    ),
    "sr: side": (SR, edit_sr("lesion-1", "363698007", set_answer(LEFT), "272741003"), "lesion-1: site: .*Right.*Left"),
    "sr: sector": (
        SR,
        edit_sr("lesion-1", "363698007", set_answer(codes.TRANSITION_ZONE)),
        "lesion-1: site: .*Transition",
    ),
    "sr: category": (
        SR,
        edit_sr("lesion-1", "130560", set_answer(CATEGORY_5)),
        "lesion-1: PI-RADS Localized.*RID50300",
    ),
    "sr: input": (SR, edit_sr("lesion-1", "130562", set_answer(CATEGORY_5)), "lesion-1: PI-RADS DWI"),
    "sr: overall": (SR, edit_sr("study", "130554", set_answer(CATEGORY_5)), "study: Overall Prostate"),
    "sr: PSA": (SR, edit_sr("study", "2857-1", set_number("31")), "study: Prostate specific.*13 ng/mL.*31"),
    "sr: verified": (SR, set_value(SR, "VerificationFlag", "VERIFIED"), "VerificationFlag"),
    "sr: complete": (SR, set_value(SR, "CompletionFlag", "COMPLETE"), "CompletionFlag"),
    "sr: final": (SR, set_value(SR, "PreliminaryFlag", "FINAL"), "PreliminaryFlag"),
    "sr: tracking UID": (
        SR,
        edit_sr("lesion-1", "112040", lambda i: setattr(i, "UID", OTHER)),
        "lesion-1: tracking UID",
    ),
    "sr: tracking id": (
        SR,
        edit_sr("lesion-2", "112039", lambda i: setattr(i, "TextValue", "lesion-3")),
        "lesion-3: .*found 'one'",
    ),
    "sr: segment number": (
        SR,
        edit_sr("lesion-1", "121191", lambda i: setattr(i.ReferencedSOPSequence[0], "ReferencedSegmentNumber", 5)),
        "lesion-1: segment: .*segment 4.*segment 5",
    ),
    "sr: segment of another SEG": (
        SR,
        edit_sr("lesion-1", "121191", lambda i: setattr(i.ReferencedSOPSequence[0], "ReferencedSOPInstanceUID", OTHER)),
        "reference to an instance that is not evidence",
    ),
    "sr: source of the segment": (
        SR,
        edit_sr(
            "lesion-1",
            "121233",
            lambda i: setattr(i.ReferencedSOPSequence[0], "ReferencedSOPInstanceUID", build_source_uids()[0]),
        ),
        "lesion-1: source of the segment",
    ),
    "sr: finding dropped": (SR, edit_dicom(SR, drop_group), "lesion-1: tracking UID: .*found nothing"),
    "sr: finding doubled": (SR, edit_dicom(SR, double_group), "lesion-1: measurement groups: expected no more"),
    "sr: model": (
        SR,
        edit_sr("lesion-1", "111003", lambda i: setattr(i, "TextValue", "2")),
        "lesion-1: model: .*1'.*2'",
    ),
    "sr: study": (SR, set_value(SR, "StudyInstanceUID", OTHER), "StudyInstanceUID"),
    "sr: patient": (SR, set_value(SR, "PatientID", "TEST-002"), "PatientID"),
    "sr: birth date": (SR, set_value(SR, "PatientBirthDate", "19610507"), "PatientBirthDate"),
    "sr: blank filled": (
        SR,
        edit_sr("study", "121106", lambda i: setattr(i, "TextValue", "Left blank: nothing")),
        "study: Comment",
    ),
    # Key images
    "key: caption category": (
        KEY,
        edit_dicom(KEY, lambda d: setattr(d, "ImageComments", d.ImageComments.replace("category 4", "category 5"))),
        "lesion-1: caption: .*category 4",
    ),
    "key: caption number": (
        KEY,
        edit_dicom(KEY, lambda d: setattr(d, "ImageComments", d.ImageComments.replace("12.1", "12.2"))),
        "caption: expected no other number, found '12.2'",
    ),
    "key: caption side": (
        KEY,
        edit_dicom(KEY, lambda d: setattr(d, "ImageComments", re.sub("[Rr]ight", "Left", d.ImageComments))),
        "caption: .*'Right'",
    ),
    "key: caption status": (
        KEY,
        edit_dicom(KEY, lambda d: setattr(d, "ImageComments", d.ImageComments.replace(", not verified", ""))),
        "caption: .*not verified",
    ),
    "key: source": (
        KEY,
        edit_dicom(
            KEY, lambda d: setattr(d.SourceImageSequence[0], "ReferencedSOPInstanceUID", build_source_uids()[0])
        ),
        "source image",
    ),
    "key: instance": (KEY, set_value(KEY, "SOPInstanceUID", OTHER), "SOPInstanceUID"),
    "key: patient": (KEY, set_value(KEY, "PatientID", "TEST-002"), "PatientID"),
    "key: picture": ("key-images/lesion-1.png", edit_dicom(KEY, paint), "picture"),
    "key: exchanged": (
        KEY,
        lambda c: c.update({KEY: c["key-images/lesion-2.dcm"], "key-images/lesion-2.dcm": c[KEY]}),
        "SOPInstanceUID",
    ),
}
"""Artifact that is changed, how, and what a message of the checker must say (a regular expression)."""

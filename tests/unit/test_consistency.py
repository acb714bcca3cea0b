"""The consistency checker: silent on every true rendering, and loud on each kind of disagreement."""

import ast
import dataclasses
import json
import re
from collections.abc import Callable
from datetime import UTC, date, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from mappings.model import codes
from mappings.model.context import ClinicalContext, ContextPatient
from mappings.model.findings import Blank, Findings
from mappings.model.study import PatientIdentity
from mappings.outputs.consistency import check_consistency, expected_names
from mappings.outputs.dicom_header import write_dicom
from tests.builders import build_context, build_findings, build_gland, build_lesion, build_masks
from tests.dicom_sources import build_sources
from tests.renderings import place_findings, render_contents

Contents = dict[str, bytes]
JAPANESE = "Yamada^Tarou=山田^太郎=やまだ^たろう"
HOSTILE = "<script>alert(1)</script>{{7*7}}|^~\\& \"'> [lesion-9/volume]"
OUTPUTS = Path(__file__).parents[2] / "mappings" / "outputs"


def named(name: str) -> PatientIdentity:
    return PatientIdentity("TEST-001", "", name, date(1961, 5, 6), "M")


def placed(**changes: object) -> Findings:
    return place_findings(build_findings(**changes))  # type: ignore[arg-type]


def hostile() -> Findings:
    order = build_context().order
    assert order is not None
    lesion = dataclasses.replace(
        build_lesion(), title=HOSTILE, notes=(HOSTILE.partition(" [")[0], "Please check. " * 20)
    )
    return placed(
        lesions=(lesion,),
        context=build_context(order=dataclasses.replace(order, reason=HOSTILE, requester=HOSTILE)),
        study_description=HOSTILE,
        blanks=(Blank("PSA density", HOSTILE),),
        technique=(HOSTILE,),
        warnings=(HOSTILE,),
    )


def nothing() -> Findings:
    """Nothing found at all: no gland, no lesion, no segment."""
    return placed(
        lesions=(),
        findings=(),
        segments=(),
        context=ClinicalContext("none", missing=("patient: not in the bundle",)),
        psa=None,
        blanks=(Blank("Prostate gland", "the model found no gland"), Blank("PSA density", "no PSA in the EHR")),
    )


VARIANTS: dict[str, Callable[[], tuple[Findings, Contents]]] = {}


def variant(name: str, findings: Findings, **rendering: Any) -> None:
    VARIANTS[name] = lambda: (findings, render_contents(findings, **rendering))


variant("default", placed())
variant("generic template", placed(), template="generic")
variant("another EHR", placed(), ehr_gave_context=False)
variant("no lesions", placed(lesions=()))
variant("nothing found", nothing())
variant(
    "no context",
    placed(context=ClinicalContext("", missing=("no EHR is configured",)), psa=None),
)
variant("no order", placed(context=build_context(order=None)))
variant("no patient in the EHR", placed(context=build_context(patient=None)))
variant(
    "no PSA",
    placed(findings=(build_gland(None), build_lesion()), psa=None, blanks=(Blank("PSA density", "no PSA in the EHR"),)),
)
variant("no blanks", placed(blanks=()))
variant(
    "bare lesion",
    placed(
        findings=(
            build_gland(),
            dataclasses.replace(
                build_lesion(),
                laterality=None,
                zone=None,
                level=None,
                sector=None,
                measurements=(),
                assessments=(),
                confidence=None,
            ),
        ),
        assessments=(),
    ),
)
variant("hostile words", hostile(), StudyDescription="any")
variant("long title", placed(lesions=(dataclasses.replace(build_lesion(), title="Lesion " + "x" * 300),)))
variant(
    "Japanese name", placed(patient=named(JAPANESE)), SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientName=JAPANESE
)
variant(
    "German name",
    placed(patient=named("Müller-Lüdenscheidt^Jörg^^Dr^Jr")),
    PatientName="Müller-Lüdenscheidt^Jörg^^Dr^Jr",
)
variant(
    "issuer",
    placed(patient=PatientIdentity("TEST-001", "1.2.3.4.5", "Phantom^Peter", date(1961, 5, 6), "M")),
    IssuerOfPatientID="1.2.3.4.5",
)
variant(
    "nobody",
    placed(patient=PatientIdentity(""), accession_number="", study_date=None),
    PatientName="",
    PatientID="",
    PatientBirthDate="",
    PatientSex="",
    AccessionNumber="",
    StudyDate="",
)
variant("revision", placed(revision=2, predecessor_revision=1, status="amended"))
variant("another zone", placed(created_at=datetime(2026, 3, 4, 23, 30, 5, tzinfo=UTC)), TimezoneOffsetFromUTC="+0900")
for one in ("final", "corrected", "entered-in-error"):
    variant(one, placed(status=one))


@pytest.mark.parametrize("name", VARIANTS)
def test_true_renderings_agree(name: str) -> None:
    findings, contents = VARIANTS[name]()
    assert check_consistency(findings, contents, build_masks()) == ()
    assert set(expected_names(findings)) <= set(contents)
    assert ("seg.dcm" in contents) == bool(findings.segments)


@pytest.fixture(scope="module")
def findings() -> Findings:
    return placed()


@pytest.fixture(scope="module")
def rendered(findings: Findings) -> Contents:
    return render_contents(findings)


def edit_dicom(name: str, edit: Callable[[Dataset], None]) -> Callable[[Contents], None]:
    def change(contents: Contents) -> None:
        dataset = pydicom.dcmread(BytesIO(contents[name]))
        edit(dataset)
        if "SOPInstanceUID" in dataset:
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        contents[name] = write_dicom(dataset)

    return change


def set_value(name: str, keyword: str, value: object) -> Callable[[Contents], None]:
    return edit_dicom(name, lambda dataset: setattr(dataset, keyword, value))


def content_items(dataset: Dataset, tracking_id: str, concept: str, below: str = "") -> list[Dataset]:
    """Items of the group with this tracking id whose name has this code value; `below`, their children's."""
    measurements = next(i for i in dataset.ContentSequence if i.ConceptNameCodeSequence[0].CodeValue == "126010")
    for group in measurements.ContentSequence:
        if any(i.get("TextValue") == tracking_id for i in group.ContentSequence):
            found = [i for i in group.ContentSequence if i.ConceptNameCodeSequence[0].CodeValue == concept]
            children = [c for i in found for c in i.get("ContentSequence", [])]
            return [c for c in children if c.ConceptNameCodeSequence[0].CodeValue == below] if below else found
    raise AssertionError(f"no group {tracking_id}")


def edit_sr(
    tracking_id: str, concept: str, edit: Callable[[Dataset], None], below: str = ""
) -> Callable[[Contents], None]:
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


def swap(name: str, old: str, new: str, count: int = 1) -> Callable[[Contents], None]:
    """Replaces the first `count` places of a text artifact (all for -1)."""

    def change(contents: Contents) -> None:
        text = contents[name].decode()
        assert old in text
        contents[name] = text.replace(old, new, count).encode()

    return change


def obx(tracking: str, question: str, old: str, new: str) -> Callable[[Contents], None]:
    """Replaces in the OBX whose OBX-4 group and OBX-3 are these."""

    def change(contents: Contents) -> None:
        lines = contents["oru.hl7"].decode().split("\r")
        (index,) = (i for i, s in enumerate(lines) if f"|{tracking}." in s and question in s.split("|")[3])
        assert old in lines[index]
        lines[index] = lines[index].replace(old, new, 1)
        contents["oru.hl7"] = "\r".join(lines).encode()

    return change


def edit_lines(edit: Callable[[list[str]], list[str]]) -> Callable[[Contents], None]:
    def change(contents: Contents) -> None:
        contents["oru.hl7"] = "\r".join(edit(contents["oru.hl7"].decode().split("\r"))).encode()

    return change


def edit_fhir(kind: str, edit: Callable[[dict[str, Any]], None], text: str = "") -> Callable[[Contents], None]:
    """Edits the first resource of a type (and code.text)."""

    def change(contents: Contents) -> None:
        bundle = json.loads(contents["fhir-bundle.json"])
        resources = [e["resource"] for e in bundle["entry"] if e["resource"]["resourceType"] == kind]
        edit(next(r for r in resources if not text or r["code"]["text"] == text))
        contents["fhir-bundle.json"] = json.dumps(bundle).encode()

    return change


def component(key: str, edit: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def change(resource: dict[str, Any]) -> None:
        edit(next(c for c in resource["component"] if any(x["code"] == key for x in c["code"]["coding"])))

    return change


def edit_entries(edit: Callable[[list[dict[str, Any]]], None]) -> Callable[[Contents], None]:
    def change(contents: Contents) -> None:
        bundle = json.loads(contents["fhir-bundle.json"])
        edit(bundle["entry"])
        contents["fhir-bundle.json"] = json.dumps(bundle).encode()

    return change


def entry(entries: list[dict[str, Any]], text: str) -> dict[str, Any]:
    return next(e for e in entries if e["resource"].get("code", {}).get("text") == text)


def quantity(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda part: part["valueQuantity"].update(changes)


def recode(value: str) -> Callable[[dict[str, Any]], None]:
    return lambda part: part["valueCodeableConcept"]["coding"][0].update(code=value)


def paint(dataset: Dataset) -> None:
    pixels = np.frombuffer(dataset.PixelData, np.uint8).copy()
    pixels[3000:6000] = 255
    dataset.PixelData = pixels.tobytes()


SEG, SR, KEY, ORU, FHIR, TEXT, HTML = (
    "seg.dcm",
    "sr.dcm",
    "key-images/lesion-1.dcm",
    "oru.hl7",
    "fhir-bundle.json",
    "report.txt",
    "report.html",
)
LEFT = codes.LEFT
OTHER = "2.25.7"
CATEGORY_5 = codes.Code("RID50300", "RADLEX", "PI-RADS 5 - Very high (lesion)")

MUTATIONS: dict[str, tuple[str, Callable[[Contents], None], str]] = {
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
    # ORU
    "oru: last digit": (ORU, obx("2", "^volume^", "|0.31|", "|0.32|"), r"lesion-1: volume: .*0\.31.*0\.32"),
    "oru: unit": (ORU, obx("2", "^diameter_3d^", "|mm^", "|cm^"), "lesion-1: diameter_3d: .*mm.*cm"),
    "oru: method": (ORU, obx("1", "^volume_voxels^", "126030", "126029"), "gland: volume_voxels"),
    "oru: label": (ORU, obx("1", "^volume_voxels^", "voxel count", "ellipsoid"), "gland: volume_voxels: label"),
    "oru: side": (ORU, obx("2", "^side^", "24028007^Right", "7771000^Left"), r"lesion-1: side: .*Right.*Left"),
    "oru: zone": (ORU, obx("2", "^zone^Zone", "279706003^Peripheral", "399384005^Transition"), "lesion-1: zone"),
    "oru: level": (ORU, obx("2", "level", "|mid|", "|apex|"), "lesion-1: level: .*mid.*apex"),
    "oru: category": (ORU, obx("2", "^pirads^", "RID50299", "RID50300"), "lesion-1: pirads: .*RID50300"),
    "oru: score": (ORU, obx("2", "^pirads^", "^4^", "^5^"), "lesion-1: pirads: .*= 4.*= 5"),
    "oru: flag": (ORU, obx("2", "^pirads^", "|A|", "||"), "lesion-1: pirads: .*flag A"),
    "oru: input": (ORU, obx("2", "^pirads.DWI score^", "RID50317", "RID50318"), r"lesion-1: pirads\.DWI score"),
    "oru: overall": (ORU, obx("4", "^pirads_overall^", "RID50292", "RID50293"), "study: pirads_overall"),
    "oru: one result final": (ORU, obx("2", "^volume^", "|P|", "|F|"), "message: OBX-11: .*found 'F'"),
    "oru: order final": (ORU, swap(ORU, "|RAD|P|", "|RAD|F|"), "message: OBR-25: expected 'P', found 'F'"),
    "oru: control id": (
        ORU,
        edit_lines(lambda s: [re.sub(r"\|WR[0-9A-F]{18}\|", "|WR0|", s[0]), *s[1:]]),
        "message: MSH-10",
    ),
    "oru: patient id": (ORU, swap(ORU, "|TEST-001^", "|TEST-002^"), "message: PID-3"),
    "oru: patient name": (ORU, swap(ORU, "|Phantom^", "|Fantom^"), "message: PID-5"),
    "oru: accession": (ORU, swap(ORU, "||ACC-1|", "||ACC-2|"), "message: OBR-18"),
    "oru: placer": (ORU, swap(ORU, "OBR|1|PLAC-1|", "OBR|1|PLAC-2|"), "message: OBR-2"),
    "oru: study": (ORU, obx("4", "110180", "|2.25.", "|2.26."), "study: Study Instance UID"),
    "oru: tracking UID": (ORU, obx("3", "112040", "|2.25.", "|2.26."), "lesion-2: Tracking Unique Identifier"),
    "oru: model": (ORU, obx("2", "^volume^", "prostate_reference^1", "prostate_reference^2"), "message: OBX-18"),
    "oru: finding dropped": (
        ORU,
        edit_lines(lambda s: [x for x in s if not re.match(r"OBX\|\d+\|[A-Z]+\|[^|]*\|3\.", x)]),
        "lesion-2: .*nothing",
    ),
    "oru: finding doubled": (
        ORU,
        edit_lines(lambda s: [*s[:-1], *(x for x in s if re.match(r"OBX\|\d+\|[A-Z]+\|[^|]*\|3\.", x)), ""]),
        "lesion-2: volume: expected no more",
    ),
    "oru: narrative": (ORU, edit_lines(lambda s: [x for x in s if "5.30|" not in x]), "message: narrative"),
    "oru: impression": (
        ORU,
        edit_lines(lambda s: [x.replace("category 4; right", "category 5; right") if "19005-8" in x else x for x in s]),
        "lesion-1: impression: .*category 4",
    ),
    # FHIR
    "fhir: last digit": (
        FHIR,
        edit_fhir("Observation", component("volume", quantity(value=0.32)), "Lesion 1"),
        "lesion-1: volume: .*0.32",
    ),
    "fhir: unit": (
        FHIR,
        edit_fhir("Observation", component("volume", quantity(code="L")), "Lesion 1"),
        "lesion-1: volume: unit",
    ),
    "fhir: side": (FHIR, edit_fhir("Observation", component("side", recode(LEFT.value)), "Lesion 1"), "lesion-1: side"),
    "fhir: sector": (
        FHIR,
        edit_fhir("Observation", lambda r: r["bodySite"]["coding"][0].update(code="1"), "Lesion 1"),
        "lesion-1: bodySite",
    ),
    "fhir: category": (
        FHIR,
        edit_fhir("Observation", component("pirads", recode("RID50300")), "Lesion 1"),
        "lesion-1: pirads: .*RID50300",
    ),
    "fhir: input": (
        FHIR,
        edit_fhir("Observation", component("pirads.DWI_score", recode("RID50318")), "Lesion 1"),
        "DWI_score",
    ),
    "fhir: overall": (
        FHIR,
        edit_fhir("Observation", recode("RID50293"), "PI-RADS v2.1 overall category"),
        "pirads_overall: value",
    ),
    "fhir: density": (
        FHIR,
        edit_fhir("Observation", quantity(value=0.62), "PSA density"),
        "psa_density: value: .*0.26.*0.62",
    ),
    "fhir: status of a finding": (
        FHIR,
        edit_fhir("Observation", lambda r: r.update(status="final"), "Lesion 1"),
        "lesion-1: status",
    ),
    "fhir: status of the report": (
        FHIR,
        edit_fhir("DiagnosticReport", lambda r: r.update(status="final")),
        "DiagnosticReport: status",
    ),
    "fhir: subject": (
        FHIR,
        edit_fhir("Observation", lambda r: r["subject"].update(reference="Patient/p2"), "Lesion 1"),
        "lesion-1: subject",
    ),
    "fhir: subject of the report": (
        FHIR,
        edit_fhir("DiagnosticReport", lambda r: r["subject"].update(reference="Patient/p2")),
        "DiagnosticReport: subject",
    ),
    "fhir: order": (
        FHIR,
        edit_fhir("DiagnosticReport", lambda r: r["basedOn"][0].update(reference="ServiceRequest/s2")),
        "basedOn",
    ),
    "fhir: accession": (
        FHIR,
        edit_fhir("ImagingStudy", lambda r: r["identifier"][1].update(value="ACC-2")),
        "ImagingStudy: identifier",
    ),
    "fhir: study": (
        FHIR,
        edit_fhir("ImagingStudy", lambda r: r["identifier"][0].update(value="urn:oid:2.25.7")),
        "ImagingStudy",
    ),
    "fhir: identifier of a finding": (
        FHIR,
        edit_fhir("Observation", lambda r: r["identifier"][0].update(value="urn:oid:2.25.7"), "Lesion 1"),
        "Observation 2.25.7",
    ),
    "fhir: report identifier": (
        FHIR,
        edit_fhir("DiagnosticReport", lambda r: r["identifier"][0].update(value="x")),
        "DiagnosticReport: ident",
    ),
    "fhir: model version": (
        FHIR,
        edit_fhir("Device", lambda r: r["version"][0].update(value="2")),
        "Device: version: expected '1', found '2'",
    ),
    "fhir: finding dropped": (
        FHIR,
        edit_entries(lambda e: e.remove(entry(e, "Lesion 2"))),
        "lesion-2: resource: .*found nothing",
    ),
    "fhir: finding doubled": (
        FHIR,
        edit_entries(lambda e: e.append(entry(e, "Lesion 2"))),
        "lesion-2: resource: expected no more",
    ),
    "fhir: result not listed": (
        FHIR,
        edit_fhir("DiagnosticReport", lambda r: r["result"].pop()),
        "DiagnosticReport: result",
    ),
    "fhir: conclusion": (
        FHIR,
        edit_fhir("DiagnosticReport", lambda r: r.update(conclusion=r["conclusion"].replace("; left", "; right"))),
        "lesion-2: impression: .*'Left'",
    ),
    "fhir: other revision": (
        FHIR,
        edit_fhir("Provenance", lambda r: r["meta"]["tag"][0].update(code="x")),
        "Provenance: tag",
    ),
    "fhir: attachment": (
        FHIR,
        edit_fhir("DiagnosticReport", lambda r: r["presentedForm"][1].update(data="eA==")),
        "presentedForm text/plain",
    ),
    "fhir: attachment's hash": (
        FHIR,
        edit_fhir("DiagnosticReport", lambda r: r["presentedForm"][0].update(hash="eA==")),
        "text/html: hash",
    ),
    # Drafts
    "text: number": (
        TEXT,
        swap(TEXT, "0.31 mL", "0.32 mL"),
        r"lesion-1: volume: expected '0\.31 mL', found '0\.32 mL'",
    ),
    "text: unit": (TEXT, swap(TEXT, "44.3 mL", "44.3 mm"), "gland: volume_voxels: .*mL.*mm"),
    "text: density": (TEXT, swap(TEXT, "0.26 ng/mL/mL", "0.27 ng/mL/mL"), "gland: psa_density"),
    "text: label": (TEXT, swap(TEXT, "Mean ADC:", "10th percentile ADC:"), "lesion-1: adc_mean: label"),
    "text: PSA": (TEXT, swap(TEXT, "13 ng/mL on", "31 ng/mL on"), "document: PSA"),
    "text: side": (
        TEXT,
        swap(TEXT, "Location:                  right", "Location:  left"),
        "lesion-1: row: .*right.*left",
    ),
    "text: side in the impression": (TEXT, swap(TEXT, "category 4; right", "category 4; left"), "lesion-1: impression"),
    "text: category": (
        TEXT,
        swap(TEXT, "   4, PI-RADS 4 - High (lesion)", "   5, PI-RADS 4 - High (lesion)"),
        "lesion-1: pirads",
    ),
    "text: input": (TEXT, swap(TEXT, "DWI score:               4", "DWI score:               3"), "lesion-1: pirads"),
    "text: banner": (TEXT, swap(TEXT, "AI-PROPOSED, UNVERIFIED, PRELIMINARY: no", "FINAL: no"), "banner above"),
    "text: status": (TEXT, swap(TEXT, "revision 1, preliminary", "revision 1, final"), "document: Result"),
    "text: revision": (TEXT, swap(TEXT, "revision 1,", "revision 2,"), "document: Result"),
    "text: patient id": (TEXT, swap(TEXT, "TEST-001", "TEST-002"), "document: Patient ID"),
    "text: accession": (TEXT, swap(TEXT, "ACC-1", "ACC-2"), "document: Accession number"),
    "text: study": (TEXT, swap(TEXT, "  Study 2.25", "  Study 2.26"), "document: Study Instance UID"),
    "text: lesion in the impression": (
        TEXT,
        swap(TEXT, "12.1 mm. [lesion-2]", "12.9 mm. [lesion-2]"),
        "lesion-2: impress",
    ),
    "text: a lesion of nobody": (
        TEXT,
        swap(TEXT, "Lesion 2  [lesion-2]\n", "Lesion 3  [lesion-3]\n\nLesion 2  [lesion-2]\n"),
        "lesion-3: heading",
    ),
    "text: blank dropped": (TEXT, swap(TEXT, "  - DCE: no dynamic", "  DCE: no dynamic"), "document: left blank"),
    "text: model version": (TEXT, swap(TEXT, "prostate_reference version 1", "prostate_reference version 2"), "model"),
    "html: number": (
        HTML,
        swap(HTML, ">0.31 mL<", ">0.32 mL<"),
        r"lesion-1: volume: expected 'no more', found|found '0\.32",
    ),
    "html: unit": (HTML, swap(HTML, ">812 um2/s<", ">812 mm2/s<"), "lesion-1: adc_mean"),
    "html: method": (HTML, swap(HTML, "<td>Mean</td>", "<td>Median</td>"), "lesion-1: adc_mean: method"),
    "html: side": (HTML, swap(HTML, "Location: right", "Location: left"), "lesion-1: location"),
    "html: side in the impression": (HTML, swap(HTML, "</span>; right", "</span>; left"), "lesion-1: impression"),
    "html: score": (HTML, swap(HTML, '(lesion)">4</span>', '(lesion)">5</span>'), "lesion-1: pirads: score"),
    "html: input": (HTML, swap(HTML, '"DWI score">4<', '"DWI score">3<'), "lesion-1: pirads: why"),
    "html: banner": (HTML, swap(HTML, "AI-PROPOSED, UNVERIFIED, PRELIMINARY", "FINAL"), "banner above"),
    "html: patient id": (HTML, swap(HTML, "TEST-001", "TEST-002"), "document: Patient ID"),
    "html: accession": (HTML, swap(HTML, "<dd>ACC-1", "<dd>ACC-2"), "document: Accession number"),
    "html: evidence": (HTML, swap(HTML, "Shown on t2w slice 5", "Shown on t2w slice 6"), "lesion-1: evidence"),
    "html: article dropped": (
        HTML,
        lambda c: c.update({HTML: re.sub(rb'<article id="finding-2".*?</article>', b"", c[HTML], flags=re.S)}),
        "lesion-2: heading: .*nothing",
    ),
    "html: article doubled": (
        HTML,
        lambda c: c.update({HTML: re.sub(rb'(<article id="finding-2".*?</article>)', rb"\1\1", c[HTML], flags=re.S)}),
        "lesion-2: heading: expected no more",
    ),
    "html: tracking UID": (HTML, swap(HTML, "<td><code>2.25.1401", "<td><code>2.25.1402"), "lesion-1: tracking UID"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_disagreement_is_noticed_and_named(name: str, findings: Findings, rendered: Contents) -> None:
    artifact, mutate, what = MUTATIONS[name]
    contents = dict(rendered)
    mutate(contents)
    messages = check_consistency(findings, contents, build_masks())
    own = [message for message in messages if message.startswith(f"{artifact}: ")]
    assert any(re.search(what, message.removeprefix(f"{artifact}: ")) for message in own), messages
    for secret in ("Phantom", "Peter", "TEST-00", "ACC-", "PLAC-", "19610506"):
        assert not any(secret in message for message in messages)


def test_enough_kinds_of_disagreement_are_tried() -> None:
    assert len(MUTATIONS) >= 40
    assert {artifact for artifact, _, _ in MUTATIONS.values()} >= {SEG, SR, KEY, ORU, FHIR, TEXT, HTML}


@pytest.mark.parametrize("name", [SEG, SR, KEY, "key-images/gland.dcm", ORU, FHIR, TEXT, HTML])
@pytest.mark.parametrize("data", [None, b"", b"\x00\xff garbage"])
def test_an_absent_or_broken_artifact_is_named(
    name: str, data: bytes | None, findings: Findings, rendered: Contents
) -> None:
    contents = {key: value for key, value in rendered.items() if key != name}
    if data is not None:
        contents[name] = data
    messages = check_consistency(findings, contents, build_masks())
    assert any(message.startswith(f"{name}: ") for message in messages), messages


@pytest.mark.parametrize("name", [SEG, SR, KEY, FHIR, TEXT, HTML])
def test_a_cut_off_artifact_is_named(name: str, findings: Findings, rendered: Contents) -> None:
    contents = {**rendered, name: rendered[name][: len(rendered[name]) // 2]}
    messages = check_consistency(findings, contents, build_masks())
    assert any(message.startswith(f"{name}: ") for message in messages), messages


def test_an_artifact_that_nobody_asked_for_is_named(findings: Findings, rendered: Contents) -> None:
    contents = {**rendered, "key-images/lesion-3.dcm": rendered[KEY], "other.txt": b"x"}
    messages = check_consistency(findings, contents, build_masks())
    assert {m.split(":")[0] for m in messages} == {"key-images/lesion-3.dcm", "other.txt"}


def test_a_segmentation_of_nothing_is_named(rendered: Contents) -> None:
    empty = nothing()
    contents = {**render_contents(empty), SEG: rendered[SEG]}
    messages = check_consistency(empty, contents, build_masks())
    assert messages == (f"{SEG}: artifact: expected none of this name, found one",)


def test_findings_that_lack_what_was_rendered_are_noticed_in_every_rendering(rendered: Contents) -> None:
    fewer = placed(lesions=(build_lesion(1),))
    messages = check_consistency(fewer, rendered, build_masks())
    for artifact in (SEG, SR, "key-images/lesion-2.dcm", ORU, FHIR, TEXT, HTML):
        assert any(message.startswith(f"{artifact}: ") for message in messages), artifact


@pytest.mark.parametrize(
    ("changes", "artifacts"),
    [
        ({"job_id": "other-job"}, (SEG, SR, KEY, ORU, FHIR)),
        ({"revision": 2}, (SEG, SR, KEY, ORU, FHIR, TEXT, HTML)),
        ({"status": "final"}, (SR, ORU, FHIR, TEXT, HTML)),
        ({"study_instance_uid": "2.25.9"}, (SEG, SR, KEY, ORU, FHIR, TEXT, HTML)),
        ({"accession_number": "ACC-9"}, (SEG, SR, KEY, ORU, FHIR, TEXT, HTML)),
        ({"patient": named("Other^Name")}, (SEG, SR, KEY, ORU, TEXT, HTML)),
        ({"psa": None}, (SR, FHIR, TEXT, HTML)),
        ({"blanks": ()}, (SR, ORU, FHIR, TEXT, HTML)),
        ({"assessments": ()}, (SR, KEY.replace("lesion-1", "gland"), ORU, FHIR, TEXT, HTML)),
        (
            {"context": build_context(patient=ContextPatient("Patient/p2", ()))},
            (FHIR,),
        ),
    ],
)
def test_each_rendering_is_held_to_the_findings(
    changes: dict[str, object], artifacts: tuple[str, ...], findings: Findings, rendered: Contents
) -> None:
    messages = check_consistency(dataclasses.replace(findings, **changes), rendered, build_masks())  # type: ignore[arg-type]
    named_artifacts = {message.split(":")[0] for message in messages}
    assert set(artifacts) <= named_artifacts, messages


def test_a_note_that_forges_a_mark_is_noticed() -> None:
    lesion = dataclasses.replace(build_lesion(), notes=("Volume 9.99 mL [lesion-9/volume]",))
    findings = placed(lesions=(lesion,))
    messages = check_consistency(findings, render_contents(findings), build_masks())
    assert messages == ("report.txt: lesion-9: volume: expected nothing, found 'Volume 9.99 mL'",)


def test_without_masks_the_place_of_each_segment_is_still_checked(findings: Findings, rendered: Contents) -> None:
    contents = dict(rendered)
    edit_dicom(SEG, shift_planes)(contents)
    assert check_consistency(findings, rendered, None) == ()
    assert any("centroid" in message for message in check_consistency(findings, contents, None))


def test_masks_of_another_answer_are_noticed(findings: Findings, rendered: Contents) -> None:
    masks = build_masks()
    masks["lesions"] = np.roll(masks["lesions"], 1, axis=0)
    messages = check_consistency(findings, rendered, masks)
    assert any(message.startswith("seg.dcm: segment 4: ") for message in messages)


def test_the_checker_shares_no_code_with_the_renderings() -> None:
    for file in [OUTPUTS / "consistency.py", *OUTPUTS.glob("read_*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                own = name.removeprefix("mappings.outputs.")
                assert own == name or own.startswith("read_"), f"{file.name} imports {name}"
                assert "highdicom" not in name, f"{file.name} imports {name}"

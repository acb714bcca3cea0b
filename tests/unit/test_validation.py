"""What may be released: every artifact judged by its own standard, and no judge's failure gets out."""

import dataclasses
import json
import re
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import MRImageStorage

from mappings.model.findings import Blank, Findings
from mappings.outputs.dicom_header import write_dicom
from middleware.release import validation
from middleware.release.validation import find_faults
from tests.builders import build_context, build_findings, build_gland, build_lesion, build_masks
from tests.renderings import place_findings, render_contents

Contents = dict[str, bytes]
SEG, SR, KEY, ORU, FHIR, TEXT, HTML, PNG = (
    "seg.dcm",
    "sr.dcm",
    "key-images/lesion-1.dcm",
    "oru.hl7",
    "fhir-bundle.json",
    "report.txt",
    "report.html",
    "key-images/lesion-1.png",
)

VARIANTS: dict[str, Findings] = {
    "default": build_findings(),
    "no lesions": build_findings(lesions=()),
    "nothing found": build_findings(lesions=(), findings=(), segments=(), psa=None),
    "no context": build_findings(context=build_context(patient=None, order=None), psa=None),
    "no PSA": build_findings(
        findings=(build_gland(None), build_lesion()), psa=None, blanks=(Blank("PSA density", "no PSA in the EHR"),)
    ),
    "hostile words": build_findings(
        lesions=(dataclasses.replace(build_lesion(), title="<script>{{7*7}}|^~\\&"),),
        blanks=(Blank("PSA density", "a | b ^ c ~ d \\ e & f"),),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_true_renderings_may_leave(name: str) -> None:
    findings = place_findings(VARIANTS[name])
    assert find_faults(findings, render_contents(findings), build_masks()) == ()


@pytest.fixture(scope="module")
def findings() -> Findings:
    return place_findings(build_findings())


@pytest.fixture(scope="module")
def rendered(findings: Findings) -> Contents:
    return render_contents(findings)


def edit_dicom(name: str, edit: Callable[[Dataset], Any]) -> Callable[[Contents], None]:
    def change(contents: Contents) -> None:
        dataset = pydicom.dcmread(BytesIO(contents[name]))
        edit(dataset)
        buffer = BytesIO()
        dataset.save_as(buffer)
        contents[name] = buffer.getvalue()

    return change


def swap(name: str, old: bytes, new: bytes) -> Callable[[Contents], None]:
    def change(contents: Contents) -> None:
        assert old in contents[name]
        contents[name] = contents[name].replace(old, new, 1)

    return change


def edit_bundle(edit: Callable[[list[dict[str, Any]]], Any]) -> Callable[[Contents], None]:
    def change(contents: Contents) -> None:
        bundle = json.loads(contents[FHIR])
        edit(bundle["entry"])
        contents[FHIR] = json.dumps(bundle).encode()

    return change


def set_reference_class(dataset: Dataset) -> None:
    for series in dataset.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence:
        series.ReferencedSOPSequence[0].ReferencedSOPClassUID = MRImageStorage


FAULTS: dict[str, tuple[str, Callable[[Contents], None], str]] = {
    "instance differs from the meta header": (
        SEG,
        edit_dicom(SEG, lambda d: setattr(d.file_meta, "MediaStorageSOPInstanceUID", "2.25.7")),
        "MediaStorageSOPInstanceUID of the file",
    ),
    "class differs from the meta header": (
        KEY,
        edit_dicom(KEY, lambda d: setattr(d.file_meta, "MediaStorageSOPClassUID", MRImageStorage)),
        "MediaStorageSOPClassUID of the file",
    ),
    "no patient id": (SR, edit_dicom(SR, lambda d: setattr(d, "PatientID", "")), "PatientID has no value"),
    "no birth date at all": (KEY, edit_dicom(KEY, lambda d: delattr(d, "PatientBirthDate")), "PatientBirthDate is mis"),
    "no series": (SEG, edit_dicom(SEG, lambda d: delattr(d, "SeriesInstanceUID")), "SeriesInstanceUID has no value"),
    "no evidence": (
        SR,
        edit_dicom(SR, lambda d: delattr(d, "CurrentRequestedProcedureEvidenceSequence")),
        "CurrentRequestedProcedureEvidenceSequence has no value",
    ),
    "a UID that is none": (
        SEG,
        lambda c: c.update({SEG: c[SEG].replace(b"2.25.", b"2.00.", 3)}),
        "is not a valid UID",
    ),
    "pixels cut": (KEY, edit_dicom(KEY, lambda d: setattr(d, "PixelData", d.PixelData[:-2])), "PixelData holds"),
    "a reference of another class": ("seg.dcm, sr.dcm, key images", edit_dicom(SR, set_reference_class), "another SOP"),
    "two studies": (
        "seg.dcm, sr.dcm, key images",
        edit_dicom(SR, lambda d: setattr(d, "StudyInstanceUID", "2.25.7")),
        "different studies",
    ),
    "two patients": (
        "seg.dcm, sr.dcm, key images",
        edit_dicom(SR, lambda d: setattr(d, "PatientID", "X")),
        "different patients",
    ),
    "one instance twice": (
        "seg.dcm, sr.dcm, key images",
        lambda c: c.update({KEY: c["key-images/lesion-2.dcm"]}),
        "share a SOP Instance UID",
    ),
    "no ORC-1": (ORU, swap(ORU, b"\rORC|RE|", b"\rORC||"), "ORC"),
    "no OBR": (ORU, lambda c: c.update({ORU: re.sub(rb"\rOBR[^\r]*", b"", c[ORU])}), "cannot be judged"),
    "a value too long": (ORU, swap(ORU, b"|Phantom^", b"|" + b"X" * 300 + b"^"), "cannot be judged"),
    "a date that is none": (ORU, swap(ORU, b"|19610506|", b"|19611506|"), "cannot be judged"),
    "another version": (ORU, swap(ORU, b"|2.5.1|", b"|2.5|"), "2.5"),
    "a line feed": (ORU, swap(ORU, b"\rPV1", b"\r\nPV1"), "U+000A"),
    "a bundle that is no R4": (
        FHIR,
        edit_bundle(lambda e: e[3]["resource"].update(unheardOf=True)),
        "unheardOf",
    ),
    "a resource without status": (FHIR, edit_bundle(lambda e: e[3]["resource"].pop("status")), "status"),
    "an entry that a resend would repeat": (
        FHIR,
        edit_bundle(lambda e: e[0]["request"].pop("ifNoneExist")),
        "not conditional",
    ),
    "a lost reference": (FHIR, edit_bundle(lambda e: e.pop(0)), "is referenced but not an entry"),
    "a script": (HTML, swap(HTML, b"</main>", b"<script>alert(1)</script></main>"), "<script>"),
    "an image from elsewhere": (HTML, swap(HTML, b"</main>", b"<img src=x></main>"), "<img>"),
    "a control character": (TEXT, swap(TEXT, b"IMPRESSION", b"IMPRESSION\x07"), "U+0007"),
    "a picture that is none": (PNG, lambda c: c.update({PNG: b"no picture"}), "cannot be judged"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named(name: str, findings: Findings, rendered: Contents) -> None:
    artifact, break_it, words = FAULTS[name]
    contents = dict(rendered)
    break_it(contents)
    faults = find_faults(findings, contents, build_masks())
    assert any(f.startswith(f"{artifact}: ") and words in f for f in faults), faults


@pytest.mark.parametrize("name", [SEG, SR, KEY, PNG, ORU, FHIR, TEXT, HTML])
@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00garbage", b"{}", b"MSH|^~\\&|"])
def test_garbage_is_a_fault_of_its_artifact_and_never_an_exception(
    name: str, data: bytes, findings: Findings, rendered: Contents
) -> None:
    faults = find_faults(findings, {**rendered, name: data}, build_masks())
    assert any(fault.startswith(f"{name}: ") for fault in faults), faults


def test_nothing_at_all_is_named_artifact_by_artifact(findings: Findings) -> None:
    faults = find_faults(findings, {}, build_masks())
    assert {fault.split(": ")[0] for fault in faults} == {
        SEG, SR, "key-images/gland.dcm", KEY, "key-images/lesion-2.dcm", ORU, FHIR, TEXT, HTML,
    }  # fmt: skip


def test_a_disagreement_is_a_fault(findings: Findings, rendered: Contents) -> None:
    faults = find_faults(findings, {**rendered, TEXT: rendered[TEXT].replace(b"0.31 mL", b"0.32 mL", 1)}, build_masks())
    assert "report.txt: lesion-1: volume: expected '0.31 mL', found '0.32 mL'" in faults


def test_too_large_is_a_fault(findings: Findings, rendered: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "TEXT_MAX_BYTES", 1000)
    faults = find_faults(findings, rendered, build_masks())
    assert f"{ORU}: holds {len(rendered[ORU])} bytes, 1000 are allowed" in faults


def test_a_judge_that_quotes_the_patient_is_silenced(findings: Findings, rendered: Contents) -> None:
    broken = swap(ORU, b"|TEST-001^", b"|TEST-001" + b"T" * 300 + b"^Phantom Peter 19610506 ")
    contents = dict(rendered)
    broken(contents)
    dataset = pydicom.dcmread(BytesIO(contents[SR]))
    dataset.PatientName, dataset.PatientID = "Phantom^Petra", "TEST-001 ACC-1"
    contents[SR] = write_dicom(dataset)
    faults = find_faults(findings, contents, build_masks())
    assert faults
    for secret in ("Phantom", "Peter", "Petra", "TEST-001 ", "'TEST-001", "19610506", "ACC-1"):
        assert not any(secret in fault for fault in faults), faults


def test_thinning_keeps_a_narrative_line_that_differs_and_the_longest() -> None:
    same = ["OBX|1|TX|a|1.1|short||||||P", "OBX|2|TX|a|1.2|much longer||||||P"]
    other = ["OBX|3|TX|a|1.3|x||||||Z", "OBX|4|NM|b|1.4|1||||||P", "OBX|5|NM|b|1.5|1||||||P", "PV1|1"]
    assert validation._thin([*same, *other]) == [same[1], *other]

"""SEG, SR and SC before judges that did not write them: dciodvfy, dcmqi and dcmtk.

Two cases: the real study with its truth masks, and the builders' synthetic oblique stack. No finding of a judge
is filtered out: dciodvfy may print no line with "Error". Its warnings are about the real study's own values (a
one-part name, an empty Study ID).
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset

from mappings.model.codes import Code
from mappings.model.findings import Findings
from mappings.model.study import Volume
from mappings.outputs.dicom_header import write_dicom
from mappings.outputs.findings_to_key_images import findings_to_key_images, key_image_to_sc
from mappings.outputs.findings_to_seg import findings_to_seg
from mappings.outputs.findings_to_sr import findings_to_sr
from tests.builders import build_context, build_findings, build_masks
from tests.comparisons import build_ambiguous, build_compared
from tests.dicom_sources import (
    build_real_findings,
    build_sources,
    build_volumes,
    load_real_masks,
    load_real_series,
    load_real_volumes,
    load_truth,
)

BIN = Path(sys.executable).parent
TIMEOUT_S = 60
TOLERANCE_VOXELS = {"real": 0.1, "synthetic": 0.001}
"""The truth's NIfTI holds a quaternion, which rounds the scanner's not quite orthogonal axes by 0.05 voxels."""
Points = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Case:
    """What the renderings are made of, and where each truth voxel lies: `affine` (column, row, slice) -> LPS mm."""

    findings: Findings
    masks: dict[str, npt.NDArray[np.uint8]]
    reference: list[Dataset]
    others: list[Dataset]
    volumes: dict[str, Volume]
    affine: npt.NDArray[np.float64]


@cache
def load_case(name: str) -> Case:
    """The real study with its truth masks and the truth's own affine, or the builders' study."""
    if name == "real":
        others = [*load_real_series(7), *load_real_series(8)]
        findings, masks, affine = build_real_findings(), load_real_masks(), load_truth("gland")[1]
        return Case(findings, masks, list(load_real_series(4)), others, load_real_volumes(), affine)
    volumes = build_volumes()
    affine = volumes["t2w"].geometry.matrix
    builders: dict[str, Callable[[], Findings]] = {
        "synthetic": build_findings,
        "compared": build_compared,
        "ambiguous": build_ambiguous,
        "revised": lambda: build_findings(revision=2, predecessor_revision=1, status="corrected"),
        "no lesion": lambda: build_findings(lesions=()),
        "nothing": lambda: build_findings(
            lesions=(), findings=(), segments=(), assessments=(), psa=None, context=build_context(order=None)
        ),
    }
    return Case(builders[name](), build_masks(), build_sources(), [], volumes, affine)


CASES = ["real", "synthetic", "compared", "ambiguous", "revised", "no lesion", "nothing"]


def write_seg(case: Case) -> bytes | None:
    seg = findings_to_seg(case.findings, case.masks, case.reference)
    return None if seg is None else write_dicom(seg)


def write_sr(case: Case) -> bytes:
    seg = findings_to_seg(case.findings, case.masks, case.reference)
    return write_dicom(findings_to_sr(case.findings, seg, [*case.reference, *case.others]))


def write_scs(case: Case) -> list[bytes]:
    images = findings_to_key_images(case.findings, case.masks, case.volumes)
    return [write_dicom(key_image_to_sc(case.findings, i, case.reference[i.frame_index])) for i in images]


def run(*command: object) -> str:
    """The tool's output and errors together; fails the test where it fails."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


def judge_with_dciodvfy(folder: Path, content: bytes, iod: str) -> None:
    path = folder / "object.dcm"
    path.write_bytes(content)
    done = subprocess.run(
        [BIN / "dciodvfy", "-new", path], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    lines = (done.stdout + done.stderr).splitlines()
    assert iod in lines, lines
    assert [line for line in lines if "Error" in line] == []


@pytest.mark.parametrize("name", CASES)
def test_dciodvfy_finds_no_error(name: str, tmp_path: Path) -> None:
    case = load_case(name)
    seg = write_seg(case)
    if seg is not None:
        judge_with_dciodvfy(tmp_path, seg, "Segmentation")
    judge_with_dciodvfy(tmp_path, write_sr(case), "Comprehensive3DSR")
    for sc in write_scs(case):
        judge_with_dciodvfy(tmp_path, sc, "SCImage")


@pytest.mark.parametrize(
    ("spoil", "iod"),
    [(write_seg, "Segmentation"), (write_sr, "Comprehensive3DSR"), (lambda c: write_scs(c)[0], "SCImage")],
)
def test_dciodvfy_would_notice_a_missing_attribute(spoil: Callable[[Case], bytes], iod: str, tmp_path: Path) -> None:
    content = spoil(load_case("synthetic"))
    element = b"\x20\x00\x0e\x00UI"  # Series Instance UID, spoilt into an unknown element
    assert element in content
    with pytest.raises(AssertionError, match="Error"):
        judge_with_dciodvfy(tmp_path, content.replace(element, b"\x20\x00\x0f\x00UI"), iod)


def find_voxels(image: sitk.Image, affine: npt.NDArray[np.float64], tolerance_voxels: float) -> Points:
    """Indices (column, row, slice) of the image's voxels on the truth's grid, by way of LPS mm; sorted.

    Fails where a voxel's centre is farther than `tolerance_voxels` from a centre of the grid.
    """
    index_zyx = np.argwhere(sitk.GetArrayFromImage(image))
    direction = np.array(image.GetDirection()).reshape(3, 3)
    lps_mm = (index_zyx[:, ::-1] * np.array(image.GetSpacing())) @ direction.T + np.array(image.GetOrigin())
    grid = (np.column_stack([lps_mm, np.ones(len(lps_mm))]) @ np.linalg.inv(affine).T)[:, :3]
    nearest = np.round(grid).astype(np.int64)
    assert np.abs(grid - nearest).max() < tolerance_voxels
    return np.asarray(nearest[np.lexsort(nearest.T)])


def read_truth_points(case: Case, mask: str, label: int) -> Points:
    points = np.argwhere(case.masks[mask] == label)[:, ::-1]
    return np.asarray(points[np.lexsort(points.T)])


@pytest.mark.parametrize("name", ["real", "synthetic"])
def test_dcmqi_reads_every_segment_back_voxel_for_voxel_in_world_space(name: str, tmp_path: Path) -> None:
    case = load_case(name)
    (tmp_path / "seg.dcm").write_bytes(write_seg(case) or b"")
    run(
        BIN / "segimage2itkimage",
        *("--inputDICOM", tmp_path / "seg.dcm", "--outputDirectory", tmp_path, "--outputType", "nrrd"),
        *("--prefix", "seg"),
    )
    for segment in case.findings.segments:
        image = sitk.ReadImage(str(tmp_path / f"seg-{segment.number}.nrrd"))
        expected = read_truth_points(case, segment.mask, segment.label)
        assert len(expected) > 0
        found = find_voxels(image, case.affine, TOLERANCE_VOXELS[name])
        assert np.array_equal(found, expected), segment.name


def test_dcmqi_reads_what_each_segment_is(tmp_path: Path) -> None:
    case = load_case("real")
    (tmp_path / "seg.dcm").write_bytes(write_seg(case) or b"")
    output = run(BIN / "segimage2itkimage", "--inputDICOM", tmp_path / "seg.dcm", "--outputDirectory", tmp_path)
    assert [line for line in output.splitlines() if line.startswith(("W:", "E:"))] == []
    meta = json.loads((tmp_path / "meta.json").read_text())
    read = {s["labelID"]: s for (s,) in meta["segmentAttributes"]}
    for segment in case.findings.segments:
        entry = read[segment.number]
        assert entry["SegmentLabel"] == segment.name
        assert entry["SegmentedPropertyTypeCodeSequence"]["CodeValue"] == segment.type.value
        assert entry["SegmentAlgorithmType"] == "AUTOMATIC"
        assert entry["TrackingUniqueIdentifier"] == segment.tracking_uid
    assert len({tuple(s["recommendedDisplayRGBValue"]) for s in read.values()}) == len(read)


def as_pair(code: Code | None) -> tuple[str, str] | None:
    return None if code is None else (code.value, code.scheme)


def read_pair(code: dict[str, str] | None) -> tuple[str, str] | None:
    return None if code is None else (code["CodeValue"], code["CodingSchemeDesignator"])


def read_with_dcmqi(case: Case, folder: Path) -> dict[str, dict[str, Any]]:
    """dcmqi's reading of the report: its measurement groups by tracking identifier."""
    (folder / "sr.dcm").write_bytes(write_sr(case))
    run(BIN / "tid1500reader", "--inputDICOM", folder / "sr.dcm", "--outputMetadata", folder / "sr.json")
    report = json.loads((folder / "sr.json").read_text())
    assert report["VerificationFlag"] == "UNVERIFIED"
    assert len(report["imageLibrary"]) == len(case.reference) + len(case.others)
    return {group["TrackingIdentifier"]: group for group in report["Measurements"]}


@pytest.mark.parametrize("name", ["real", "synthetic", "revised", "no lesion"])
def test_dcmqi_reads_the_report_as_the_findings_say(name: str, tmp_path: Path) -> None:
    case = load_case(name)
    groups = read_with_dcmqi(case, tmp_path)
    assert set(groups) == {f.tracking_id for f in case.findings.findings} | {"study"}
    for finding in case.findings.findings:
        group = groups[finding.tracking_id]
        assert group["TrackingUniqueIdentifier"] == finding.tracking_uid
        assert read_pair(group["Finding"]) == as_pair(finding.kind)
        assert read_pair(group["FindingSite"]) == as_pair(finding.sector or finding.site)
        assert read_pair(group.get("Laterality")) == as_pair(finding.laterality)
        assert group["ReferencedSegment"] == finding.segment_number
        assert group["measurementAlgorithmIdentification"] == {
            "AlgorithmName": case.findings.model.name,
            "AlgorithmVersion": case.findings.model.version,
        }
        expected = [(as_pair(m.concept), m.text, as_pair(m.unit), as_pair(m.derivation)) for m in finding.measurements]
        read = [
            (
                read_pair(i["quantity"]),
                i["value"],
                read_pair(i["units"]),
                read_pair(i.get("derivationModifier")),
            )
            for i in group["measurementItems"]
        ]
        assert read[: len(expected)] == expected
        assert len(read) == len(expected) + (finding.confidence is not None)


@pytest.mark.parametrize("name", ["real", "synthetic"])
def test_dcmqi_reads_each_category_and_its_inputs(name: str, tmp_path: Path) -> None:
    case = load_case(name)
    groups = read_with_dcmqi(case, tmp_path)
    about = {finding.tracking_id: finding.assessments for finding in case.findings.findings}
    for tracking_id, assessments in {**about, "study": case.findings.assessments}.items():
        read = {
            read_pair(e["conceptCode"]): read_pair(e["conceptValue"])
            for e in groups[tracking_id]["qualitativeEvaluations"]
            if isinstance(e["conceptValue"], dict)
        }
        for assessment in assessments:
            assert read[as_pair(assessment.concept)] == as_pair(assessment.value)
            for given in assessment.inputs:
                if given.concept and given.code:
                    assert read[as_pair(given.concept)] == as_pair(given.code)
    (psa,) = groups["study"]["measurementItems"]
    assert (psa["value"], psa["units"]["CodeValue"]) == ("13", "ng/mL")


def test_dcmqi_reads_each_change_and_takes_none_for_the_value(tmp_path: Path) -> None:
    case = load_case("compared")
    group = read_with_dcmqi(case, tmp_path)["lesion-1"]
    read = {i["quantity"]["CodeValue"]: (i["value"], i["units"]["CodeValue"]) for i in group["measurementItems"]}
    assert case.findings.comparison is not None
    row = case.findings.comparison.lesions[0]
    for change in row.changes:
        assert read[f"{change.key}_prior"] == (change.prior.text, change.prior.unit.value)
        assert read[change.current.concept.value] == (change.current.text, change.current.unit.value)
        for m in (change.difference, change.percent, change.per_year, change.percent_per_year):
            assert m is not None
            assert read[m.key] == (m.text, m.unit.value)
    assert row.doubling_time is not None
    assert read["doubling_time"] == (row.doubling_time.text, "d")
    assert group["TrackingUniqueIdentifier"] == case.findings.lesions[0].tracking_uid
    said = {e["conceptCode"]["CodeValue"]: e["conceptValue"] for e in group["qualitativeEvaluations"]}
    assert said["change_status"]["CodeValue"] == "matched"


@pytest.mark.parametrize("name", CASES)
def test_dcmtk_reads_the_report(name: str, tmp_path: Path) -> None:
    case = load_case(name)
    (tmp_path / "sr.dcm").write_bytes(write_sr(case))
    text = run("/usr/bin/dsrdump", "+Pl", tmp_path / "sr.dcm")
    assert "Comprehensive 3D SR Document" in text
    assert "Verification Flag   : UNVERIFIED" in text
    assert [line for line in text.splitlines() if line.startswith(("E:", "F:"))] == []
    for finding in case.findings.findings:
        for measurement in finding.measurements:
            assert f'="{measurement.text}" ({measurement.unit.value},UCUM' in text
    assert ("Predecessor Docs" in text) == (case.findings.predecessor_revision is not None)

"""`wetread process` as a person runs it: a folder in, the whole result out."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image

from tests.charts import REAL_STUDY, REAL_STUDY_UID, real_chart
from tests.commands import (
    RESULT_FILES,
    Ended,
    assert_no_result,
    assert_no_triton,
    assert_nothing_left,
    finish,
    interrupt,
    run_wetread,
    start_wetread,
)
from tests.dicom_sources import load_truth

GLAND_ML, ELLIPSOID_ML, LESION_ML, PSA_NG_ML = 44.3, 50.0, 0.31, 13.0


@pytest.fixture(scope="module")
def by_truth(tmp_path_factory: pytest.TempPathFactory, truth_triton: str) -> tuple[Ended, Path]:
    """The real study read with the truth model and a chart with PSA 13 ng/mL."""
    folder = tmp_path_factory.mktemp("by-truth")
    context = folder / "context.json"
    context.write_text(json.dumps(real_chart()), encoding="utf-8")
    ended = run_wetread(folder, "process", REAL_STUDY, "--out", "o", "--context", context, "--triton", truth_triton)
    return ended, folder / "o"


@pytest.fixture(scope="module")
def by_reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    """The real study read with nothing set at all: the bundled Triton and the reference model."""
    folder = tmp_path_factory.mktemp("by-reference")
    child = start_wetread(folder, "process", REAL_STUDY, "--out", "o")
    ended = finish(child)
    assert "Traceback" not in ended.said, ended.said
    assert_nothing_left(child.pid, folder / "tmp")
    return ended, folder / "o"


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def measured(finding: dict[str, Any], key: str) -> float:
    return next(float(m["value"]) for m in finding["measurements"] if m["key"] == key)


def finding(out: Path, tracking_id: str) -> dict[str, Any]:
    found = read_json(out / "findings.json")["findings"]
    return next(f for f in found if f["tracking_id"] == tracking_id)


@pytest.mark.parametrize("run", ["by_truth", "by_reference"])
def test_every_file_is_there_and_nothing_else(run: str, request: pytest.FixtureRequest) -> None:
    ended, out = request.getfixturevalue(run)
    assert ended.code == 0, ended.said
    there = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert there == {*RESULT_FILES, "key-images/gland.png", "key-images/lesion-1.png"}
    assert all((out / name).stat().st_size > 100 for name in there)


def test_the_gland_is_measured_by_voxels_and_by_ellipsoid(by_truth: tuple[Ended, Path]) -> None:
    gland = finding(by_truth[1], "gland")
    assert measured(gland, "volume_voxels") == pytest.approx(GLAND_ML, abs=0.05)
    assert measured(gland, "volume_ellipsoid") == pytest.approx(ELLIPSOID_ML, rel=0.03)


def test_psa_of_the_context_gives_its_density(by_truth: tuple[Ended, Path]) -> None:
    findings = read_json(by_truth[1] / "findings.json")
    density = measured(finding(by_truth[1], "gland"), "psa_density")
    assert findings["psa"]["value"] == PSA_NG_ML
    assert density == pytest.approx(PSA_NG_ML / measured(finding(by_truth[1], "gland"), "volume_ellipsoid"), abs=0.005)
    assert density == pytest.approx(0.26, abs=0.01)


def test_the_lesion_is_on_the_right_in_the_peripheral_zone_pirads_4(by_truth: tuple[Ended, Path]) -> None:
    lesion = finding(by_truth[1], "lesion-1")
    assert measured(lesion, "volume") == pytest.approx(LESION_ML, abs=0.005)
    assert lesion["laterality"]["meaning"].lower() == "right"
    assert "peripheral zone" in lesion["zone"]["meaning"].lower()
    assert [a["score"] for a in lesion["assessments"]] == ["4"]
    assert lesion["centroid_lps_mm"] == pytest.approx([28.0, 33.2, -38.4], abs=0.1)


def test_every_rendering_tells_the_same(by_truth: tuple[Ended, Path]) -> None:
    out = by_truth[1]
    report, page = (out / "report.txt").read_text(encoding="utf-8"), (out / "report.html").read_text(encoding="utf-8")
    for words in ("44.3 mL", "0.31 mL", "0.26", "13"):
        assert words in report
        assert words in page
    message = (out / "oru.hl7").read_bytes().decode("utf-8")
    assert "|44.3|" in message
    assert "|0.31|" in message
    bundle = (out / "fhir-bundle.json").read_text(encoding="utf-8")
    assert '"value": 44.3' in bundle
    assert '"value": 0.31' in bundle
    assert pydicom.dcmread(out / "sr.dcm").VerificationFlag == "UNVERIFIED"


def test_the_segmentation_holds_the_truth_voxel_for_voxel(by_truth: tuple[Ended, Path]) -> None:
    seg = pydicom.dcmread(by_truth[1] / "seg.dcm")
    voxels = {
        item.SegmentNumber: int(
            sum(f.sum() for f, n in zip(seg.pixel_array, _segments(seg), strict=True) if n == item.SegmentNumber)
        )
        for item in seg.SegmentSequence
    }
    gland, zones, lesion = (load_truth(name)[0] for name in ("gland", "zones", "lesion"))
    assert sorted(voxels.values()) == sorted(
        [int((gland > 0).sum()), int((zones == 1).sum()), int((zones == 2).sum()), int((lesion > 0).sum())]
    )


def _segments(seg: pydicom.Dataset) -> list[int]:
    frames = seg.PerFrameFunctionalGroupsSequence
    return [int(f.SegmentIdentificationSequence[0].ReferencedSegmentNumber) for f in frames]


@pytest.mark.parametrize("run", ["by_truth", "by_reference"])
def test_key_images_are_pictures_of_the_slice(run: str, request: pytest.FixtureRequest) -> None:
    _, out = request.getfixturevalue(run)
    for file in (out / "key-images").iterdir():
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        assert min(pixels.shape[:2]) >= 300
        coloured = (pixels.max(axis=2) - pixels.min(axis=2)) > 60
        assert 50 < int(coloured.sum()) < coloured.size // 4, file.name


def test_the_trace_names_every_input(by_truth: tuple[Ended, Path]) -> None:
    trace = read_json(by_truth[1] / "trace.json")
    read = {uid for series in trace["inputs"]["series"] for uid in series["instances"]}
    there = {str(pydicom.dcmread(f, stop_before_pixels=True).SOPInstanceUID) for f in REAL_STUDY.rglob("*.dcm")}
    assert read == there
    assert len(read) == 164
    assert trace["study_instance_uid"] == REAL_STUDY_UID
    assert trace["state"] == "released"
    assert trace["protocol"]["name"] == "prostate_mri"
    assert len(trace["protocol"]["sha256"]) == 64
    assert (trace["model"]["name"], trace["model"]["version"]) == ("prostate_reference", "1")
    steps = [s["step"] for s in trace["steps"]]
    told = ("fetch", "route", "context", "identity", "inference", "findings", "render", "validate", "release")
    assert [s for s in steps if s in told] == list(told)
    assert {a["name"] for a in trace["artifacts"]} >= {"seg.dcm", "sr.dcm", "oru.hl7", "fhir-bundle.json"}


def test_the_trace_names_where_each_context_value_came_from(by_truth: tuple[Ended, Path]) -> None:
    references = read_json(by_truth[1] / "trace.json")["inputs"]["context_references"]
    assert len(references) == 6  # two PSA, creatinine, eGFR, patient, order
    assert all(references)


def test_without_settings_the_reference_model_outlines_the_gland(by_reference: tuple[Ended, Path]) -> None:
    """It is no clinical model: plausible is a gland of 25-80 mL that overlaps the expert's."""
    _, out = by_reference
    assert 25 < measured(finding(out, "gland"), "volume_voxels") < 80
    seg = pydicom.dcmread(out / "seg.dcm")
    gland = load_truth("gland")[0] > 0
    outlined = np.zeros_like(gland)
    z_of = _slices_of(seg)
    for frame, number, z in zip(seg.pixel_array, _segments(seg), z_of, strict=True):
        if number == 1:
            outlined[z] = frame > 0
    dice = 2 * (outlined & gland).sum() / (outlined.sum() + gland.sum())
    assert dice > 0.6


def _slices_of(seg: pydicom.Dataset) -> list[int]:
    """The index along the T2 stack of each frame, from the instance that it was derived from."""
    instances = [pydicom.dcmread(f, stop_before_pixels=True) for f in next(REAL_STUDY.glob("4.*")).glob("*.dcm")]
    orientation = np.array(instances[0].ImageOrientationPatient, float)
    normal = np.cross(orientation[:3], orientation[3:])
    order = sorted(float(normal @ np.array(i.ImagePositionPatient, float)) for i in instances)
    frames = [f.PlanePositionSequence[0].ImagePositionPatient for f in seg.PerFrameFunctionalGroupsSequence]
    return [int(np.argmin(np.abs(np.array(order) - normal @ np.array(p, float)))) for p in frames]


def test_without_context_nothing_is_made_up(by_reference: tuple[Ended, Path]) -> None:
    report = (by_reference[1] / "report.txt").read_text(encoding="utf-8")
    assert "PSA density:               left blank" in report
    assert "no EHR is configured" in report


def test_reading_again_replaces_the_earlier_result_with_the_same_ids(
    by_truth: tuple[Ended, Path], tmp_path: Path, truth_triton: str
) -> None:
    out = tmp_path / "o"
    (out / "key-images").mkdir(parents=True)
    (out / "key-images" / "lesion-9.png").write_bytes(b"old")
    (out / "seg.dcm").write_bytes(b"old")
    (out / "mine.txt").write_text("a file of someone else")
    assert run_wetread(tmp_path, "process", REAL_STUDY, "--out", out, "--triton", truth_triton).code == 0
    assert not (out / "key-images" / "lesion-9.png").exists()
    assert (out / "mine.txt").read_text() == "a file of someone else"
    for name in ("seg.dcm", "sr.dcm"):
        first, second = (pydicom.dcmread(folder / name) for folder in (by_truth[1], out))
        assert first.SOPInstanceUID == second.SOPInstanceUID


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_during_inference_its_triton_goes_too(tmp_path: Path, number: signal.Signals) -> None:
    child = start_wetread(tmp_path, "process", REAL_STUDY, "--out", "o")
    deadline = time.monotonic() + 60
    while not list(Path("/dev/shm").glob(f"wetread_{child.pid}_*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(Path("/dev/shm").glob(f"wetread_{child.pid}_*")), "the bundled Triton was never up"
    ended = interrupt(child, number)
    assert ended.code != 0
    assert "Traceback" not in ended.said, ended.said
    assert_no_triton(child.pid)
    assert_no_result(tmp_path / "o", trace=False)
    if number == signal.SIGINT:
        assert ended.code == 130
        assert_nothing_left(child.pid, tmp_path / "tmp")

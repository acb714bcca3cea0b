"""The real study with its truth masks as the model's answer: the numbers that are known of it come out.

Facts of the study: ../shared/data/README.md. The masks are placed by a reader of their own
(tests/fixtures/triton_truth).
"""

import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from mappings.inputs.dicom_to_study import datasets_to_study
from mappings.model import codes
from mappings.model.context import ClinicalContext, ContextValue
from mappings.model.findings import Finding, Findings, ModelIdentity, RoleChoice
from mappings.model.study import Study
from mappings.reading.series_to_roles import choose_series, match_protocol
from mappings.reading.tensors_to_findings import Reading, tensors_to_findings
from mappings.reading.volumes_to_tensors import volumes_to_tensors
from middleware.errors import Stopped
from middleware.intake.images import RoleImages, check_roles, load_roles, read_study
from middleware.intake.protocols import load_protocols
from tests.fixtures.triton_truth.study import DATA, real_study

PROTOCOL = load_protocols()["prostate_mri"].protocol
PSA = ContextValue(codes.PSA, 13.0, "ng/mL", datetime(2011, 6, 1, tzinfo=UTC), "Observation/psa")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study as a spool holds it: one folder, names in no order of their own."""
    spool = tmp_path_factory.mktemp("spool")
    files = sorted((DATA / "images").rglob("*.dcm"))
    assert len(files) == 164
    for number, file in enumerate(files):
        shutil.copy(file, spool / f"{number * 37 % 164:03}.dcm")
    return spool


@pytest.fixture(scope="module")
def study(folder: Path) -> Study:
    return read_study(folder)


@pytest.fixture(scope="module")
def roles(study: Study) -> tuple[RoleChoice, ...]:
    return choose_series(study, PROTOCOL)


@pytest.fixture(scope="module")
def images(folder: Path, study: Study, roles: tuple[RoleChoice, ...]) -> RoleImages:
    check_roles(study, PROTOCOL, roles)
    return load_roles(folder, study, PROTOCOL, roles)


@pytest.fixture(scope="module")
def findings(study: Study, roles: tuple[RoleChoice, ...], images: RoleImages) -> Findings:
    truth = real_study()
    answer = {
        "gland": truth.gland,
        "zones": truth.zones,
        "lesions": (truth.lesion > 0).astype(np.uint8),
        "scores": np.array([[4, 4, np.nan, 0.9]], dtype=np.float32),
    }
    reading = Reading(
        job_id="real",
        revision=1,
        now=datetime(2026, 3, 4, tzinfo=UTC),
        study=study,
        protocol=PROTOCOL,
        model=ModelIdentity("prostate_reference", "1", "tests"),
        context=ClinicalContext("test"),
        psa=PSA,
        psa_reason="",
        roles=roles,
        volumes=images.volumes,
    )
    return tensors_to_findings(answer, reading)


def value(finding: Finding | None, key: str) -> float:
    assert finding is not None
    measurement = finding.measurement(key)
    assert measurement is not None
    return measurement.value


def test_study_is_whole_and_matched(study: Study) -> None:
    assert [(s.series_number, len(s.instances)) for s in study.series] == [
        (3, 19), (4, 19), (5, 15), (6, 57), (7, 19), (8, 19), (9, 16),
    ]  # fmt: skip
    assert match_protocol(study, PROTOCOL) == ()
    assert study.patient.birth_date is None, "the published study states none; it stays blank"


def test_roles_with_the_reason_of_each_series(roles: tuple[RoleChoice, ...]) -> None:
    by_role = {r.role: r for r in roles}
    assert [by_role[r].series_label.split(" ")[0] for r in ("t2w", "adc", "hbv", "dce")] == ["4", "7", "8", ""]
    assert all(len(r.reasons) == 7 for r in roles)

    def why(role: str, number: int) -> str:
        return next(r for r in by_role[role].reasons if r.startswith(f"series {number} "))

    assert "chosen: modality MR, plane axial, scanning_sequence SE, echo_time_ms 104" in why("t2w", 4)
    assert why("t2w", 3).endswith("refused: plane is sagittal, not axial")
    assert why("t2w", 5).endswith("refused: plane is coronal, not axial")
    assert "image type is DERIVED, PRIMARY, DIFFUSION, ADC" in why("t2w", 7)
    assert why("t2w", 9).endswith("refused: sequence is GR, not spin echo")
    assert "image_type DERIVED/PRIMARY/DIFFUSION/ADC" in why("adc", 7)
    assert why("hbv", 6).endswith("refused: several b-values in one series (50, 400, 800 s/mm2)")
    assert why("hbv", 7).endswith("refused: already used as adc")
    assert why("dce", 9).endswith("refused: contrast_agent is not stated")


def test_volumes_lie_where_an_independent_reader_puts_them(images: RoleImages) -> None:
    truth = real_study()
    grid = images.volumes["t2w"].geometry
    assert grid.shape == (19, 384, 384)
    assert grid.spacing_mm == pytest.approx((3.0, 0.5, 0.5), abs=1e-3)
    np.testing.assert_array_equal(images.volumes["t2w"].array, truth.inputs["t2w"])
    for role in ("adc", "hbv"):
        ours, theirs = images.volumes[role].array, truth.inputs[role]
        assert float(np.mean(np.isnan(ours) != np.isnan(theirs))) < 0.001, "only the rim may round differently"
        both = ~np.isnan(ours) & ~np.isnan(theirs)
        assert both.mean() > 0.5
        np.testing.assert_allclose(ours[both], theirs[both], atol=0.5)


def test_tensors_are_those_of_the_contract(images: RoleImages) -> None:
    tensors = volumes_to_tensors(images.volumes, PROTOCOL)
    assert {n: (t.dtype.name, t.shape) for n, t in tensors.items()} == {
        "t2w": ("float32", (19, 384, 384)),
        "adc": ("float32", (19, 384, 384)),
        "hbv": ("float32", (19, 384, 384)),
        "spacing": ("float32", (3,)),
    }
    assert tensors["spacing"] == pytest.approx([3.0, 0.5, 0.5], abs=1e-3)
    assert all(np.isfinite(t).all() for t in tensors.values())


def test_gland(findings: Findings) -> None:
    gland = findings.gland
    assert value(gland, "volume_voxels") == 44.3
    assert value(gland, "volume_ellipsoid") == pytest.approx(50.0, rel=0.03)
    assert value(gland, "psa_density") == 0.26
    assert gland is not None
    assert gland.centroid_lps_mm is not None
    assert gland.centroid_lps_mm[0] == pytest.approx(38.0, abs=0.5)


def test_lesion(findings: Findings) -> None:
    (lesion,) = findings.lesions
    assert value(lesion, "volume") == 0.31
    assert lesion.laterality == codes.RIGHT
    assert lesion.zone == codes.PERIPHERAL_ZONE
    assert lesion.centroid_lps_mm == pytest.approx((28.0, 33.2, -38.4), abs=0.05)
    assert lesion.sector is not None
    assert lesion.sector.meaning.startswith("Right poster")
    assert 5 < value(lesion, "diameter_in_plane") <= value(lesion, "diameter_3d") < 25
    assert 400 < value(lesion, "adc_p10") <= value(lesion, "adc_mean") < 1400
    assert lesion.notes == ()


def test_category_is_4_with_the_inputs_that_gave_it(findings: Findings) -> None:
    (lesion,) = findings.lesions
    assessment = lesion.assessment("pirads")
    assert assessment is not None
    assert assessment.score == "4"
    assert [i.value for i in assessment.inputs] == ["peripheral zone", "4", "4", "not acquired"]
    assert findings.assessments[0].score == "4"


def test_evidence_is_the_instance_on_which_the_lesion_is_largest(findings: Findings, images: RoleImages) -> None:
    (evidence,) = findings.lesions[0].evidence
    source = images.sources["t2w"][evidence.frame_index]
    assert source.SOPInstanceUID == evidence.sop_instance_uid
    assert evidence.frame_index == int((real_study().lesion > 0).sum(axis=(1, 2)).argmax())


def test_file_names_decide_nothing(folder: Path, tmp_path: Path, images: RoleImages) -> None:
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, tmp_path / f"{163 - number:03}.dcm")
    study = read_study(tmp_path)
    again = load_roles(tmp_path, study, PROTOCOL, choose_series(study, PROTOCOL))
    for role, volume in images.volumes.items():
        np.testing.assert_array_equal(again.volumes[role].array, volume.array)
        assert again.volumes[role].geometry == volume.geometry


def incomplete(folder: Path, target: Path) -> Path:
    """The study with the real incomplete series in the place of the whole one."""
    for file in folder.iterdir():
        shutil.copy(file, target / file.name)
    whole = next((DATA / "images").glob("8.*"))
    for ds_file in (f for f in target.iterdir() if _series_number(f) == 8):
        ds_file.unlink()
    for file in (DATA.parent / "missing-slice" / whole.name).glob("*.dcm"):
        shutil.copy(file, target / f"incomplete-{file.name}")
    return target


def _series_number(file: Path) -> int:
    return int(pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["SeriesNumber"]).SeriesNumber)


def test_incomplete_high_b_series_refuses_the_study_naming_the_gap(folder: Path, tmp_path: Path) -> None:
    study = read_study(incomplete(folder, tmp_path))
    with pytest.raises(Stopped) as stopped:
        check_roles(study, PROTOCOL, choose_series(study, PROTOCOL))
    (reason,) = stopped.value.reasons
    assert stopped.value.state == "unusable"
    assert reason.startswith("High b-value diffusion (hbv), series 8 ")
    assert "1 slice(s) missing between incomplete-1-" in reason


def test_the_study_without_its_high_b_series_says_why_nothing_else_will_do(study: Study) -> None:
    left: dict[str, Any] = {"series": tuple(s for s in study.series if s.series_number != 8)}
    poorer = replace(study, **left)
    with pytest.raises(Stopped) as stopped:
        check_roles(poorer, PROTOCOL, choose_series(poorer, PROTOCOL))
    (reason,) = stopped.value.reasons
    assert reason.startswith("no series can be the High b-value diffusion (hbv): ")
    assert "several b-values in one series (50, 400, 800 s/mm2)" in reason


def test_headers_alone_give_the_same_study(folder: Path, study: Study) -> None:
    files = sorted(folder.iterdir())
    assert datasets_to_study((f.name, pydicom.dcmread(f, stop_before_pixels=True)) for f in files) == study

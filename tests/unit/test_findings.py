"""The model's answer to findings: what is refused, what is measured, and what stays blank with its name."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mappings.model import codes
from mappings.model.context import ClinicalContext, ContextValue
from mappings.model.findings import Findings, ModelIdentity, RoleChoice
from mappings.model.measurement import Measurement
from mappings.model.protocol import PsaPolicy
from mappings.model.study import Geometry, Instance, PatientIdentity, Series, Study, Volume
from mappings.reading.tensors_to_findings import AnswerUnusable, Reading, check_answer, tensors_to_findings
from middleware.intake.protocols import load_protocols

PROTOCOL = load_protocols()["prostate_mri"].protocol
SHAPE = (12, 40, 40)
GRID = Geometry(SHAPE, ((1.0, 0, 0, 10.0), (0, 1.0, 0, -20.0), (0, 0, 3.0, -18.0), (0, 0, 0, 1.0)), "1.9")
"""1 x 1 x 3 mm; the gland's centre is at x = 29.5, so every x is positive."""
NOW = datetime(2026, 3, 4, 10, 30, tzinfo=UTC)
PSA = ContextValue(codes.PSA, 13.0, "ng/mL", datetime(2026, 2, 1, tzinfo=UTC), "Observation/1")
NAN = float("nan")
Answer = dict[str, NDArray[Any]]


def build_answer(*rows: tuple[float, float, float, float], **changes: Any) -> Answer:
    """A box of a gland of 20 x 20 x 10 voxels (12 mL), PZ behind and TZ in front, and one 5 x 4 x 2 lesion a row, from
    the right posterior to the left."""
    gland, zones, lesions = (np.zeros(SHAPE, dtype=np.uint8) for _ in range(3))
    gland[1:11, 10:30, 10:30] = 1
    zones[1:11, 10:20, 10:30], zones[1:11, 20:30, 10:30] = 2, 1
    for number in range(1, len(rows) + 1):
        left = 6 + 6 * number
        lesions[5:7, 24:28, left : left + 5] = number
    scores = np.array(rows, dtype=np.float32).reshape(-1, 4)
    return {"gland": gland, "zones": zones, "lesions": lesions, "scores": scores, **changes}


def build_reading(**changes: Any) -> Reading:
    array = np.full(SHAPE, 800.0, dtype=np.float32)
    volumes = {
        "t2w": Volume(array, GRID, "1.4", tuple(f"1.4.{n}" for n in range(SHAPE[0]))),
        "adc": Volume(array, GRID, "1.7"),
    }
    instances = tuple(Instance(f"1.4.{n}", "", f"f{n}", "P1") for n in range(SHAPE[0]))
    series = Series("1.4", "MR", instances, 4, "t2_tse_tra", slice_thickness_mm=3.0)
    roles = (
        RoleChoice("t2w", "T2-weighted axial", True, "1.4", "4 t2_tse_tra", ("chosen",)),
        RoleChoice("dce", "Dynamic contrast-enhanced", False, None, "", ("none",)),
    )
    plain = Reading(
        job_id="job",
        revision=1,
        now=NOW,
        study=Study("1.1", PatientIdentity("P1"), (series,)),
        protocol=PROTOCOL,
        model=ModelIdentity("m", "1", "us"),
        context=ClinicalContext("ehr", missing=("no order",)),
        psa=PSA,
        psa_reason="",
        roles=roles,
        volumes=volumes,
    )
    return replace(plain, **changes)


def find(answer: Answer, **changes: Any) -> Findings:
    return tensors_to_findings(answer, build_reading(**changes))


def value(found: Findings, finding: str, key: str) -> float | None:
    measurement: Measurement | None = next(f for f in found.findings if f.tracking_id == finding).measurement(key)
    return measurement.value if measurement else None


def blanks(found: Findings) -> dict[str, str]:
    return {b.name: b.reason for b in found.blanks}


GOOD = (4.0, 4.0, NAN, 0.9)


# Answers that cannot be read


def test_good_answers_pass() -> None:
    for rows in ((), (GOOD,), ((1.0, 5.0, 0.0, 0.0), (5.0, 1.0, 1.0, 1.0))):
        check_answer(build_answer(*rows), SHAPE)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ((0, 4, NAN, 0.9), "T2W score 0 is not one of 1 to 5"),
        ((6, 4, NAN, 0.9), "T2W score 6 is not"),
        ((3.5, 4, NAN, 0.9), "T2W score 3.5 is not"),
        ((NAN, 4, NAN, 0.9), "T2W score nan is not"),
        ((4, NAN, NAN, 0.9), "DWI score nan is not"),
        ((4, 9, NAN, 0.9), "DWI score 9 is not"),
        ((4, -1, NAN, 0.9), "DWI score -1 is not"),
        ((4, 4, 2, 0.9), "DCE 2 is not 0, 1 or NaN"),
        ((4, 4, 0.5, 0.9), "DCE 0.5 is not"),
        ((4, 4, float("inf"), 0.9), "DCE inf is not"),
        ((4, 4, NAN, NAN), "confidence nan is not between 0 and 1"),
        ((4, 4, NAN, 1.01), "confidence 1.01 is not"),
        ((4, 4, NAN, -0.1), "confidence -0.1 is not"),
    ],
)
def test_scores_outside_their_range_are_refused_naming_the_row(row: tuple[float, ...], says: str) -> None:
    with pytest.raises(AnswerUnusable, match="scores row 2: " + says):
        find(build_answer(GOOD, row))  # type: ignore[arg-type]


def labels(*present: int) -> NDArray[np.uint8]:
    mask = np.zeros(SHAPE, dtype=np.uint8)
    for n, label in enumerate(present):
        mask[5, 20, n] = label
    return mask


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lesions": labels()}, r"labels \[\] but scores has 1 rows"),
        ({"lesions": labels(1, 2)}, r"labels \[1, 2\] but scores has 1 rows"),
        ({"lesions": labels(2)}, r"labels \[2\] but scores has 1 rows"),
        ({"scores": np.zeros((0, 4), np.float32)}, r"labels \[1\] but scores has 0 rows"),
        ({"scores": np.ones((1, 3), np.float32)}, r"scores has shape \(1, 3\), not \(n, 4\)"),
        ({"scores": np.ones(4, np.float32)}, r"scores has shape \(4,\)"),
        ({"gland": np.ones((3, 3, 3), np.uint8)}, "gland has shape"),
        ({"zones": np.ones((3, 3, 3), np.uint8)}, "zones has shape"),
        ({"lesions": np.ones((3, 3, 3), np.uint8)}, "lesions has shape"),
        ({"gland": np.full(SHAPE, 2, np.uint8)}, "gland holds the label 2; the highest is 1"),
        ({"zones": np.full(SHAPE, 3, np.uint8)}, "zones holds the label 3; the highest is 2"),
    ],
)
def test_masks_and_rows_that_contradict_each_other_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(AnswerUnusable, match=says):
        check_answer(build_answer(GOOD, **changes), SHAPE)


# Gland


def test_gland_measures_and_density_by_the_volume_that_the_protocol_names() -> None:
    found = find(build_answer())
    assert value(found, "gland", "volume_voxels") == 12.0
    assert value(found, "gland", "volume_ellipsoid") == 6.2
    assert [value(found, "gland", f"diameter_{d}") for d in ("transverse", "ap", "si")] == [20.0, 20.0, 30.0]
    assert value(found, "gland", "psa_density") == round(13 / 6.2, 2)
    by_voxels = replace(PROTOCOL, measure=replace(PROTOCOL.measure, psa=PsaPolicy(volume="voxels")))
    assert value(find(build_answer(), protocol=by_voxels), "gland", "psa_density") == round(13 / 12.0, 2)


def test_no_psa_leaves_the_density_blank_with_its_reason() -> None:
    found = find(build_answer(), psa=None, psa_reason="the latest PSA is 400 days old")
    assert value(found, "gland", "psa_density") is None
    assert blanks(found)["PSA density"] == "the latest PSA is 400 days old"


def test_gland_of_one_voxel_has_no_density() -> None:
    gland = np.zeros(SHAPE, dtype=np.uint8)
    gland[5, 25, 25] = 1
    found = find(build_answer(gland=gland))
    assert value(found, "gland", "psa_density") is None
    assert "no volume" in blanks(found)["PSA density"]


def test_empty_gland_leaves_volumes_density_and_places_out_and_says_so() -> None:
    empty = np.zeros(SHAPE, dtype=np.uint8)
    found = find(build_answer(GOOD, gland=empty))
    (lesion,) = found.lesions
    assert found.gland is None
    assert (lesion.laterality, lesion.level, lesion.sector) == (None, None, None)
    assert lesion.measurement("volume") is not None
    assert {"Prostate gland", "lesion-1 side, level and sector"} <= set(blanks(found))
    assert [s.mask for s in found.segments] == ["zones", "zones", "lesions"]
    assert [s.number for s in found.segments] == [1, 2, 3]
    assert lesion.segment_number == 3


# Lesions


def test_lesion_is_measured_placed_and_scored() -> None:
    found = find(build_answer(GOOD))
    (lesion,) = found.lesions
    assert value(found, "lesion-1", "volume") == 0.12
    assert value(found, "lesion-1", "diameter_in_plane") == pytest.approx(np.hypot(4, 4), abs=0.5)
    assert (value(found, "lesion-1", "adc_mean"), value(found, "lesion-1", "adc_p10")) == (800, 800)
    assert (lesion.laterality, lesion.zone, lesion.level) == (codes.RIGHT, codes.PERIPHERAL_ZONE, "mid")
    assert lesion.centroid_lps_mm == (24.0, 5.5, -1.5)
    assert lesion.confidence == 0.9
    assert lesion.evidence[0].sop_instance_uid == "1.4.5"
    assessment = lesion.assessment("pirads")
    assert assessment is not None
    assert assessment.score == "4"
    assert found.assessments[0].score == "4"
    assert lesion.notes == ()


def test_lesions_keep_their_labels_segments_and_order() -> None:
    found = find(build_answer(GOOD, (2, 2, 0, 0.5), (5, 5, 1, 1)))
    assert [(f.tracking_id, f.label, f.segment_number) for f in found.lesions] == [
        ("lesion-1", 1, 4),
        ("lesion-2", 2, 5),
        ("lesion-3", 3, 6),
    ]
    assert [f.laterality for f in found.lesions] == [codes.RIGHT, codes.BILATERAL, codes.LEFT]
    assert [(s.number, s.mask, s.label, s.tracking_uid) for s in found.segments if s.mask == "lesions"] == [
        (f.segment_number, "lesions", f.label, f.tracking_uid) for f in found.lesions
    ]
    assert found.assessments[0].score == "5"
    assert found.gland is not None
    assert found.segments[0].tracking_uid == found.gland.tracking_uid
    assert len({s.tracking_uid for s in found.segments}) == len(found.segments)


def test_ids_repeat_for_the_same_job_and_differ_for_another() -> None:
    first, again, other = (find(build_answer(GOOD), job_id=j) for j in ("job", "job", "other"))
    assert first == again
    assert first.lesions[0].tracking_uid != other.lesions[0].tracking_uid


def test_no_lesion_gives_no_overall_category_and_says_whose_it_is() -> None:
    found = find(build_answer())
    assert (found.lesions, found.assessments) == ((), ())
    assert "PI-RADS overall category" in blanks(found)


def test_lesion_outside_the_gland_and_in_no_zone_is_kept_and_said() -> None:
    lesions = np.zeros(SHAPE, dtype=np.uint8)
    lesions[5, 2:5, 2:5] = 1
    found = find(build_answer(GOOD, lesions=lesions))
    (lesion,) = found.lesions
    assert lesion.zone is None
    assert lesion.sector is None
    assert any("outside the gland" in n for n in lesion.notes)
    assert any("neither zone" in n for n in lesion.notes)
    assert found.assessments[0].score == "X"
    assert "lesion-1 PI-RADS category" in blanks(found)


@pytest.mark.parametrize(("dce", "score", "words"), [(1, "4", "positive"), (0, "3", "negative"), (NAN, "3", "not acq")])
def test_contrast_decides_a_three_in_the_peripheral_zone(dce: float, score: str, words: str) -> None:
    found = find(build_answer((3, 3, dce, 0.5)))
    assert found.assessments[0].score == score
    assessment = found.lesions[0].assessment("pirads")
    assert assessment is not None
    assert assessment.inputs[3].value.startswith(words)


def test_size_note_speaks_of_the_diameter_as_shown() -> None:
    grid = replace(GRID, affine=((0.748, 0, 0, 0.0), (0, 0.748, 0, 0.0), (0, 0, 3.0, 0.0), (0, 0, 0, 1.0)))
    lesions = np.zeros(SHAPE, dtype=np.uint8)
    lesions[5, 24, 10:30] = 1
    volumes = {name: replace(v, geometry=grid) for name, v in build_reading().volumes.items()}
    for score, says in ((4, "would be category 5"), (5, None)):
        found = find(build_answer((4, score, NAN, 0.9), lesions=lesions), volumes=volumes)
        assert value(found, "lesion-1", "diameter_in_plane") == 15.0
        assert any(says in n for n in found.lesions[0].notes) if says else found.lesions[0].notes == ()


# ADC


def test_adc_is_blank_where_the_map_is_absent_or_does_not_reach_or_is_not_credible() -> None:
    def why(array: NDArray[np.float32] | None) -> str:
        volumes = dict(build_reading().volumes)
        if array is None:
            del volumes["adc"]
        else:
            volumes["adc"] = replace(volumes["adc"], array=array)
        found = find(build_answer(GOOD), volumes=volumes)
        assert value(found, "lesion-1", "adc_mean") is None
        return blanks(found)["lesion-1 ADC"]

    assert "no ADC map" in why(None)
    assert "field of view" in why(np.full(SHAPE, NAN, np.float32))
    assert "not credible" in why(np.full(SHAPE, 0.0008, np.float32))
    assert "not credible" in why(np.full(SHAPE, 8000, np.float32))


def test_adc_is_measured_on_the_lesion_only_and_its_uncovered_part_is_said() -> None:
    adc = np.full(SHAPE, 3000.0, dtype=np.float32)
    adc[5:7, 24:28, 12:17] = np.linspace(500, 890, 40).reshape(2, 4, 5)
    volumes = {**build_reading().volumes}
    volumes["adc"] = replace(volumes["adc"], array=adc)
    found = find(build_answer(GOOD), volumes=volumes)
    assert (value(found, "lesion-1", "adc_mean"), value(found, "lesion-1", "adc_p10")) == (695, 539)
    assert found.lesions[0].notes == ()
    adc[6, 24:28, 12:17] = NAN
    assert "ADC was measured on 50% of it" in find(build_answer(GOOD), volumes=volumes).lesions[0].notes[0]


def test_absent_series_and_context_are_named_and_read_ones_described() -> None:
    found = find(build_answer())
    assert blanks(found)["Dynamic contrast-enhanced"] == "no suitable series in the study"
    assert blanks(found)["Clinical context"] == "no order"
    assert found.technique == ("T2-weighted axial: series 4 t2_tse_tra, 12 slices, 3 mm",)

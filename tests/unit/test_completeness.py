"""When a study that waits is read: by what is there, since when, and what is said about it. The clock is given."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pydicom
import pytest

from mappings.inputs.dicom_to_study import HEADER_TAGS, datasets_to_study
from mappings.model.study import Instance, Series, Study
from middleware.intake.completeness import (
    NOTHING_CAME,
    Patience,
    Sight,
    Told,
    changes_roles,
    digest_images,
    judge,
    see_outline,
    see_study,
)
from middleware.intake.headers import _dataset
from middleware.intake.protocols import load_protocols

REAL = Path(__file__).parents[3] / "shared" / "data" / "prostatex-0000" / "images"
NOW = datetime(2026, 3, 4, 10, 30, tzinfo=UTC)
PATIENCE = Patience(quiet_s=30, longest_wait_s=900, look_every_s=5)
PROTOCOLS = load_protocols()
PROSTATE = PROTOCOLS["prostate_mri"].protocol
COMPLETE = Sight("i", "r", True)
MISSING = Sight("i", "", True, ("prostate_mri: no ADC",))
FOREIGN = Sight("i", reasons=("prostate_mri: no MR",))
NOTHING = Sight(reasons=("no images of it are in the PACS yet",))


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def look(*sights: tuple[float, Sight], told: Told = Told()) -> list[str]:
    """What is done at each look."""
    marks: dict[str, Any] = {}
    actions = []
    for seconds, sight in sights:
        verdict = judge(sight, told, marks, PATIENCE, after(seconds))
        marks = dict(verdict.marks)
        actions.append(verdict.action)
    return actions


@pytest.mark.parametrize(
    ("looks", "actions"),
    [
        ([(0, COMPLETE), (29, COMPLETE), (30, COMPLETE)], ["wait", "wait", "read"]),
        # What is required changes: the rest begins anew. Other images may come all the while.
        ([(0, COMPLETE), (20, replace(COMPLETE, required="r2")), (49, replace(COMPLETE, required="r2"))], ["wait"] * 3),
        ([(0, COMPLETE), (20, replace(COMPLETE, images="i2")), (30, replace(COMPLETE, images="i3"))],
         ["wait", "wait", "read"]),
        ([(0, MISSING), (899, MISSING), (900, MISSING)], ["wait", "wait", "read"]),
        ([(0, MISSING), (600, replace(MISSING, images="i2")), (1400, replace(MISSING, images="i2"))], ["wait"] * 3),
        ([(0, FOREIGN), (900, FOREIGN)], ["wait", "unmatched"]),
        ([(0, NOTHING), (86400, NOTHING)], ["wait", "wait"]),
        ([(0, NOTHING), (NOTHING_CAME.total_seconds(), NOTHING)], ["wait", "unusable"]),
        ([(0, NOTHING), (50, COMPLETE), (80, COMPLETE)], ["wait", "wait", "read"]),
    ],
)  # fmt: skip
def test_what_is_done_by_what_is_there(looks: list[tuple[float, Sight]], actions: list[str]) -> None:
    assert look(*looks) == actions


def test_said_to_be_complete_it_is_read_when_one_more_look_finds_the_same() -> None:
    assert look((0, COMPLETE), (4, COMPLETE), (5, COMPLETE), told=Told(is_complete=True)) == ["wait", "wait", "read"]
    growing = [(n, replace(COMPLETE, required=str(n))) for n in range(0, 20, 4)]
    assert look(*growing, told=Told(is_complete=True)) == ["wait"] * 5
    assert look((0, MISSING), (29, MISSING), (30, MISSING), told=Told(is_complete=True)) == ["wait", "wait", "read"]
    assert look((0, NOTHING), (899, NOTHING), told=Told(is_complete=True)) == ["wait", "wait"]


def test_on_hold_nothing_is_read_however_long() -> None:
    assert look((0, COMPLETE), (10**6, COMPLETE), told=Told(is_complete=True, is_on_hold=True)) == ["wait", "wait"]


@pytest.mark.parametrize(("since", "pause"), [(0, 5), (100, 20), (900 - 1, 1), (10**5, 600)])
def test_the_next_look_comes_the_later_the_longer_nothing_changed(since: float, pause: float) -> None:
    sight = NOTHING if since > 900 else MISSING
    first = judge(sight, Told(), {}, PATIENCE, NOW)
    verdict = judge(sight, Told(), first.marks, PATIENCE, after(since))
    assert verdict.look_at == after(since + pause)


def test_marks_of_another_version_or_none_begin_anew() -> None:
    assert judge(COMPLETE, Told(), {"something": "else"}, PATIENCE, NOW).action == "wait"


# What is seen


@pytest.fixture(scope="module")
def files() -> list[tuple[str, pydicom.Dataset]]:
    return [(f.name, pydicom.dcmread(f, stop_before_pixels=True)) for f in sorted(REAL.rglob("*.dcm"))]


def test_headers_of_the_elements_that_are_kept_tell_the_same_study(files: list[tuple[str, pydicom.Dataset]]) -> None:
    from_json = [(name, _dataset(dataset.to_json_dict())) for name, dataset in files]
    assert datasets_to_study(from_json) == datasets_to_study(files)
    full, kept = files[0][1].to_json_dict(), from_json[0][1].to_json_dict()
    assert set(kept) == set(full) & HEADER_TAGS
    assert len(kept) < len(full) / 2


@pytest.fixture(scope="module")
def real(files: list[tuple[str, pydicom.Dataset]]) -> Study:
    return datasets_to_study(files)


def without(study: Study, *numbers: int) -> Study:
    return replace(study, series=tuple(s for s in study.series if s.series_number not in numbers))


def test_the_real_study_is_complete_and_its_parts_are_not(real: Study) -> None:
    assert see_study(real, PROTOCOLS, NOW).required
    sight = see_study(without(real, 7), PROTOCOLS, NOW)
    assert (sight.required, sight.applies) == ("", True)
    assert any("Apparent diffusion coefficient map" in reason for reason in sight.reasons)


def test_one_slice_less_is_not_complete(real: Study) -> None:
    series = tuple(
        replace(s, instances=s.instances[:5] + s.instances[6:]) if s.series_number == 4 else s for s in real.series
    )
    sight = see_study(replace(real, series=series), PROTOCOLS, NOW)
    assert sight.required == ""
    assert "missing" in " ".join(sight.reasons)


def test_series_that_no_role_requires_changes_the_images_only(real: Study) -> None:
    all_of_it, part = see_study(real, PROTOCOLS, NOW), see_study(without(real, 3, 9), PROTOCOLS, NOW)
    assert all_of_it.required == part.required
    assert all_of_it.images != part.images


def test_headers_without_b_values_are_complete_all_the_same(real: Study) -> None:
    bare = replace(
        real,
        series=tuple(
            replace(
                s,
                description=s.description.replace("BVAL", "X"),
                protocol_name="",
                instances=tuple(replace(i, b_value_s_mm2=None) for i in s.instances),
            )
            for s in real.series
            if s.series_number != 6
        ),
    )
    assert see_study(bare, PROTOCOLS, NOW).required


def test_other_modality_is_refused_by_the_outline_alone() -> None:
    outline = Study("1.2", real_patient(), (Series("1.2.1", "CT", (Instance("0.300", "", "", ""),)),))
    sight = see_study(outline, PROTOCOLS, NOW)
    assert (sight.applies, sight.decided) == (False, None)
    assert sight.reasons == ("prostate_mri: the study holds no MR images (CT)",)


def test_nothing_and_our_own_results_are_no_images() -> None:
    results = Study("1.2", real_patient(), (Series("1.2.1", "SEG", (Instance("1.2.1.1", "", "", ""),)),))
    for study in (None, results):
        assert see_study(study, PROTOCOLS, NOW).images == ""
        assert see_outline(study, "no metadata").images == ""


def real_patient() -> Any:
    return datasets_to_study([("f", pydicom.dcmread(next(REAL.rglob("*.dcm")), stop_before_pixels=True))]).patient


# What comes later


def test_what_came_later_matters_where_a_role_uses_it(real: Study) -> None:
    t2w = next(s for s in real.series if s.series_number == 4)
    later = replace(
        t2w,
        series_instance_uid="9.9",
        series_number=40,
        instances=tuple(replace(i, sop_instance_uid=f"9.9.{n}") for n, i in enumerate(t2w.instances)),
    )
    assert changes_roles(real, replace(real, series=(*real.series, later)), PROSTATE)


def test_what_came_later_does_not_matter_where_no_role_uses_it(real: Study) -> None:
    assert not changes_roles(without(real, 3), real, PROSTATE)
    assert not changes_roles(real, real, PROSTATE)


def test_headers_without_b_values_do_not_look_like_a_change(real: Study) -> None:
    bare = replace(
        real,
        series=tuple(
            replace(s, instances=tuple(replace(i, b_value_s_mm2=None) for i in s.instances)) for s in real.series
        ),
    )
    assert not changes_roles(real, bare, PROSTATE)


def test_series_that_is_gone_matters(real: Study) -> None:
    assert changes_roles(real, without(real, 7), PROSTATE)


def test_digest_of_images_is_the_same_in_any_order(real: Study) -> None:
    turned = replace(real, series=tuple(replace(s, instances=s.instances[::-1]) for s in reversed(real.series)))
    assert digest_images(turned) == digest_images(real)

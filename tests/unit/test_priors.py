"""Two sittings of one patient: which lesion is which, and the growth that is reported, against the phantom's truth."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pytest

from deploy.hospital.phantom import (
    Grid,
    PhantomLesion,
    PhantomSpec,
    _default_lps,
    axes,
    axial_grid,
    left_transition_lesion,
    right_peripheral_lesion,
    truth,
    truth_masks,
)
from mappings.model import codes
from mappings.model.changes import Comparison, LesionChange, PriorRefused
from mappings.model.context import ClinicalContext
from mappings.model.findings import Finding, Findings, ModelIdentity
from mappings.model.measurement import Measurement
from mappings.model.study import Geometry, PatientIdentity, Study, Volume
from mappings.reading.priors_to_changes import (
    Gates,
    align_glands,
    check_prior,
    compare,
    find_doubling_time,
    match_lesions,
    measure_change,
)
from mappings.reading.tensors_to_findings import Reading, tensors_to_findings
from middleware.intake.protocols import BUNDLED, load_protocol
from tests.builders import build_findings, build_gland, build_lesion

PROTOCOL = load_protocol(BUNDLED / "prostate_mri.yaml").protocol
LEFT_PERIPHERAL = PhantomLesion(_default_lps(13.0, 10.0, -2.0), (8.0, 8.0, 9.0))
BOTH = (right_peripheral_lesion(), left_transition_lesion())
EARLIER = date(2025, 3, 2)


# --- sittings of the phantom ---------------------------------------------------------------------------------


def geometry_of(grid: Grid) -> Geometry:
    z, y, x = grid.spacing_mm
    columns = np.column_stack((grid.row * x, grid.column * y, grid.normal * z, grid.origin_lps_mm))
    rows = [*map(tuple, columns.tolist()), (0.0, 0.0, 0.0, 1.0)]
    return Geometry(grid.shape, tuple(rows), "2.25.1")


def thick_axial_grid(spec: PhantomSpec) -> Grid:
    """The phantom's T2 grid round the gland: 128 x 128 x 19 at 0.5 x 0.5 x 3 mm."""
    return axial_grid(spec, (19, 128, 128), (3.0, 0.5, 0.5), (0.0, -4.0, 1.2))


def thin_axial_grid(spec: PhantomSpec) -> Grid:
    """128 x 128 x 57 at 0.5 x 0.5 x 1 mm: a 3D sequence."""
    return axial_grid(spec, (57, 128, 128), (1.0, 0.5, 0.5), (0.0, -4.0, 1.2))


def read_phantom(
    spec: PhantomSpec,
    shift_mm: tuple[float, float, float] = (0.0, 0.0, 0.0),
    make_grid: Callable[[PhantomSpec], Grid] = thick_axial_grid,
) -> Findings:
    """The findings that the truth masks of `spec` give; `shift_mm` moves the patient against the scanner."""
    moved = replace(
        spec,
        gland_centre_lps_mm=_add(spec.gland_centre_lps_mm, shift_mm),
        lesions=tuple(replace(one, centre_lps_mm=_add(one.centre_lps_mm, shift_mm)) for one in spec.lesions),
    )
    grid = make_grid(moved)
    masks: dict[str, Any] = dict(truth_masks(moved, grid))
    masks["scores"] = np.tile(np.array([4, 4, np.nan, 0.8], np.float32), (len(spec.lesions), 1))
    array = np.full(grid.shape, 800.0, np.float32)
    uids = tuple(f"2.25.4.{n}" for n in range(grid.shape[0]))
    volume = Volume(array, geometry_of(grid), "2.25.4", uids)
    uid = f"2.25.{spec.study_date:%Y%m%d}"
    patient = PatientIdentity(spec.patient_id, "", spec.patient_name, spec.birth_date, spec.sex)
    reading = Reading(
        job_id=f"job-{uid}",
        revision=1,
        now=datetime(2026, 3, 4, tzinfo=UTC),
        study=Study(uid, patient, (), study_date=spec.study_date),
        protocol=PROTOCOL,
        model=ModelIdentity("truth", "1", "us"),
        context=ClinicalContext("ehr"),
        psa=None,
        psa_reason="none",
        roles=(),
        volumes={"t2w": volume, "adc": volume},
    )
    return tensors_to_findings(masks, reading)


def _add(one: tuple[float, float, float], other: tuple[float, float, float]) -> tuple[float, float, float]:
    x, y, z = (a + b for a, b in zip(one, other, strict=True))
    return (x, y, z)


def earlier(**changes: Any) -> PhantomSpec:
    return PhantomSpec(**{"study_date": EARLIER, "lesions": BOTH, **changes})


def later(**changes: Any) -> PhantomSpec:
    return PhantomSpec(**{"lesions": BOTH, **changes})


def statuses(rows: tuple[LesionChange, ...]) -> list[tuple[str, str | None, str | None]]:
    """Status, current and prior tracking id of each row."""
    return [
        (
            r.status,
            r.current.tracking_id if r.current else None,
            r.prior.tracking_id if r.prior else None,
        )
        for r in rows
    ]


@pytest.fixture(scope="module")
def prior() -> Findings:
    return read_phantom(earlier())


@pytest.fixture(scope="module")
def grown() -> Comparison:
    """A year later, every diameter 1.3 times as long, the patient lying elsewhere; 1 mm slices."""
    current = read_phantom(later(growth_factor=1.3), (-17.0, 6.0, 23.0), thin_axial_grid)
    return compare(current, read_phantom(earlier(), make_grid=thin_axial_grid))


# --- growth against the truth --------------------------------------------------------------------------------


def growth(row: LesionChange) -> float:
    """How many times its prior volume the lesion has now."""
    volume = row.change("volume")
    assert volume is not None
    assert volume.percent is not None
    return 1 + volume.percent.value / 100


def test_known_growth_of_volume_is_reported_within_two_percent(grown: Comparison) -> None:
    assert statuses(grown.lesions) == [("matched", "lesion-1", "lesion-1"), ("matched", "lesion-2", "lesion-2")]
    assert [growth(row) for row in grown.lesions] == [pytest.approx(1.3**3, rel=0.02)] * 2
    assert grown.interval_days == 365


@pytest.mark.parametrize(("diameter_mm", "tolerance"), [(16.0, 0.02), (20.0, 0.02), (12.0, 0.09)])
@pytest.mark.parametrize("phase_mm", [0.0, 1.0, 2.0])
def test_growth_on_slices_of_3_mm(diameter_mm: float, tolerance: float, phase_mm: float) -> None:
    """Counting voxels shows 2 percent from 16 mm on. Of 12 mm there are four slices, and where they happen to cut
    decides 9 percent: that is the image's, not the comparison's."""
    lesions = (PhantomLesion(_default_lps(-12.0, 5.0, phase_mm), (diameter_mm,) * 3),)
    row = compare(read_phantom(later(lesions=lesions, growth_factor=1.3)), read_phantom(earlier(lesions=lesions)))
    assert growth(row.lesions[0]) == pytest.approx(1.3**3, rel=tolerance)


def test_known_growth_of_diameter_is_reported_within_a_pixel(grown: Comparison) -> None:
    """A pixel is 0.5 mm, so 2 percent of 12 mm is half a pixel: the grid cannot show less than one."""
    specs = earlier(), later(growth_factor=1.3)
    for row, before, now in zip(grown.lesions, *(truth(s).lesions for s in specs), strict=True):
        diameter = row.change("diameter_in_plane")
        assert diameter is not None
        expected = max(now.diameters_mm[:2]) - max(before.diameters_mm[:2])
        assert diameter.difference.value == pytest.approx(expected, abs=0.5)


def test_rates_and_doubling_time_follow_from_the_truth(grown: Comparison) -> None:
    for row in grown.lesions:
        volume = row.change("volume")
        assert volume is not None
        assert volume.percent_per_year is not None
        assert volume.per_year is not None
        assert row.doubling_time is not None
        assert row.doubling_time.value == pytest.approx(365 * math.log(2) / math.log(1.3**3), rel=0.03)
        assert 1 + volume.percent_per_year.value / 100 == pytest.approx(1.3**3, rel=0.02)
        assert volume.per_year.value == pytest.approx(volume.difference.value * 365.25 / 365, abs=0.006)
        units = [m.unit.value for m in (volume.difference, volume.per_year, volume.percent_per_year, row.doubling_time)]
        assert units == ["mL", "mL/a", "%/a", "d"]


def test_an_unchanged_phantom_has_not_changed_and_never_doubles(prior: Findings) -> None:
    comparison = compare(read_phantom(later(), (9.0, -4.0, 11.0)), prior)
    for row in comparison.lesions:
        assert row.status == "matched"
        assert row.distance_mm == pytest.approx(0.0, abs=0.3)
        assert row.doubling_time is None
        for change in row.changes:
            assert change.percent is not None
            assert change.percent.value == pytest.approx(0.0, abs=2.0)
    assert [c.percent and abs(c.percent.value) < 1 for c in comparison.gland] == [True, True]


def test_each_value_names_the_lesions_that_it_comes_from(grown: Comparison) -> None:
    row = grown.lesions[0]
    assert row.current is not None
    assert row.prior is not None
    assert (row.prior.study_instance_uid, row.prior.study_date) == ("2.25.20250302", EARLIER)
    assert (row.prior.job_id, row.current.job_id) == ("job-2.25.20250302", "job-2.25.20260302")
    assert row.prior.tracking_uid != row.current.tracking_uid
    assert row.prior.evidence[0].sop_instance_uid.startswith("2.25.4.")


# --- which lesion is which -----------------------------------------------------------------------------------


def test_a_moved_tilted_and_larger_gland_keeps_its_lesions(prior: Findings) -> None:
    """The gland 10 percent longer each way, its lesions with it, the stack tilted otherwise, the patient elsewhere."""
    spec = later(gland_semi_axes_mm=(28.6, 21.45, 20.9), tilt_deg=8.0)
    turn = axes(spec).T @ axes(earlier())
    centre = np.array(earlier().gland_centre_lps_mm)
    assert np.abs(turn - np.eye(3)).max() > 0.1
    lesions = []
    for one in BOTH:
        x, y, z = (centre + 1.1 * (np.array(one.centre_lps_mm) - centre)).tolist()
        lesions.append(replace(one, centre_lps_mm=(x, y, z)))
    current = read_phantom(replace(spec, lesions=tuple(lesions)), (30.0, -20.0, 40.0))
    rows = match_lesions(current, prior)
    assert statuses(rows) == [("matched", "lesion-1", "lesion-1"), ("matched", "lesion-2", "lesion-2")]
    assert max(row.distance_mm or 0 for row in rows) < 1.0
    assert align_glands(current, prior).scale == pytest.approx(1.1, rel=0.01)


def test_lesions_in_another_order_are_found_by_place(prior: Findings) -> None:
    rows = match_lesions(read_phantom(later(lesions=BOTH[::-1])), prior)
    assert statuses(rows) == [("matched", "lesion-1", "lesion-2"), ("matched", "lesion-2", "lesion-1")]


def test_a_mirrored_lesion_is_another_lesion(prior: Findings) -> None:
    mirrored = PhantomLesion(_default_lps(14.5, 9.0, 0.0), (12.0, 12.0, 12.0))
    before = read_phantom(earlier(lesions=(right_peripheral_lesion(),)))
    rows = match_lesions(read_phantom(later(lesions=(mirrored,))), before)
    assert statuses(rows) == [("new", "lesion-1", None), ("gone", None, "lesion-1")]
    assert all(row.changes == () and row.doubling_time is None for row in rows)


def test_one_new_one_gone_one_kept(prior: Findings) -> None:
    current = read_phantom(later(lesions=(LEFT_PERIPHERAL, right_peripheral_lesion())))
    rows = match_lesions(current, prior)
    assert statuses(rows) == [
        ("new", "lesion-1", None),
        ("matched", "lesion-2", "lesion-1"),
        ("gone", None, "lesion-2"),
    ]


def test_studies_without_lesions_compare_to_nothing(prior: Findings) -> None:
    empty = read_phantom(later(lesions=()))
    assert statuses(match_lesions(empty, prior)) == [("gone", None, "lesion-1"), ("gone", None, "lesion-2")]
    assert match_lesions(empty, read_phantom(earlier(lesions=()))) == ()


# --- gates, with lesions at chosen places --------------------------------------------------------------------


def lesion(number: int, x: float, y: float = 20.0, z: float = 0.0, **changes: Any) -> Finding:
    side = codes.LEFT if x > 0 else codes.RIGHT
    return replace(build_lesion(number, side), centroid_lps_mm=(x, y, z), **changes)


def sittings(now: list[Finding], before: list[Finding]) -> tuple[Findings, Findings]:
    current = build_findings(lesions=tuple(now), study_instance_uid="1.1", study_date=date(2026, 3, 4))
    return current, build_findings(lesions=tuple(before), study_instance_uid="1.2", study_date=date(2025, 3, 4))


@pytest.mark.parametrize(("apart_mm", "status"), [(0.0, "matched"), (9.9, "matched"), (10.1, "new")])
def test_the_gate_decides_how_far_a_lesion_may_be(apart_mm: float, status: str) -> None:
    rows = match_lesions(*sittings([lesion(1, -15.0)], [lesion(1, -15.0, 20.0 - apart_mm)]))
    assert rows[0].status == status


def test_a_large_lesion_may_move_by_half_its_length() -> None:
    long = tuple(replace(m, value=30.0) if m.key == "diameter_3d" else m for m in build_lesion(1).measurements)
    rows = match_lesions(*sittings([lesion(1, -15.0, measurements=long)], [lesion(1, -15.0, 20.0, 14.0)]))
    assert (rows[0].status, rows[0].distance_mm) == ("matched", 14.0)


def test_the_same_zone_is_preferred() -> None:
    inner, outer = lesion(1, -15.0, 19.0, zone=codes.TRANSITION_ZONE), lesion(2, -15.0, 21.9)
    rows = match_lesions(*sittings([lesion(1, -15.0)], [inner, outer]))
    assert statuses(rows) == [("matched", "lesion-1", "lesion-2"), ("gone", None, "lesion-1")]
    here = replace(inner, zone=codes.PERIPHERAL_ZONE)
    assert match_lesions(*sittings([lesion(1, -15.0)], [here, outer]))[0].status == "ambiguous"
    rows = match_lesions(*sittings([lesion(1, -15.0)], [inner]))
    assert rows[0].notes == (
        "Its zone was Transition zone of the prostate in the prior and is Peripheral zone of the prostate now.",
    )


def test_sides_are_crossed_at_the_midline_only() -> None:
    assert match_lesions(*sittings([lesion(1, 2.0)], [lesion(1, -2.0)]))[0].status == "matched"
    assert match_lesions(*sittings([lesion(1, 2.0)], [lesion(1, -5.5)]))[0].status == "new"
    both = lesion(1, -4.0, laterality=codes.BILATERAL)
    assert match_lesions(*sittings([both], [lesion(1, 5.5)]))[0].status == "matched"


def test_a_lesion_between_two_is_ambiguous_and_gets_no_numbers() -> None:
    rows = match_lesions(*sittings([lesion(1, -15.0)], [lesion(1, -15.0, 16.5), lesion(2, -15.0, 23.0)]))
    assert statuses(rows) == [("ambiguous", "lesion-1", None)]
    assert [c.tracking_id for c in rows[0].candidates] == ["lesion-1", "lesion-2"]
    assert (rows[0].changes, rows[0].doubling_time) == ((), None)
    assert rows[0].notes == (
        "By its place it may be Lesion 1 or Lesion 2 of the prior; no growth is given. Please match by eye.",
    )


def test_two_lesions_near_one_are_both_ambiguous() -> None:
    rows = match_lesions(*sittings([lesion(1, -15.0, 16.5), lesion(2, -15.0, 23.0)], [lesion(1, -15.0)]))
    assert [(r.status, [c.tracking_id for c in r.candidates]) for r in rows] == [("ambiguous", ["lesion-1"])] * 2


def test_the_assignment_is_the_best_of_all_and_not_the_nearest_first() -> None:
    """Nearest first would take lesion 1 of the prior for lesion 2 (4 mm) and leave lesion 1 with 13 mm."""
    now = [lesion(1, -15.0, 10.0), lesion(2, -15.0, 19.0)]
    before = [lesion(1, -15.0, 15.0), lesion(2, -15.0, 25.5)]
    rows = match_lesions(*sittings(now, before), gates=Gates(margin_mm=0.0))
    assert statuses(rows) == [("matched", "lesion-1", "lesion-1"), ("matched", "lesion-2", "lesion-2")]


def test_a_sure_pair_is_not_broken_to_find_partners_for_others() -> None:
    """1 mm apart and two lesions left over beats two pairs of 9 mm."""
    now = [lesion(1, -15.0, 10.0), lesion(2, -15.0, 20.0)]
    before = [lesion(1, -15.0, 11.0), lesion(2, -15.0, 1.0)]
    assert statuses(match_lesions(*sittings(now, before))) == [
        ("matched", "lesion-1", "lesion-1"),
        ("new", "lesion-2", None),
        ("gone", None, "lesion-2"),
    ]


def test_every_lesion_of_both_studies_appears_and_pairs_are_one_to_one() -> None:
    random = np.random.default_rng(7)
    for now_count, before_count in itertools.product(range(5), range(5)):
        places = random.uniform(-25, 25, (now_count + before_count, 3))
        made = [lesion(n + 1, *map(float, p)) for n, p in enumerate(places[:now_count])]
        olds = [lesion(n + 1, *map(float, p)) for n, p in enumerate(places[now_count:])]
        rows = match_lesions(*sittings(made, olds))
        assert [r.current.tracking_id for r in rows if r.current] == [m.tracking_id for m in made]
        taken = [r.prior.tracking_id for r in rows if r.prior]
        assert len(set(taken)) == len(taken)
        named = {c.tracking_id for r in rows for c in r.candidates}
        assert set(taken) | named == {o.tracking_id for o in olds}


def test_a_given_transform_is_used_instead_of_the_glands() -> None:
    current, before = sittings([lesion(1, -15.0)], [lesion(1, -15.0, 60.0)])
    assert match_lesions(current, before)[0].status == "new"
    assert match_lesions(current, before, lambda p: (p[0], p[1] - 40.0, p[2]))[0].status == "matched"


# --- refused -------------------------------------------------------------------------------------------------

SAME = PatientIdentity("TEST-001", "", "Phantom^Peter", date(1961, 5, 6), "M")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study_instance_uid": "1.1"}, "the prior is the study itself"),
        ({"study_date": date(2026, 3, 9)}, "the prior is 5 days later than the study"),
        ({"study_date": None}, "one of the studies has no date"),
        ({"status": "entered-in-error"}, "entered in error"),
        ({"patient": replace(SAME, patient_id="TEST-002")}, "different patient IDs"),
        ({"patient": replace(SAME, patient_id="")}, "no patient ID"),
        ({"patient": replace(SAME, birth_date=date(1962, 5, 6))}, "different birth dates"),
        ({"patient": replace(SAME, sex="F")}, "different sexes"),
        ({"findings": (build_lesion(1),)}, "the prior has no gland to register by"),
        ({"findings": (replace(build_gland(), centroid_lps_mm=None),)}, "the prior has no gland to register by"),
    ],
)
def test_what_may_not_be_compared_is_refused(changes: dict[str, Any], message: str) -> None:
    current, before = sittings([lesion(1, -15.0)], [lesion(1, -15.0)])
    for use in (compare, match_lesions):
        with pytest.raises(PriorRefused, match=message) as caught:
            use(current, replace(before, **changes))
        assert "TEST-00" not in str(caught.value)


def test_issuers_disagree_only_where_both_are_stated() -> None:
    current, before = sittings([], [])
    hospital = replace(current, patient=replace(SAME, issuer="A"))
    assert check_prior(hospital, before) == 365
    with pytest.raises(PriorRefused, match="different issuers"):
        check_prior(hospital, replace(before, patient=replace(SAME, issuer="B")))


def test_another_model_and_another_outline_are_said() -> None:
    current, before = sittings([], [])
    before = replace(before, model=ModelIdentity("prostate_reference", "0", "us"), protocol_name="other")
    halved = tuple(replace(m, value=20.0) if m.key == "volume_voxels" else m for m in build_gland().measurements)
    before = replace(before, findings=(replace(build_gland(), measurements=halved),))
    notes = " ".join(compare(current, before).notes)
    assert "measured by prostate_reference 0, this study by prostate_reference 1" in notes
    assert "read by protocol other" in notes
    assert "differ by a factor of 2.21: positions were not scaled" in notes


# --- arithmetic ----------------------------------------------------------------------------------------------


def ml(value: float, decimals: int = 2) -> Measurement:
    return Measurement("volume", "Volume", codes.VOLUME, value, codes.ML, decimals)


@pytest.mark.parametrize(
    ("now", "before", "days", "doubling"),
    [
        (2.0, 1.0, 100, 100),
        (4.0, 1.0, 100, 50),
        (1.5, 1.0, 200, 342),
        (1.0, 1.0, 100, None),
        (0.5, 1.0, 100, None),
        (1.01, 1.0, 100, None),
        (1.0, 0.0, 100, None),
        (2.0, 1.0, 27, None),
    ],
)
def test_doubling_time(now: float, before: float, days: int, doubling: int | None) -> None:
    found = find_doubling_time(ml(now), ml(before), days)
    assert (found and found.value) == doubling
    assert found is None or (found.text, found.unit.value) == (str(doubling), "d")


def test_change_is_computed_from_the_values_that_are_shown() -> None:
    """0.444 and 0.326 are shown as 0.44 and 0.33: the difference that a reader finds is 0.11."""
    change = measure_change(ml(0.444), ml(0.326), 731)
    assert change.percent is not None
    assert change.per_year is not None
    assert change.percent_per_year is not None
    texts = [m.text for m in (change.difference, change.percent, change.per_year, change.percent_per_year)]
    assert texts == ["0.11", "33.3", "0.05", "15.5"]


def test_shrinking_is_negative_and_from_nothing_has_no_percentage() -> None:
    shrunk = measure_change(ml(0.5), ml(1.0), 365)
    assert shrunk.percent is not None
    assert (shrunk.difference.value, shrunk.percent.value) == (-0.5, -50.0)
    appeared = measure_change(ml(0.5), ml(0.0), 365)
    assert (appeared.percent, appeared.percent_per_year) == (None, None)


def test_a_short_interval_gives_no_rates_and_says_so() -> None:
    current, before = sittings([lesion(1, -15.0)], [lesion(1, -15.0)])
    row = match_lesions(current, replace(before, study_date=date(2026, 3, 4)))[0]
    assert row.interval_days == 0
    assert all(c.per_year is None and c.percent_per_year is None for c in row.changes)
    assert row.notes == ("The studies are 0 days apart: too short for a rate of growth.",)

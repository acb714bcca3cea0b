"""What people do to findings, and a second reading of them: every revision derived, or refused with a reason."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

import pytest
from pydantic import TypeAdapter

from mappings.model import codes
from mappings.model.changes import Comparison, LesionChange, LesionRef
from mappings.model.context import ContextValue
from mappings.model.findings import Blank, Findings
from mappings.model.revision import Difference, Edit, OwnReport, Rejection, RevisionRefused, Signature
from mappings.reading.findings_to_revision import edit_findings, note_own_report, sign_findings, withdraw_findings
from mappings.reading.rerun_to_revision import adopt_rerun, keep_identities, merge_rerun, reports_the_same
from mappings.reading.revisions_to_difference import diff
from tests.builders import NOW, build_context
from tests.comparisons import build_compared
from tests.revisions import FERRER, OWN_WORDS, WEISS, at, build_chains, edit, first, read_again, signed_by

CHAINS = build_chains()


def score(tracking_id: str, findings: Findings) -> str:
    lesion = next(f for f in findings.findings if f.tracking_id == tracking_id)
    assessment = lesion.assessment("pirads")
    assert assessment is not None
    return assessment.score


def value(findings: Findings, key: str) -> str:
    assert findings.gland is not None
    measurement = findings.gland.measurement(key)
    assert measurement is not None
    return measurement.text


# --- status and signature ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "statuses"),
    [
        ("final", ["preliminary", "final"]),
        ("touched", ["preliminary", "preliminary"]),
        ("touched, final", ["preliminary", "preliminary", "final"]),
        ("corrected", ["preliminary", "final", "corrected"]),
        ("amended", ["preliminary", "final", "amended"]),
        ("amended, corrected", ["preliminary", "final", "amended", "corrected"]),
        ("countersigned", ["preliminary", "final", "final"]),
        ("withdrawn", ["preliminary", "entered-in-error"]),
        ("final, withdrawn", ["preliminary", "final", "corrected", "entered-in-error"]),
        ("rerun", ["preliminary", "preliminary"]),
        ("rerun adopted", ["preliminary", "final", "corrected"]),
        ("own report", ["preliminary", "preliminary"]),
    ],
)
def test_each_path_has_the_statuses_that_fhir_and_hl7_know(name: str, statuses: list[str]) -> None:
    chain = CHAINS[name]
    assert [f.status for f in chain] == statuses
    assert [f.revision for f in chain] == [*range(1, len(chain) + 1)]
    assert [f.predecessor_revision for f in chain[1:]] == [f.revision for f in chain[:-1]]
    assert all(bool(f.signature) == (f.status in ("final", "amended", "corrected")) for f in chain)


@pytest.mark.parametrize("name", CHAINS)
def test_every_revision_survives_json(name: str) -> None:
    adapter = TypeAdapter(Findings)
    for findings in CHAINS[name]:
        assert adapter.validate_json(adapter.dump_json(findings)) == findings


def test_findings_that_were_kept_before_revisions_had_people_are_still_read() -> None:
    adapter = TypeAdapter(Findings)
    kept = adapter.dump_python(first(), mode="json")
    for key in ("signature", "edits", "report_text", "rejection", "dropped", "predecessor", "own_report"):
        del kept[key]
    del kept["blank_assessments"]
    assert adapter.validate_python(kept) == first()


def test_a_change_of_something_signed_must_be_signed() -> None:
    final = CHAINS["final"][-1]
    with pytest.raises(RevisionRefused, match="must be signed"):
        edit_findings(final, [edit("rejected", "lesion-1")], at(9))


@pytest.mark.parametrize(
    "follow",
    [
        lambda f: edit_findings(f, [edit("accepted", "lesion-1")], at(20)),
        lambda f: sign_findings(f, signed_by(), at(20)),
        lambda f: withdraw_findings(f, Rejection(FERRER, at(20), "again"), at(20)),
        lambda f: merge_rerun(f, read_again(f), at(20)),
        lambda f: adopt_rerun(f, read_again(f), signed_by(), at(20)),
        lambda f: note_own_report(f, OwnReport("F"), at(20)),
    ],
)
def test_nothing_follows_a_withdrawn_result(follow: Callable[[Findings], Findings]) -> None:
    with pytest.raises(RevisionRefused, match="withdrawn"):
        follow(CHAINS["withdrawn"][-1])


@pytest.mark.parametrize(
    "build",
    [
        lambda: Signature("^^", "St. Elsewhere", NOW),
        lambda: Signature(FERRER, " ", NOW),
        lambda: Signature(FERRER, "x" * 65, NOW),
        lambda: Signature("x" * 65, "St. Elsewhere", NOW),
        lambda: Signature("a^b^c^d^e^f", "St. Elsewhere", NOW),
        lambda: Signature("Ferrer\\Rosa", "St. Elsewhere", NOW),
        lambda: Edit("accepted", "Ferrer\r^Rosa", NOW),
        lambda: Signature(FERRER, "St. Elsewhere", datetime(2026, 3, 4)),
        lambda: Edit("accepted", "", NOW),
        lambda: Edit("accepted", FERRER, datetime(2026, 3, 4)),
        lambda: Rejection(FERRER, NOW, " "),
        lambda: sign_findings(first(), signed_by(), datetime(2026, 3, 4)),
    ],
)
def test_nobody_signs_changes_or_withdraws_without_name_time_and_reason(build: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"needs"):
        build()


def test_a_withdrawn_result_keeps_what_was_said_but_has_no_segments() -> None:
    before, after = CHAINS["withdrawn"]
    assert [f.tracking_uid for f in after.findings] == [f.tracking_uid for f in before.findings]
    assert (after.segments, after.rejection and after.rejection.revision) == ((), 1)
    assert all(f.segment_number is None for f in after.findings)


# --- edits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "new", "category"),
    [("DWI score", "5", "5"), ("DWI score", "3", "3"), ("T2W score", "1", "4"), ("DWI score", "not usable", "4")],
)
def test_a_changed_score_derives_the_category_anew(key: str, new: str, category: str) -> None:
    changed = edit_findings(first(), [edit("score", "lesion-1", key, new)], at(4))
    assert score("lesion-1", changed) == category
    assert changed.assessments[0].score == max(category, "2")
    (made,) = changed.edits
    assert (made.title, made.label, made.before, made.after) == ("Lesion 1", key, "4", new)


def test_dce_makes_3_a_4() -> None:
    edits = [edit("score", "lesion-1", "DWI score", "3"), edit("score", "lesion-1", "DCE", "positive")]
    assert score("lesion-1", edit_findings(first(), edits, at(4))) == "4"
    assert score("lesion-1", edit_findings(first(), edits[:1], at(4))) == "3"


def test_without_any_usable_score_the_category_is_left_blank_and_comes_back() -> None:
    unusable = [edit("score", "lesion-1", key, "not usable") for key in ("T2W score", "DWI score")]
    blank = edit_findings(first(), unusable, at(4))
    assert score("lesion-1", blank) == "X"
    assert [b.name for b in blank.blanks if b.name.startswith("lesion-1")] == ["lesion-1 PI-RADS category"]
    back = edit_findings(blank, [edit("score", "lesion-1", "DWI score", "4")], at(5))
    assert score("lesion-1", back) == "4"
    assert back.blanks == first().blanks


def test_the_note_on_size_follows_category_and_diameter() -> None:
    five = edit_findings(first(), [edit("score", "lesion-1", "DWI score", "5")], at(4))
    assert "under 15 mm" in five.lesions[0].notes[0]
    large = edit_findings(five, [edit("measurement", "lesion-1", "diameter_in_plane", "16.04")], at(5))
    assert large.lesions[0].notes == ()
    four = edit_findings(large, [edit("score", "lesion-1", "DWI score", "4")], at(6))
    assert "16.0 mm: 15 mm or more" in four.lesions[0].notes[0]


def test_a_changed_volume_changes_the_density_and_says_what_was_before() -> None:
    changed = edit_findings(first(), [edit("measurement", "gland", "volume_ellipsoid", "65")], at(4))
    assert (value(changed, "volume_ellipsoid"), value(changed, "psa_density")) == ("65.0", "0.20")
    (made,) = changed.edits
    assert (made.before, made.after, made.label) == ("50.0 mL", "65.0 mL", "Volume by ellipsoid")


def test_a_changed_diameter_changes_ellipsoid_and_density() -> None:
    changed = edit_findings(first(), [edit("measurement", "gland", "diameter_si", "50")], at(4))
    assert value(changed, "volume_ellipsoid") == f"{52.0 * 41.0 * 50.0 * 0.52 / 1000:.1f}"
    assert value(changed, "psa_density") == f"{13 / float(value(changed, 'volume_ellipsoid')):.2f}"


def test_another_volume_leaves_the_density_and_loses_its_method() -> None:
    changed = edit_findings(first(), [edit("measurement", "gland", "volume_voxels", "60")], at(4))
    assert value(changed, "psa_density") == "0.26"
    assert changed.gland is not None
    measurement = changed.gland.measurement("volume_voxels")
    assert measurement is not None
    assert measurement.method is None


def test_another_psa_of_the_chart_changes_the_density() -> None:
    newer = ContextValue(codes.PSA, 6.5, "ng/mL", at(-600), "Observation/psa2")
    start = first()
    start = replace(start, context=build_context(labs=(*start.context.labs, newer)))
    changed = edit_findings(start, [edit("psa", value="Observation/psa2")], at(4))
    assert (changed.psa, value(changed, "psa_density")) == (newer, "0.13")
    with pytest.raises(RevisionRefused, match="Observation/psa1, Observation/psa2"):
        edit_findings(start, [edit("psa", value="Observation/other")], at(4))


def test_a_density_that_was_blank_is_filled_when_a_psa_is_chosen() -> None:
    start = first()
    assert start.gland is not None
    bare = replace(start.gland, measurements=start.gland.measurements[:-1])
    start = replace(start, findings=(bare, *start.lesions), psa=None, blanks=(Blank("PSA density", "too old"),))
    changed = edit_findings(start, [edit("psa", value="Observation/psa1")], at(4))
    assert (value(changed, "psa_density"), changed.blanks) == ("0.26", ())


def test_a_rejected_lesion_is_gone_with_segment_blanks_and_category_but_remembered() -> None:
    start = replace(first(), blanks=(Blank("lesion-1 ADC", "outside"), Blank("lesion-11 ADC", "outside")))
    changed = edit_findings(start, [edit("rejected", "lesion-1", reason="artefact")], at(4))
    assert [f.tracking_id for f in changed.findings] == ["gland", "lesion-2"]
    assert [(s.number, s.tracking_id) for s in changed.segments][-1] == (4, "lesion-2")
    assert changed.lesions[0].segment_number == 4
    assert [b.name for b in changed.blanks] == ["lesion-11 ADC"]
    assert changed.assessments[0].score == "2"
    (row,) = changed.dropped
    assert (row.finding, row.why, row.person, row.reason) == (start.lesions[0], "rejected", FERRER, "artefact")


def test_without_a_lesion_the_overall_category_is_blank_and_what_was_sent_is_remembered() -> None:
    left = CHAINS["no lesion left"][1]
    assert (left.lesions, left.assessments) == ((), ())
    assert [(a.key, a.score) for a in left.blank_assessments] == [("pirads_overall", "4")]
    assert "PI-RADS overall category" in [b.name for b in left.blanks]


def test_a_rejected_gland_takes_density_and_segment_along() -> None:
    changed = CHAINS["gland rejected"][-1]
    assert changed.gland is None
    assert "gland" not in [s.tracking_id for s in changed.segments]
    assert [s.number for s in changed.segments] == [1, 2, 3, 4]


def test_growth_of_what_a_person_measured_is_not_given() -> None:
    start = build_compared()
    changed = edit_findings(start, [edit("measurement", "lesion-1", "volume", "0.5")], at(4))
    assert changed.comparison is not None
    row = changed.comparison.lesion("lesion-1")
    assert row is not None
    assert (row.changes, row.doubling_time) == ((), None)
    assert "A person changed a measurement" in row.notes[-1]
    rejected = edit_findings(start, [edit("rejected", "lesion-1")], at(4))
    assert rejected.comparison is not None
    assert rejected.comparison.lesion("lesion-1") is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (edit("accepted", "lesion-9"), "no finding 'lesion-9'.*gland, lesion-1, lesion-2"),
        (edit("score", "lesion-1", "DWI score", "6"), "may be 1, 2, 3, 4, 5, not usable"),
        (edit("score", "lesion-1", "DCE", "maybe"), "positive, negative, not acquired"),
        (edit("score", "lesion-1", "zone", "TZ"), "no zone"),
        (edit("score", "gland", "DWI score", "4"), "Prostate gland has no DWI score"),
        (edit("measurement", "lesion-1", "volume", "much"), "a number over 0 in mL"),
        (edit("measurement", "lesion-1", "volume", "nan"), "a number over 0 in mL"),
        (edit("measurement", "lesion-1", "volume", "-1"), "a number over 0 in mL"),
        (edit("measurement", "lesion-1", "volume", "1e9"), "a number over 0 in mL"),
        (edit("measurement", "lesion-1", "weight", "1"), "is not measured"),
        (edit("measurement", "gland", "psa_density", "1"), "is derived"),
        (edit("rerun"), "nothing that a person changes"),
    ],
)
def test_an_edit_that_cannot_be_is_refused_with_what_can(wrong: Edit, words: str) -> None:
    with pytest.raises(RevisionRefused, match=words):
        edit_findings(first(), [wrong], at(4))


def test_what_was_rejected_cannot_be_edited_and_no_edit_is_no_revision() -> None:
    with pytest.raises(RevisionRefused, match="no finding 'lesion-1'"):
        edit_findings(first(), [edit("rejected", "lesion-1"), edit("accepted", "lesion-1")], at(4))
    with pytest.raises(RevisionRefused, match="No change"):
        edit_findings(first(), [], at(4))


# --- difference ----------------------------------------------------------------------------------------------


def test_equal_findings_have_no_difference_and_signing_is_none() -> None:
    start, final = CHAINS["final"]
    assert diff(start, start) == diff(start, final) == Difference()
    assert not diff(start, final)


def test_a_difference_names_what_came_went_and_changed() -> None:
    final, corrected = CHAINS["corrected"][1:]
    there = diff(final, corrected)
    assert (there.added, there.removed) == ((), ("lesion-2",))
    assert {(c.tracking_id, c.key): (c.before, c.after) for c in there.changed} == {
        ("gland", "volume_ellipsoid"): ("50.0 mL", "65.0 mL"),
        ("gland", "psa_density"): ("0.26 ng/mL/mL", "0.20 ng/mL/mL"),
        ("study", "pirads_overall.lesion categories"): ("4, 2", "4"),
    }
    assert not there.only_adds
    assert diff(corrected, final).added == ("lesion-2",)


def test_text_that_is_added_only_adds_and_text_that_changes_does_not() -> None:
    final, amended = CHAINS["amended"][1:]
    assert amended.report_text == OWN_WORDS
    assert diff(final, amended).only_adds
    other = sign_findings(amended, signed_by(), at(20), text="Other words.")
    assert other.status == "corrected"
    same = sign_findings(amended, signed_by(), at(20), text=OWN_WORDS)
    assert (same.status, same.edits) == ("amended", amended.edits)


# --- a second reading ----------------------------------------------------------------------------------------


def test_a_lesion_keeps_its_identity_where_the_model_counts_otherwise() -> None:
    start, rerun = CHAINS["rerun"]
    before = {f.tracking_id: (f.tracking_uid, f.centroid_lps_mm, f.title) for f in start.findings}
    assert {f.tracking_id: (f.tracking_uid, f.centroid_lps_mm, f.title) for f in rerun.findings} == before
    assert [f.tracking_id for f in rerun.lesions] == ["lesion-2", "lesion-1"]
    by_number = {s.number: s.tracking_uid for s in rerun.segments}
    assert all(by_number[f.segment_number or 0] == f.tracking_uid for f in rerun.findings)
    assert rerun.dropped == ()


def test_a_lesion_that_is_not_found_again_is_named_and_its_id_is_never_given_again() -> None:
    start, lost, again = CHAINS["found again"]
    assert [(row.finding.tracking_id, row.why, row.model.version) for row in lost.dropped] == [
        ("lesion-1", "not found again", "1")
    ]
    assert [f.tracking_id for f in again.lesions] == ["lesion-2", "lesion-3"]
    assert again.lesions[1].title == "Lesion 3"
    assert again.lesions[1].tracking_uid not in {f.tracking_uid for f in start.findings}
    assert again.dropped == lost.dropped


def test_a_lesion_elsewhere_is_another_lesion() -> None:
    start = first()
    moved = replace(read_again(start).lesions[0], centroid_lps_mm=(40.0, 60.0, 30.0))
    rerun = replace(read_again(start), findings=(start.findings[0], moved))
    merged = merge_rerun(start, rerun, at(5))
    assert [f.tracking_id for f in merged.lesions] == ["lesion-3"]
    assert {row.finding.tracking_id for row in merged.dropped} == {"lesion-1", "lesion-2"}


def test_a_lesion_in_doubt_is_a_new_one() -> None:
    start = first()
    one, two = start.lesions
    assert one.centroid_lps_mm is not None
    x, y, z = one.centroid_lps_mm
    near = replace(two, laterality=one.laterality, centroid_lps_mm=(x + 2, y, z))
    start = replace(start, findings=(start.findings[0], one, near))
    rerun = replace(start, findings=(start.findings[0], replace(one, centroid_lps_mm=(x + 1, y, z))))
    assert [f.tracking_id for f in keep_identities(start, rerun).lesions] == ["lesion-3"]


def test_names_of_a_re_run_follow_in_blanks_and_comparison() -> None:
    start = first()
    rerun = read_again(start)
    ref = LesionRef(start.study_instance_uid, NOW.date(), "test-job", 1, "lesion-1", "2.25.1", "Lesion 1")
    done = Comparison("2.25.5", NOW.date(), "j", 1, "p", 10, (), (LesionChange("new", 10, ref),))
    rerun = replace(rerun, blanks=(Blank("lesion-1 ADC", "outside"), Blank("DCE", "none")), comparison=done)
    merged = merge_rerun(start, rerun, at(5))
    assert [b.name for b in merged.blanks] == ["lesion-2 ADC", "DCE"]
    assert merged.comparison is not None
    row = merged.comparison.lesions[0].current
    assert row is not None
    assert (row.tracking_id, row.tracking_uid) == ("lesion-2", start.lesions[1].tracking_uid)


def test_a_gland_that_is_found_again_after_it_was_lost_is_another_observation() -> None:
    start = first()
    without = merge_rerun(start, replace(read_again(start), findings=read_again(start).lesions), at(5))
    assert [row.finding.tracking_id for row in without.dropped] == ["gland"]
    back = merge_rerun(without, read_again(start), at(6))
    assert back.gland is not None
    assert start.gland is not None
    assert back.gland.tracking_uid != start.gland.tracking_uid
    assert back.segments[0].tracking_uid == back.gland.tracking_uid
    third = merge_rerun(back, read_again(start), at(7))
    assert third.gland is not None
    assert third.gland.tracking_uid == back.gland.tracking_uid


def test_other_frames_of_reference_are_matched_by_the_gland_or_not_at_all() -> None:
    start = first()
    shift = (100.0, 50.0, 20.0)

    def moved(f: Findings) -> Findings:
        rows = (
            replace(x, centroid_lps_mm=tuple(a + b for a, b in zip(x.centroid_lps_mm or shift, shift, strict=True)))
            for x in f.findings
        )
        return replace(f, findings=tuple(rows), reference_frame_uid="2.25.99")

    rerun = moved(read_again(start))
    assert [f.tracking_id for f in merge_rerun(start, rerun, at(5)).lesions] == ["lesion-2", "lesion-1"]
    blind = replace(rerun, findings=rerun.lesions)
    assert [f.tracking_id for f in merge_rerun(start, blind, at(5)).lesions] == ["lesion-3", "lesion-4"]


@pytest.mark.parametrize("name", ["final", "corrected", "touched"])
def test_what_a_person_signed_or_changed_is_not_dropped_by_a_re_run(name: str) -> None:
    released = CHAINS[name][-1]
    with pytest.raises(RevisionRefused, match=r"sign a correction|under your name"):
        merge_rerun(released, read_again(released), at(20))


def test_a_person_may_take_a_re_run_over_and_it_is_said() -> None:
    touched = CHAINS["touched"][-1]
    adopted = adopt_rerun(touched, read_again(touched), signed_by(WEISS), at(20))
    (made,) = adopted.edits
    assert (adopted.status, made.kind, made.person) == ("final", "rerun", WEISS)
    assert made.reason == "changes by hand that it does not have: 2"
    assert score("lesion-1", adopted) == "4"


def test_a_re_run_that_says_nothing_new_is_told_from_one_that_does() -> None:
    start = first()
    same = replace(read_again(start, version="1"), created_at=at(30), revision=7)
    assert reports_the_same(start, replace(start, created_at=at(30)))
    assert reports_the_same(CHAINS["final"][-1], replace(start, created_at=at(30)))
    assert not reports_the_same(start, same), "the lesions stand in another order"
    assert not reports_the_same(start, read_again(start, without=1))
    assert not reports_the_same(start, replace(start, blanks=()))
    merged = merge_rerun(start, same, at(31))
    assert reports_the_same(merged, same)


@pytest.mark.parametrize(
    "other",
    [{"study_instance_uid": "2.25.1"}, {"protocol_name": "other"}, {"job_id": "other"}],
)
def test_a_re_run_of_something_else_is_refused(other: dict[str, str]) -> None:
    with pytest.raises(RevisionRefused, match="no revision"):
        merge_rerun(first(), replace(read_again(first()), **other), at(5))  # type: ignore[arg-type]


def test_the_radiologists_own_report_is_noted_once() -> None:
    noted = CHAINS["own report"][-1]
    assert noted.own_report == OwnReport("F", at(2))
    with pytest.raises(RevisionRefused, match="already"):
        note_own_report(noted, OwnReport("F", at(2)), at(9))
    corrected = note_own_report(noted, OwnReport("C", at(8)), at(9))
    assert corrected.revision == 3

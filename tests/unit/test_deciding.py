"""Which protocol reads a study: the first that lets it in; what only the EHR can tell stays open until it was asked;
and where two decisions about a study differ."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from mappings.inputs.dicom_to_study import datasets_to_study
from mappings.model.ids import derive_uid
from mappings.model.protocol import Condition
from mappings.model.study import Study
from mappings.reading.match_to_verdicts import describe_condition, judge_match
from mappings.reading.series_to_roles import match_protocol
from mappings.reading.study_to_facts import facts_of, facts_of_images
from middleware.intake.comparing import COMES_FIRST, compare
from middleware.intake.deciding import Decided, decide
from middleware.intake.protocols import BUNDLED, LoadedProtocol, load_protocol, replace_protocol
from middleware.showing import MOST_LINES, diff_lines
from tests.builders import NOW, build_context
from tests.dicom_sources import build_sources

TEXT = (BUNDLED / "prostate_mri.yaml").read_text(encoding="utf-8")
PSA_4, PSA_20 = '"labs.psa >= 4.0"', '"labs.psa >= 20.0"'


def build_series(number: int, description: str, **changes: Any) -> list[tuple[str, Any]]:
    uid = derive_uid("test-deciding", number)
    named = {"SeriesInstanceUID": uid, "SeriesNumber": number, "SeriesDescription": description}
    datasets = build_sources((6, 8, 10), **named, **changes)
    for index, dataset in enumerate(datasets):
        dataset.SOPInstanceUID = f"{uid}.{index}"[:64]
    return [(f"{number}-{index}.dcm", dataset) for index, dataset in enumerate(datasets)]


STUDY = datasets_to_study(
    [
        *build_series(4, "t2_tse_tra", ScanningSequence="SE"),
        *build_series(7, "ADC", ScanningSequence="EP", ImageType=["DERIVED", "PRIMARY", "ADC"]),
        *build_series(8, "DWI", ScanningSequence="EP", DiffusionBValue=1400.0),
    ]
)
WITHOUT_ADC = replace(STUDY, series=tuple(s for s in STUDY.series if s.description != "ADC"))
CONTEXT = build_context()


@pytest.fixture
def protocol(tmp_path: Path) -> Any:
    """Writes a protocol file with rules and loads it."""

    def write(name: str = "prostate_mri", *, when: str = "", aside: str = "", **changes: str) -> LoadedProtocol:
        text = TEXT.replace("name: prostate_mri", f"name: {name}", 1)
        rules = f"when:\n  - {{expression: {when}, say: too low}}\n" if when else ""
        rules += f"set_aside:\n  - {{expression: {aside}}}\n" if aside else ""
        text = text.replace("roles:\n", f"{rules}\nroles:\n", 1)
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new, 1)
        file = tmp_path / f"{name}.yaml"
        file.write_text(text, encoding="utf-8")
        return load_protocol(file)

    return write


def among(*loaded: LoadedProtocol) -> dict[str, LoadedProtocol]:
    return {one.protocol.name: one for one in loaded}


def ask(*loaded: LoadedProtocol, study: Study = STUDY, context: Any = CONTEXT) -> Decided:
    return decide(study, context, among(*loaded), NOW)


# Deciding


def test_a_study_is_read_where_every_check_holds_and_each_names_its_values(protocol: Any) -> None:
    decided = ask(protocol(when=PSA_4, aside="patient.name.contains('QA')"))
    assert (decided.state, decided.protocol, decided.reasons) == ("read", "prostate_mri", ())
    checks = decided.considered[0].checks
    assert [c.part for c in checks] == ["match", "match", "match", "when", "set_aside"]
    assert all(c.lets_in for c in checks)
    assert checks[0].values == {"modality": "MR"}
    assert checks[3].values == {"labs.psa": "13 ng/mL"}
    assert checks[4].values == {"patient.name": "stated, not shown"}
    assert [r.series_label for r in decided.considered[0].roles][:3] == ["4 t2_tse_tra", "7 ADC", "8 DWI"]
    assert "Phantom" not in str(decided)


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ({"when": PSA_20}, "prostate_mri: too low: `labs.psa >= 20.0` does not hold (labs.psa is 13 ng/mL)"),
        ({"aside": PSA_4}, "prostate_mri: set aside: labs.psa >= 4.0 (labs.psa is 13 ng/mL)"),
        (
            {"when": "labs.egfr > 3.0"},
            "prostate_mri: too low: `labs.egfr > 3.0` cannot be decided: labs.egfr not stated",
        ),
    ],
)
def test_a_rule_that_refuses_names_the_value(protocol: Any, rules: dict[str, str], reason: str) -> None:
    decided = ask(protocol(**rules))
    assert (decided.state, decided.protocol, decided.reasons) == ("unmatched", "", (reason,))
    assert decided.considered[0].roles == ()


def test_a_study_that_two_protocols_match_is_read_by_the_one_whose_rules_let_it_in(protocol: Any) -> None:
    strict, other = protocol("a_strict", when=PSA_20), protocol("b_other", when=PSA_4)
    decided = ask(strict, other)
    assert (decided.state, decided.protocol) == ("read", "b_other")
    assert [c.part for c in decided.considered[0].refusals] == ["when"]
    assert ask(other, strict).protocol == "b_other"
    assert ask(protocol("c_third"), other).protocol == "c_third"


def test_where_none_lets_it_in_those_are_told_whose_match_holds(protocol: Any) -> None:
    ct = protocol("ct", **{"any_of: [MR], say": "any_of: [CT], say"})
    assert ask(ct, protocol(when=PSA_20)).reasons[0].startswith("prostate_mri: too low")
    assert ask(ct).reasons == ("ct: the study holds no MR images (MR)",)
    refusals = ask(protocol("ct", when=PSA_20, **{"any_of: [MR], say": "any_of: [CT], say"})).considered[0].refusals
    assert [c.part for c in refusals] == ["match"], "rules of a protocol that does not match are no reason"


def test_series_that_cannot_be_used_make_it_unusable_and_no_other_protocol_steps_in(protocol: Any) -> None:
    decided = ask(protocol("a"), protocol("b"), study=WITHOUT_ADC)
    assert (decided.state, decided.protocol) == ("unusable", "a")
    assert decided.reasons[0].startswith("no series can be the Apparent diffusion coefficient map (adc)")


# Before the EHR was asked


@pytest.mark.parametrize(
    ("when", "state"),
    [
        (PSA_4, "open"),
        (PSA_20, "open"),
        ('"labs.psa.stated"', "open"),
        ('"!order.priority.stated || labs.psa > 4.0"', "open"),
        ("\"context.conditions.exists(c, c.contains('x'))\"", "open"),
        ('"study.series_count > 100 && labs.psa >= 4.0"', "unmatched"),
        ('"study.series_count == 3 || labs.psa >= 4.0"', "read"),
        ('"study.field_strength_t > 1.0"', "unmatched"),
        ('"patient.id.stated"', "read"),
    ],
)
def test_only_what_hangs_on_the_context_is_open(protocol: Any, when: str, state: str) -> None:
    assert ask(protocol(when=when), context=None).state == state


def test_what_is_open_says_so_and_is_settled_once_the_ehr_was_asked(protocol: Any) -> None:
    loaded = protocol(when=PSA_4, aside="labs.psa > 100.0")
    checks = ask(loaded, context=None).considered[0].checks[3:]
    assert [c.lets_in for c in checks] == [None, None]
    assert checks[0].values == {"labs.psa": "not known yet"}
    assert checks[0].reason == "`labs.psa >= 4.0` cannot be decided: labs.psa not known yet"
    assert [c.lets_in for c in ask(loaded).considered[0].checks[3:]] == [True, True]
    nothing = ask(loaded, context=build_context(labs=()))
    assert nothing.state == "unmatched"
    assert "labs.psa not stated" in nothing.reasons[0]


def test_a_phantom_is_set_aside_before_the_ehr_is_asked(protocol: Any) -> None:
    loaded = protocol(when=PSA_4, aside="study.series_count == 3")
    assert ask(loaded, context=None).reasons[0].startswith("prostate_mri: set aside")


def test_while_the_first_is_open_another_that_can_be_read_keeps_it_open(protocol: Any) -> None:
    title = "title: Apparent diffusion coefficient map\n"
    needs_adc, usable = protocol("a", when=PSA_20), protocol("b", **{title: f"{title}    required: false\n"})
    assert ask(needs_adc, protocol("c"), study=WITHOUT_ADC, context=None).state == "unusable"
    decided = ask(needs_adc, usable, study=WITHOUT_ADC, context=None)
    assert (decided.state, decided.protocol) == ("open", "a")
    settled = ask(needs_adc, usable, study=WITHOUT_ADC)
    assert (settled.state, settled.protocol) == ("read", "b")


def test_facts_of_images_are_those_that_no_context_changes() -> None:
    known, whole = facts_of_images(STUDY, NOW), facts_of(STUDY, None, CONTEXT, NOW)
    assert all(known[name] == whole[name] for name in known)
    assert set(whole) - set(known) >= {"labs.psa", "order.status", "context.allergies"}
    nameless = replace(STUDY, patient=replace(STUDY.patient, sex="", birth_date=None))
    assert not {"patient.sex", "patient.age_years"} & set(facts_of_images(nameless, NOW))


def test_a_decision_comes_back_from_json_as_it_was(protocol: Any) -> None:
    adapter = TypeAdapter(Decided)
    decided = ask(protocol(when=PSA_20), protocol("b"), context=None)
    assert adapter.validate_json(adapter.dump_json(decided)) == decided


# `match` in words


WOMAN = replace(STUDY, patient=replace(STUDY.patient, sex="F"))


@pytest.mark.parametrize("study", [STUDY, WOMAN, replace(STUDY, series=())])
def test_verdicts_of_match_agree_with_its_reasons(study: Study) -> None:
    loaded = load_protocol(BUNDLED / "prostate_mri.yaml").protocol
    verdicts = [verdict for _, verdict in judge_match(study, loaded)]
    assert len(verdicts) == len(loaded.match)
    assert tuple(v.reason for v in verdicts if not v.matched) == match_protocol(study, loaded)


def test_conditions_are_told_in_the_words_of_the_file() -> None:
    both = Condition("b_value", at_least=50.0, at_most=90.0, missing="pass")
    either = Condition(any=(Condition("sex", any_of=("M", "O")), Condition("description", matches="(?i)x")))
    assert describe_condition(both) == "b_value at_least 50.0, at_most 90.0, missing pass"
    assert describe_condition(either) == "any: sex any_of [M, O] | description matches (?i)x"


def test_long_and_many_values_are_cut() -> None:
    series = tuple(replace(STUDY.series[0], description=f"{n} " + "x" * 200) for n in range(9))
    condition = Condition("series_description", matches="never")
    bundled = load_protocol(BUNDLED / "prostate_mri.yaml").protocol
    ((_, verdict),) = judge_match(replace(STUDY, series=series), replace(bundled, match=(condition,)))
    shown = verdict.values_looked_at["series_description"]
    assert shown.endswith("… and 3 more")
    assert len(shown) < 520


# Comparing


def test_the_same_decision_differs_in_nothing(protocol: Any) -> None:
    assert compare(ask(protocol(when=PSA_4)), ask(protocol(when='"labs.psa > 4.0"'))) == ()
    assert compare(ask(protocol(when=PSA_20)), ask(protocol(when='"labs.psa > 99.0"'))) == ()
    assert compare(ask(protocol(when=PSA_4), context=None), ask(protocol(when=PSA_4))) == ()


def test_a_difference_names_rule_and_value(protocol: Any) -> None:
    in_, out = ask(protocol(when=PSA_4)), ask(protocol(when=PSA_20))
    (lost,) = compare(in_, out)
    assert lost == "prostate_mri, when, now: too low: `labs.psa >= 20.0` does not hold (labs.psa is 13 ng/mL)"
    then, now = compare(out, in_)
    assert then == "prostate_mri, when, then: too low: `labs.psa >= 20.0` does not hold (labs.psa is 13 ng/mL)"
    assert now == "prostate_mri, when, now: `labs.psa >= 4.0` holds: labs.psa is 13 ng/mL"


def test_another_protocol_is_told_from_both_sides(protocol: Any) -> None:
    a, b, stricter = protocol("a"), protocol("b"), protocol("a", when=PSA_20)
    (why,) = compare(ask(a, b), ask(stricter, b))
    assert why.startswith("a, when, now: too low")
    assert compare(ask(a, b), ask(b)) == ("a is not in use now",)
    assert compare(ask(b), ask(a, b)) == ("a was not tried then",)
    assert compare(ask(a, b), ask(b, a)) == (COMES_FIRST,)


def test_another_series_and_a_series_lost_are_told(protocol: Any) -> None:
    loaded = protocol()
    first = replace(STUDY.series[0], series_instance_uid="1.2.9", series_number=9)
    renamed = replace(STUDY, series=(first, *STUDY.series[1:]))
    assert compare(ask(loaded), ask(loaded, study=renamed)) == ("role t2w: series 4 t2_tse_tra then, 9 t2_tse_tra now",)
    (fault,) = compare(ask(loaded), ask(loaded, study=WITHOUT_ADC))
    assert fault.startswith("prostate_mri, roles, now: no series can be the Apparent")


def test_a_run_without_kept_verdicts_is_told_by_its_reasons(protocol: Any) -> None:
    then = Decided("unmatched", "", ("prostate_mri: it was told so",), (), NOW, True)
    assert compare(then, ask(protocol())) == ("then: prostate_mri: it was told so",)


# Files


def test_a_tried_protocol_takes_the_place_of_its_name_or_of_its_file_name(protocol: Any) -> None:
    a, c = protocol("a"), protocol("c")
    changed = replace(a, digest="other", file="/elsewhere/zzz.yaml")
    assert list(replace_protocol(among(a, c), changed).values()) == [changed, c]
    assert list(replace_protocol(among(a, c), protocol("b"))) == ["a", "b", "c"]


def test_changed_lines_are_named_by_number() -> None:
    assert diff_lines("a\nb\nc\n", "a\nB\nc\nd\n") == ["- line 2: b", "+ line 2: B", "+ line 4: d"]
    assert diff_lines(TEXT, TEXT) == []
    many = diff_lines("", "\n".join(map(str, range(100))))
    assert (len(many), many[-1]) == (MOST_LINES + 1, "and 80 more lines")


def test_when_the_reading_began_decides_which_values_count(protocol: Any) -> None:
    early = decide(STUDY, CONTEXT, among(protocol(when=PSA_4)), NOW - timedelta(days=60))
    assert early.state == "unmatched", "the PSA was not measured yet"

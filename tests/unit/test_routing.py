"""Routing rules: what they say of a study and why, what is refused when loaded, and that none can hold up a worker."""

import random
import threading
import time
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from mappings.inputs.fhir_to_labs import LABS
from mappings.model import codes
from mappings.model.codes import Code
from mappings.model.context import ClinicalContext, ContextPatient, ContextValue
from mappings.model.rules import Rule, RuleError, Verdict
from mappings.model.study import Instance, PatientIdentity, Series, Study
from mappings.reading import study_to_facts
from mappings.reading.routing import compile_rule, evaluate
from mappings.reading.study_to_facts import FACTS, facts_of
from tests.builders import build_context

NOW = datetime(2026, 3, 4, 10, 30, tzinfo=UTC)
EGFR = Code("98979-8", "LN", "eGFR")
TOO_MANY = "cannot be decided: it takes too many steps"
UNIT = "mL/min/{1.73_m2}"


def build_series(number: int, description: str, **changes: object) -> Series:
    instance = Instance(f"1.2.{number}.1", "1.2", "a.dcm", "TEST-001")
    values: dict[str, object] = {
        "series_instance_uid": f"1.2.{number}",
        "modality": "MR",
        "instances": (instance, instance),
        "description": description,
        "body_part": "PROSTATE",
        "manufacturer": "SIEMENS",
        "field_strength_t": 3.0,
    }
    return Series(**{**values, **changes})  # type: ignore[arg-type]


def build_study(**changes: object) -> Study:
    values: dict[str, object] = {
        "study_instance_uid": "1.2.3",
        "patient": PatientIdentity("TEST-001", "HOSP", "Phantom^Peter", date(1961, 5, 6), "M"),
        "series": (build_series(1, "t2_tse_tra"), build_series(2, "ep2d_diff_ADC")),
        "study_date": date(2026, 3, 2),
        "description": "MR Prostate multiparametric",
        "institution": "St Elsewhere",
    }
    return Study(**{**values, **changes})  # type: ignore[arg-type]


FACTS_OF_STUDY = facts_of(build_study(), None, build_context(), NOW)


def ask(expression: str, **changes: object) -> Verdict:
    """The verdict on the built study; `labs__psa=None` changes one fact."""
    facts = {**FACTS_OF_STUDY, **{name.replace("__", "."): value for name, value in changes.items()}}
    return evaluate(compile_rule(expression), facts)  # type: ignore[arg-type]


# --- facts ---------------------------------------------------------------------------------------------------


def test_facts_are_read_from_images_order_and_context() -> None:
    assert FACTS_OF_STUDY == {
        "study.modality": ("MR",),
        "study.body_part": ("PROSTATE",),
        "study.description": "MR Prostate multiparametric",
        "study.series_descriptions": ("t2_tse_tra", "ep2d_diff_ADC"),
        "study.protocol_names": None,
        "study.manufacturer": ("SIEMENS",),
        "study.device_model": None,
        "study.institution": "St Elsewhere",
        "study.field_strength_t": 3.0,
        "study.series_count": 2,
        "study.instance_count": 4,
        "study.age_days": 2,
        "patient.id": "TEST-001",
        "patient.issuer": "HOSP",
        "patient.name": "Phantom^Peter",
        "patient.sex": "M",
        "patient.age_years": 64,
        "order.code": "36389-5",
        "order.title": "MR Prostate",
        "order.reason": "Elevated PSA",
        "order.priority": "routine",
        "order.status": "active",
        "labs.psa": 13.0,
        "labs.psa_age_days": 31,
        "labs.egfr": None,
        "labs.creatinine_mg_dl": None,
        "labs.creatinine_umol_l": None,
        "context.conditions": ("Benign prostatic hyperplasia",),
        "context.allergies": None,
    }


def test_every_fact_is_in_the_documentation_and_the_other_way_round() -> None:
    lines = (study_to_facts.__doc__ or "").splitlines()
    rows = {line.split()[0]: line.split()[1] for line in lines if line.startswith("    ")}
    assert rows == {name: fact.kind for name, fact in FACTS.items()}


def test_nothing_known_leaves_every_fact_unknown() -> None:
    facts = facts_of(None, None, None, NOW)
    assert set(facts) == set(FACTS)
    assert set(facts.values()) == {None}


def test_latest_value_until_now_counts_and_only_in_its_unit() -> None:
    def lab(value: float, day: int, unit: str = UNIT) -> ContextValue:
        return ContextValue(EGFR, value, unit, datetime(2026, 3, day, tzinfo=UTC), f"Observation/{day}")

    context = build_context(labs=(lab(70, 1), lab(28, 3), lab(90, 30), lab(5, 4, "mL/min")))
    assert facts_of(None, None, context, NOW)["labs.egfr"] == 28


def test_laboratory_codes_are_those_that_the_ehr_mapping_reads() -> None:
    for code, lab in LABS.items():
        value = ContextValue(lab.code, 1.5, lab.unit, NOW, "Observation/1")
        facts = facts_of(None, None, ClinicalContext("ehr", labs=(value,)), NOW)
        assert 1.5 in facts.values(), code


@pytest.mark.parametrize(
    ("birth", "stated", "years"),
    [
        (date(1961, 3, 2), "", 65),
        (date(1961, 3, 3), "", 64),
        (date(2030, 1, 1), "", None),
        (None, "065Y", 65),
        (None, "011M", 0),
        (None, "024M", 2),
        (None, "65", None),
        (None, "", None),
    ],
)
def test_age_is_in_full_years_on_the_study_date(birth: date | None, stated: str, years: int | None) -> None:
    study = build_study(patient=PatientIdentity("1", birth_date=birth), patient_age=stated)
    assert facts_of(study, None, None, NOW)["patient.age_years"] == years


def test_ehr_fills_what_the_images_do_not_state() -> None:
    record = ContextPatient("Patient/1", (), birth_date=date(1960, 1, 1), gender="male")
    study = build_study(patient=PatientIdentity("1"))
    facts = facts_of(study, None, ClinicalContext("ehr", record), NOW)
    assert (facts["patient.sex"], facts["patient.age_years"]) == ("M", 66)


def test_the_order_of_the_work_goes_before_the_order_of_the_context() -> None:
    context = build_context()
    assert context.order is not None
    order = replace(context.order, reason="Rising PSA", code=None)
    facts = facts_of(None, order, context, NOW)
    assert (facts["order.reason"], facts["order.code"]) == ("Rising PSA", None)


def test_texts_and_lists_are_cut_and_cleaned() -> None:
    series = tuple(build_series(n, f"{n} " + "x" * 500) for n in range(300))
    facts = facts_of(build_study(series=series, description="y" * 5000, institution="a\udcffb"), None, None, NOW)
    listed = facts["study.series_descriptions"]
    assert isinstance(listed, tuple)
    assert (len(listed), max(map(len, listed)), facts["study.description"]) == (200, 256, "y" * 1000)
    assert facts["study.institution"] == "a?b"


# --- verdicts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "matched"),
    [
        ('"MR" in study.modality && patient.age_years >= 40', True),
        ('"CT" in study.modality', False),
        ('study.description.matches("(?i)prosta") || "PROSTATE" in study.body_part', True),
        ('study.series_descriptions.exists(d, d.matches("(?i)adc"))', True),
        ('study.series_descriptions.all(d, d.contains("tra"))', False),
        ('study.series_descriptions.exists_one(d, d.endsWith("ADC"))', True),
        ("size(study.series_descriptions) == 2 && study.series_descriptions.size() < 3", True),
        ("labs.psa >= 10.0 ? patient.age_years < 80 : false", True),
        ("labs.psa / double(patient.age_years) > 0.3", False),
        ('order.priority in ["stat", "urgent"]', False),
        ('order.reason.startsWith("Elevated") && order.code == "36389-5"', True),
        ('patient.id.startsWith("TEST-") // a comment\n && patient.name.contains("^")', True),
        (r'study.description.matches(r"^MR\s+\w+")', True),
        ("true", True),
    ],
)
def test_rules_hold_or_not(expression: str, matched: bool) -> None:
    verdict = ask(expression)
    assert (verdict.matched, verdict.decided) == (matched, True)


@pytest.mark.parametrize(
    ("expression", "matched", "decided"),
    [
        ("labs.egfr >= 30.0", False, False),
        ("!(labs.egfr >= 30.0)", False, False),
        ("labs.egfr != 30.0", False, False),
        ("labs.egfr >= 30.0 || patient.age_years > 40", True, True),
        ("labs.egfr >= 30.0 && patient.age_years > 80", False, True),
        ("!labs.egfr.stated || labs.egfr >= 30.0", True, True),
        ("labs.egfr.stated && labs.egfr >= 30.0", False, True),
        ("labs.psa.stated", True, True),
        ('context.allergies.exists(a, a.matches("gadolin"))', False, False),
        ('!("KNEE" in study.body_part)', True, True),
    ],
)
def test_unknown_facts_are_neither_true_nor_false(expression: str, matched: bool, decided: bool) -> None:
    verdict = ask(expression)
    assert (verdict.matched, verdict.decided) == (matched, decided)
    assert verdict.not_stated == (() if decided else tuple(FACTS.keys() & set(compile_rule(expression).names)))


def test_verdict_names_the_clause_that_failed_and_its_values_only() -> None:
    rule = compile_rule('"MR" in study.modality && labs.psa >= 20.0 && patient.age_years >= 40')
    verdict = evaluate(rule, FACTS_OF_STUDY)
    assert verdict.reason == "`labs.psa >= 20.0` does not hold (labs.psa is 13 ng/mL)"
    assert verdict.values_looked_at == {
        "study.modality": "MR",
        "labs.psa": "13 ng/mL",
        "patient.age_years": "64",
    }


def test_verdict_says_what_held_and_what_was_not_stated() -> None:
    assert ask("labs.psa > 3.0 && patient.age_years > 40").reason == (
        "holds: labs.psa is 13 ng/mL; patient.age_years is 64"
    )
    verdict = ask("labs.egfr > 30.0 && patient.age_years > 40")
    assert verdict.reason == "`labs.egfr > 30.0` cannot be decided: labs.egfr not stated"
    assert verdict.not_stated == ("labs.egfr",)
    assert ask("patient.age_years / (study.series_count - 2) > 1").reason.endswith("cannot be decided: divide by zero")


def test_clauses_are_not_split_inside_alternatives_or_texts() -> None:
    either = "labs.psa > 99.0 || patient.age_years > 99 && patient.age_years > 98"
    assert ask(either).reason == f"`{either}` does not hold (labs.psa is 13 ng/mL; patient.age_years is 64)"
    assert len(compile_rule('order.reason == "a && b" && (labs.psa > 1.0 && labs.psa < 2.0)').clauses) == 2


def test_what_identifies_the_patient_is_looked_at_and_not_shown() -> None:
    verdict = ask('patient.id == "TEST-002" && patient.name.contains("Paul")')
    shown = f"{verdict.values_looked_at}"
    assert not verdict.matched
    assert "TEST-001" not in shown + verdict.reason.replace("`", "")
    assert "Phantom" not in shown
    assert set(verdict.values_looked_at.values()) == {"stated, not shown"}


def test_long_values_are_shortened() -> None:
    verdict = ask('"q" in study.body_part', study__body_part=tuple("abcdefgh"))
    assert verdict.values_looked_at["study.body_part"] == "a, b, c, d, e, f and 2 more"
    assert (
        len(ask('study.description == "q"', study__description="y" * 900).values_looked_at["study.description"]) == 80
    )


# --- refused when loaded -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "line", "column", "message"),
    [
        ("labs.pza > 3.0", 1, 1, "there is no fact 'labs.pza'; did you mean labs.psa"),
        ('"MR" in study.modality &&\n  patient.aeg_years > 4', 2, 3, "did you mean patient.age_years"),
        ("labs > 3.0", 1, 1, "there is no fact 'labs'; did you mean labs.psa or"),
        ("labs.psa.value > 3.0", 1, 1, "there is no fact 'labs.psa.value'"),
        ("labs.psa == 1.0 && pateint.sex == 'M'", 1, 27, "there is no 'pateint.sex' here; did you mean patient.sex"),
        ("labs.psa > 4", 1, 10, "write the number with a fraction, like 4.0"),
        ("patient.age_years > 4.0", 1, 19, "write the number without a fraction, like 4"),
        ("labs.psa = 4.0", 1, 10, "write == to compare"),
        ("labs.psa != null", 1, 10, "write NAME.stated to ask"),
        ("has(labs.psa)", 1, 4, "there is no 'has' here; write NAME.stated"),
        ("matches(study.description, 'a')", 1, 8, 'write TEXT.matches("pattern")'),
        ("study.description == ", 1, 22, "mismatched input '<EOF>'"),
        ("'abc", 1, 1, "token recognition error"),
        ("study.description", 1, 1, "the rule gives a string; it must give true or false"),
        ("study.modality.exists(m, m > 3)", 1, 28, "found no matching overload for '_>_'"),
        ("study.description.matches('(a')", 1, 27, "not an RE2 pattern: missing )"),
        ("study.description.matches('(?=a)')", 1, 27, "not an RE2 pattern: invalid perl operator"),
        ("study.description.matches('((x{1,9}){1,9}){1,9}z')", 1, 27, "the pattern compiles to 1642 steps; 500 are"),
        ("study.description.matches('\\\\q')", 1, 27, "not an RE2 pattern: invalid escape"),
        ("study.description.matches('\\q')", 1, 27, "error"),
        ("study.description.matches('\\bpros')", 1, 27, 'write the pattern as r"..."'),
        ("study.description.matches(order.reason)", 1, 27, "matches takes one pattern, written out"),
        ("study.modality.exists(m, study.modality.exists(n, n == m))", 1, 41, "may not stand inside another one"),
        ("{'a': 1} == {'a': 1}", 1, 1, "'{' is not used"),
        ("'a' + 'b' == 'ab'", 1, 5, "found no matching overload for '_+_'"),
        ("study.modality.map(m, m) == study.modality", 1, 20, "there is no 'm' here"),
        ("dyn(1) == 'a'", 1, 4, "there is no 'dyn' here"),
        (".labs.psa > 1.0", 1, 1, "a name does not begin with a dot"),
        ("true && .labs.psa > 1.0", 1, 9, "a name does not begin with a dot"),
        ('order.code == """a"""', 1, 15, "use single or double quotes once"),
        ("", 1, 1, "mismatched input '<EOF>'"),
    ],
)
def test_wrong_rules_are_refused_with_line_and_column(expression: str, line: int, column: int, message: str) -> None:
    with pytest.raises(RuleError) as caught:
        compile_rule(expression)
    assert message in caught.value.message
    assert (caught.value.line, caught.value.column) == (line, column)
    assert str(caught.value).startswith(f"line {line}, column {column}: ")


@pytest.mark.parametrize(
    "expression",
    [
        "true && " * 300 + "true",
        "1 + " * 400 + "1 == 1",
        "(" * 900 + "true" + ")" * 900,
        "[" * 900 + "]" * 900 + " == []",
        "-(" * 600 + "1" + ")" * 600 + " == 1",
        "true ? (" * 150 + "true" + ") : false" * 150,
        "study.description.matches('" + r"(?i)\\pL" * 60 + "')",
        r"study.description.matches(r'(?i)(\pL{1,100}x?){3,9}(a|b|c)*[^d]{1,200}z')",
        "study.description.matches('((((x{1,9}){1,9}){1,9}))z')",
        " && ".join(f"study.modality.exists(m, m == '{n}')" for n in range(9)),
        " && ".join(f"study.description.matches('{n}')" for n in range(9)),
        "study.modality" + ".exists(m, study.modality" * 20 + ".size() == 1" + ")" * 20,
        "'" + "\\" * 1500,
        "r'" + '"' * 1500,
        "a" * 1999,
        "a." * 900 + "b",
        "\x00" * 100,
        "\ud800 == 1",
    ],
)
def test_hostile_rules_end_at_once(expression: str) -> None:
    """Refused when loaded, or decided: in either case within a second."""
    started = time.perf_counter()
    try:
        rule: Rule | None = compile_rule(expression)
    except RuleError:
        rule = None
    if rule is not None:
        evaluate(rule, FACTS_OF_STUDY)
    assert time.perf_counter() - started < 1


def test_too_long_a_rule_is_refused() -> None:
    with pytest.raises(RuleError, match="5006 characters long; 2000 are allowed"):
        compile_rule("1+" * 2500 + "1 == 1")


def slowest(patterns: int, size: int) -> str:
    """List tests with patterns that outgrow RE2's automaton cache, on a text that is none of the list's."""
    tests = (f"study.description.matches('[xy]*x[xy]{{{size}}}{n}')" for n in range(patterns))
    return " || ".join(f"study.series_descriptions.exists(d, d == d && {test})" for test in tests)


def slowest_facts(characters: int, texts: int) -> dict[str, object]:
    text = "".join(random.Random(1).choice("xy") for _ in range(characters))
    return {"study__series_descriptions": tuple(f"{n:03d}" for n in range(texts)), "study__description": text}


def test_what_could_take_too_long_is_not_begun() -> None:
    """All that the bounds of text allow: 14 s of searching."""
    started = time.perf_counter()
    verdict = ask(slowest(8, 450), **slowest_facts(1000, 200))
    assert time.perf_counter() - started < 1
    assert (verdict.matched, verdict.decided, verdict.reason) == (False, False, TOO_MANY)


def test_the_most_that_may_be_done_ends_soon() -> None:
    """Just under the bound: 460 steps, 41 rounds, 1,020 characters."""
    started = time.perf_counter()
    assert ask(slowest(1, 450), **slowest_facts(1000, 41)).decided
    assert time.perf_counter() - started < 4
    assert not ask(slowest(1, 450), **slowest_facts(1000, 44)).decided


def test_an_ordinary_rule_is_decided_on_the_largest_study() -> None:
    terms = "phantom|quality|daily qa|acceptance|service test|calibration"
    rule = f'study.series_descriptions.exists(d, d.matches("(?i)({terms})"))'
    assert ask(rule, study__series_descriptions=tuple(f"{n:03d}" + "x" * 253 for n in range(200))).decided


def test_rules_are_evaluated_by_several_threads_at_once() -> None:
    rule = compile_rule('study.description.matches("(?i)prosta") && labs.psa > 10.0')
    wrong: list[float] = []

    def work(psa: float) -> None:
        for _ in range(200):
            if evaluate(rule, {**FACTS_OF_STUDY, "labs.psa": psa}).matched is not (psa > 10):
                wrong.append(psa)

    threads = [threading.Thread(target=work, args=(8.0 + n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_examples_in_the_documentation_load() -> None:
    from mappings.reading import routing

    examples = [line.strip() for line in (routing.__doc__ or "").splitlines() if line.startswith("    ")]
    assert len(examples) == 5
    for example in examples:
        evaluate(compile_rule(example), FACTS_OF_STUDY)


def test_no_rule_module_evaluates_python() -> None:
    source = Path(str(study_to_facts.__file__)).with_name("routing.py").read_text(encoding="utf-8")
    assert not any(word in source for word in (" eval(", " exec(", "__import__", "ast.literal_eval"))


def test_a_day_old_psa_has_an_age_of_one_day() -> None:
    lab = ContextValue(codes.PSA, 4.2, "ng/mL", NOW - timedelta(days=1, hours=3), "Observation/1")
    assert facts_of(None, None, build_context(labs=(lab,)), NOW)["labs.psa_age_days"] == 1

"""Which prior is compared, what is said of the others, and that all of it survives the store."""

from dataclasses import replace
from datetime import date

import pytest
from pydantic import TypeAdapter

from mappings.model.changes import PriorStudy
from mappings.model.findings import Findings
from mappings.reading.priors_to_findings import with_comparison
from tests.builders import build_findings
from tests.comparisons import COMPARED, build_prior, prior_study


def earlier(day: date | None, uid: str, **changes: object) -> tuple[PriorStudy, Findings]:
    current = build_findings()
    findings = build_prior(current, *current.lesions, study_date=day, study_instance_uid=uid, **changes)
    return prior_study(findings), findings


def outcomes(findings: Findings) -> list[tuple[str, str]]:
    return [(prior.study_instance_uid, prior.outcome) for prior in findings.priors]


def compared_with(findings: Findings) -> str | None:
    return findings.comparison.prior_study_instance_uid if findings.comparison else None


def test_the_newest_is_compared_whatever_the_order() -> None:
    priors = [earlier(date(2023, 1, 1), "1.3"), earlier(date(2025, 1, 1), "1.5"), earlier(date(2024, 1, 1), "1.4")]
    for order in (priors, priors[::-1]):
        found = with_comparison(build_findings(), order)
        assert compared_with(found) == "1.5"
        older = "older than the study that was compared"
        assert outcomes(found) == [("1.5", "compared"), ("1.4", older), ("1.3", older)]


def test_what_may_not_be_compared_is_passed_over_and_says_why() -> None:
    other = replace(build_findings().patient, sex="F")
    priors = [earlier(date(2025, 1, 1), "1.5", patient=other), earlier(date(2024, 1, 1), "1.4")]
    found = with_comparison(build_findings(), priors)
    assert compared_with(found) == "1.4"
    assert outcomes(found) == [("1.5", "the studies have different sexes"), ("1.4", "compared")]


def test_equal_dates_are_told_apart_by_uid_and_undated_ones_come_last() -> None:
    priors = [earlier(None, "1.1"), earlier(date(2025, 1, 1), "1.6"), earlier(date(2025, 1, 1), "1.5")]
    for order in (priors, priors[::-1]):
        found = with_comparison(build_findings(), order)
        assert [uid for uid, _ in outcomes(found)] == ["1.5", "1.6", "1.1"]
        assert compared_with(found) == "1.5"


def test_a_study_without_findings_says_so_or_keeps_its_reason() -> None:
    study, _ = earlier(date(2025, 1, 1), "1.5")
    known = replace(study, study_instance_uid="1.6", outcome="its reading was rejected")
    found = with_comparison(build_findings(), [(study, None), (known, None)])
    assert found.comparison is None
    assert outcomes(found) == [("1.5", "no findings of it are known here"), ("1.6", "its reading was rejected")]


def test_a_search_without_result_is_not_the_same_as_none() -> None:
    found = with_comparison(build_findings(), ())
    assert (found.comparison, found.priors, found.priors_searched) == (None, (), True)
    assert not build_findings().priors_searched


@pytest.mark.parametrize("name", COMPARED)
def test_it_comes_back_out_of_json(name: str) -> None:
    adapter, findings = TypeAdapter(Findings), COMPARED[name]()
    assert adapter.validate_json(adapter.dump_json(findings)) == findings


def test_findings_of_before_there_were_priors_are_still_read() -> None:
    adapter = TypeAdapter(Findings)
    old = adapter.dump_python(build_findings(), mode="json")
    for name in ("comparison", "priors", "priors_searched"):
        del old[name]
    assert adapter.validate_python(old) == build_findings()

"""What the section "Comparison" of the HTML draft must say beside its marked numbers."""

from collections.abc import Sequence

from mappings.model.changes import Change
from mappings.model.findings import Finding, Findings
from mappings.outputs.read_changes import (
    gone_sentences,
    impression_lines,
    match_words,
    numbers_of,
    prior_sentences,
    row_of,
)
from mappings.outputs.read_facts import Facts, prose

WHERE = "comparison"
HEAD, SAID, LISTED, COLUMNS = "heading of the comparison", "said of the comparison", "listed", "columns"


def expect_comparison(facts: Facts, findings: Findings) -> None:
    """Headings, sentences, tables and numbers of the section, and the impression's lines about changes."""
    done = findings.comparison
    wanted = done is not None or findings.priors_searched or bool(findings.priors)
    facts.add(WHERE, "section", "yes" if wanted else "no")
    for line in impression_lines(findings):
        facts.add(WHERE, "impression", prose(line))
    for sentence, _ in gone_sentences(findings):
        facts.add(WHERE, LISTED, prose(sentence))
    for line in prior_sentences(findings):
        facts.add(WHERE, LISTED, prose(f"Not compared: {line}"))
    if done is None and wanted:
        none = "No prior study could be compared." if findings.priors else "No prior study was found."
        facts.add(WHERE, SAID, prose(none))
    if done is not None:
        day = f"Prior study of {done.prior_study_date}, {done.interval_days} days before"
        for said in (f"{day} {done.prior_study_instance_uid}", *done.notes):
            facts.add(WHERE, SAID, prose(said))
        if findings.gland is not None and done.gland:
            _expect_changes(facts, findings, findings.gland, done.gland)
        _expect_lesions(facts, findings)


def _expect_lesions(facts: Facts, findings: Findings) -> None:
    for lesion in findings.lesions:
        row, where = row_of(findings, lesion), lesion.tracking_id
        if row is None:
            continue
        _expect_changes(facts, findings, lesion, row.changes)
        facts.add(where, SAID, prose(f"In the prior: {match_words(row)}"))
        if row.doubling_time is not None:
            days = f"{row.doubling_time.text} {row.doubling_time.unit.value}"
            facts.add(where, SAID, prose(f"Volume doubling time: {days}"))
        for note in row.notes:
            facts.add(where, SAID, prose(note))


def _expect_changes(facts: Facts, findings: Findings, finding: Finding, changes: Sequence[Change]) -> None:
    """The table of one finding: its head, its rows' labels and columns, each number."""
    where, done = finding.tracking_id, findings.comparison
    facts.add(where, HEAD, prose(finding.title))
    for number in numbers_of(findings, finding):
        if number.key != "prior_distance":
            facts.add(where, number.key, f"{number.signed} {number.unit.value}")
    if changes and done is not None:
        head = f"Measurement {done.prior_study_date} Now Difference Percent Per year Growth rate"
        facts.add(where, "head of the table of changes", prose(head))
    for change in changes:
        parts = [m.key for m in (change.difference, change.percent, change.per_year, change.percent_per_year) if m]
        facts.add(where, f"{change.key}: {COLUMNS}", " ".join([f"{change.key}_prior", change.key, *parts]))
        facts.add(where, f"{change.key}: label of the change", prose(change.label))

"""Reads the section "Comparison" of the text draft back: headings, rows with marks, and sentences."""

import re
from collections.abc import Iterator, Sequence

from mappings.model.changes import Change
from mappings.model.findings import Findings
from mappings.outputs.read_changes import (
    gone_sentences,
    impression_lines,
    match_words,
    prior_sentences,
    row_of,
)
from mappings.outputs.read_facts import Facts, prose

WHERE = "comparison"
_MARK = re.compile(r"\s*\[([^\[\]]+)\]$")


def read_comparison(facts: Facts, lines: Sequence[str] | None) -> None:
    """Every heading, row and sentence of the section; None where the draft has none."""
    facts.add(WHERE, "section", "no" if lines is None else "yes")
    where = WHERE
    for entry in _join(lines or ()):
        mark = _MARK.search(entry)
        if not entry.startswith(" "):
            where = mark[1] if mark else entry
            facts.add(where, "heading of the comparison", prose(entry[: mark.start()] if mark else entry))
        elif entry.startswith("  - "):
            facts.add(WHERE, "listed", prose(entry.strip().removeprefix("- ")))
        elif mark:
            owner, _, key = mark[1].partition("/")
            facts.add(owner, key, prose(entry[: mark.start()]))
        else:
            facts.add(where, "said of the comparison", prose(entry))


def _join(lines: Sequence[str]) -> Iterator[str]:
    """Entries with their continuations: a line indented by more than two is one."""
    entry = ""
    for line in (line for line in lines if line.strip()):
        if line.startswith("   ") and entry:
            entry += " " + line.strip()
        else:
            if entry:
                yield entry
            entry = line
    if entry:
        yield entry


def expect_comparison(facts: Facts, findings: Findings) -> None:
    """What the section must say."""
    done = findings.comparison
    wanted = done is not None or findings.priors_searched or bool(findings.priors)
    facts.add(WHERE, "section", "yes" if wanted else "no")
    for sentence, _ in gone_sentences(findings):
        facts.add(WHERE, "listed", prose(sentence))
    for line in prior_sentences(findings):
        facts.add(WHERE, "listed", prose(f"Not compared: {line}"))
    if done is None and wanted:
        none = "No prior study could be compared." if findings.priors else "No prior study was found."
        facts.add(WHERE, "said of the comparison", prose(none))
    if done is not None:
        facts.add("prior", "study", prose(f"Prior study: {done.prior_study_date}, {done.interval_days} days before"))
        for said in (f"Study {done.prior_study_instance_uid}", *done.notes):
            facts.add(WHERE, "said of the comparison", prose(said))
        _expect_gland(facts, findings, done.gland)
        _expect_lesions(facts, findings)


def _expect_gland(facts: Facts, findings: Findings, changes: Sequence[Change]) -> None:
    gland = findings.gland
    if gland is not None and changes:
        facts.add(gland.tracking_id, "heading of the comparison", prose(gland.title))
        for change in changes:
            facts.add(gland.tracking_id, f"{change.key}/change", prose(_change_words(change)))


def _expect_lesions(facts: Facts, findings: Findings) -> None:
    for lesion in findings.lesions:
        row, where = row_of(findings, lesion), lesion.tracking_id
        if row is None:
            continue
        facts.add(where, "heading of the comparison", prose(lesion.title))
        facts.add(where, "change", prose(f"In the prior: {match_words(row)}"))
        for change in row.changes:
            facts.add(where, f"{change.key}/change", prose(_change_words(change)))
        if row.doubling_time is not None:
            said = f"Volume doubling time: {row.doubling_time.text} {row.doubling_time.unit.value}"
            facts.add(where, "doubling_time", prose(said))
        for note in row.notes:
            facts.add(where, "said of the comparison", prose(note))


def _change_words(change: Change) -> str:
    def say(part: str, sign: bool = True) -> str:
        m = getattr(change, part)
        return f"{'+' if sign and m.value > 0 else ''}{m.text} {m.unit.value}" if m else ""

    percent = f" ({say('percent')})" if change.percent else ""
    compound = f" ({say('percent_per_year')})" if change.percent_per_year else ""
    rate = f", per year {say('per_year')}{compound}" if change.per_year else ""
    before, now = say("prior", False), say("current", False)
    return f"{change.label}: before {before}, now {now}, difference {say('difference')}{percent}{rate}"


def read_impression_items(facts: Facts, items: Sequence[str]) -> None:
    """The lines of the impression that tell of changes."""
    for item in items:
        facts.add(WHERE, "impression", prose(item.strip().removeprefix("- ")))


def expect_impression_items(facts: Facts, findings: Findings) -> None:
    """The same, as they must be."""
    for line in impression_lines(findings):
        facts.add(WHERE, "impression", prose(line))

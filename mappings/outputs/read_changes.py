"""What a comparison with a prior must say in any rendering, worked out anew from the findings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date

from mappings.model.changes import DAYS, PRIOR_VALUE, Change, LesionChange
from mappings.model.codes import MM, Code
from mappings.model.findings import Finding, Findings
from mappings.model.measurement import Measurement

OWN = "99WETREAD"
STATUS = Code("change_status", OWN, "Status since the prior study")
STATUSES = {
    "matched": Code("matched", OWN, "Matched with a lesion of the prior study"),
    "new": Code("new", OWN, "Not in the prior study"),
    "ambiguous": Code("ambiguous", OWN, "More than one match with the prior study"),
}
PRIOR_LESION = Code("prior_tracking_uid", OWN, "Tracking UID in the prior study")
CANDIDATE = Code("prior_candidate", OWN, "Tracking UID of a candidate")
PRIOR_STUDY = Code("prior_study_uid", OWN, "Study Instance UID of the prior")
PRIOR_DATE = Code("prior_study_date", OWN, "Date of the prior study")
NOT_ONE_DIGIT = 1.001
"""Growth counts from more than one unit of the last digit; the excess is for rounding."""


@dataclass(frozen=True)
class Number:
    """One number: its key and label, its digits without and with a sign, its unit, what it is of its quantity, and the
    day that it holds for where that is not the study's."""

    key: str
    label: str
    text: str
    signed: str
    unit: Code
    how: Code | None = None
    day: date | None = None

    @property
    def concept(self) -> Code:
        """The code under which it is sent."""
        return Code(self.key, OWN, self.label)


def _signed(m: Measurement) -> str:
    return ("+" if m.value > 0 else "") + m.text


def _numbers(changes: Sequence[Change], day: date) -> Iterator[Number]:
    for c in changes:
        before = c.prior
        yield Number(f"{c.key}_prior", f"{c.label}, prior", before.text, before.text, before.unit, PRIOR_VALUE, day)
        parts = (c.difference, c.percent, c.per_year, c.percent_per_year)
        for part in (p for p in parts if p is not None):
            yield Number(part.key, part.label, part.text, _signed(part), part.unit, part.derivation)


def numbers_of(findings: Findings, finding: Finding) -> list[Number]:
    """Every number of the comparison that a rendering states with this finding."""
    comparison, row = findings.comparison, row_of(findings, finding)
    if comparison is None:
        return []
    if finding == findings.gland:
        return list(_numbers(comparison.gland, comparison.prior_study_date))
    if row is None:
        return []
    found = list(_numbers(row.changes, comparison.prior_study_date))
    if row.doubling_time is not None:
        days = row.doubling_time.text
        found.append(Number("doubling_time", "Volume doubling time", days, days, row.doubling_time.unit))
    if row.distance_mm is not None:
        apart = f"{row.distance_mm:.1f}"
        found.append(Number("prior_distance", "Distance from its place in the prior", apart, apart, MM))
    return found


def interval_of(findings: Findings) -> list[Number]:
    """The days between the studies; none without a comparison."""
    if findings.comparison is None:
        return []
    days = str(findings.comparison.interval_days)
    return [Number("prior_interval", "Interval since the prior study", days, days, DAYS)]


def row_of(findings: Findings, finding: Finding) -> LesionChange | None:
    """What became of a lesion, by its tracking UID."""
    rows = findings.comparison.lesions if findings.comparison else ()
    return next((row for row in rows if row.current and row.current.tracking_uid == finding.tracking_uid), None)


def links_of(row: LesionChange) -> list[tuple[Code, str]]:
    """The tracking UIDs in the prior that a lesion may go by."""
    links = [(PRIOR_LESION, row.prior.tracking_uid)] if row.prior else []
    return links + [(CANDIDATE, candidate.tracking_uid) for candidate in row.candidates]


def match_words(row: LesionChange) -> str:
    """What a draft says a lesion was in the prior."""
    if row.prior is not None:
        apart = "" if row.distance_mm is None else f", {row.distance_mm:.1f} mm from its place there"
        return row.prior.title + apart
    return "not decided: " + " or ".join(c.title for c in row.candidates) if row.candidates else "none, it is new"


def gone_sentences(findings: Findings) -> list[tuple[str, str]]:
    """A sentence for each lesion that only the prior has, with its tracking UID."""
    comparison = findings.comparison
    lost = [r.prior for r in comparison.lesions if r.current is None and r.prior is not None] if comparison else []
    return [(f"{one.title} of {one.study_date} has no counterpart in this study.", one.tracking_uid) for one in lost]


def prior_sentences(findings: Findings) -> list[str]:
    """A line for each prior that was not compared."""
    lines = []
    for prior in findings.priors:
        if prior.outcome == "compared":
            continue
        accession = f", accession number {prior.accession_number}" if prior.accession_number else ""
        name = f"{prior.study_date or 'no date'}, {prior.description or 'no description'}{accession}"
        lines.append(f"{name}, found in {prior.found_in}: {prior.outcome or 'not compared'}.")
    return lines


def comparison_comments(findings: Findings) -> list[str]:
    """The notes on the whole comparison, what was not compared, and that there is no prior where one was looked for."""
    notes = list(findings.comparison.notes) if findings.comparison else []
    others = [f"Prior study not compared: {line}" for line in prior_sentences(findings)]
    return notes + others + (["No prior study was found."] if findings.priors_searched and not findings.priors else [])


def comparison_sentence(findings: Findings) -> list[str]:
    """Which study it is compared with; none without a comparison."""
    done = findings.comparison
    if done is None:
        return []
    return [f"Compared with the study of {done.prior_study_date}, {done.interval_days} days before."]


def impression_lines(findings: Findings) -> list[str]:
    """What the impression must say of changes, in any order."""
    done = findings.comparison
    if done is None:
        return []
    words = []
    for lesion in findings.lesions:
        row = row_of(findings, lesion)
        if row is not None and row.prior is not None:
            words += _growth_words(lesion.title, row)
        elif row is not None:
            words.append(f"{lesion.title} {'could not be matched with certainty' if row.candidates else 'is new'}")
    words += [f"{r.prior.title} of that study was not found again" for r in done.lesions if not r.current and r.prior]
    return [f"Since {done.prior_study_date}: {word}." for word in words]


def _growth_words(title: str, row: LesionChange) -> list[str]:
    volumes = [c for c in row.changes if c.key == "volume"]
    for volume in volumes:
        before, now = float(volume.prior.text), float(volume.current.text)
        if now - before > NOT_ONE_DIGIT * 10.0**-volume.current.decimals:
            percent = f" ({_signed(volume.percent)}%)" if volume.percent else ""
            doubling = row.doubling_time
            rate = f", doubling time {doubling.text} {doubling.unit.value}" if doubling else ""
            unit = volume.current.unit.value
            return [f"{title} grew from {volume.prior.text} to {volume.current.text} {unit}{percent}{rate}"]
    return []

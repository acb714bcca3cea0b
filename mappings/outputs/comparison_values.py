"""What a comparison with a prior study says, in the numbers and words that its renderings share."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mappings.model.changes import DAYS, PRIOR_VALUE, Change, Comparison, LesionChange, PriorStudy
from mappings.model.codes import MM, Code
from mappings.model.findings import Finding, Findings
from mappings.model.measurement import Measurement

OWN = "99WETREAD"
STATUS = Code("change_status", OWN, "Status since the prior study")
PRIOR_LESION = Code("prior_tracking_uid", OWN, "Tracking UID in the prior study")
PRIOR_CANDIDATE = Code("prior_candidate", OWN, "Tracking UID of a candidate")
PRIOR_STUDY = Code("prior_study_uid", OWN, "Study Instance UID of the prior")
PRIOR_DATE = Code("prior_study_date", OWN, "Date of the prior study")
INTERVAL = Code("prior_interval", OWN, "Interval since the prior study")
DISTANCE = Code("prior_distance", OWN, "Distance from its place in the prior")
DOUBLING_KEY = "doubling_time"
COMPARED = "compared"


def _own(measurement: Measurement, key: str, label: str) -> Measurement:
    """The measurement under Wetread's own code. A change never carries the code of its quantity: a reader that looks
    for the volume would take the difference, or the prior's volume, for the volume."""
    return replace(measurement, key=key, label=label, concept=Code(key, OWN, label))


def change_numbers(change: Change) -> Iterator[Measurement]:
    """The prior's value, the difference, and the percentage and rates that there are."""
    before = replace(change.prior, method=None, derivation=PRIOR_VALUE)
    yield _own(before, f"{change.key}_prior", f"{change.label}, prior")
    for m in (change.difference, change.percent, change.per_year, change.percent_per_year):
        if m is not None:
            yield _own(m, m.key, m.label)


def lesion_numbers(row: LesionChange) -> Iterator[Measurement]:
    """Every number of a lesion's change."""
    for change in row.changes:
        yield from change_numbers(change)
    if row.doubling_time is not None:
        yield _own(row.doubling_time, DOUBLING_KEY, row.doubling_time.label)
    if row.distance_mm is not None:
        yield Measurement(DISTANCE.value, DISTANCE.meaning, DISTANCE, row.distance_mm, MM, 1)


def interval(comparison: Comparison) -> Measurement:
    """The days between the two studies."""
    return Measurement(INTERVAL.value, INTERVAL.meaning, INTERVAL, float(comparison.interval_days), DAYS, 0)


def finding_numbers(findings: Findings, finding: Finding) -> list[Measurement]:
    """Every number of the comparison that belongs to one finding; none without a comparison."""
    comparison = findings.comparison
    if comparison is None:
        return []
    if finding == findings.gland:
        return [number for change in comparison.gland for number in change_numbers(change)]
    row = comparison.lesion(finding.tracking_id)
    return list(lesion_numbers(row)) if row else []


def lesion_references(row: LesionChange) -> list[tuple[Code, str]]:
    """The prior's lesion, or the candidates, by tracking UID."""
    candidates = [(PRIOR_CANDIDATE, candidate.tracking_uid) for candidate in row.candidates]
    return [(PRIOR_LESION, row.prior.tracking_uid), *candidates] if row.prior else candidates


def signed(measurement: Measurement) -> str:
    """The number with its sign: +0.69, -0.10, 0.00."""
    return f"+{measurement.text}" if measurement.value > 0 else measurement.text


def describe_comparison(comparison: Comparison) -> str:
    """Which study it is compared with."""
    return f"Compared with the study of {comparison.prior_study_date}, {comparison.interval_days} days before."


def describe_match(row: LesionChange) -> str:
    """Which lesion of the prior it is, in words."""
    if row.status == "matched" and row.prior:
        apart = f", {row.distance_mm:.1f} mm from its place there" if row.distance_mm is not None else ""
        return f"{row.prior.title}{apart}"
    if row.status == "ambiguous":
        return f"not decided: {' or '.join(candidate.title for candidate in row.candidates)}"
    return "none, it is new"


def describe_gone(comparison: Comparison) -> list[str]:
    """One sentence for each lesion that only the prior has."""
    day = comparison.prior_study_date
    return [f"{lesion.title} of {day} has no counterpart in this study." for lesion in comparison.gone]


def describe_prior(prior: PriorStudy) -> str:
    """One prior study in one line, with what became of it."""
    day = prior.study_date.isoformat() if prior.study_date else "no date"
    name = prior.description or "no description"
    accession = f", accession number {prior.accession_number}" if prior.accession_number else ""
    return f"{day}, {name}{accession}, found in {prior.found_in}: {prior.outcome or 'not compared'}."


def other_priors(findings: Findings) -> list[str]:
    """The priors that were not compared, one line each."""
    return [describe_prior(prior) for prior in findings.priors if prior.outcome != COMPARED]


def comparison_comments(findings: Findings) -> list[str]:
    """What holds for the comparison as a whole, one sentence each: notes, and priors that were not compared."""
    notes = findings.comparison.notes if findings.comparison else ()
    missing = findings.priors_searched and not findings.priors
    return [
        *notes,
        *(f"Prior study not compared: {line}" for line in other_priors(findings)),
        *(["No prior study was found."] if missing else []),
    ]


def has_comparison(findings: Findings) -> bool:
    """Whether there is anything to say of priors."""
    return findings.comparison is not None or findings.priors_searched or bool(findings.priors)


def _describe_growth(row: LesionChange, title: str) -> str:
    """How the volume grew; empty where it did not by more than its last digit, or is not known."""
    volume = row.change("volume")
    if volume is None or volume.difference.value <= 10.0**-volume.difference.decimals * 1.001:
        return ""
    unit, now, before = volume.current.unit.value, volume.current.text, volume.prior.text
    percent = f" ({signed(volume.percent)}%)" if volume.percent else ""
    doubling = row.doubling_time
    rate = f", doubling time {doubling.text} {doubling.unit.value}" if doubling else ""
    return f"{title} grew from {before} to {now} {unit}{percent}{rate}"


def comparison_impression(findings: Findings, lesions: Sequence[Finding]) -> list[str]:
    """What changed and matters, one line each: lesions that grew, are new, cannot be matched, or are gone."""
    comparison = findings.comparison
    if comparison is None:
        return []
    lines = []
    for lesion in lesions:
        row = comparison.lesion(lesion.tracking_id)
        if row is not None:
            grown = _describe_growth(row, lesion.title) if row.status == "matched" else ""
            new = f"{lesion.title} is new" if row.status == "new" else ""
            unsure = f"{lesion.title} could not be matched with certainty" if row.candidates else ""
            lines += [line for line in (grown, new, unsure) if line]
    gone = [f"{lesion.title} of that study was not found again" for lesion in comparison.gone]
    return [f"Since {comparison.prior_study_date}: {line}." for line in (*lines, *gone)]

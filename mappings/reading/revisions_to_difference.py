"""What changed between two revisions of one result, as data: it is kept at sign-off, and decides the status."""

from collections.abc import Iterator, Mapping

from mappings.model.findings import Assessment, Finding, Findings
from mappings.model.revision import Difference, ValueChange

STUDY = "study"
Values = Mapping[tuple[str, str], tuple[str, str]]
"""Label and value as shown, by tracking id and key."""


def diff(old: Findings, new: Findings) -> Difference:
    """Findings that came and went, by tracking UID, and each value of what both have, by tracking id and key.

    What a blank says, what people did and who signed is no value; the person's own words ("report_text") are one.
    """
    before = {finding.tracking_uid: finding for finding in old.findings}
    after = {finding.tracking_uid: finding for finding in new.findings}
    changed = list(_compare(_study_values(old), _study_values(new)))
    for uid, finding in after.items():
        if uid in before:
            changed += _compare(_finding_values(before[uid]), _finding_values(finding))
    return Difference(
        added=tuple(f.tracking_id for uid, f in after.items() if uid not in before),
        removed=tuple(f.tracking_id for uid, f in before.items() if uid not in after),
        changed=tuple(changed),
    )


def _compare(old: Values, new: Values) -> Iterator[ValueChange]:
    for key in dict.fromkeys([*old, *new]):
        label = new.get(key, old.get(key, ("", "")))[0]
        before, after = old.get(key, ("", ""))[1], new.get(key, ("", ""))[1]
        if before != after:
            yield ValueChange(key[0], key[1], label, before, after)


def _study_values(findings: Findings) -> dict[tuple[str, str], tuple[str, str]]:
    values = dict(_assessment_values(STUDY, findings.assessments))
    if findings.psa is not None:
        psa = findings.psa
        values[STUDY, "psa"] = ("PSA", f"{psa.value:.10g} {psa.unit} of {psa.effective_at.isoformat()}")
    if findings.report_text:
        values[STUDY, "report_text"] = ("Report text", findings.report_text)
    return values


def _finding_values(finding: Finding) -> dict[tuple[str, str], tuple[str, str]]:
    where = finding.tracking_id
    places = (
        ("site", "Finding site", finding.site),
        ("side", "Side", finding.laterality),
        ("zone", "Zone", finding.zone),
        ("sector", "Sector", finding.sector),
    )
    values = {(where, key): (label, code.meaning) for key, label, code in places if code is not None}
    if finding.level:
        values[where, "level"] = ("Level", finding.level)
    for m in finding.measurements:
        values[where, m.key] = (m.label, f"{m.text} {m.unit.value}")
    return values | dict(_assessment_values(where, finding.assessments))


def _assessment_values(
    where: str, assessments: tuple[Assessment, ...]
) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    for assessment in assessments:
        yield (where, assessment.key), (assessment.label, assessment.score)
        for given in assessment.inputs:
            yield (where, f"{assessment.key}.{given.name}"), (given.name, given.value)

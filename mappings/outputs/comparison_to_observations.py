"""What changed since a prior study, as parts of the findings' FHIR R4 Observations.

The changes are components of the finding's own Observation, so that a revision without a comparison takes them away
again. The prior's lesion and study are named by identifier: they may be stored elsewhere, or not at all.
"""

from collections.abc import Iterator

from mappings.model.changes import STATUS_CODES, Comparison
from mappings.model.findings import Finding, Findings
from mappings.outputs.comparison_values import (
    INTERVAL,
    PRIOR_DATE,
    PRIOR_STUDY,
    STATUS,
    comparison_comments,
    describe_comparison,
    describe_gone,
    finding_numbers,
    interval,
    lesion_references,
)
from mappings.outputs.fhir_elements import REPORT, Json, to_concept, to_identifier, to_quantity, uid_identifier


def change_components(findings: Findings, finding: Finding) -> Iterator[Json]:
    """Which prior, the status of a lesion, every number in UCUM, the prior's lesion; nothing without a comparison."""
    comparison = findings.comparison
    row = comparison.lesion(finding.tracking_id) if comparison else None
    if comparison is None or (row is None and finding != findings.gland):
        return
    yield from _study_components(comparison)
    if row is not None:
        yield {"code": to_concept(STATUS), "valueCodeableConcept": to_concept(STATUS_CODES[row.status])}
    for number in finding_numbers(findings, finding):
        yield {"code": to_concept(number.concept), "valueQuantity": to_quantity(number)}
    for concept, uid in lesion_references(row) if row else []:
        yield {"code": to_concept(concept), "valueString": f"urn:oid:{uid}"}


def _study_components(comparison: Comparison) -> Iterator[Json]:
    uid = f"urn:oid:{comparison.prior_study_instance_uid}"
    yield {"code": to_concept(PRIOR_STUDY), "valueString": uid}
    yield {"code": to_concept(PRIOR_DATE), "valueDateTime": comparison.prior_study_date.isoformat()}
    yield {"code": to_concept(INTERVAL), "valueQuantity": to_quantity(interval(comparison))}


def change_sources(findings: Findings, finding: Finding) -> list[Json]:
    """What the changes were derived from besides this study: the prior study, and the Observation of its lesion."""
    comparison = findings.comparison
    row = comparison.lesion(finding.tracking_id) if comparison else None
    if comparison is None or (row is None and finding != findings.gland):
        return []
    study = {"type": "ImagingStudy", "identifier": uid_identifier(comparison.prior_study_instance_uid)}
    lesions = (
        [{"type": "Observation", "identifier": uid_identifier(row.prior.tracking_uid)}] if row and row.prior else []
    )
    return [study, *lesions]


def change_notes(findings: Findings, finding: Finding) -> list[str]:
    """The notes on a lesion's change; with the gland, what holds for the whole comparison, and what is gone."""
    comparison = findings.comparison
    row = comparison.lesion(finding.tracking_id) if comparison else None
    if row is not None:
        return list(row.notes)
    if finding != findings.gland:
        return []
    whole = [describe_comparison(comparison), *describe_gone(comparison)] if comparison else []
    return [*whole, *comparison_comments(findings)]


def prior_report(findings: Findings) -> Json | None:
    """Wetread's own report on the prior, by its identifier."""
    comparison = findings.comparison
    if comparison is None:
        return None
    value = f"{comparison.prior_study_instance_uid}:{comparison.prior_protocol_name}"
    return {"type": "DiagnosticReport", "identifier": to_identifier(REPORT, value)}

"""What changed since a prior study, as content items of a measurement report.

TID 1411 and 1501 are extensible (PS3.16). PS3.16 codes "Comparison to previous studies" and "Previous Finding"; what it
has no code for is Wetread's own. The prior's lesion is named by its tracking UID under a concept of its own: a second
Tracking Unique Identifier (DCM 112040) in a group would be taken for the lesion's.
"""

from collections.abc import Iterator

from highdicom.sr import (
    ContentItem,
    QualitativeEvaluation,
    RelationshipTypeValues,
    TextContentItem,
    UIDRefContentItem,
)

from mappings.model import codes
from mappings.model.changes import STATUS_CODES
from mappings.model.codes import Code
from mappings.model.findings import Finding, Findings
from mappings.outputs.comparison_values import (
    PRIOR_STUDY,
    STATUS,
    describe_comparison,
    describe_gone,
    lesion_references,
)
from mappings.outputs.dicom_header import concept


def status_evaluations(findings: Findings, finding: Finding) -> list[QualitativeEvaluation]:
    """Whether the lesion is matched, new or ambiguous, as coded question and answer."""
    row = findings.comparison.lesion(finding.tracking_id) if findings.comparison else None
    return [QualitativeEvaluation(concept(STATUS), concept(STATUS_CODES[row.status]))] if row else []


def lesion_items(findings: Findings, finding: Finding) -> Iterator[ContentItem]:
    """The prior's lesion (or the candidates) by UID and title, and the notes."""
    row = findings.comparison.lesion(finding.tracking_id) if findings.comparison else None
    if row is None:
        return
    for name, uid in lesion_references(row):
        yield _uid(name, uid)
    for prior in (row.prior, *row.candidates):
        if prior is not None:
            yield _text(codes.PREVIOUS_FINDING, f"{prior.title} of {prior.study_date}")
    for note in row.notes:
        yield _text(codes.COMMENT, note)


def study_items(findings: Findings) -> Iterator[ContentItem]:
    """The study that was compared, and the lesions of it that are gone."""
    comparison = findings.comparison
    if comparison is None:
        return
    yield _text(codes.COMPARISON, describe_comparison(comparison))
    yield _uid(PRIOR_STUDY, comparison.prior_study_instance_uid)
    for lesion, sentence in zip(comparison.gone, describe_gone(comparison), strict=True):
        yield _text(codes.PREVIOUS_FINDING, f"{sentence} Its tracking UID: {lesion.tracking_uid}")


def _text(name: Code, value: str) -> ContentItem:
    return TextContentItem(name=concept(name), value=value, relationship_type=RelationshipTypeValues.CONTAINS)


def _uid(name: Code, value: str) -> ContentItem:
    return UIDRefContentItem(name=concept(name), value=value, relationship_type=RelationshipTypeValues.CONTAINS)

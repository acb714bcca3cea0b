"""What changed since a prior study, as OBX in the groups of the findings and of the study.

Concepts are Wetread's own throughout: under the code of the quantity, a receiver that files a lesion's volume by its
OBX-3 would file the difference, or the prior's value.
"""

from collections.abc import Iterator
from dataclasses import replace

from mappings.model.changes import PRIOR_VALUE, STATUS_CODES
from mappings.model.codes import Code
from mappings.model.findings import Finding, Findings
from mappings.model.measurement import Measurement
from mappings.outputs.comparison_values import (
    OWN,
    PRIOR_DATE,
    PRIOR_STUDY,
    STATUS,
    describe_gone,
    finding_numbers,
    interval,
    lesion_references,
)
from mappings.outputs.er7 import Field, format_date, text_value
from mappings.outputs.oru_observation import Common, coded, methods, write_obx

NOTE = Code("change_note", OWN, "Note on the comparison")
GONE = Code("gone", OWN, "Lesion of the prior study only")
PRIOR_GONE = Code("prior_gone_uid", OWN, "Tracking UID of a lesion of the prior study only")


def write_finding_change(common: Common, findings: Findings, finding: Finding) -> Iterator[list[Field]]:
    """Status, numbers, the prior's lesion and notes of one finding; nothing without a comparison."""
    row = findings.comparison.lesion(finding.tracking_id) if findings.comparison else None
    if row is not None:
        yield write_obx(common, "CWE", coded(STATUS), coded(STATUS_CODES[row.status]))
    for number in finding_numbers(findings, finding):
        yield _write_number(_observed(common, findings, number), number)
    if row is not None:
        for concept, uid in lesion_references(row):
            yield write_obx(common, "ST", coded(concept), uid)
        for note in row.notes:
            yield write_obx(common, "TX", coded(NOTE), text_value(note))


def _observed(common: Common, findings: Findings, number: Measurement) -> Common:
    """OBX-14 of the prior's values is the prior's date."""
    if findings.comparison is None or number.derivation != PRIOR_VALUE:
        return common
    return replace(common, observed=format_date(findings.comparison.prior_study_date))


def write_study_change(common: Common, findings: Findings) -> Iterator[list[Field]]:
    """The prior study, how long ago it was, and the lesions that only it has."""
    comparison = findings.comparison
    if comparison is None:
        return
    yield write_obx(common, "ST", coded(PRIOR_STUDY), comparison.prior_study_instance_uid)
    yield write_obx(common, "DT", coded(PRIOR_DATE), format_date(comparison.prior_study_date))
    yield _write_number(common, interval(comparison))
    for lesion, sentence in zip(comparison.gone, describe_gone(comparison), strict=True):
        yield write_obx(common, "TX", coded(GONE), text_value(sentence))
        yield write_obx(common, "ST", coded(PRIOR_GONE), lesion.tracking_uid)
    for note in comparison.notes:
        yield write_obx(common, "TX", coded(NOTE), text_value(note))


def _write_number(common: Common, number: Measurement) -> list[Field]:
    return write_obx(common, "NM", coded(number.concept), number.text, unit=number.unit, method=methods(number))

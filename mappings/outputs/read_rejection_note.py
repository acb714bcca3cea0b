"""Reads a rejection note (Key Object Selection, TID 2010; IHE IOCM) back: why, and what it takes out of view."""

from pydicom.dataset import Dataset
from pydicom.uid import KeyObjectSelectionDocumentStorage

from mappings.model.findings import Findings
from mappings.model.ids import derive_uid
from mappings.outputs.read_dicom import (
    DOCUMENT,
    expect_header,
    find_references,
    items_of,
    merge,
    plain_name,
    read_code,
    read_header,
    text_of,
)
from mappings.outputs.read_facts import Facts, compare, withheld

NOTE = "rejection.dcm"
SAFETY = "Rejected for Patient Safety Reasons (DCM 113037)"
QUALITY = "Rejected for Quality Reasons (DCM 113001)"


def rejected_uids(findings: Findings) -> tuple[str, ...]:
    """The instances of the former revision that must be taken out of view; none where nothing is replaced."""
    former = findings.predecessor
    if former is None:
        return ()
    images = [name for name in (former.overview, *former.lesion_ids) if name]
    parts = [*(["seg"] if former.segmented else []), *(f"sc-{name}" for name in images)]
    parts += ["sr"] if findings.status == "entered-in-error" else []
    return tuple(derive_uid(findings.job_id, former.revision, part) for part in parts)


def check_rejection_note(note: Dataset, findings: Findings) -> list[str]:
    """Everything in which the note disagrees with the findings."""
    expected = merge(
        expect_header(findings, KeyObjectSelectionDocumentStorage, "ko", "ko-series"), _expect_note(findings)
    )
    found = merge(read_header(note, findings), _read_note(note))
    for facts in (expected, found):  # it says nothing about the result itself
        facts.values.pop((DOCUMENT, "series description"), None)
    return compare(NOTE, expected, found)


def _read_note(note: Dataset) -> Facts:
    facts = Facts()
    facts.add(DOCUMENT, "title", read_code(note, "ConceptNameCodeSequence"))
    for item in items_of(note, "ContentSequence"):
        for uid in find_references(item):
            facts.add(DOCUMENT, "rejects", uid)
        if text_of(item, "ValueType") == "PNAME":
            facts.add(DOCUMENT, "observer", withheld(plain_name(text_of(item, "PersonName"))))
    for study in items_of(note, "CurrentRequestedProcedureEvidenceSequence"):
        facts.add(DOCUMENT, "study of what it rejects", text_of(study, "StudyInstanceUID"))
        for uid in find_references(study):
            facts.add(DOCUMENT, "evidence", uid)
    return facts


def _expect_note(findings: Findings) -> Facts:
    facts = Facts()
    facts.add(DOCUMENT, "title", SAFETY if findings.status == "entered-in-error" else QUALITY)
    for uid in rejected_uids(findings):
        facts.add(DOCUMENT, "rejects", uid)
        facts.add(DOCUMENT, "evidence", uid)
    signed, withdrew = findings.signature, findings.rejection
    if signed or withdrew:
        facts.add(
            DOCUMENT, "observer", withheld(plain_name(withdrew.person if withdrew else signed.person if signed else ""))
        )
    facts.add(DOCUMENT, "study of what it rejects", findings.study_instance_uid)
    return facts

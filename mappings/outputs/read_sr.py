"""Reads a measurement report (TID 1500) back by walking its content tree."""

from collections.abc import Iterator, Mapping

from pydicom.dataset import Dataset
from pydicom.uid import Comprehensive3DSRStorage

from mappings.model import codes
from mappings.model.codes import SYSTEM_URLS, Code
from mappings.model.findings import Assessment, Finding, Findings
from mappings.model.ids import derive_uid
from mappings.outputs.read_changes import (
    PRIOR_STUDY,
    STATUS,
    STATUSES,
    Number,
    comparison_comments,
    comparison_sentence,
    gone_sentences,
    interval_of,
    links_of,
    numbers_of,
    row_of,
)
from mappings.outputs.read_dicom import (
    DOCUMENT,
    expect_header,
    expect_model,
    find_references,
    items_of,
    merge,
    plain_name,
    read_code,
    read_header,
    text_of,
)
from mappings.outputs.read_facts import Facts, compare, head, name_of, prose, withheld
from mappings.outputs.read_revision import expect_lines

STUDY = "study"
MEASUREMENTS, GROUP, LIBRARY = "126010", "125007", "111028"
TRACKING_ID, TRACKING_UID = "112039", "112040"
CATEGORY, FINDING, SITE, LATERALITY = "276214006", "121071", "363698007", "272741003"
ALGORITHM_NAME, ALGORITHM_VERSION, ALGORITHM_MAKER, ALGORITHM_FAMILY = "111001", "111003", "122405", "111000"
METHOD, DERIVATION = "370129005", "121401"
SEGMENT, SEGMENT_SOURCE = "121191", "121233"
PROCEDURE, DEVICE_UID, DEVICE_MODEL = "121058", "121012", "121015"
PERSON_OBSERVER = "121008"
KINDS = {
    codes.ORGAN.value: Code("123037004", "SCT", "Anatomical Structure"),
    codes.LESION.value: Code("49755003", "SCT", "Morphologically Abnormal Structure"),
}
"""Finding category (CID 7150) of each kind of finding."""
COMMENT, PREVIOUS = "Comment (DCM 121106)", "Previous Finding (DCM 121069)"
FINAL = ("final", "amended", "corrected")


def check_sr(report: Dataset, findings: Findings, seg_sources: Mapping[int, set[str]] | None) -> list[str]:
    """Everything in which the report disagrees with the findings. `seg_sources` are the instances that the SEG
    names for each segment's frames, None where there is no SEG to read."""
    expected = merge(
        expect_header(findings, Comprehensive3DSRStorage, "sr", "sr-series"),
        _expect_document(findings),
        *(_expect_finding(findings, finding, seg_sources) for finding in findings.findings),
        _expect_study(findings),
    )
    found = merge(read_header(report, findings), _read_document(report, findings))
    for number, group in enumerate(_groups(report), 1):
        found = merge(found, _read_group(group, number))
    return compare("sr.dcm", expected, found)


def _children(item: Dataset, name: str) -> Iterator[Dataset]:
    """The content items directly below whose concept name has this code value."""
    for child in items_of(item, "ContentSequence"):
        if _name_value(child) == name:
            yield child


def _name_value(item: Dataset) -> str:
    return "".join(text_of(name, "CodeValue") for name in items_of(item, "ConceptNameCodeSequence"))


def _groups(report: Dataset) -> list[Dataset]:
    return [group for part in _children(report, MEASUREMENTS) for group in _children(part, GROUP)]


def evidence_of(report: Dataset) -> set[str]:
    """The instances that the report lists as evidence."""
    return {
        uid for item in items_of(report, "CurrentRequestedProcedureEvidenceSequence") for uid in find_references(item)
    }


def _read_document(report: Dataset, findings: Findings) -> Facts:
    facts = Facts()
    for keyword in ("VerificationFlag", "CompletionFlag", "PreliminaryFlag"):
        facts.add(DOCUMENT, keyword, text_of(report, keyword))
    for item in items_of(report, "VerifyingObserverSequence"):
        facts.add(DOCUMENT, "VerifyingObserverName", withheld(plain_name(text_of(item, "VerifyingObserverName"))))
        for keyword in ("VerifyingOrganization", "VerificationDateTime"):
            facts.add(DOCUMENT, keyword, withheld(text_of(item, keyword)))
    for item in _children(report, PERSON_OBSERVER):
        facts.add(DOCUMENT, "person observer", withheld(plain_name(text_of(item, "PersonName"))))
    facts.add(DOCUMENT, "CompletionFlagDescription", head(text_of(report, "CompletionFlagDescription")))
    for item in _children(report, PROCEDURE):
        facts.add(DOCUMENT, "procedure", read_code(item, "ConceptCodeSequence"))
    for item in _children(report, DEVICE_UID):
        facts.add(DOCUMENT, "observer UID", text_of(item, "UID"))
    for item in _children(report, DEVICE_MODEL):
        facts.add(DOCUMENT, "observer model", head(text_of(item, "TextValue")))
    for item in items_of(report, "PredecessorDocumentsSequence"):
        for uid in find_references(item):
            facts.add(DOCUMENT, "predecessor", uid)
    for item in items_of(report, "ReferencedRequestSequence"):
        _read_request(facts, item)
    evidence = evidence_of(report)
    for uid in dict.fromkeys(uid for item in items_of(report, "ContentSequence") for uid in find_references(item)):
        if uid not in evidence:
            facts.add(DOCUMENT, "reference to an instance that is not evidence", uid)
    library = {uid for part in _children(report, LIBRARY) for uid in find_references(part)}
    for uid in dict.fromkeys(seen.sop_instance_uid for f in findings.findings for seen in f.evidence):
        facts.add(DOCUMENT, f"image library lists {uid}", "yes" if uid in library else "no")
    return facts


def _read_request(facts: Facts, item: Dataset) -> None:
    facts.add(DOCUMENT, "request's study", text_of(item, "StudyInstanceUID"))
    facts.add(DOCUMENT, "request's accession number", withheld(text_of(item, "AccessionNumber")))
    for keyword in ("PlacerOrderNumberImagingServiceRequest", "FillerOrderNumberImagingServiceRequest"):
        facts.add(DOCUMENT, keyword, withheld(head(text_of(item, keyword))))


def _expect_document(findings: Findings) -> Facts:
    facts = Facts()
    withdrawn = findings.status == "entered-in-error"
    lead = "Complete as signed, left blank: " if findings.signature else "Missing: "
    missing = lead + ", ".join(blank.name for blank in findings.blanks) if findings.blanks else ""
    partial = findings.signature is None and bool(withdrawn or missing)
    facts.add(DOCUMENT, "VerificationFlag", "VERIFIED" if findings.signature else "UNVERIFIED")
    _expect_signature(facts, findings)
    facts.add(DOCUMENT, "CompletionFlag", "PARTIAL" if partial else "COMPLETE")
    facts.add(DOCUMENT, "PreliminaryFlag", "FINAL" if findings.status in FINAL or findings.rejection else "PRELIMINARY")
    facts.add(DOCUMENT, "CompletionFlagDescription", head("Withdrawn: entered in error" if withdrawn else missing))
    facts.add(DOCUMENT, "procedure", name_of(_procedure(findings)))
    model = findings.model
    facts.add(DOCUMENT, "observer UID", derive_uid("device", model.manufacturer, model.name, model.version))
    facts.add(DOCUMENT, "observer model", head(model.name))
    if findings.predecessor_revision is not None:
        facts.add(DOCUMENT, "predecessor", derive_uid(findings.job_id, findings.predecessor_revision, "sr"))
    _expect_request(facts, findings)
    for uid in dict.fromkeys(seen.sop_instance_uid for f in findings.findings for seen in f.evidence):
        facts.add(DOCUMENT, f"image library lists {uid}", "yes")
    return facts


def _expect_signature(facts: Facts, findings: Findings) -> None:
    signed = findings.signature
    if signed is not None:
        facts.add(DOCUMENT, "VerifyingObserverName", withheld(plain_name(signed.person)))
        facts.add(DOCUMENT, "VerifyingOrganization", withheld(signed.organisation.strip()))
        facts.add(DOCUMENT, "VerificationDateTime", withheld(f"{signed.signed_at:%Y%m%d%H%M%S%z}"))
        facts.add(DOCUMENT, "person observer", withheld(plain_name(signed.person)))


def _procedure(findings: Findings) -> Code:
    """The protocol's, else the order's in a scheme that we know, else any imaging procedure."""
    order = findings.context.order
    ordered = order.code if order and order.code and order.code.scheme in SYSTEM_URLS else None
    return findings.procedure or ordered or Code("363679005", "SCT", "Imaging procedure")


def _expect_request(facts: Facts, findings: Findings) -> None:
    order = findings.context.order
    if order is None:
        return
    facts.add(DOCUMENT, "request's study", findings.study_instance_uid)
    facts.add(DOCUMENT, "request's accession number", withheld(findings.accession_number))
    facts.add(DOCUMENT, "PlacerOrderNumberImagingServiceRequest", withheld(head(order.placer_order_number)))
    facts.add(DOCUMENT, "FillerOrderNumberImagingServiceRequest", withheld(head(order.filler_order_number)))


def _read_group(group: Dataset, number: int) -> Facts:
    """One measurement group, under its tracking id."""
    facts = Facts()
    named = [text_of(item, "TextValue") for item in _children(group, TRACKING_ID)]
    where = named[0] if named else f"group {number} without tracking id"
    facts.add(where, "measurement groups", "one")
    model = {}
    for item in items_of(group, "ContentSequence"):
        name = _name_value(item)
        if name == TRACKING_UID:
            facts.add(where, "tracking UID", text_of(item, "UID"))
        elif name in (ALGORITHM_NAME, ALGORITHM_VERSION):
            model[name] = head(text_of(item, "TextValue"))
        elif name not in (TRACKING_ID, ALGORITHM_MAKER, ALGORITHM_FAMILY):
            _read_item(facts, where, item, name)
    if model:
        facts.add(where, "model", f"{model.get(ALGORITHM_NAME, '')} {model.get(ALGORITHM_VERSION, '')}")
    return facts


def _read_item(facts: Facts, where: str, item: Dataset, name: str) -> None:
    question = read_code(item, "ConceptNameCodeSequence")
    kind = text_of(item, "ValueType")
    if kind == "NUM":
        facts.add(where, question, _read_number(item))
    elif kind == "CODE":
        side = "".join(f", {read_code(s, 'ConceptCodeSequence')}" for s in _children(item, LATERALITY))
        what = {CATEGORY: "category", FINDING: "finding", SITE: "site"}.get(name, question)
        facts.add(where, what, read_code(item, "ConceptCodeSequence") + side)
    elif kind == "TEXT":
        facts.add(where, question, prose(text_of(item, "TextValue")))
    elif kind == "UIDREF":
        facts.add(where, question, text_of(item, "UID"))
    elif kind == "IMAGE":
        for reference in items_of(item, "ReferencedSOPSequence"):
            uid, segment = text_of(reference, "ReferencedSOPInstanceUID"), text_of(reference, "ReferencedSegmentNumber")
            what = {SEGMENT: "segment", SEGMENT_SOURCE: "source of the segment"}.get(name, question)
            facts.add(where, what, f"{uid} segment {segment}" if segment else uid)
    else:
        facts.add(where, question, f"an item of type {kind}")


def _read_number(item: Dataset) -> str:
    """Value as written, unit, then method, derivation and time where stated."""
    measured = items_of(item, "MeasuredValueSequence")
    words = [f"{text_of(m, 'NumericValue')} {_unit(m)}" for m in measured] or ["no value"]
    if any("FloatingPointValue" in m for m in measured):
        words.append("a second, binary spelling")
    for name in (METHOD, DERIVATION):
        words += [read_code(child, "ConceptCodeSequence") for child in _children(item, name)]
    taken = text_of(item, "ObservationDateTime")
    return ", ".join([*words, *([f"taken {taken}"] if taken else [])])


def _unit(measured: Dataset) -> str:
    units = items_of(measured, "MeasurementUnitsCodeSequence")
    return " ".join(f"{text_of(u, 'CodeValue')} ({text_of(u, 'CodingSchemeDesignator')})" for u in units)


def _expect_finding(findings: Findings, finding: Finding, seg_sources: Mapping[int, set[str]] | None) -> Facts:
    facts, where = Facts(), finding.tracking_id
    facts.add(where, "measurement groups", "one")
    facts.add(where, "tracking UID", finding.tracking_uid)
    facts.add(where, "model", expect_model(findings))
    facts.add(where, "finding", name_of(finding.kind))
    if finding.kind.value in KINDS:
        facts.add(where, "category", name_of(KINDS[finding.kind.value]))
    side = f", {name_of(finding.laterality)}" if finding.laterality else ""
    for place in [p for p in (finding.sector, finding.zone) if p is not None] or [finding.site]:
        facts.add(where, "site", name_of(place) + side)
    for m in finding.measurements:
        made = "".join(f", {name_of(code)}" for code in (m.method, m.derivation) if code is not None)
        facts.add(where, name_of(m.concept), f"{m.text} {m.unit.value} ({m.unit.scheme}){made}")
    if finding.confidence is not None:
        facts.add(where, name_of(codes.CONFIDENCE), f"{finding.confidence:.2f} 1 (UCUM)")
    for assessment in finding.assessments:
        _expect_assessment(facts, where, assessment)
    for note in finding.notes:
        facts.add(where, COMMENT, prose(note))
    _expect_change(facts, findings, finding)
    if seg_sources is not None and finding.segment_number is not None:
        seg_uid = derive_uid(findings.job_id, findings.revision, "seg")
        facts.add(where, "segment", f"{seg_uid} segment {finding.segment_number}")
        for uid in sorted(seg_sources.get(finding.segment_number, ())):
            facts.add(where, "source of the segment", uid)
    return facts


def _expect_change(facts: Facts, findings: Findings, finding: Finding) -> None:
    """The numbers of the comparison, and what the lesion was in the prior."""
    where, row = finding.tracking_id, row_of(findings, finding)
    for number in numbers_of(findings, finding):
        _expect_number(facts, where, number)
    if row is None:
        return
    facts.add(where, name_of(STATUS), name_of(STATUSES[row.status]))
    for concept, uid in links_of(row):
        facts.add(where, name_of(concept), uid)
    for prior in (*([row.prior] if row.prior else []), *row.candidates):
        facts.add(where, PREVIOUS, prose(f"{prior.title} of {prior.study_date}"))
    for note in row.notes:
        facts.add(where, COMMENT, prose(note))


def _expect_number(facts: Facts, where: str, number: Number) -> None:
    made = f", {name_of(number.how)}" if number.how else ""
    taken = f", taken {number.day:%Y%m%d}" if number.day else ""
    facts.add(where, name_of(number.concept), f"{number.text} {number.unit.value} ({number.unit.scheme}){made}{taken}")


def _expect_prior(facts: Facts, findings: Findings) -> None:
    """The study that was compared, and what only it has."""
    for number in interval_of(findings):
        _expect_number(facts, STUDY, number)
    for sentence in comparison_sentence(findings):
        facts.add(STUDY, "Comparison to previous studies (DCM 111424)", prose(sentence))
    if findings.comparison is not None:
        facts.add(STUDY, name_of(PRIOR_STUDY), findings.comparison.prior_study_instance_uid)
    for sentence, uid in gone_sentences(findings):
        facts.add(STUDY, PREVIOUS, prose(f"{sentence} Its tracking UID: {uid}"))


def _expect_assessment(facts: Facts, where: str, assessment: Assessment) -> None:
    facts.add(where, name_of(assessment.concept), name_of(assessment.value))
    for given in assessment.inputs:
        if given.concept is not None:
            facts.add(where, name_of(given.concept), name_of(given.code) if given.code else prose(given.value))
    facts.add(where, COMMENT, prose(f"{assessment.explanation} (rule {assessment.rule})"))


def _expect_study(findings: Findings) -> Facts:
    """What holds for the whole study has a group of its own, unless there is nothing to say."""
    facts = Facts()
    comments = [f"Left blank: {blank.name}: {blank.reason}" for blank in findings.blanks] + [*findings.warnings]
    comments += [*comparison_comments(findings), *expect_lines(findings)]
    comments += [f"Report as signed: {findings.report_text}"] if findings.report_text else []
    if findings.findings and not (findings.assessments or findings.psa or findings.comparison or comments):
        return facts
    facts.add(STUDY, "measurement groups", "one")
    facts.add(STUDY, "tracking UID", derive_uid(findings.job_id, "finding", STUDY))
    if findings.findings:
        facts.add(STUDY, "site", name_of(findings.findings[0].site))
    if findings.psa is not None:
        psa = findings.psa
        taken = f"taken {psa.effective_at:%Y%m%d%H%M%S%z}"
        facts.add(STUDY, name_of(psa.code), f"{psa.value:g} {psa.unit} (UCUM), {taken}")
    for assessment in findings.assessments:
        _expect_assessment(facts, STUDY, assessment)
    for comment in comments:
        facts.add(STUDY, COMMENT, prose(comment))
    _expect_prior(facts, findings)
    return facts

"""Findings -> DICOM Comprehensive 3D SR with a TID 1500 Measurement Report (PS3.16), as IHE AI Results wants it."""

from collections.abc import Iterator, Sequence
from typing import Any

from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    Comprehensive3DSR,
    DeviceObserverIdentifyingAttributes,
    FindingSite,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    PersonObserverIdentifyingAttributes,
    QualitativeEvaluation,
    ReferencedSegment,
    RelationshipTypeValues,
    SourceImageForSegmentation,
    TextContentItem,
    TrackingIdentifier,
    VolumetricROIMeasurementsAndQualitativeEvaluations,
)
from highdicom.sr import Measurement as MeasurementItem
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes as dicom_codes
from pydicom.uid import Comprehensive3DSRStorage, ExplicitVRLittleEndian

from mappings.model import codes
from mappings.model.changes import PRIOR_VALUE
from mappings.model.codes import SYSTEM_URLS, Code
from mappings.model.context import ContextValue
from mappings.model.findings import Assessment, AssessmentInput, Finding, Findings
from mappings.model.ids import derive_uid
from mappings.model.measurement import Measurement
from mappings.outputs.comparison_to_sr import lesion_items, status_evaluations, study_items
from mappings.outputs.comparison_values import comparison_comments, finding_numbers, interval
from mappings.outputs.dicom_header import (
    MANUFACTURER,
    PRODUCT,
    add_study,
    as_dt,
    concept,
    copy_image_header,
    describe_model,
    device_uid,
    local_time,
    private_schemes,
    serial_number,
    set_times,
    shorten,
    software_versions,
    verification_words,
)
from mappings.outputs.dicom_image_library import build_image_library
from mappings.outputs.revision_words import revision_sentences

SERIES_NUMBER = 1002
Group = MeasurementsAndQualitativeEvaluations | VolumetricROIMeasurementsAndQualitativeEvaluations
STUDY_TRACKING_ID = "study"
IMAGING_PROCEDURE = Code("363679005", "SCT", "Imaging procedure")
FINAL_STATES = ("final", "amended", "corrected")
CATEGORIES = {
    codes.ORGAN: Code("123037004", "SCT", "Anatomical Structure"),
    codes.LESION: Code("49755003", "SCT", "Morphologically Abnormal Structure"),
}
"""Finding category (CID 7150) of each kind of finding."""


def findings_to_sr(findings: Findings, seg: Dataset | None, sources: Sequence[Dataset]) -> Dataset:
    """Writes the measurement report of `findings`.

    `sources` are the instances that were read (headers are enough, any number of series of the one study, at
    least one); they become the image library and the evidence. A finding whose segment is in `seg` becomes a
    volumetric ROI group (TID 1411) on that segment; one without, a group without a region (TID 1501). What holds
    for the whole study (overall category, PSA, what was left blank) is the TID 1501 group "study".

    Verification Flag is VERIFIED only where a person signed, who is the Verifying Observer. Completion Flag (PS3.3
    C.17.2: completeness by the writer's own criterion) is COMPLETE where a person signed (VERIFIED is allowed with
    nothing else) or nothing that the protocol asks for was left blank; otherwise PARTIAL. Completion Flag Description
    names what was left blank. Preliminary Flag follows `findings.status`; a withdrawal by a person is final too.
    Equal arguments give equal bytes. Raises ValueError where `sources` is empty.
    """
    if not sources:
        raise ValueError("a report needs the instances that were read as evidence; none were given")
    images = [copy_image_header(source) for source in sources]
    report = Comprehensive3DSR(
        evidence=[*images, seg] if seg is not None else images,
        content=_build_report(findings, seg, images),
        series_instance_uid=derive_uid(findings.job_id, findings.revision, "sr-series"),
        series_number=SERIES_NUMBER,
        sop_instance_uid=derive_uid(findings.job_id, findings.revision, "sr"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=findings.signature is not None or not _find_missing(findings),
        is_final=findings.status in FINAL_STATES or findings.rejection is not None,
        is_verified=findings.signature is not None,
        verifying_observer_name=findings.signature.person if findings.signature else None,
        verifying_organization=shorten(findings.signature.organisation) if findings.signature else None,
        previous_versions=_predecessors(findings),
        requested_procedures=_requests(findings, sources[0]),
        transfer_syntax_uid=ExplicitVRLittleEndian,
        contributing_equipment=[describe_model(findings)],
        manufacturer_model_name=PRODUCT,
        software_versions=software_versions(findings),
        device_serial_number=serial_number(findings),
        series_description=shorten(f"{verification_words(findings)}: measurements, {findings.protocol_title}"),
        coding_schemes=private_schemes(list(_all_codes(findings))),
    )
    _describe_completion(report, findings)
    _date_verification(report, findings)
    add_study(report, sources[0])
    set_times(report, local_time(findings, sources[0]))
    return report


def _build_report(findings: Findings, seg: Dataset | None, images: Sequence[Dataset]) -> MeasurementReport:
    """The content tree: who observed, what was done, which images were read, then the groups."""
    groups = [_build_group(findings, finding, seg) for finding in findings.findings]
    if not groups or findings.assessments or findings.psa or findings.comparison or _comments(findings):
        groups.append(_build_study_group(findings))
    report = MeasurementReport(
        observation_context=ObservationContext(
            observer_person_context=_person_observer(findings), observer_device_context=_observer(findings)
        ),
        procedure_reported=concept(_procedure(findings)),
        imaging_measurements=groups,
        title=dicom_codes.DCM.ImagingMeasurementReport,
    )
    before_measurements = len(report[0].ContentSequence) - 1
    report[0].ContentSequence.insert(before_measurements, build_image_library(images))
    return report


def _observer(findings: Findings) -> ObserverContext:
    """TID 1004: the observer is a device, Wetread running this version of the model."""
    attributes = DeviceObserverIdentifyingAttributes(
        uid=device_uid(findings),
        name=PRODUCT,
        manufacturer_name=shorten(findings.model.manufacturer) or None,
        model_name=shorten(findings.model.name),
        serial_number=serial_number(findings),
    )
    return ObserverContext(observer_type=dicom_codes.DCM.Device, observer_identifying_attributes=attributes)


def _person_observer(findings: Findings) -> ObserverContext | None:
    """TID 1003: the person who signed; None where nobody did."""
    if findings.signature is None:
        return None
    attributes = PersonObserverIdentifyingAttributes(
        name=findings.signature.person, organization_name=shorten(findings.signature.organisation)
    )
    return ObserverContext(observer_type=dicom_codes.DCM.Person, observer_identifying_attributes=attributes)


def _procedure(findings: Findings) -> Code:
    """The protocol's procedure, else the order's where its coding scheme is a known one, else a general one."""
    if findings.procedure is not None:
        return findings.procedure
    order = findings.context.order
    if order is not None and order.code is not None and order.code.scheme in SYSTEM_URLS:
        return order.code
    return IMAGING_PROCEDURE


def _build_group(findings: Findings, finding: Finding, seg: Dataset | None) -> Group:
    """One measurement group: TID 1411 on the finding's segment, or TID 1501 where it has none."""
    content: dict[str, Any] = {
        "tracking_identifier": TrackingIdentifier(finding.tracking_uid, finding.tracking_id),
        "finding_category": concept(CATEGORIES[finding.kind]) if finding.kind in CATEGORIES else None,
        "finding_type": concept(finding.kind),
        "finding_sites": _sites(finding),
        "algorithm_id": _algorithm(findings),
        "measurements": [*map(_measurement, _numbers(finding)), *_changes(findings, finding)],
        "qualitative_evaluations": [*_evaluations(finding.assessments), *status_evaluations(findings, finding)],
    }
    if seg is None or finding.segment_number is None:
        group: Group = MeasurementsAndQualitativeEvaluations(**content)
    else:
        segment = _referenced_segment(seg, finding.segment_number)
        group = VolumetricROIMeasurementsAndQualitativeEvaluations(referenced_segment=segment, **content)
    group[0].ContentSequence.extend(_texts(finding.assessments, finding.notes))
    group[0].ContentSequence.extend(lesion_items(findings, finding))
    return group


def _referenced_segment(seg: Dataset, number: int) -> ReferencedSegment:
    """The segment with the images that its frames came from. Built here because highdicom looks for the segment
    of a frame per frame only, and a SEG of one segment says it once, in the shared functional groups."""
    if len(seg.SegmentSequence) > 1:
        return ReferencedSegment.from_segmentation(seg, number)
    images = {
        str(source.ReferencedSOPInstanceUID): str(source.ReferencedSOPClassUID)
        for frame in seg.PerFrameFunctionalGroupsSequence
        for source in frame.DerivationImageSequence[0].SourceImageSequence
    }
    sources = [SourceImageForSegmentation(kind, uid) for uid, kind in images.items()]
    return ReferencedSegment(str(seg.SOPClassUID), str(seg.SOPInstanceUID), number, source_images=sources)


def _build_study_group(findings: Findings) -> MeasurementsAndQualitativeEvaluations:
    """What holds for the whole study: the overall category, the PSA, the prior that it was compared with, and what was
    left blank."""
    numbers = [_laboratory_value(findings.psa)] if findings.psa else []
    numbers += [_measurement(interval(findings.comparison))] if findings.comparison else []
    group = MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(
            derive_uid(findings.job_id, "finding", STUDY_TRACKING_ID), STUDY_TRACKING_ID
        ),
        finding_sites=[FindingSite(concept(findings.findings[0].site))] if findings.findings else None,
        measurements=numbers or None,
        qualitative_evaluations=_evaluations(findings.assessments),
    )
    group[0].ContentSequence.extend(_texts(findings.assessments, _comments(findings)))
    group[0].ContentSequence.extend(study_items(findings))
    return group


def _sites(finding: Finding) -> list[FindingSite]:
    """The most exact site first: sector, then zone; the organ where neither is known. Each with its side."""
    side = None if finding.laterality is None else concept(finding.laterality)
    places = [place for place in (finding.sector, finding.zone) if place is not None]
    return [FindingSite(concept(place), side) for place in places or [finding.site]]


def _algorithm(findings: Findings) -> AlgorithmIdentification:
    """TID 4019: the model that drew the region and gave the scores."""
    return AlgorithmIdentification(
        name=findings.model.name,
        version=findings.model.version,
        family=dicom_codes.DCM.ArtificialIntelligence,
        manufacturer=findings.model.manufacturer or None,
    )


def _numbers(finding: Finding) -> list[Measurement]:
    """The finding's measurements, and its confidence as one more."""
    if finding.confidence is None:
        return list(finding.measurements)
    confidence = Measurement("confidence", "Confidence", codes.CONFIDENCE, finding.confidence, codes.PROBABILITY, 2)
    return [*finding.measurements, confidence]


def _measurement(measurement: Measurement) -> MeasurementItem:
    """TID 300: the number exactly as every rendering shows it, with unit, method and derivation."""
    item = MeasurementItem(
        name=concept(measurement.concept),
        value=float(measurement.text),
        unit=concept(measurement.unit),
        method=None if measurement.method is None else concept(measurement.method),
        derivation=None if measurement.derivation is None else concept(measurement.derivation),
    )
    _write_number(item, measurement.text)
    return item


def _changes(findings: Findings, finding: Finding) -> Iterator[MeasurementItem]:
    """TID 300 for each number of the comparison; Observation DateTime says which ones are the prior's."""
    for number in finding_numbers(findings, finding):
        item = _measurement(number)
        if findings.comparison is not None and number.derivation == PRIOR_VALUE:
            item[0].ObservationDateTime = f"{findings.comparison.prior_study_date:%Y%m%d}"
        yield item


def _laboratory_value(value: ContextValue) -> MeasurementItem:
    """TID 300 for a value that the EHR gave; Observation DateTime says when it was taken."""
    unit = codes.NG_ML if value.unit == codes.NG_ML.value else Code(value.unit, "UCUM", value.unit)
    item = MeasurementItem(name=concept(value.code), value=value.value, unit=concept(unit))
    _write_number(item, f"{value.value:g}")
    item[0].ObservationDateTime = as_dt(value.effective_at)
    return item


def _write_number(item: MeasurementItem, text: str) -> None:
    """One number, one spelling: a second, binary copy of it could only disagree."""
    number = item[0].MeasuredValueSequence[0]
    number.NumericValue = text
    del number.FloatingPointValue


def _evaluations(assessments: Sequence[Assessment]) -> list[QualitativeEvaluation]:
    """Each category and each coded input that led to it, as coded question and answer."""
    pairs: list[tuple[Code, Code]] = []
    for assessment in assessments:
        pairs.append((assessment.concept, assessment.value))
        pairs += [(i.concept, i.code) for i in assessment.inputs if i.concept and i.code]
    return [QualitativeEvaluation(concept(name), concept(value)) for name, value in pairs]


def _texts(assessments: Sequence[Assessment], comments: Sequence[str]) -> Iterator[TextContentItem]:
    """Inputs that have a coded name but no coded value, why each category came out, and comments."""
    for assessment in assessments:
        for given in assessment.inputs:
            if given.concept is not None and given.code is None:
                yield _input_text(given.concept, given)
        yield _text(concept(codes.COMMENT), f"{assessment.explanation} (rule {assessment.rule})")
    for comment in comments:
        yield _text(concept(codes.COMMENT), comment)


def _input_text(name: Code, given: AssessmentInput) -> TextContentItem:
    return _text(concept(name), given.value)


def _text(name: CodedConcept, value: str) -> TextContentItem:
    return TextContentItem(name=name, value=value, relationship_type=RelationshipTypeValues.CONTAINS)


def _comments(findings: Findings) -> list[str]:
    """What was left blank, what the reader was warned of, what holds for the comparison, what people did; one sentence
    each, and the report in the signing person's words."""
    blanks = [f"Left blank: {blank.name}: {blank.reason}" for blank in findings.blanks]
    own_words = [f"Report as signed: {findings.report_text}"] if findings.report_text else []
    return [
        *blanks,
        *findings.warnings,
        *comparison_comments(findings),
        *revision_sentences(findings),
        *own_words,
    ]


def _find_missing(findings: Findings) -> list[str]:
    """Why the report is not complete; empty where it is."""
    if findings.status == "entered-in-error":
        return ["entered in error"]
    return [blank.name for blank in findings.blanks]


def _describe_completion(report: Dataset, findings: Findings) -> None:
    missing = _find_missing(findings)
    if missing:
        lead = "Missing" if findings.signature is None else "Complete as signed, left blank"
        report.CompletionFlagDescription = shorten(f"{lead}: {', '.join(missing)}")
        if findings.status == "entered-in-error":
            report.CompletionFlagDescription = "Withdrawn: entered in error"


def _date_verification(report: Dataset, findings: Findings) -> None:
    """Verification DateTime is when the person signed; highdicom takes the clock's."""
    if findings.signature is not None:
        report.VerifyingObserverSequence[0].VerificationDateTime = as_dt(findings.signature.signed_at)


def _predecessors(findings: Findings) -> list[Dataset] | None:
    """The report of the revision that this one replaces; its ids are derived as they were then."""
    revision = findings.predecessor_revision
    if revision is None:
        return None
    previous = Dataset()
    previous.SOPClassUID = Comprehensive3DSRStorage
    previous.SOPInstanceUID = derive_uid(findings.job_id, revision, "sr")
    previous.StudyInstanceUID = findings.study_instance_uid
    previous.SeriesInstanceUID = derive_uid(findings.job_id, revision, "sr-series")
    return [previous]


def _requests(findings: Findings, source: Dataset) -> list[Dataset] | None:
    """Referenced Request Sequence (PS3.3 C.17.2): the order, where the EHR gave one."""
    order = findings.context.order
    if order is None:
        return None
    item = Dataset()
    item.StudyInstanceUID = source.StudyInstanceUID
    item.ReferencedStudySequence = []
    item.AccessionNumber = source.get("AccessionNumber", "")
    item.PlacerOrderNumberImagingServiceRequest = shorten(order.placer_order_number)
    item.FillerOrderNumberImagingServiceRequest = shorten(order.filler_order_number)
    item.RequestedProcedureID = ""
    item.RequestedProcedureDescription = shorten(order.code.meaning) if order.code else ""
    known = order.code is not None and order.code.scheme in SYSTEM_URLS
    item.RequestedProcedureCodeSequence = [concept(order.code)] if order.code and known else []
    return [item]


def _all_codes(findings: Findings) -> Iterator[Code]:
    """Every code that the report may write, to find out which schemes need an introduction."""
    yield _procedure(findings)
    for finding in findings.findings:
        yield from (c for c in (finding.kind, finding.site, finding.zone, finding.sector) if c)
        for measurement in finding.measurements:
            yield from (c for c in (measurement.concept, measurement.method, measurement.derivation) if c)
    for assessment in (*findings.assessments, *(a for f in findings.findings for a in f.assessments)):
        yield from (assessment.concept, assessment.value)
        yield from (i.code for i in assessment.inputs if i.code)
    if findings.comparison is not None:
        yield interval(findings.comparison).concept

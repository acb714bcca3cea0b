"""findings_to_sr: the report's content and flags, with nothing found and with everything found."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from io import BytesIO
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import Comprehensive3DSRStorage

from mappings.model import codes
from mappings.model.codes import Code
from mappings.model.findings import AssessmentInput, Findings
from mappings.model.ids import derive_uid
from mappings.outputs.dicom_header import write_dicom
from mappings.outputs.findings_to_seg import findings_to_seg
from mappings.outputs.findings_to_sr import findings_to_sr
from tests.builders import build_context, build_findings, build_gland, build_lesion, build_masks
from tests.dicom_sources import build_sources


def render(findings: Findings, **changes: Any) -> Dataset:
    """The report, written and read again; `changes` go to the source headers."""
    sources = build_sources(**changes)
    seg = findings_to_seg(findings, build_masks(), sources)
    return pydicom.dcmread(BytesIO(write_dicom(findings_to_sr(findings, seg, sources))))


def children(item: Dataset, name: str) -> list[Dataset]:
    """The content items directly below `item` whose concept name has this code value."""
    return [i for i in item.ContentSequence if i.ConceptNameCodeSequence[0].CodeValue == name]


def read_groups(report: Dataset) -> dict[str, Dataset]:
    """The measurement groups by tracking identifier."""
    (measurements,) = children(report, "126010")
    groups = children(measurements, "125007")
    return {children(group, "112039")[0].TextValue: group for group in groups}


def read_numbers(group: Dataset) -> Iterator[tuple[str, str, str]]:
    """(quantity, value as written, unit) of each number."""
    for item in group.ContentSequence:
        if item.ValueType == "NUM":
            value = item.MeasuredValueSequence[0]
            unit = value.MeasurementUnitsCodeSequence[0].CodeValue
            yield (item.ConceptNameCodeSequence[0].CodeValue, str(value["NumericValue"].value), unit)


def read_codes(group: Dataset, name: str) -> list[str]:
    """The code values that answer the question `name`."""
    return [item.ConceptCodeSequence[0].CodeValue for item in children(group, name)]


def test_each_finding_is_a_group_with_its_numbers_in_the_one_spelling() -> None:
    findings = build_findings()
    groups = read_groups(render(findings))
    assert list(groups) == ["gland", "lesion-1", "lesion-2", "study"]
    for finding in findings.findings:
        group = groups[finding.tracking_id]
        assert finding.tracking_uid == children(group, "112040")[0].UID
        expected = [(m.concept.value, m.text, m.unit.value) for m in finding.measurements]
        if finding.confidence is not None:
            expected.append((codes.CONFIDENCE.value, "0.90", "1"))
        assert list(read_numbers(group)) == expected


def test_groups_are_tid_1411_on_the_segment_of_the_finding() -> None:
    report = render(build_findings())
    for tracking_id, number in (("gland", 1), ("lesion-1", 4), ("lesion-2", 5)):
        group = read_groups(report)[tracking_id]
        assert group.ContentTemplateSequence[0].TemplateIdentifier == "1411"
        (reference,) = (i.ReferencedSOPSequence[0] for i in children(group, "121191"))
        assert reference.ReferencedSegmentNumber == number
        assert reference.ReferencedSOPInstanceUID == derive_uid("test-job", 1, "seg")


def test_site_and_side() -> None:
    groups = read_groups(render(build_findings()))
    for tracking_id, sector, side in (
        ("lesion-1", "716921007", codes.RIGHT),
        ("lesion-2", "716922000", codes.LEFT),
    ):
        sites = children(groups[tracking_id], "363698007")
        assert [s.ConceptCodeSequence[0].CodeValue for s in sites] == [sector, codes.PERIPHERAL_ZONE.value]
        assert [read_codes(s, "272741003") for s in sites] == [[side.value]] * 2
    assert read_codes(groups["gland"], "363698007") == [codes.PROSTATE.value]


def test_methods_and_derivations() -> None:
    gland, lesion = (read_groups(render(build_findings()))[name] for name in ("gland", "lesion-1"))
    methods = [read_codes(item, "370129005") for item in children(gland, codes.VOLUME.value)]
    assert methods == [[codes.SEGMENTED_VOXELS.value], [codes.ELLIPSOID.value]]
    derivations = [read_codes(item, "121401") for item in children(lesion, codes.ADC.value)]
    assert derivations == [[codes.MEAN.value], [codes.TENTH_PERCENTILE.value]]


def test_category_and_each_input_are_coded_and_the_rule_is_explained() -> None:
    lesion = read_groups(render(build_findings()))["lesion-1"]
    assert read_codes(lesion, codes.PIRADS_LESION.value) == ["RID50299"]
    assert read_codes(lesion, codes.PIRADS_T2WI.value) == ["RID50305"]
    assert read_codes(lesion, codes.PIRADS_DWI.value) == ["RID50317"]
    assert read_codes(lesion, codes.PIRADS_DCE.value) == ["RID50327"]
    assert "DWI is dominant" in children(lesion, "121106")[0].TextValue


def test_an_input_without_a_code_is_written_in_words() -> None:
    lesion = build_lesion()
    inputs = (AssessmentInput("DCE", "not acquired", codes.PIRADS_DCE, None),)
    lesion = replace(lesion, assessments=(replace(lesion.assessments[0], inputs=inputs),))
    group = read_groups(render(build_findings(lesions=(lesion,))))["lesion-1"]
    assert [i.TextValue for i in children(group, codes.PIRADS_DCE.value)] == ["not acquired"]


def test_what_holds_for_the_study() -> None:
    study = read_groups(render(build_findings()))["study"]
    assert list(read_numbers(study)) == [(codes.PSA.value, "13", "ng/mL")]
    assert children(study, codes.PSA.value)[0].ObservationDateTime == "20260201080000+0000"
    assert read_codes(study, codes.PIRADS_OVERALL.value) == ["RID50292"]
    assert any("Left blank: DCE" in item.TextValue for item in children(study, "121106"))


def test_completion_is_honest() -> None:
    partial, complete = render(build_findings()), render(build_findings(blanks=()))
    assert (partial.CompletionFlag, partial.CompletionFlagDescription) == ("PARTIAL", "Missing: DCE")
    assert complete.CompletionFlag == "COMPLETE"
    assert "CompletionFlagDescription" not in complete
    assert partial.VerificationFlag == complete.VerificationFlag == "UNVERIFIED"


@pytest.mark.parametrize(
    ("status", "flag"),
    [("preliminary", "PRELIMINARY"), ("final", "FINAL"), ("amended", "FINAL"), ("corrected", "FINAL")],
)
def test_preliminary_flag_follows_the_status(status: str, flag: str) -> None:
    report = render(build_findings(status=status))
    assert report.PreliminaryFlag == flag
    assert report.VerificationFlag == "UNVERIFIED"


def test_entered_in_error_is_never_complete() -> None:
    report = render(build_findings(status="entered-in-error", blanks=()))
    assert (report.CompletionFlag, report.PreliminaryFlag) == ("PARTIAL", "PRELIMINARY")
    assert "entered in error" in report.CompletionFlagDescription


def test_a_revision_names_the_report_that_it_replaces() -> None:
    first = render(build_findings())
    second = render(build_findings(revision=2, predecessor_revision=1))
    assert "PredecessorDocumentsSequence" not in first
    series = second.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == first.SeriesInstanceUID != second.SeriesInstanceUID
    reference = series.ReferencedSOPSequence[0]
    assert reference.ReferencedSOPClassUID == Comprehensive3DSRStorage
    assert reference.ReferencedSOPInstanceUID == first.SOPInstanceUID != second.SOPInstanceUID


def test_evidence_lists_every_source_and_the_segmentation() -> None:
    report = render(build_findings())
    study = report.CurrentRequestedProcedureEvidenceSequence[0]
    listed = {
        item.ReferencedSOPInstanceUID
        for series in study.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    assert listed == {s.SOPInstanceUID for s in build_sources()} | {derive_uid("test-job", 1, "seg")}


def test_observer_model_order_and_procedure_are_stated() -> None:
    report = render(build_findings())
    assert read_codes(report, "121005") == ["121007"]
    assert children(report, "121015")[0].TextValue == "prostate_reference"
    assert read_codes(report, "121058") == ["36389-5"]
    request = report.ReferencedRequestSequence[0]
    assert request.AccessionNumber == "ACC-1"
    assert request.PlacerOrderNumberImagingServiceRequest == "PLAC-1"
    assert request.FillerOrderNumberImagingServiceRequest == "FILL-1"
    models = [item.get("ManufacturerModelName") for item in report.ContributingEquipmentSequence]
    assert "prostate_reference" in models


def test_procedure_of_the_protocol_comes_first_and_an_unknown_scheme_is_not_passed_on() -> None:
    mri = Code("719178004", "SCT", "Multiparametric MRI of prostate")
    assert read_codes(render(build_findings(procedure=mri)), "121058") == ["719178004"]
    known = build_context().order
    assert known is not None
    order = replace(known, code=Code("PROSMR", "local", "MR prostaat"))
    report = render(build_findings(context=build_context(order=order)))
    assert read_codes(report, "121058") == ["363679005"]
    assert len(report.ReferencedRequestSequence[0].RequestedProcedureCodeSequence) == 0


def test_a_code_of_ours_is_introduced() -> None:
    lesion = replace(build_lesion(), sector=Code("SECTOR-1", "99WETREAD", "A sector without a code"))
    schemes = render(build_findings(lesions=(lesion,))).CodingSchemeIdentificationSequence
    assert [item.CodingSchemeDesignator for item in schemes] == ["99WETREAD"]
    assert "CodingSchemeIdentificationSequence" not in render(build_findings())


def test_nothing_found_at_all_is_still_a_report() -> None:
    nothing = build_findings(
        lesions=(), findings=(), segments=(), assessments=(), psa=None, blanks=(), context=build_context(order=None)
    )
    report = render(nothing)
    assert list(read_groups(report)) == ["study"]
    assert report.CompletionFlag == "COMPLETE"
    assert "ReferencedRequestSequence" not in report


def test_no_lesion_leaves_the_gland() -> None:
    assert list(read_groups(render(build_findings(lesions=())))) == ["gland", "study"]


def test_a_finding_without_segment_is_a_group_without_region() -> None:
    gland = replace(build_gland(), segment_number=None)
    report = render(build_findings(lesions=(), findings=(gland,), segments=()))
    group = read_groups(report)["gland"]
    assert group.ContentTemplateSequence[0].TemplateIdentifier == "1501"
    assert not children(group, "121191")


def test_no_sources_is_refused() -> None:
    with pytest.raises(ValueError, match="none were given"):
        findings_to_sr(build_findings(), None, [])


def test_study_is_the_source_s_and_names_stay_readable() -> None:
    name = "Yamada^Tarou=山田^太郎=やまだ^たろう"
    report = render(build_findings(), SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientName=name)
    assert (report.SpecificCharacterSet, str(report.PatientName)) == ("ISO_IR 192", name)
    source = build_sources()[0]
    for keyword in ("PatientID", "StudyInstanceUID", "AccessionNumber", "StudyDate", "StudyID"):
        assert report[keyword].value == source[keyword].value


def test_equal_arguments_give_equal_bytes_and_nothing_is_taken_from_the_clock() -> None:
    findings, sources = build_findings(), build_sources()
    seg = findings_to_seg(findings, build_masks(), sources)
    first, second = (write_dicom(findings_to_sr(findings, seg, sources)) for _ in range(2))
    assert first == second
    assert datetime.now().strftime("%Y%m%d").encode() not in first


def test_image_library_lists_every_source_once_and_shares_what_is_shared() -> None:
    report = render(build_findings())
    (library,) = children(report, "111028")
    (group,) = children(library, "126200")
    images = [i.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for i in children(group, "260753009")]
    assert images == [source.SOPInstanceUID for source in build_sources()]
    assert len(children(group, "112227")) == 1
    assert not children(group, "110901")


@pytest.mark.parametrize("keyword", ["SliceThickness", "SpacingBetweenSlices", "PixelSpacing", "StudyID"])
def test_a_header_without_an_optional_value_is_no_obstacle(keyword: str) -> None:
    nothing = build_findings(lesions=(), findings=(), segments=())
    assert list(read_groups(render(nothing, **{keyword: None}))) == ["study"]

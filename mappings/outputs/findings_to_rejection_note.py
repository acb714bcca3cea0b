"""Findings that replace a revision -> the Key Object Selection that takes its objects out of view.

IHE Radiology, Imaging Object Change Management: a rejection note is a Key Object Selection (TID 2010) whose title
says why; the archive then hides what it references. SEG has no predecessor of its own (PS3.3 A.51), so this is how
an archive learns which segmentation counts. A superseded revision is rejected for quality, a withdrawn one for
patient safety, which leaves it to nobody.
"""

from collections.abc import Iterator, Sequence

from highdicom.ko import KeyObjectSelection, KeyObjectSelectionDocument
from highdicom.sr import ObserverContext, PersonObserverIdentifyingAttributes
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes as dicom_codes
from pydicom.uid import (
    Comprehensive3DSRStorage,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)

from mappings.model import codes
from mappings.model.findings import Findings
from mappings.model.ids import derive_uid
from mappings.model.revision import Predecessor
from mappings.outputs.dicom_header import (
    MANUFACTURER,
    PRODUCT,
    add_study,
    concept,
    copy_image_header,
    describe_model,
    local_time,
    serial_number,
    set_times,
    shorten,
    software_versions,
)
from mappings.outputs.revision_words import LEAD, revision_sentences

SERIES_NUMBER = 1004


def findings_to_rejection_note(findings: Findings, sources: Sequence[Dataset]) -> Dataset | None:
    """Writes the rejection note for the objects of the revision that `findings` replace; None where there is none.

    Segmentation and key images of the former revision are rejected; its report (SR) only where the result is
    withdrawn, as the new report names it as its predecessor. `sources` are instances of the study (the first one's
    header is enough). Equal arguments give equal bytes. Raises ValueError where `sources` is empty.
    """
    former = findings.predecessor
    rejected = [] if former is None else [*_list_objects(findings, former)]
    if not rejected:
        return None
    if not sources:
        raise ValueError("a rejection note needs an instance of the study; none was given")
    for item in rejected:
        _complete(item, sources[0])
    withdrawn = findings.status == "entered-in-error"
    selection = KeyObjectSelection(
        document_title=concept(codes.REJECTED_FOR_PATIENT_SAFETY if withdrawn else codes.REJECTED_FOR_QUALITY),
        referenced_objects=rejected,
        observer_person_context=_observer(findings),
        description=_describe(findings),
    )
    note = KeyObjectSelectionDocument(
        evidence=rejected,
        content=selection,
        series_instance_uid=derive_uid(findings.job_id, findings.revision, "ko-series"),
        series_number=SERIES_NUMBER,
        sop_instance_uid=derive_uid(findings.job_id, findings.revision, "ko"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        contributing_equipment=[describe_model(findings)],
        manufacturer_model_name=PRODUCT,
        software_versions=software_versions(findings),
        device_serial_number=serial_number(findings),
        series_description=shorten(f"Rejection note: {findings.protocol_title}"),
    )
    add_study(note, sources[0])
    set_times(note, local_time(findings, sources[0]))
    return note


def _list_objects(findings: Findings, former: Predecessor) -> Iterator[Dataset]:
    """The former revision's objects; their ids are derived as they were then."""

    def name(kind: str, sop_class: str, part: str, series: str) -> Dataset:
        item = Dataset()
        item.SOPClassUID = sop_class
        item.SOPInstanceUID = derive_uid(findings.job_id, former.revision, part)
        item.SeriesInstanceUID = derive_uid(findings.job_id, former.revision, series)
        item.Modality = kind
        return item

    if former.segmented:
        yield name("SEG", SegmentationStorage, "seg", "seg-series")
    if findings.status == "entered-in-error":
        yield name("SR", Comprehensive3DSRStorage, "sr", "sr-series")
    for image in (*([former.overview] if former.overview else []), *former.lesion_ids):
        item = name("OT", SecondaryCaptureImageStorage, f"sc-{image}", "sc-series")
        item.Rows, item.Columns = 1, 1  # says "image" to highdicom; neither is written
        yield item


def _complete(item: Dataset, source: Dataset) -> None:
    """What highdicom takes from the first object; patient and study are put on the note afterwards."""
    item.StudyInstanceUID = source.StudyInstanceUID
    for element in copy_image_header(source):
        if element.keyword.startswith(("Patient", "Study", "Accession", "Referring")) and element.keyword not in item:
            item.add(element)


def _observer(findings: Findings) -> ObserverContext | None:
    """The person who withdrew or signed; None where a re-run replaced the revision."""
    signed = findings.signature
    person = findings.rejection.person if findings.rejection else signed.person if signed else ""
    if not person:
        return None
    attributes = PersonObserverIdentifyingAttributes(name=person)
    return ObserverContext(observer_type=dicom_codes.DCM.Person, observer_identifying_attributes=attributes)


def _describe(findings: Findings) -> str:
    """Why, and what takes its place."""
    former = findings.predecessor_revision
    if findings.status == "entered-in-error":
        why = next((line.removeprefix(LEAD) for line in revision_sentences(findings)), "withdrawn.")
        return f"Withdrawn as entered in error: {why}"
    return f"Superseded: revision {findings.revision} replaces revision {former}."

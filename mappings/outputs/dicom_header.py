"""What every DICOM object that Wetread writes has in common: who, which study, which equipment, when.

Shared by `findings_to_seg`, `findings_to_sr` and `findings_to_key_images`.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from io import BytesIO

from highdicom import ContributingEquipment, SOPClass
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.sr import CodedConcept
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.filewriter import dcmwrite
from pydicom.sr.codedict import codes as dicom_codes
from pydicom.uid import ExplicitVRLittleEndian, SegmentationStorage
from pydicom.valuerep import DT, PersonName

from mappings.model.codes import Code
from mappings.model.findings import Findings
from mappings.model.ids import derive_uid

MANUFACTURER = "Wetread project"
PRODUCT = "Wetread"
NOT_VERIFIED = "AI result, not verified"
VERIFIED = "AI result, verified by a person"
WITHDRAWN = "AI result, WITHDRAWN, do not use"
PRIVATE_SCHEME = "99WETREAD"

STUDY_ATTRIBUTES = [
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "TypeOfPatientID",
    "IssuerOfPatientIDQualifiersSequence",
    "PatientBirthDate",
    "PatientBirthTime",
    "PatientSex",
    "OtherPatientIDsSequence",
    "EthnicGroup",
    "PatientComments",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
    "IssuerOfAccessionNumberSequence",
    "StudyDescription",
    "ProcedureCodeSequence",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "LongitudinalTemporalInformationModified",
    "TimezoneOffsetFromUTC",
]
"""Patient, General Study and Patient Study modules (PS3.3 C.7.1.1, C.7.2.1, C.7.2.2), as far as sources state
them."""

IMAGE_ATTRIBUTES = [
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "Modality",
    "InstanceNumber",
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "Manufacturer",
    "ManufacturerModelName",
    "SoftwareVersions",
    "DeviceSerialNumber",
    "InstitutionName",
    "StationName",
    "ImageType",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
    "PatientOrientation",
    "BodyPartExamined",
]
"""What the SEG, the image library and the references need to know of one source image."""

ALWAYS_PRESENT = [
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
]
"""Type 2 attributes: written empty where the source has none."""


def load_dicom_tables() -> None:
    """Loads highdicom's attribute tables (0.4 s, half a million objects, kept for good), so that no result waits
    for them. It loads them when it makes its first object, so this makes an empty one."""
    SOPClass(
        study_instance_uid=derive_uid("tables", "study"),
        series_instance_uid=derive_uid("tables", "series"),
        series_number=1,
        sop_instance_uid=derive_uid("tables", "instance"),
        instance_number=1,
        sop_class_uid=SegmentationStorage,
        modality="SEG",
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )


def copy_image_header(source: Dataset) -> Dataset:
    """The image attributes of `source` without the patient, for libraries to build on.

    The patient's and the study's attributes are empty, so that no library can reject or log them; `add_study`
    puts them on what was built. Pixel data is left behind.
    """
    header = Dataset()
    for keyword in (*IMAGE_ATTRIBUTES, "StudyInstanceUID"):
        if keyword in source:
            header.add(_as_unicode(source[keyword]))
    for keyword in ALWAYS_PRESENT:
        setattr(header, keyword, "")
    return header


def add_study(dataset: Dataset, source: Dataset) -> None:
    """Puts the patient's and the study's attributes of `source` on `dataset`, as Unicode under ISO_IR 192.

    Text is decoded with the source's own SpecificCharacterSet, so that a name written in ISO 2022 IR 87 stays
    readable when it is written again as UTF-8.
    """
    dataset.SpecificCharacterSet = "ISO_IR 192"
    for keyword in STUDY_ATTRIBUTES:
        if keyword in source:
            dataset.add(_as_unicode(source[keyword]))
        elif keyword in ALWAYS_PRESENT:
            setattr(dataset, keyword, "")


def _as_unicode(element: DataElement) -> DataElement:
    """The element detached from its source; names lose the bytes they were read from."""
    if element.VR == "PN":
        return DataElement(element.tag, "PN", PersonName(str(element.value)))
    if element.VR != "SQ":
        return DataElement(element.tag, element.VR, element.value)
    return DataElement(element.tag, "SQ", [_sequence_item(item) for item in element.value])


def _sequence_item(item: Dataset) -> Dataset:
    copy = Dataset()
    for element in item:
        copy.add(_as_unicode(element))
    return copy


def local_time(findings: Findings, source: Dataset) -> datetime:
    """`created_at` on the clock that the source's dates are on: its TimezoneOffsetFromUTC, else as it came."""
    offset = str(source.get("TimezoneOffsetFromUTC", "") or "")
    if len(offset) != 5:
        return findings.created_at
    minutes = int(offset[1:3]) * 60 + int(offset[3:5])
    zone = timezone(timedelta(minutes=-minutes if offset[0] == "-" else minutes))
    return findings.created_at.astimezone(zone)


def set_times(dataset: Dataset, created_at: datetime) -> None:
    """Overwrites every date and time that a library took from the clock with `created_at`."""
    for keyword in ("InstanceCreationDate", "ContentDate", "SeriesDate"):
        setattr(dataset, keyword, created_at.strftime("%Y%m%d"))
    for keyword in ("InstanceCreationTime", "ContentTime", "SeriesTime"):
        setattr(dataset, keyword, created_at.strftime("%H%M%S"))
    for item in dataset.get("ContributingEquipmentSequence", []):
        if item.get("ManufacturerModelName") == "highdicom":
            item.ContributionDateTime = as_dt(created_at)


def as_dt(moment: datetime) -> DT:
    """A DICOM DT with its offset from UTC."""
    return DT(moment.strftime("%Y%m%d%H%M%S%z"))


def describe_model(findings: Findings) -> ContributingEquipment:
    """The item of the Contributing Equipment Sequence (PS3.3 C.12.1) that names the model."""
    model = findings.model
    return ContributingEquipment(
        manufacturer=shorten(model.manufacturer or "unknown"),
        purpose_of_reference=dicom_codes.DCM.ProcessingEquipment,
        manufacturer_model_name=shorten(model.name),
        software_versions=shorten(model.version),
        contribution_datetime=as_dt(findings.created_at),
        contribution_description=shorten(
            f"AI model run by {PRODUCT}, protocol {findings.protocol_name} {findings.protocol_version}", 1024
        ),
    )


def software_versions(findings: Findings) -> list[str]:
    """SoftwareVersions of the written object: the protocol and the model that made it."""
    return [
        shorten(f"{findings.protocol_name} {findings.protocol_version}"),
        shorten(f"{findings.model.name} {findings.model.version}"),
    ]


def verification_words(findings: Findings) -> str:
    """What an object says first: whether a person stands behind it."""
    if findings.status == "entered-in-error":
        return WITHDRAWN
    return VERIFIED if findings.signature is not None else NOT_VERIFIED


def device_uid(findings: Findings) -> str:
    """The Device Observer UID: one for each version of the model."""
    model = findings.model
    return derive_uid("device", model.manufacturer, model.name, model.version)


def serial_number(findings: Findings) -> str:
    """DeviceSerialNumber (type 1 in the SEG): software has none, so the model's name and version stand in."""
    return shorten(f"{findings.model.name}-{findings.model.version}")


def concept(code: Code) -> CodedConcept:
    """The code as highdicom writes it; Code Meaning is LO, so it is cut at 64 characters."""
    return CodedConcept(code.value, code.scheme, shorten(code.meaning))


def private_schemes(codes: Sequence[Code]) -> list[CodingSchemeIdentificationItem] | None:
    """Coding Scheme Identification for Wetread's own scheme, None where no code is from it."""
    if not any(code.scheme == PRIVATE_SCHEME for code in codes):
        return None
    return [
        CodingSchemeIdentificationItem(
            PRIVATE_SCHEME,
            name="Wetread codes",
            responsible_organization=MANUFACTURER,
        )
    ]


def shorten(text: str, length: int = 64) -> str:
    """`text` fit for a DICOM text value: no backslash, at most `length` characters."""
    clean = text.replace("\\", "/").strip()
    return clean if len(clean) <= length else clean[: length - 3].rstrip() + "..."


def write_dicom(dataset: Dataset) -> bytes:
    """The dataset as a DICOM file (PS3.10); the same dataset always gives the same bytes."""
    buffer = BytesIO()
    dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()

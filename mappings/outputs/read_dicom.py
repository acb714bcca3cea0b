"""What any DICOM object of ours says about itself: identity, patient, study, model, time."""

from collections.abc import Iterator
from datetime import datetime, tzinfo
from io import BytesIO

import pydicom
from pydicom.dataset import Dataset

from mappings.model.findings import Findings
from mappings.model.ids import derive_uid
from mappings.outputs.read_facts import Facts, code_name, head, moment, withheld
from mappings.outputs.read_revision import verification_of

DOCUMENT = "document"


def read_dataset(data: bytes) -> Dataset:
    """The dataset of a DICOM file; raises what pydicom raises."""
    return pydicom.dcmread(BytesIO(data))


def text_of(dataset: Dataset, keyword: str) -> str:
    """An attribute as text without padding; empty where it is absent."""
    value = dataset.get(keyword)
    return "" if value is None else str(value).strip()


def items_of(dataset: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence; none where it is absent."""
    return list(dataset.get(keyword) or [])


def read_code(dataset: Dataset, keyword: str) -> str:
    """The code in a code sequence, in words; empty where there is none."""
    for item in items_of(dataset, keyword):
        value = text_of(item, "CodeValue") or text_of(item, "LongCodeValue") or text_of(item, "URNCodeValue")
        return code_name(text_of(item, "CodingSchemeDesignator"), value, text_of(item, "CodeMeaning"))
    return ""


def find_references(dataset: Dataset) -> Iterator[str]:
    """Every ReferencedSOPInstanceUID at any depth."""
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from find_references(item)
        elif element.keyword == "ReferencedSOPInstanceUID":
            yield str(element.value)


def plain_name(name: str) -> str:
    """A person name without the separators that carry nothing."""
    return "=".join(group.strip("^ ") for group in name.split("=")).rstrip("=")


def _made_at(dataset: Dataset, zone: tzinfo | None) -> datetime:
    """Content date and time, on the object's own clock or else on that of the findings."""
    stamp = text_of(dataset, "ContentDate") + text_of(dataset, "ContentTime").partition(".")[0]
    offset = text_of(dataset, "TimezoneOffsetFromUTC")
    if offset:
        return datetime.strptime(stamp + offset, "%Y%m%d%H%M%S%z")
    return datetime.strptime(stamp, "%Y%m%d%H%M%S").replace(tzinfo=zone)


def read_header(dataset: Dataset, findings: Findings) -> Facts:
    """The facts of the header. `findings` tells the zone of times and which optional attributes are known."""
    facts = Facts()
    for keyword in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        facts.add(DOCUMENT, keyword, text_of(dataset, keyword))
    facts.add(DOCUMENT, "PatientName", withheld(plain_name(text_of(dataset, "PatientName"))))
    for keyword, known in _identity(findings).items():
        if known or keyword in ("PatientID", "AccessionNumber"):
            facts.add(DOCUMENT, keyword, withheld(text_of(dataset, keyword)))
    for item in items_of(dataset, "ContributingEquipmentSequence"):
        purpose = read_code(item, "PurposeOfReferenceCodeSequence")
        if "109102" in purpose and text_of(item, "ManufacturerModelName") != "highdicom":
            facts.add(DOCUMENT, "model", _model(item, "ManufacturerModelName", "SoftwareVersions"))
    software = dataset.get("SoftwareVersions") or []
    for version in [software] if isinstance(software, str) else software:
        facts.add(DOCUMENT, "software version", head(str(version)))
    facts.add(DOCUMENT, "made at", moment(_made_at(dataset, findings.created_at.tzinfo)))
    words = verification_of(findings)
    said = text_of(dataset, "SeriesDescription").startswith(words)
    facts.add(DOCUMENT, "series description", f"says '{words}'" if said else "does not")
    return facts


def _model(item: Dataset, name: str, version: str) -> str:
    return f"{head(text_of(item, name))} {head(text_of(item, version))}"


def _identity(findings: Findings) -> dict[str, str]:
    patient = findings.patient
    return {
        "PatientID": patient.patient_id,
        "IssuerOfPatientID": patient.issuer,
        "PatientBirthDate": f"{patient.birth_date:%Y%m%d}" if patient.birth_date else "",
        "PatientSex": patient.sex,
        "AccessionNumber": findings.accession_number,
        "StudyDate": f"{findings.study_date:%Y%m%d}" if findings.study_date else "",
    }


def expect_header(findings: Findings, sop_class_uid: str, name: str, series: str) -> Facts:
    """What the header must say; `name` and `series` are the last parts that its UIDs are derived from."""
    facts = Facts()
    facts.add(DOCUMENT, "SOPClassUID", sop_class_uid)
    facts.add(DOCUMENT, "SOPInstanceUID", derive_uid(findings.job_id, findings.revision, name))
    facts.add(DOCUMENT, "SeriesInstanceUID", derive_uid(findings.job_id, findings.revision, series))
    facts.add(DOCUMENT, "StudyInstanceUID", findings.study_instance_uid)
    facts.add(DOCUMENT, "PatientName", withheld(plain_name(findings.patient.name.strip())))
    for keyword, known in _identity(findings).items():
        if known or keyword in ("PatientID", "AccessionNumber"):
            facts.add(DOCUMENT, keyword, withheld(known.strip()))
    model = findings.model
    facts.add(DOCUMENT, "model", expect_model(findings))
    facts.add(DOCUMENT, "software version", head(f"{findings.protocol_name} {findings.protocol_version}"))
    facts.add(DOCUMENT, "software version", head(f"{model.name} {model.version}"))
    facts.add(DOCUMENT, "made at", moment(findings.created_at))
    facts.add(DOCUMENT, "series description", f"says '{verification_of(findings)}'")
    return facts


def expect_model(findings: Findings) -> str:
    """The model's name and version as objects name them."""
    return f"{head(findings.model.name)} {head(findings.model.version)}"


def merge(*bags: Facts) -> Facts:
    """All facts of several bags."""
    facts = Facts()
    for bag in bags:
        for (where, what), values in bag.values.items():
            for value in values:
                facts.add(where, what, value)
    return facts

"""DICOM headers to the `Study` noun: what is there, and what is wrong with it."""

import re
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import date, datetime
from typing import Any

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence as DicomSequence

from mappings.model.study import InputProblem, Instance, PatientIdentity, Series, Study

_SIEMENS_B_VALUE = (0x0019, 0x100C)
_SIEMENS_CREATOR = (0x0019, 0x0010)
_GE_B_VALUE = (0x0043, 0x1039)
_PHILIPS_B_VALUE = (0x2001, 0x1003)
_B_VALUE_IN_SEQUENCE_NAME = re.compile(r"\bep_?b(\d{1,5})(?:t|#\d+)?$")
_GE_B_VALUE_OFFSET = 1_000_000_000

_HEADER_KEYWORDS = """
    AccessionNumber AcquisitionDate AcquisitionTime BodyPartExamined Columns ContrastBolusAgent DiffusionBValue EchoTime
    FrameOfReferenceUID ImageOrientationPatient ImagePositionPatient ImageType InstanceNumber InstitutionName
    IssuerOfAccessionNumberSequence IssuerOfPatientID MRAcquisitionType MagneticFieldStrength Manufacturer
    ManufacturerModelName Modality NumberOfFrames PatientAge PatientBirthDate PatientID PatientName PatientSex
    PixelSpacing ProtocolName ReferringPhysicianName RepetitionTime Rows SOPClassUID SOPInstanceUID ScanningSequence
    SequenceName SeriesDescription SeriesInstanceUID SeriesNumber SliceThickness SpecificCharacterSet StudyDate
    StudyDescription StudyID StudyInstanceUID StudyTime
"""
_PRIVATE = (_SIEMENS_CREATOR, _SIEMENS_B_VALUE, _GE_B_VALUE, _PHILIPS_B_VALUE)
HEADER_TAGS = frozenset(
    {f"{tag_for_keyword(keyword):08X}" for keyword in _HEADER_KEYWORDS.split()}
    | {f"{group:04X}{element:04X}" for group, element in _PRIVATE}
)
"""Every element that `datasets_to_study` looks at, as DICOM JSON names it: who asks for headers needs no other."""


def datasets_to_study(headers: Iterable[tuple[str, Dataset]]) -> Study:
    """The study that `headers` (pairs of spool file name and dataset, pixel data not needed) describe.

    The patient and study of most instances are taken. An instance of another study, and the second copy of one
    SOP instance, are named as a problem and left out; another patient's instance is named and stays in its series,
    where the geometry check names it too. An element that cannot be read counts as not stated.
    Raises ValueError where there is no DICOM instance at all.
    """
    pairs = list(headers)
    if not pairs:
        raise ValueError("no DICOM instances")
    study_uid = _most_common(_text(ds, "StudyInstanceUID") for _, ds in pairs)
    problems: list[InputProblem] = []
    members = _drop_foreign_studies(pairs, study_uid, problems)
    members = _drop_repeats(members, problems)
    patient_id = _most_common(_text(ds, "PatientID") for _, ds in members)
    for file, ds in members:
        if _text(ds, "PatientID") != patient_id:
            problems.append(
                InputProblem("other-patient", _text(ds, "SOPInstanceUID") or file, f"{file} belongs to another patient")
            )
    problems.extend(_identity_conflicts(members, patient_id))
    first = next(ds for _, ds in members if _text(ds, "PatientID") == patient_id)
    return Study(
        study_instance_uid=study_uid,
        patient=_patient(first),
        series=_series(members),
        accession_number=_first_text(members, "AccessionNumber"),
        accession_issuer=_issuer(first, "IssuerOfAccessionNumberSequence"),
        study_id=_text(first, "StudyID"),
        study_date=parse_date(_text(first, "StudyDate")),
        study_time=_text(first, "StudyTime"),
        description=_first_text(members, "StudyDescription"),
        referring_physician=_text(first, "ReferringPhysicianName"),
        patient_age=_text(first, "PatientAge"),
        institution=_text(first, "InstitutionName"),
        problems=tuple(problems),
    )


def _drop_foreign_studies(
    pairs: Sequence[tuple[str, Dataset]], study_uid: str, problems: list[InputProblem]
) -> list[tuple[str, Dataset]]:
    members = []
    for file, ds in pairs:
        if _text(ds, "StudyInstanceUID") == study_uid:
            members.append((file, ds))
        else:
            problems.append(InputProblem("other-study", file, f"{file} belongs to another study"))
    return members


def _drop_repeats(pairs: Sequence[tuple[str, Dataset]], problems: list[InputProblem]) -> list[tuple[str, Dataset]]:
    kept: dict[str, tuple[str, Dataset]] = {}
    for file, ds in pairs:
        uid = _text(ds, "SOPInstanceUID") or file
        if uid in kept:
            problems.append(
                InputProblem("repeated-instance", uid, f"{file} repeats SOP Instance UID {uid} of {kept[uid][0]}")
            )
        else:
            kept[uid] = (file, ds)
    return list(kept.values())


def _identity_conflicts(members: Sequence[tuple[str, Dataset]], patient_id: str) -> list[InputProblem]:
    """Issuer, birth date and sex must not differ within one patient id, nor accession numbers within one study."""
    problems = []
    for keyword, what in (
        ("IssuerOfPatientID", "issuers of the patient id"),
        ("PatientBirthDate", "birth dates"),
        ("PatientSex", "sexes"),
        ("AccessionNumber", "accession numbers"),
    ):
        stated = {_text(ds, keyword) for _, ds in members if _text(ds, "PatientID") == patient_id} - {""}
        if len(stated) > 1:
            problems.append(
                InputProblem("identity-conflict", keyword, f"the instances state {len(stated)} different {what}")
            )
    return problems


def _patient(ds: Dataset) -> PatientIdentity:
    return PatientIdentity(
        patient_id=_text(ds, "PatientID"),
        issuer=_text(ds, "IssuerOfPatientID"),
        name=_text(ds, "PatientName"),
        birth_date=parse_date(_text(ds, "PatientBirthDate")),
        sex=_text(ds, "PatientSex"),
    )


def _issuer(ds: Dataset, keyword: str) -> str:
    item = _safely(lambda: ds[keyword].value[0])
    if not isinstance(item, Dataset):
        return ""
    return _text(item, "UniversalEntityID") or _text(item, "LocalNamespaceEntityID")


def _series(members: Sequence[tuple[str, Dataset]]) -> tuple[Series, ...]:
    grouped: dict[str, list[tuple[str, Dataset]]] = defaultdict(list)
    for file, ds in members:
        grouped[_text(ds, "SeriesInstanceUID")].append((file, ds))
    series = [_one_series(uid, pairs) for uid, pairs in grouped.items()]
    return tuple(sorted(series, key=lambda s: (s.series_number is None, s.series_number or 0, s.series_instance_uid)))


def _one_series(uid: str, pairs: Sequence[tuple[str, Dataset]]) -> Series:
    ds = pairs[0][1]
    return Series(
        series_instance_uid=uid,
        modality=_text(ds, "Modality"),
        instances=tuple(_instance(file, each) for file, each in pairs),
        series_number=_integer(ds, "SeriesNumber"),
        description=_text(ds, "SeriesDescription"),
        protocol_name=_text(ds, "ProtocolName"),
        sequence_name=_text(ds, "SequenceName"),
        scanning_sequence=_words(ds, "ScanningSequence"),
        image_type=_words(ds, "ImageType"),
        body_part=_text(ds, "BodyPartExamined"),
        acquisition_type=_text(ds, "MRAcquisitionType"),
        contrast_agent=_text(ds, "ContrastBolusAgent"),
        echo_time_ms=_number(ds, "EchoTime"),
        repetition_time_ms=_number(ds, "RepetitionTime"),
        slice_thickness_mm=_number(ds, "SliceThickness"),
        manufacturer=_text(ds, "Manufacturer"),
        device_model=_text(ds, "ManufacturerModelName"),
        field_strength_t=_number(ds, "MagneticFieldStrength"),
        acquired=_text(ds, "AcquisitionDate") + _text(ds, "AcquisitionTime"),
    )


def _instance(file: str, ds: Dataset) -> Instance:
    position = _numbers(ds, "ImagePositionPatient", 3)
    orientation = _numbers(ds, "ImageOrientationPatient", 6)
    spacing = _numbers(ds, "PixelSpacing", 2)
    return Instance(
        sop_instance_uid=_text(ds, "SOPInstanceUID"),
        sop_class_uid=_text(ds, "SOPClassUID"),
        file=file,
        patient_id=_text(ds, "PatientID"),
        frame_of_reference_uid=_text(ds, "FrameOfReferenceUID"),
        instance_number=_integer(ds, "InstanceNumber"),
        rows=_integer(ds, "Rows") or 0,
        columns=_integer(ds, "Columns") or 0,
        number_of_frames=_integer(ds, "NumberOfFrames") or 1,
        pixel_spacing_mm=(spacing[0], spacing[1]) if spacing else None,
        position_mm=(position[0], position[1], position[2]) if position else None,
        orientation=tuple(orientation) if orientation else None,  # type: ignore[arg-type]
        b_value_s_mm2=read_b_value(ds),
    )


def read_b_value(ds: Dataset) -> float | None:
    """The diffusion b-value in s/mm2, or None where the instance does not state one.

    Looked for in DiffusionBValue (0018,9087), then the vendors' private elements (Siemens (0019,100C), GE
    (0043,1039), Philips (2001,1003)), then Siemens' sequence name (`*ep_b1000t`).
    """
    for read in (_standard_b_value, _siemens_b_value, _ge_b_value, _philips_b_value, _named_b_value):
        value = read(ds)
        if value is not None and 0 <= value < 100_000:
            return value
    return None


def _standard_b_value(ds: Dataset) -> float | None:
    return _number(ds, "DiffusionBValue")


def _siemens_b_value(ds: Dataset) -> float | None:
    creator = str(_safely(lambda: ds[_SIEMENS_CREATOR].value) or "SIEMENS")
    return _private_number(ds, _SIEMENS_B_VALUE) if "SIEMENS" in creator.upper() else None


def _ge_b_value(ds: Dataset) -> float | None:
    value = _private_number(ds, _GE_B_VALUE)
    return value % _GE_B_VALUE_OFFSET if value is not None else None


def _philips_b_value(ds: Dataset) -> float | None:
    """Philips states it as a binary float (FL), which is four bytes where the private dictionary was stripped."""
    value = _safely(lambda: ds[_PHILIPS_B_VALUE].value)
    if isinstance(value, bytes) and len(value) == 4:
        return _to_float(struct.unpack("<f", value)[0])
    return _private_number(ds, _PHILIPS_B_VALUE)


def _named_b_value(ds: Dataset) -> float | None:
    found = _B_VALUE_IN_SEQUENCE_NAME.search(_text(ds, "SequenceName"))
    return float(found.group(1)) if found else None


def _private_number(ds: Dataset, tag: tuple[int, int]) -> float | None:
    """The first number of a private element, which an implicit or stripped dictionary may give as bytes."""
    value = _safely(lambda: ds[tag].value)
    if isinstance(value, MultiValue | list | tuple):
        value = value[0] if value else None
    if isinstance(value, bytes):
        value = value.split(b"\\")[0].decode("ascii", "replace").strip("\0 ")
    return _to_float(value)


def _most_common(values: Iterable[str]) -> str:
    return Counter(values).most_common(1)[0][0]


def _first_text(members: Sequence[tuple[str, Dataset]], keyword: str) -> str:
    return next((text for _, ds in members if (text := _text(ds, keyword))), "")


def _safely(read: Callable[[], Any]) -> Any:
    """What `read` returns, or None: one unreadable element must not lose the instance. pydicom's conversions
    raise many kinds of error for a broken value."""
    try:
        return read()
    except Exception:
        return None


def _text(ds: Dataset, keyword: str) -> str:
    """The value as text, a backslash between several values as on the wire; empty for what is no text at all."""
    value = _safely(lambda: ds.get(keyword))
    if isinstance(value, MultiValue):
        return "\\".join(str(part) for part in value).strip("\0 ")
    return "" if value is None or isinstance(value, DicomSequence | bytes) else str(value).strip("\0 ")


def _words(ds: Dataset, keyword: str) -> tuple[str, ...]:
    text = _text(ds, keyword)
    return tuple(word.strip("\0 ") for word in text.split("\\")) if text else ()


def _to_float(value: Any) -> float | None:
    number = _safely(lambda: float(value))
    return number if number is not None and number == number and abs(number) != float("inf") else None


def _number(ds: Dataset, keyword: str) -> float | None:
    return _to_float(_safely(lambda: ds.get(keyword)))


def _integer(ds: Dataset, keyword: str) -> int | None:
    number = _number(ds, keyword)
    return None if number is None else int(number)


def _numbers(ds: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    values = _safely(lambda: [float(v) for v in ds.get(keyword)])
    if values is None or len(values) != count or any(v != v or abs(v) == float("inf") for v in values):
        return None
    return tuple(values)


def parse_date(text: str) -> date | None:
    """The date of a DICOM DA (YYYYMMDD) or None; nothing is read into fewer or other characters."""
    if not re.fullmatch("[0-9]{8}", text):
        return None
    parsed: date | None = _safely(lambda: datetime.strptime(text, "%Y%m%d").date())
    return parsed

"""What a search tells of a study, as the `Study` noun: enough to see whether it is a prior of another one.

Sources: QIDO-RS study and series attributes (PS3.18 tables 10.6.3-3 and 10.6.3-4); FHIR R4 ImagingStudy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mappings.inputs.dicom_to_study import parse_date
from mappings.inputs.fhir_elements import (
    Json,
    as_dict,
    as_list,
    as_text,
    normalise_reference,
    parse_day,
    read_concept_text,
    read_identifiers,
)
from mappings.model.study import PatientIdentity, Series, Study

WITHDRAWN = frozenset({"cancelled", "entered-in-error", "registered"})
"""FHIR imagingstudy-status of studies that hold no images of this patient, or none yet."""


def qido_to_study(study: Mapping[str, Any], series: Sequence[Mapping[str, Any]]) -> Study:
    """The study of QIDO-RS answers (DICOM JSON); attributes that the server left out are empty."""
    return Study(
        study_instance_uid=_value(study, "0020000D"),
        patient=PatientIdentity(
            _value(study, "00100020"),
            _value(study, "00100021"),
            birth_date=parse_date(_value(study, "00100030")),
            sex=_value(study, "00100040"),
        ),
        series=tuple(
            Series(
                _value(one, "0020000E"),
                _value(one, "00080060"),
                (),
                description=_value(one, "0008103E"),
                body_part=_value(one, "00180015"),
            )
            for one in series
        ),
        accession_number=_value(study, "00080050"),
        study_date=parse_date(_value(study, "00080020")),
        study_time=_value(study, "00080030"),
        description=_value(study, "00081030"),
    )


def imaging_study_to_study(
    resource: Json, patient: PatientIdentity, patient_references: frozenset[str]
) -> Study | None:
    """The study of a FHIR ImagingStudy, or None for one that is not this patient's, withdrawn, or without a study UID.
    `patient_references` are the names that the patient is referred to by."""
    subject = normalise_reference(as_text(as_dict(resource.get("subject")).get("reference")))
    if subject not in patient_references or as_text(resource.get("status")) in WITHDRAWN:
        return None
    identifiers = read_identifiers(resource)
    uids = [i.value.removeprefix("urn:oid:") for i in identifiers if i.system == "urn:dicom:uid"]
    if not uids:
        return None
    texts = [as_text(resource.get("description")), *map(read_concept_text, as_list(resource.get("procedureCode")))]
    return Study(
        study_instance_uid=uids[0],
        patient=patient,
        series=tuple(_series(as_dict(one)) for one in as_list(resource.get("series"))) or _modalities(resource),
        accession_number=next((i.value for i in identifiers if i.type_code == "ACSN"), ""),
        study_date=parse_day(resource.get("started")),
        description=next(filter(None, texts), ""),
    )


def _series(series: Json) -> Series:
    site = as_dict(series.get("bodySite"))
    return Series(
        as_text(series.get("uid")),
        as_text(as_dict(series.get("modality")).get("code")),
        (),
        description=as_text(series.get("description")),
        body_part=as_text(site.get("display")).upper(),
    )


def _modalities(resource: Json) -> tuple[Series, ...]:
    """One series for each modality that is stated for the study as a whole."""
    codes = [as_text(as_dict(coding).get("code")) for coding in as_list(resource.get("modality"))]
    return tuple(Series("", code, ()) for code in codes if code)


def modalities_in_study(study: Mapping[str, Any]) -> tuple[str, ...]:
    """ModalitiesInStudy (0008,0061) of a QIDO-RS answer; empty where the server does not tell."""
    return tuple(dict.fromkeys(filter(None, map(_text, _values(study, "00080061")))))


def _value(headers: Mapping[str, Any], tag: str) -> str:
    return next(map(_text, _values(headers, tag)), "")


def _values(headers: Mapping[str, Any], tag: str) -> list[Any]:
    return as_list(as_dict(headers.get(tag)).get("Value"))


def _text(value: object) -> str:
    """What is no text or number (DICOM JSON has objects and nulls too) counts as not there."""
    return str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""

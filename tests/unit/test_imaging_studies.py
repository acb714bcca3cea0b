"""What QIDO-RS answers and FHIR ImagingStudies tell of a study, also where they are malformed or hostile."""

from dataclasses import replace
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mappings.inputs.imaging_studies_to_studies import (
    WITHDRAWN,
    imaging_study_to_study,
    modalities_in_study,
    qido_to_study,
)
from mappings.model.study import PatientIdentity, Series, Study

PATIENT = PatientIdentity("4711", "HOSPITAL", birth_date=date(1961, 2, 3), sex="M")
MINE = frozenset({"Patient/1"})


def answer(**elements: Any) -> dict[str, Any]:
    """DICOM JSON of these values by tag (written tXXXXXXXX)."""
    return {tag.removeprefix("t"): {"vr": "LO", "Value": [value]} for tag, value in elements.items()}


WHOLE = answer(
    t0020000D="1.2.3", t00100020="4711", t00100021="HOSPITAL", t00100030="19610203", t00100040="M",
    t00080050="ACC", t00080020="20250302", t00080030="101500.25", t00081030="MR prostate",
)  # fmt: skip
SERIES = answer(t0020000E="1.2.3.4", t00080060="MR", t0008103E="t2_tse_tra", t00180015="PROSTATE")


def test_study_of_a_whole_answer() -> None:
    study = qido_to_study(WHOLE, [SERIES])
    assert (study.study_instance_uid, study.patient) == ("1.2.3", PATIENT)
    assert (study.accession_number, study.study_date, study.study_time) == ("ACC", date(2025, 3, 2), "101500.25")
    (series,) = study.series
    assert (series.modality, series.description, series.body_part) == ("MR", "t2_tse_tra", "PROSTATE")


def test_what_the_server_left_out_is_empty() -> None:
    study = qido_to_study({}, [{}])
    assert replace(study, series=()) == Study("", PatientIdentity(""), ())
    assert study.series == (Series("", "", ()),)
    assert qido_to_study({"00080020": {"vr": "DA"}}, ()).study_date is None


@pytest.mark.parametrize(
    "element",
    [
        None, 7, "text", [], ["a"], {}, {"Value": None}, {"Value": "1.2.3"}, {"Value": {}}, {"Value": []},
        {"Value": [None]}, {"Value": [{}]}, {"Value": [[]]}, {"Value": [True]}, {"Value": [{"Alphabetic": "A^B"}]},
    ],
)  # fmt: skip
def test_malformed_element_counts_as_not_there(element: Any) -> None:
    for tag in WHOLE:
        study = qido_to_study({**WHOLE, tag: element}, ())
        assert study == qido_to_study({k: v for k, v in WHOLE.items() if k != tag}, ())
    assert modalities_in_study({"00080061": element}) == ()


def test_numbers_are_text_and_modalities_come_once_each() -> None:
    assert qido_to_study(answer(t00100020=4711), ()).patient.patient_id == "4711"
    assert modalities_in_study({"00080061": {"Value": ["MR", " SEG ", "", None, "MR", 3]}}) == ("MR", "SEG", "3")


@pytest.mark.parametrize("day", ["2025030", "20250230", "2025-03-02", "20250302-20250303", "99999999", "*"])
def test_what_is_no_date_is_none(day: str) -> None:
    assert qido_to_study({**WHOLE, **answer(t00080020=day)}, ()).study_date is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
TAGS = st.sampled_from([*WHOLE, *SERIES, "00080061"])
KEYS = st.sampled_from(
    ["status", "identifier", "subject", "series", "modality", "started", "description", "procedureCode"]
)


@given(st.dictionaries(TAGS, JSON | st.fixed_dictionaries({"Value": JSON})), st.lists(st.dictionaries(TAGS, JSON)))
def test_no_answer_raises(study: dict[str, Any], series: list[dict[str, Any]]) -> None:
    found = qido_to_study(study, series)
    assert isinstance(found.study_instance_uid, str)
    assert len(found.series) == len(series)
    modalities_in_study(study)


# FHIR


def imaging(**changes: Any) -> dict[str, Any]:
    return {
        "resourceType": "ImagingStudy",
        "status": "available",
        "subject": {"reference": "Patient/1"},
        "identifier": [
            {"system": "urn:dicom:uid", "value": "urn:oid:1.2.3"},
            {"type": {"coding": [{"code": "ACSN"}]}, "value": "ACC"},
        ],
        "started": "2025-03-02T10:15:00Z",
        "description": "MR prostate",
        "series": [{"uid": "1.2.3.4", "modality": {"code": "MR"}, "bodySite": {"display": "Prostate"}}],
        **changes,
    }


def read(resource: dict[str, Any]) -> Study | None:
    return imaging_study_to_study(resource, PATIENT, MINE)


def test_study_of_a_whole_resource() -> None:
    study = read(imaging())
    assert study is not None
    assert (study.study_instance_uid, study.accession_number, study.study_date) == ("1.2.3", "ACC", date(2025, 3, 2))
    assert (study.patient, study.description) == (PATIENT, "MR prostate")
    assert [(s.modality, s.body_part) for s in study.series] == [("MR", "PROSTATE")]


@pytest.mark.parametrize(
    "subject",
    [
        None, {}, "Patient/1", {"reference": "Patient/2"}, {"reference": "Group/1"}, {"reference": 1},
        {"reference": "Patient/11"}, {"identifier": {"value": "4711"}}, {"reference": ""},
    ],
)  # fmt: skip
def test_somebody_else_s_study_is_none(subject: Any) -> None:
    assert read(imaging(subject=subject)) is None


@pytest.mark.parametrize("reference", ["Patient/1", "http://ehr/fhir/Patient/1", "Patient/1/_history/3"])
def test_patient_is_known_by_every_form_of_the_reference(reference: str) -> None:
    assert read(imaging(subject={"reference": reference})) is not None


@pytest.mark.parametrize("status", sorted(WITHDRAWN))
def test_withdrawn_study_is_none(status: str) -> None:
    assert read(imaging(status=status)) is None


@pytest.mark.parametrize("identifier", [None, [], "x", [7], [{}], [{"system": "urn:other", "value": "1.2.3"}]])
def test_study_without_a_uid_is_none(identifier: Any) -> None:
    assert read(imaging(identifier=identifier)) is None


def test_modalities_of_the_whole_study_stand_in_for_missing_series() -> None:
    study = read(imaging(series=None, modality=[{"code": "MR"}, 7, {"code": ""}, {"code": "SEG"}]))
    assert study is not None
    assert [series.modality for series in study.series] == ["MR", "SEG"]


@pytest.mark.parametrize("started", [None, "2025", "2025-03", "yesterday", 20250302, "2025-02-30"])
def test_study_without_an_exact_day_has_none(started: Any) -> None:
    study = read(imaging(started=started))
    assert study is not None
    assert study.study_date is None


@given(st.dictionaries(KEYS, JSON))
def test_no_resource_raises(changes: dict[str, Any]) -> None:
    read(imaging(**changes))

"""FHIR resources to events: numbers are never guessed, a status says what it means, and nothing raises."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mappings.inputs.fhir_to_event import NumberSystems, is_merged_away, references_of, resources_to_events
from mappings.model.events import Event, OrderEvent, PatientEvent, UnhandledEvent

Json = dict[str, Any]

UID = "1.2.840.99.7"
MRN = "urn:oid:1.2.3"
PATIENT: Json = {
    "resourceType": "Patient",
    "id": "p1",
    "identifier": [{"system": MRN, "value": "M-canary"}],
    "birthDate": "1961-02-03",
    "gender": "female",
}


def identifier(value: str, code: str = "", system: str = "") -> Json:
    made: Json = {"value": value, **({"system": system} if system else {})}
    return {**made, "type": {"coding": [{"code": code}]}} if code else made


def order(*identifiers: Json, **more: Any) -> Json:
    return {
        "resourceType": "ServiceRequest",
        "id": "s1",
        "meta": {"lastUpdated": "2026-03-04T10:30:00.123+00:00"},
        "identifier": list(identifiers) or [identifier("A-canary", "ACSN")],
        "status": "active",
        "intent": "order",
        "subject": {"reference": "Patient/p1"},
        **more,
    }


def study(*identifiers: Json, **more: Any) -> Json:
    uid = {"system": "urn:dicom:uid", "value": f"urn:oid:{UID}"}
    return {**order(uid, *identifiers, status="available"), "resourceType": "ImagingStudy", "id": "i1", **more}


def event(*resources: object, **systems: str) -> Event:
    (one,) = resources_to_events(resources, NumberSystems(**systems))
    return one


def order_event(*resources: object, **systems: str) -> OrderEvent:
    one = event(*resources, **systems)
    assert isinstance(one, OrderEvent), one
    return one


def problem(*resources: object, **systems: str) -> str:
    """The only problem of what these resources tell, which names nobody and no number."""
    one = event(*resources, **systems)
    assert isinstance(one, OrderEvent | PatientEvent), one
    (sentence,) = one.problems
    assert "canary" not in sentence
    return sentence


def test_order_with_everything() -> None:
    one = order_event(
        order(
            identifier("A1", "ACSN", "urn:a"),
            identifier("P1", "PLAC"),
            identifier("F1", "FILL"),
            code={"coding": [{"system": "http://loinc.org", "code": "36572-6", "display": "MRI prostate"}]},
            priority="stat",
            reasonCode=[{"text": "Raised\x00 PSA"}, {"coding": [{"code": "x", "display": "Pain"}]}],
            requester={"display": "Dr. Ada^Canary\\Smith"},
            occurrenceDateTime="2026-03-05T08:00:00+01:00",
        ),
        PATIENT,
    )
    assert (one.accession_number, one.accession_authority) == ("A1", "urn:a")
    assert (one.placer_order_number, one.filler_order_number, one.study_instance_uid) == ("P1", "F1", "")
    assert (one.control, one.status, one.priority) == ("resume", "requested", "S")
    assert one.procedure is not None
    assert (one.procedure.value, one.procedure.scheme, one.procedure.meaning) == ("36572-6", "LN", "MRI prostate")
    assert (one.reason, one.requester) == ("Raised PSA; Pain", "Dr. Ada Canary Smith")
    assert one.scheduled_at is not None
    assert one.scheduled_at.isoformat() == "2026-03-05T08:00:00+01:00"
    assert one.occurred_at is not None
    assert (one.patient.patient_id, one.patient.issuer, one.patient.sex) == ("M-canary", MRN, "F")
    assert str(one.patient.birth_date) == "1961-02-03"
    assert one.problems == ()


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("draft", ("new", "")),
        ("active", ("resume", "requested")),
        ("on-hold", ("hold", "requested")),
        ("revoked", ("cancel", "cancelled")),
        ("completed", ("complete", "completed")),
        ("entered-in-error", ("cancel", "cancelled")),
        ("unknown", ("status", "")),
    ],
)
def test_status_of_an_order(status: str, expected: tuple[str, str]) -> None:
    one = order_event(order(status=status), PATIENT)
    assert (one.control, one.status) == expected


@pytest.mark.parametrize("status", ["", "done", "ACTIVE", None, 1, ["active"]])
def test_status_that_is_none_is_a_problem(status: object) -> None:
    assert "status" in problem(order(status=status), PATIENT)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"intent": "proposal"}, "intent"),
        ({"intent": "plan"}, "intent"),
        ({"intent": None}, "intent"),
        ({"doNotPerform": True}, "doNotPerform"),
        ({"identifier": []}, "number"),
        ({"identifier": [identifier("X1")]}, "number"),
        ({"identifier": [identifier("X1", system="urn:other")]}, "number"),
        ({"identifier": [identifier("X1", "MR")]}, "number"),
    ],
)
def test_request_that_is_no_order_or_has_no_number_is_not_acted_on(more: Json, reason: str) -> None:
    one = event(order(**more), PATIENT)
    assert isinstance(one, UnhandledEvent)
    assert reason in one.reason


def test_untyped_number_counts_where_the_site_names_its_system() -> None:
    told = order(identifier("A1", system="urn:acc"), identifier("P1", system="urn:plac"), identifier("X"))
    one = order_event(told, PATIENT, accession="urn:acc", placer="urn:plac", filler="urn:fill")
    assert (one.accession_number, one.placer_order_number, one.filler_order_number) == ("A1", "P1", "")


def test_type_of_an_identifier_wins_over_its_system() -> None:
    assert event(order(identifier("P1", "PLAC", "urn:acc")), PATIENT, accession="urn:acc").accession_number == ""


def test_two_numbers_of_a_kind_are_a_problem() -> None:
    assert "ACSN" in problem(order(identifier("canary1", "ACSN"), identifier("canary2", "ACSN")), PATIENT)
    assert order_event(order(identifier("A1", "ACSN", "u:1"), identifier("A1", "ACSN")), PATIENT).problems == ()


def test_number_with_control_characters_is_a_problem() -> None:
    assert "control characters" in problem(order(identifier("A\x00canary", "ACSN")), PATIENT)


# Imaging studies


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("registered", ("status", "scheduled")),
        ("available", ("status", "in-progress")),
        ("unknown", ("status", "")),
        ("cancelled", ("cancel", "cancelled")),
        ("entered-in-error", ("cancel", "cancelled")),
    ],
)
def test_status_of_a_study(status: str, expected: tuple[str, str]) -> None:
    one = order_event(study(identifier("A1", "ACSN"), status=status), PATIENT)
    assert (one.control, one.status, one.study_instance_uid) == (*expected, UID)
    assert one.accession_number == ("" if expected[0] == "cancel" else "A1"), "an error may be in its accession number"


def test_study_has_the_numbers_of_the_order_it_is_based_on() -> None:
    told = study(basedOn=[{"reference": "ServiceRequest/s1"}], modality=[{"system": "http://dicom", "code": "MR"}])
    one = order_event(told, PATIENT, order(identifier("A1", "ACSN"), identifier("P1", "PLAC", "urn:p")))
    assert (one.accession_number, one.placer_order_number, one.placer_authority) == ("A1", "P1", "urn:p")
    assert (one.study_instance_uid, one.modality) == (UID, "MR")


def test_study_and_order_that_contradict_each_other_are_a_problem() -> None:
    told = study(identifier("A1", "ACSN"), basedOn=[{"reference": "ServiceRequest/s1"}])
    assert "accession number" in problem(told, PATIENT, order(identifier("A2", "ACSN")))


def test_study_of_two_orders_takes_the_numbers_of_neither() -> None:
    told = study(basedOn=[{"reference": "ServiceRequest/s1"}, {"reference": "ServiceRequest/s2"}])
    assert order_event(told, PATIENT, order(), {**order(), "id": "s2"}).accession_number == ""


def test_study_without_a_uid_is_not_acted_on() -> None:
    one = event({**study(), "identifier": [identifier("A1", "ACSN")]}, PATIENT)
    assert isinstance(one, UnhandledEvent)


@pytest.mark.parametrize("uid", ["urn:oid:canary", "urn:uuid:c757873d-ec9a-4326-a141-556f43239520", "1.02.3"])
def test_uid_that_is_none_is_a_problem(uid: str) -> None:
    assert "UID" in problem({**study(), "identifier": [{"system": "urn:dicom:uid", "value": uid}]}, PATIENT)


# Patients


def test_patient_id_is_that_of_the_sites_system_whose_authority_is_left_out() -> None:
    ids = [identifier("SSN", "MR", "urn:ssn"), identifier("M1", "", MRN), identifier("M2", "", "urn:other")]
    one = order_event(order(), {**PATIENT, "identifier": ids}, patient=MRN)
    assert (one.patient.patient_id, one.patient.issuer) == ("M1", "")
    assert {i.value for i in one.patient_identifiers} == {"SSN", "M1", "M2"}


@pytest.mark.parametrize(
    "ids",
    [
        [],
        [identifier("canary", "", "urn:other")],
        [identifier("canary1", "", MRN), identifier("canary2", "", MRN)],
        [identifier("canary\x01", "", MRN)],
    ],
)
def test_patient_without_one_id_of_the_sites_system_is_a_problem(ids: list[Json]) -> None:
    problem(order(), {**PATIENT, "identifier": ids}, patient=MRN)


def test_identifier_that_is_no_longer_in_use_is_not_the_patients() -> None:
    ids = [{**identifier("OLD", "MR"), "use": "old"}, identifier("NEW", "MR")]
    assert order_event(order(), {**PATIENT, "identifier": ids}).patient.patient_id == "NEW"


def test_subject_without_a_patient_is_its_identifier_or_a_problem() -> None:
    named = {"reference": "Patient/gone", "identifier": identifier("M1", "MR", MRN)}
    assert order_event(order(subject=named)).patient.patient_id == "M1"
    for subject in (None, {}, {"reference": "Patient/p2"}, {"reference": "#p1"}, {"display": "canary"}, "p1"):
        assert "patient" in problem(order(subject=subject), PATIENT)


def merge(**more: Any) -> Json:
    link = {"other": {"reference": "Patient/p1"}, "type": "replaced-by"}
    return {**PATIENT, "id": "p0", "identifier": [identifier("GONE", "", MRN)], "link": [link], **more}


def test_merge() -> None:
    one = event(merge(), PATIENT)
    assert isinstance(one, PatientEvent)
    assert (one.kind, one.patient.patient_id) == ("merge", "M-canary")
    assert one.merged_patient is not None
    assert one.merged_patient.patient_id == "GONE"
    assert one.problems == ()


def test_merged_patient_whose_identifiers_are_all_old_is_known_by_them() -> None:
    one = event(merge(identifier=[{**identifier("GONE", "", MRN), "use": "old"}]), PATIENT, patient=MRN)
    assert isinstance(one, PatientEvent)
    assert one.merged_patient is not None
    assert one.merged_patient.patient_id == "GONE"


def test_merge_that_cannot_be_told_is_a_problem() -> None:
    other = {"other": {"reference": "Patient/p9"}, "type": "replaced-by"}
    assert "same patient id" in problem(merge(identifier=PATIENT["identifier"]), PATIENT)
    assert "more than one" in problem(merge(link=[*merge()["link"], other]), PATIENT)
    survivor_gone = event(merge())
    assert isinstance(survivor_gone, PatientEvent)
    assert "cannot be read" in survivor_gone.problems[0]


def test_patient_who_was_not_merged_is_not_acted_on() -> None:
    replaces = {"other": {"reference": "Patient/p0"}, "type": "replaces"}
    for patient in (PATIENT, {**PATIENT, "link": [replaces]}, {**PATIENT, "link": "x"}):
        assert not is_merged_away(patient)
        assert isinstance(event(patient), UnhandledEvent)
    assert is_merged_away(merge())


def test_what_a_resource_needs_beside_it() -> None:
    assert references_of(order()) == ("Patient/p1",)
    assert references_of(study(basedOn=[{"reference": "ServiceRequest/s1"}])) == ("Patient/p1", "ServiceRequest/s1")
    assert references_of(merge()) == ("Patient/p1",)
    assert references_of({"resourceType": "Observation", "subject": {"reference": "Patient/p1"}}) == ()


# What is no resource


@pytest.mark.parametrize("resource", [None, [], "x", 1, {}, {"resourceType": 1}, {"resourceType": "Observation"}])
def test_what_is_not_acted_on(resource: object) -> None:
    assert isinstance(event(resource), UnhandledEvent)


def test_nothing_at_all_is_not_acted_on() -> None:
    assert isinstance(event(), UnhandledEvent)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "value",
                    "system",
                    "type",
                    "coding",
                    "code",
                    "reference",
                    "identifier",
                    "display",
                    "other",
                    "use",
                    "text",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
ELEMENTS = (
    "identifier",
    "status",
    "intent",
    "subject",
    "basedOn",
    "link",
    "code",
    "reasonCode",
    "requester",
    "meta",
    "modality",
    "priority",
    "occurrenceDateTime",
    "birthDate",
    "gender",
    "doNotPerform",
    "id",
)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(["ServiceRequest", "ImagingStudy", "Patient"]),
    broken=st.dictionaries(st.sampled_from(ELEMENTS), JSON, max_size=4),
    of_patient=st.dictionaries(st.sampled_from(ELEMENTS), JSON, max_size=3),
)
def test_no_malformed_resource_raises(kind: str, broken: Json, of_patient: Json) -> None:
    told = {"ServiceRequest": order(), "ImagingStudy": study(), "Patient": merge()}[kind] | broken
    assert isinstance(event(told, {**PATIENT, **of_patient}, order()), OrderEvent | PatientEvent | UnhandledEvent)
    references_of(told)
    is_merged_away(told)

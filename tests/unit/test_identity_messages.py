"""Identity gates against what HL7 told and what the site lists as names of one authority: every way to disagree."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mappings.inputs.fhir_to_context import fhir_to_context
from mappings.model.context import ClinicalContext, ContextPatient, Identifier
from mappings.model.study import PatientIdentity, Study
from middleware.intake.context import read_chart
from middleware.intake.identity import digest_identity, find_disagreements, find_heard_disagreements
from middleware.store.issuers import are_other_issuers, may_be_same_issuer, names_of_issuer
from tests.hl7_inbox import Inbox, write_message, write_order

UID, OTHER_UID = "1.2.3", "1.2.4"
ISSUERS = (("HOSPITAL", "HOSP", "urn:oid:1.2.840.1"), ("Clinic of the Lake", "LAKE", "http://lake.example/mrn"))
STUDY = Study(
    UID, PatientIdentity("4711", birth_date=date(1961, 2, 3), sex="F"), (), accession_number="ACC"
)  # the patient that tests.hl7_inbox writes into PID
CANCELLED = "the order of this study is cancelled"
ANOTHERS = "the order of this study is another patient's"
MERGED = "the patient of the images was merged into another one (ADT^A40); correct the images first"
OTHER_STUDY = "the order of this accession number is for another Study Instance UID"
OTHER_ACCESSION = "the accession number in the images differs from the one of the order for this study"
TWO_PATIENTS = "an order message of this study names another patient than those before it, and was refused"
BIRTH = "the birth date in the images differs from the one told by HL7"
SEX = "the sex in the images differs from the one told by HL7"


def inbox_of(*raws: bytes, issuers: Sequence[Sequence[str]] = ()) -> Inbox:
    inbox = Inbox(issuers=issuers)
    for raw in raws:
        assert inbox.hear(raw).state == "applied"
    return inbox


def images(accession: str = "ACC", **patient: Any) -> Study:
    return replace(STUDY, accession_number=accession, patient=replace(STUDY.patient, **patient))


def order(number: str, control: str, accession: str, study: str, **how: Any) -> bytes:
    return write_order(number, control, (f"P-{number}", "", accession, study), **how)


def adt(kind: str = "ADT^A08", *, patient: str = "4711", authority: str = "HOSP", **words: str) -> bytes:
    raw = write_message(kind, f"{kind}-{patient}-{authority}", patient=patient, authority=authority)
    for old, new in words.items():
        raw = raw.replace({"born": b"19610203", "sex": b"|F\r"}[old], new.encode())
    return raw


def merge(away: str, into: str, *, authority: str = "HOSP", away_authority: str = "") -> bytes:
    away_authority = away_authority or authority
    name = f"m-{away}-{into}-{authority}-{away_authority}"
    return write_message("ADT^A40", name, f"MRG|{away}^^^{away_authority}", patient=into, authority=authority)


def why(study: Study, *raws: bytes, issuers: Sequence[Sequence[str]] = ()) -> tuple[str, ...]:
    found = find_heard_disagreements(study, inbox_of(*raws, issuers=issuers).store, issuers)
    assert not any(word in " ".join(found) for word in ("4711", "Canary", "1961", "ACC", UID, OTHER_UID, "LAKE"))
    return found


# Orders


@pytest.mark.parametrize(
    ("raws", "reasons"),
    [
        ([], ()),
        ([order("a", "NW", "ACC", "")], ()),
        ([order("a", "NW", "ACC", UID)], ()),
        ([order("a", "NW", "", UID)], ()),
        ([order("a", "XO", "ACC", UID, status="CM")], ()),
        ([order("a", "CA", "ACC", UID)], (CANCELLED,)),
        ([order("a", "DC", "ACC", "")], ("the order of this study is discontinued",)),
        ([order("a", "NW", "ACC", UID, patient="1")], (ANOTHERS,)),
        ([order("a", "NW", "ACC", OTHER_UID)], (OTHER_STUDY,)),
        ([order("a", "NW", "OTHER", UID)], (OTHER_ACCESSION,)),
        ([order("a", "NW", "OTHER", OTHER_UID)], ()),
        ([order("a", "CA", "OTHER", UID, patient="1")], (CANCELLED, ANOTHERS, OTHER_ACCESSION)),
    ],
)
def test_orders_must_be_this_study_s_and_wanted(raws: list[bytes], reasons: tuple[str, ...]) -> None:
    assert why(STUDY, *raws) == reasons


def test_images_without_an_accession_number_are_held_by_the_order_of_their_study_only() -> None:
    assert why(images(""), order("a", "NW", "OTHER", UID)) == ()
    assert why(images(""), order("a", "CA", "", UID)) == (CANCELLED,)
    assert why(images(""), order("a", "CA", "", OTHER_UID)) == ()


@pytest.mark.parametrize(
    ("second", "reasons"),
    [
        (write_order("b", "NW", ("P-a", "", "ACC", UID), patient="1"), (TWO_PATIENTS,)),
        (write_order("b", "NW", ("P-a", "", "ACC", ""), patient="1"), (TWO_PATIENTS,)),
        (write_order("b", "NW", ("P-a", "", "", ""), patient="1"), ()),  # names no number of the study
        (write_order("b", "NW", ("P-b", "", "ACC", UID)), ()),  # another placer number: refused, but no other patient
    ],
)
def test_message_that_was_refused_holds_where_it_names_another_patient_for_the_study(
    second: bytes, reasons: tuple[str, ...]
) -> None:
    inbox = inbox_of(order("a", "NW", "ACC", UID))
    assert inbox.hear(second).state == "refused"
    assert find_heard_disagreements(STUDY, inbox.store) == reasons


# Patients


@pytest.mark.parametrize(
    ("study", "raw", "reasons"),
    [
        (images(), adt(), ()),
        (images(), adt(born="19610302"), (BIRTH,)),
        (images(), adt(sex="|M\r"), (SEX,)),
        (images(), adt(born="19610302", sex="|M\r"), (BIRTH, SEX)),
        (images(), adt(sex="|U\r"), ()),
        (images(), adt(born=""), ()),
        (images(birth_date=None, sex=""), adt(born="19610302", sex="|M\r"), ()),
        (images(), adt(patient="4712", born="19610302"), ()),
        (images(), merge("4711", "1"), (MERGED,)),
        (images(), merge("1", "4711"), ()),
    ],
)
def test_what_adt_told_of_the_patient_must_agree(study: Study, raw: bytes, reasons: tuple[str, ...]) -> None:
    assert why(study, raw) == reasons


@pytest.mark.parametrize(
    ("issuer", "issuers", "held"),
    [
        ("", (), True),  # the images do not say: it may be this one
        ("HOSP", (), True),
        ("HOSPITAL", (), True),  # a name that nobody has listed tells nothing
        ("HOSPITAL", ISSUERS, True),  # another name of the same authority
        ("LAKE", ISSUERS, False),  # known to be another authority's number
        ("Clinic of the Lake", ISSUERS, False),
    ],
)
@pytest.mark.parametrize(
    "raw", [adt(born="19610302"), merge("4711", "1"), order("a", "NW", "ACC", UID, patient="1")], ids=str
)
def test_issuer_says_whether_a_message_is_about_this_patient(
    raw: bytes, issuer: str, issuers: Sequence[Sequence[str]], held: bool
) -> None:
    is_order = b"ORM" in raw  # an order of the study is about it whoever numbers its patient
    assert bool(why(images(issuer=issuer), raw, issuers=issuers)) == (held or is_order)


def test_same_number_of_another_authority_is_another_patient() -> None:
    lake = order("a", "NW", "ACC", UID).replace(b"4711^^^HOSP", b"4711^^^LAKE")
    assert why(images(issuer="HOSPITAL"), lake, issuers=ISSUERS) == (ANOTHERS,)
    assert why(images(issuer="HOSPITAL"), lake) == ()  # not listed: the names tell nothing
    merged = merge("4711", "4711", authority="HOSP", away_authority="LAKE")
    assert why(images(issuer="HOSP"), lake, merged, issuers=ISSUERS) == ()


def test_two_authorities_with_one_number_are_told_apart_only_where_it_is_said_which() -> None:
    both = [adt(born="19610302", authority="LAKE"), adt(authority="HOSP")]
    assert why(images(issuer="LAKE"), *both) == (BIRTH,)
    assert why(images(issuer="Clinic of the Lake"), *both, issuers=ISSUERS) == (BIRTH,)
    assert why(images(issuer="HOSPITAL"), *both, issuers=ISSUERS) == ()
    assert why(images(), *both) == ()


# The EHR's issuer


def chart(*systems: str) -> ClinicalContext:
    identifiers = tuple(Identifier("4711", system, "") for system in systems)
    return ClinicalContext("ehr", ContextPatient("Patient/1", identifiers))


@pytest.mark.parametrize(
    ("issuer", "systems", "held"),
    [
        ("HOSPITAL", ["urn:oid:1.2.840.1"], False),
        ("HOSPITAL", ["http://lake.example/mrn"], True),
        ("HOSPITAL", ["http://lake.example/mrn", "urn:oid:1.2.840.1"], False),
        ("HOSPITAL", ["http://elsewhere.example"], False),
        ("HOSPITAL", [""], False),
        ("HOSPITAL", [], False),
        ("", ["http://lake.example/mrn"], False),
        ("ELSEWHERE", ["http://lake.example/mrn"], False),
    ],
)
def test_patient_id_of_another_issuer_in_the_ehr_is_a_disagreement(issuer: str, systems: list[str], held: bool) -> None:
    found = find_disagreements(images(issuer=issuer), chart(*systems), context_expected=True, issuers=ISSUERS)
    assert found == (("the PatientID of the images is of another issuer than in ehr",) if held else ())
    assert find_disagreements(images(issuer=issuer), chart(*systems), context_expected=True) == ()


def test_names_that_a_site_lists_let_the_ehr_s_system_be_the_images_issuer() -> None:
    issuers = (("1.2.840.5", "http://hospital.example/mrn"),)
    patient = {
        "resourceType": "Patient", "id": "p", "identifier": [{"value": "4711", "system": "http://hospital.example/mrn"}]
    }  # fmt: skip
    study = images(issuer="1.2.840.5")
    heard = Inbox().store
    assert read_chart([patient], study, "ehr", heard).patient is None
    assert read_chart([patient], study, "ehr", heard, issuers).patient is not None


def test_merged_patient_in_the_ehr_is_named_as_the_reason() -> None:
    patient = {
        "resourceType": "Patient",
        "id": "p",
        "identifier": [{"value": "4711"}],
        "link": [{"type": "replaced-by", "other": {"reference": "Patient/q"}}],
    }
    context = fhir_to_context([17, patient], source="ehr", patient_id="4711", patient_issuer="", accession_number="ACC")
    assert find_disagreements(STUDY, context, context_expected=True) == (
        "ehr has no single patient with the images' PatientID",
        "patient: Patient/p was merged into another (replaced-by); it was not used",
    )


@pytest.mark.parametrize(
    ("changes", "conflicts"),
    [
        ({}, []),
        ({"subject": {"reference": "Patient/other"}}, ["belongs to another patient"]),
        ({"subject": None}, ["belongs to another patient"]),
        ({"identifier": [{"value": f"urn:oid:{OTHER_UID}"}], "subject": {"reference": "Patient/other"}}, []),
        ({"status": "entered-in-error", "subject": {"reference": "Patient/other"}}, []),
        (
            {"identifier": [{"value": UID}, {"value": "OTHER", "type": {"coding": [{"code": "ACSN"}]}}]},
            ["names another accession number"],
        ),
        ({"identifier": [{"value": UID}, {"value": "ACC", "type": {"coding": [{"code": "ACSN"}]}}]}, []),
        ({"identifier": "not a list"}, []),
        ({"subject": "not an object"}, ["belongs to another patient"]),
    ],
)
def test_imaging_study_of_the_ehr_must_be_this_patient_s(changes: dict[str, Any], conflicts: list[str]) -> None:
    patient = {"resourceType": "Patient", "id": "p", "identifier": [{"value": "4711"}]}
    imaging = {
        "resourceType": "ImagingStudy",
        "id": "i",
        "status": "available",
        "subject": {"reference": "Patient/p"},
        "identifier": [{"system": "urn:dicom:uid", "value": f"urn:oid:{UID}"}],
        **changes,
    }
    context = fhir_to_context(
        [patient, imaging],
        source="ehr",
        patient_id="4711",
        patient_issuer="",
        accession_number="ACC",
        study_instance_uid=UID,
    )
    assert len(context.conflicts) == len(conflicts)
    assert all(words in found for words, found in zip(conflicts, context.conflicts, strict=True))


# What a release by a person holds for


def test_digest_stays_while_nobody_else_is_named_and_changes_with_each_who_is() -> None:
    context = chart("urn:oid:1.2.840.1")
    ordered = order("a", "NW", "ACC", UID, patient="1")
    digest = digest_identity(STUDY, context, inbox_of(ordered).store)
    assert digest == digest_identity(STUDY, context, inbox_of(ordered).store)
    further = order("a", "XO", "ACC", UID, patient="1", status="CM").replace(b"|a|P|", b"|b|P|")
    assert digest == digest_identity(STUDY, context, inbox_of(ordered, further).store)
    agreeing = digest_identity(STUDY, context, inbox_of().store)
    assert agreeing == digest_identity(STUDY, context, inbox_of(order("a", "NW", "ACC", UID), adt()).store)
    others = {
        digest_identity(images(patient_id="5"), context, inbox_of(ordered).store),
        digest_identity(images(sex="M"), context, inbox_of(ordered).store),
        digest_identity(images("ACC-2"), context, inbox_of(ordered).store),
        digest_identity(STUDY, replace(context, conflicts=("another",)), inbox_of(ordered).store),
        digest_identity(STUDY, ClinicalContext("ehr"), inbox_of(ordered).store),
        digest_identity(STUDY, context, inbox_of().store),
        digest_identity(STUDY, context, inbox_of(order("a", "NW", "ACC", UID, patient="2")).store),
        digest_identity(STUDY, context, inbox_of(ordered, merge("4711", "8")).store),
        digest_identity(STUDY, context, inbox_of(ordered, adt(born="19610302")).store),
    }
    assert digest not in others
    assert len(others) == 9


# One patient or two


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("NEW", ""), ("OLD", ""), True),
        (("NEW", "HOSPITAL"), ("OLD", "HOSPITAL"), True),  # HL7 calls it HOSP
        (("NEW", "HOSPITAL"), ("OLD", ""), True),
        (("NEW", "HOSPITAL"), ("OLD", "Clinic of the Lake"), False),
        (("NEW", "Clinic of the Lake"), ("OLD", "Clinic of the Lake"), False),
        (("4711", "HOSPITAL"), ("4711", "ELSEWHERE"), False),
        (("4711", "HOSPITAL"), ("4711", "HOSP"), True),
        (("4711", "ELSEWHERE"), ("4711", ""), True),
        (("NEW", "X"), ("STRANGER", "X"), False),
    ],
)
def test_merges_are_followed_under_the_issuer_s_other_names(
    one: tuple[str, str], other: tuple[str, str], same: bool
) -> None:
    store = inbox_of(merge("OLD", "NEW"), adt(), issuers=ISSUERS).store
    assert store.are_same_patient(one, other) is store.are_same_patient(other, one) is same


def test_names_of_a_patient_are_those_before_merges_under_the_issuer_s_other_names() -> None:
    store = inbox_of(merge("A", "B"), merge("B", "C"), merge("X", "Y", authority="LAKE"), issuers=ISSUERS).store
    for name, issuer in itertools.product("ABC", ("", "HOSP", "HOSPITAL", "UNLISTED")):
        assert store.names_of(name, issuer) == ["A", "B", "C"]
    assert store.names_of("C", "Clinic of the Lake") == ["C"]
    assert store.names_of("Y", "Clinic of the Lake") == ["X", "Y"]
    assert store.names_of("unheard", "HOSP") == ["unheard"]


NAMES = st.sampled_from(["", "A", "a", "B", "b", "C"])
LISTED = (("A", "a"), ("B", "b"))


@given(NAMES, NAMES)
def test_issuers_are_compared_alike_either_way(one: str, other: str) -> None:
    assert may_be_same_issuer(one, other, LISTED) is may_be_same_issuer(other, one, LISTED)
    assert are_other_issuers(one, other, LISTED) is are_other_issuers(other, one, LISTED)
    assert not (may_be_same_issuer(one, other, LISTED) and are_other_issuers(one, other, LISTED))
    assert (other in names_of_issuer(one, LISTED)) is (one in names_of_issuer(other, LISTED)) or "" in (one, other)

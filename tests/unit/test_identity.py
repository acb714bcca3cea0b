"""Identity gates: each way in which images, order and EHR can disagree holds the result, naming no patient."""

from dataclasses import replace
from datetime import date
from typing import Any

import pytest

from mappings.inputs.fhir_to_context import fhir_to_context
from mappings.model.context import ClinicalContext
from mappings.model.study import PatientIdentity, Study
from middleware.intake.identity import find_disagreements
from tests.builders import build_context

STUDY = Study("1.1", PatientIdentity("TEST-001", name="Phantom^Peter", birth_date=date(1961, 5, 6), sex="M"), (),
              accession_number="ACC-1")  # fmt: skip


def why(study: Study = STUDY, context: ClinicalContext | None = None, *, expected: bool = True) -> tuple[str, ...]:
    reasons = find_disagreements(study, context or build_context(), context_expected=expected)
    assert not any(word in " ".join(reasons) for word in ("TEST-001", "Phantom", "1961", "ACC-1"))
    return reasons


def patient(**changes: Any) -> ClinicalContext:
    plain = build_context()
    assert plain.patient is not None
    return replace(plain, patient=replace(plain.patient, **changes))


def images(**changes: Any) -> Study:
    return replace(STUDY, patient=replace(STUDY.patient, **changes))


def test_all_agree() -> None:
    assert why() == ()


@pytest.mark.parametrize(
    ("study", "context", "reasons"),
    [
        (images(patient_id=""), None, ("the images state no PatientID",)),
        (images(birth_date=date(1961, 6, 5)), None, ("the birth date in the images differs from the one in ehr",)),
        (images(sex="F"), None, ("the sex in the images differs from the one in ehr",)),
        (STUDY, patient(gender="female"), ("the sex in the images differs from the one in ehr",)),
        (STUDY, patient(gender="other"), ("the sex in the images differs from the one in ehr",)),
        (
            STUDY,
            build_context(conflicts=("the order is revoked", "the order is another patient's")),
            ("the order is revoked in ehr", "the order is another patient's in ehr"),
        ),
        (
            images(birth_date=date(1961, 6, 5), sex="F"),
            None,
            (
                "the birth date in the images differs from the one in ehr",
                "the sex in the images differs from the one in ehr",
            ),
        ),
    ],
)
def test_each_disagreement_is_named(study: Study, context: ClinicalContext | None, reasons: tuple[str, ...]) -> None:
    assert why(study, context) == reasons


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({}, False),
        ({"status": "completed"}, False),
        ({"subject": {"reference": "Patient/p2"}}, True),
        ({"status": "revoked"}, True),
        ({"status": "entered-in-error"}, True),
    ],
)
def test_order_in_the_ehr_must_be_this_patients_and_standing(changes: dict[str, Any], held: bool) -> None:
    def resource(kind: str, number: str, **values: Any) -> dict[str, Any]:
        return {"resourceType": kind, "id": number, **values}

    order = resource(
        "ServiceRequest",
        "s1",
        **{
            "status": "active",
            "intent": "order",
            "subject": {"reference": "Patient/p1"},
            "identifier": [{"type": {"coding": [{"code": "ACSN"}]}, "value": "ACC-1"}],
            **changes,
        },
    )
    patients = [resource("Patient", f"p{n}", identifier=[{"value": f"TEST-00{n}"}]) for n in (1, 2)]
    context = fhir_to_context(
        [*patients, order], source="ehr", patient_id="TEST-001", patient_issuer="", accession_number="ACC-1"
    )
    assert context.patient is not None
    assert bool(why(context=context)) == held


def test_patient_that_the_ehr_does_not_know_is_a_disagreement_with_its_reason() -> None:
    unknown = build_context(patient=None, order=None, missing=("patient: none with this id", "psa: none"))
    assert why(context=unknown) == (
        "ehr has no single patient with the images' PatientID",
        "patient: none with this id",
    )


@pytest.mark.parametrize(
    ("study", "context"),
    [
        (images(birth_date=None), None),
        (images(sex=""), None),
        (STUDY, patient(birth_date=None)),
        (STUDY, patient(gender="unknown")),
        (STUDY, patient(gender="")),
        (STUDY, build_context(order=None)),
    ],
)
def test_what_is_not_stated_is_no_disagreement(study: Study, context: ClinicalContext | None) -> None:
    assert why(study, context) == ()


def test_without_an_ehr_only_the_images_own_id_counts() -> None:
    nobody = ClinicalContext("", missing=("no EHR is configured",))
    assert why(context=nobody, expected=False) == ()
    assert why(images(patient_id=""), nobody, expected=False) == ("the images state no PatientID",)

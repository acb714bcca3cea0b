"""Identity gates: images, order and EHR must speak of the same patient before anything is released."""

from mappings.model.context import ClinicalContext
from mappings.model.study import Study

_SEX_OF_GENDER = {"male": "M", "female": "F", "other": "O"}


def find_disagreements(study: Study, context: ClinicalContext, *, context_expected: bool) -> tuple[str, ...]:
    """Why this study's result may not be released, in sentences without patient data; empty where all agree.

    `context_expected` says that an EHR (or a context file) was asked: a patient it does not know is a
    disagreement then, since the images may carry a mistyped or foreign id.
    """
    reasons: list[str] = []
    if not study.patient.patient_id:
        reasons.append("the images state no PatientID")
    if not context_expected:
        return tuple(reasons)
    patient = context.patient
    if patient is None:
        return (*reasons, f"{context.source} has no single patient with the images' PatientID", *context.missing[:1])
    if study.patient.birth_date and patient.birth_date and study.patient.birth_date != patient.birth_date:
        reasons.append(f"the birth date in the images differs from the one in {context.source}")
    sex = _SEX_OF_GENDER.get(patient.gender)
    if study.patient.sex in ("M", "F", "O") and sex and study.patient.sex != sex:
        reasons.append(f"the sex in the images differs from the one in {context.source}")
    return (*reasons, *(f"{conflict} in {context.source}" for conflict in context.conflicts))

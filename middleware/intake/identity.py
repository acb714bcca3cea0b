"""Identity gates: images, order and EHR must speak of the same patient before anything is released.

Every reason is a sentence without patient data. A person may release a study in spite of the reasons it was held for;
that holds for these reasons and this identity only (`digest_identity`).
"""

import hashlib

from mappings.model.context import ClinicalContext, ContextPatient
from mappings.model.study import Study
from middleware.intake.orders import OTHER_PATIENT
from middleware.store.heard import OrderRecord
from middleware.store.hearing import UNWANTED, HearingStore
from middleware.store.issuers import Issuers, are_other_issuers

_SEX_OF_GENDER = {"male": "M", "female": "F", "other": "O"}


def find_disagreements(
    study: Study, context: ClinicalContext, *, context_expected: bool, issuers: Issuers = ()
) -> tuple[str, ...]:
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
        why = [missing for missing in context.missing if missing.startswith("patient: ")]
        return (*reasons, f"{context.source} has no single patient with the images' PatientID", *why)
    if _is_of_other_issuer(patient, study, issuers):
        reasons.append(f"the PatientID of the images is of another issuer than in {context.source}")
    if study.patient.birth_date and patient.birth_date and study.patient.birth_date != patient.birth_date:
        reasons.append(f"the birth date in the images differs from the one in {context.source}")
    sex = _SEX_OF_GENDER.get(patient.gender)
    if study.patient.sex in ("M", "F", "O") and sex and study.patient.sex != sex:
        reasons.append(f"the sex in the images differs from the one in {context.source}")
    return (*reasons, *(f"{conflict} in {context.source}" for conflict in context.conflicts))


def _is_of_other_issuer(patient: ContextPatient, study: Study, issuers: Issuers) -> bool:
    """Whether the EHR knows the images' PatientID as given out by other authorities only."""
    systems = [i.system for i in patient.identifiers if i.value == study.patient.patient_id]
    return bool(systems) and all(are_other_issuers(system, study.patient.issuer, issuers) for system in systems)


def find_heard_disagreements(study: Study, heard: HearingStore, issuers: Issuers = ()) -> tuple[str, ...]:
    """What HL7 and EHR messages say against releasing a result of this study as it stands; empty where nothing."""
    patient = study.patient
    reasons: list[str] = []
    if heard.was_merged_away(patient.patient_id, patient.issuer):
        reasons.append("the patient of the images was merged into another one (ADT^A40); correct the images first")
    reasons += _against_orders(study, heard, issuers)
    if _was_told_of_two_patients(study, heard):
        reasons.append("an order message of this study names another patient than those before it, and was refused")
    reasons += _against_record(study, heard)
    return tuple(reasons)


def _against_orders(study: Study, heard: HearingStore, issuers: Issuers) -> list[str]:
    """What the orders of its Study Instance UID, or else of its accession number, say."""
    known = heard.orders_of_study(study.study_instance_uid, study.accession_number)
    by_uid = [order for order in known if order.study_instance_uid == study.study_instance_uid]
    orders = by_uid or known
    if not orders:
        return []
    reasons = []
    if all(order.status in UNWANTED for order in orders):
        reasons.append(f"the order of this study is {orders[0].status}")
    if any(is_anothers(order, study, heard, issuers) for order in orders):
        reasons.append("the order of this study is another patient's")
    stated = [order.accession_number for order in by_uid if order.accession_number]
    if study.accession_number and stated and study.accession_number not in stated:
        reasons.append("the accession number in the images differs from the one of the order for this study")
    if not by_uid and all(order.study_instance_uid for order in orders):
        reasons.append("the order of this accession number is for another Study Instance UID")
    return reasons


def _was_told_of_two_patients(study: Study, heard: HearingStore) -> bool:
    """Whether a message was refused since the study's order was told of for somebody else. Which of them is right only
    a person can say."""
    numbers = {("study_instance_uid", study.study_instance_uid), ("accession_number", study.accession_number)}
    return any(f"order {OTHER_PATIENT}" in note for one in heard.refused_about(numbers) for note in one.notes)


def is_anothers(order: OrderRecord, study: Study, heard: HearingStore, issuers: Issuers) -> bool:
    """Whether an order is known to be for another patient than the images', merges followed."""
    patient = study.patient
    if heard.is_other_patient(order, patient.patient_id):
        return True
    one, other = (order.patient_id, order.patient_issuer), (patient.patient_id, patient.issuer)
    return are_other_issuers(one[1], other[1], issuers) and not heard.are_same_patient(one, other)


def _against_record(study: Study, heard: HearingStore) -> list[str]:
    """What ADT messages told of the patient of the images."""
    known = heard.patient(study.patient.patient_id, study.patient.issuer)
    if known is None:
        return []
    birth = study.patient.birth_date.isoformat() if study.patient.birth_date else ""
    reasons = []
    if birth and known.birth_date and birth != known.birth_date:
        reasons.append("the birth date in the images differs from the one told by HL7")
    if study.patient.sex in ("M", "F", "O") and known.sex in ("M", "F", "O") and study.patient.sex != known.sex:
        reasons.append("the sex in the images differs from the one told by HL7")
    return reasons


def digest_identity(study: Study, context: ClinicalContext, heard: HearingStore, issuers: Issuers = ()) -> str:
    """One word for whose study images and EHR say it is, and for what messages say otherwise: a release by a person
    holds while it stays the same. A message that agrees changes nothing."""
    otherwise = sorted({*_orders_otherwise(study, heard, issuers), *_record_otherwise(study, heard)})
    parts = (study.patient, study.accession_number, context.patient, context.conflicts, otherwise)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _orders_otherwise(study: Study, heard: HearingStore, issuers: Issuers) -> list[tuple[str, ...]]:
    """What the orders of the study state that the images do not."""
    orders = heard.orders_of_study(study.study_instance_uid, study.accession_number)
    patients = [("patient", o.patient_id, o.patient_issuer) for o in orders if is_anothers(o, study, heard, issuers)]
    numbers = [("number", number) for o in orders for number in (o.accession_number, o.study_instance_uid)]
    mine = ("", study.accession_number, study.study_instance_uid)
    return [*patients, *(number for number in numbers if number[1] not in mine)]


def _record_otherwise(study: Study, heard: HearingStore) -> list[tuple[str, ...]]:
    """What ADT messages told of the patient that the images do not state."""
    record = heard.patient(study.patient.patient_id, study.patient.issuer)
    if record is None:
        return []
    birth = study.patient.birth_date.isoformat() if study.patient.birth_date else ""
    told = (
        ("birth", record.birth_date, birth),
        ("sex", record.sex, study.patient.sex),
        ("merged", record.merged_into, ""),
    )
    return [(what, theirs) for what, theirs, mine in told if theirs and theirs != mine]

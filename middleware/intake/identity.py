"""Identity gates: images, order and EHR must speak of the same patient before anything is released.

Every reason is a sentence without patient data. A person may release a study in spite of the reasons it was held for;
that holds for these reasons and this identity only (`digest_identity`).
"""

import hashlib
from collections.abc import Sequence

from mappings.model.context import ClinicalContext
from mappings.model.study import Study
from middleware.store.heard import OrderRecord
from middleware.store.hearing import UNWANTED, HearingStore

Issuers = Sequence[Sequence[str]]
"""Assigning authorities: each entry has the names (DICOM issuer, HL7 namespace, FHIR system) of one."""

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


def find_heard_disagreements(study: Study, heard: HearingStore, issuers: Issuers = ()) -> tuple[str, ...]:
    """What HL7 and EHR messages say against releasing a result of this study as it stands; empty where nothing."""
    patient = study.patient
    reasons: list[str] = []
    if heard.was_merged_away(patient.patient_id, patient.issuer):
        reasons.append("the patient of the images was merged into another one (ADT^A40); correct the images first")
    reasons += _against_orders(study, heard, issuers)
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


def is_anothers(order: OrderRecord, study: Study, heard: HearingStore, issuers: Issuers) -> bool:
    """Whether an order is known to be for another patient than the images', merges followed."""
    patient = study.patient
    return heard.is_other_patient(order, patient.patient_id) or are_other_issuers(
        order.patient_issuer, patient.issuer, issuers
    )


def are_other_issuers(one: str, other: str, issuers: Issuers) -> bool:
    """Whether two names are known to be of different authorities. Names that the site has not listed tell nothing:
    DICOM, HL7 and FHIR seldom call one authority the same."""
    groups = [next((n for n, names in enumerate(issuers) if issuer in names), None) for issuer in (one, other)]
    return None not in groups and groups[0] != groups[1]


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


def digest_identity(study: Study, context: ClinicalContext) -> str:
    """One word for whose study images and EHR say it is: a release by a person holds while it stays the same."""
    parts = (study.patient, study.accession_number, context.patient, context.conflicts)
    return hashlib.sha256(repr(parts).encode()).hexdigest()

"""The clinical context of a study: what the EHR (or a Bundle given by hand) holds, and the order that messages told."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mappings.inputs.fhir_to_context import fhir_to_context
from mappings.inputs.fhir_to_labs import LABS, LOINC
from mappings.model.codes import Code
from mappings.model.context import ClinicalContext, ContextOrder
from mappings.model.study import Study
from middleware.intake.identity import is_anothers
from middleware.ports import ContextSource
from middleware.store.heard import OrderRecord
from middleware.store.hearing import HearingStore
from middleware.store.issuers import Issuers

_PRIORITY = {"S": "stat", "A": "asap", "T": "urgent", "P": "urgent", "C": "urgent", "R": "routine"}
"""HL7 table 0485 to FHIR request-priority; what FHIR has no word for is urgent."""
_STATUS = {
    "requested": "active",
    "scheduled": "active",
    "in-progress": "active",
    "completed": "completed",
    "preliminary": "completed",
    "final": "completed",
    "discontinued": "revoked",
    "cancelled": "revoked",
}
"""Our order statuses to FHIR request-status."""


_ABOUT_A_PATIENT: tuple[tuple[str, dict[str, str]], ...] = (
    # By code, since not every EHR states a category; the newest come first, so a limit cuts off the oldest.
    ("Observation", {"code": ",".join(f"{LOINC}|{code}" for code in LABS), "_sort": "-date"}),
    ("Condition", {}),
    ("AllergyIntolerance", {}),
    ("DiagnosticReport", {"_sort": "-date"}),
)

Found = list[dict[str, Any]]


async def search_identity(source: ContextSource, study: Study, identifier_system: str) -> Found:
    """Whose study it is: patient, order and imaging study by their identifiers. Raises as the connector does."""
    patient_id = study.patient.patient_id
    token = f"{identifier_system}|{patient_id}" if identifier_system else patient_id
    found = await source.search("Patient", {"identifier": token}) if patient_id else []
    if study.accession_number:
        found = [*found, *await source.search("ServiceRequest", {"identifier": study.accession_number})]
    studies = await source.search("ImagingStudy", {"identifier": f"urn:oid:{study.study_instance_uid}"})
    return [*found, *studies]


async def search_chart(source: ContextSource, study: Study, identifier_system: str) -> Found:
    """Whose study it is, and then everything else by the patients found. Raises as the connector does."""
    found = await search_identity(source, study, identifier_system)
    patients = [one for one in found if one.get("resource", one).get("resourceType") == "Patient"]
    for patient in patients[:2]:
        reference = f"Patient/{patient.get('id', '')}"
        for kind, params in _ABOUT_A_PATIENT:
            found += await source.search(kind, {"patient": reference, **params}, limit=200)
    return found


def read_chart(
    found: Sequence[object], study: Study, source_name: str | None, heard: HearingStore, issuers: Issuers = ()
) -> ClinicalContext:
    """The context out of what was found; an order that is not there is the one that messages told of. `source_name`
    None: there is no EHR to ask. `issuers` are the site's assigning authorities, each with all its names."""
    if source_name is None:
        context = ClinicalContext(source="", missing=("no EHR is configured",))
    else:
        context = fhir_to_context(
            found,
            source=source_name,
            patient_id=study.patient.patient_id,
            patient_issuer=study.patient.issuer,
            accession_number=study.accession_number,
            study_instance_uid=study.study_instance_uid,
            issuers=issuers,
        )
    return replace(context, order=context.order or find_order(heard, study, issuers))


def find_own_orders(heard: HearingStore, study_instance_uid: str, accession_number: str) -> list[OrderRecord]:
    """The orders that name the study's UID or, where none does, its accession number."""
    known = heard.orders_of_study(study_instance_uid, accession_number)
    return [order for order in known if order.study_instance_uid == study_instance_uid] or known


def find_order(heard: HearingStore, study: Study, issuers: Issuers = ()) -> ContextOrder | None:
    """The only order of this patient with the study's UID or, where there is none, its accession number; None where
    there is none, or several."""
    orders = find_own_orders(heard, study.study_instance_uid, study.accession_number)
    same_patient = [order for order in orders if not is_anothers(order, study, heard, issuers)]
    return _to_context(same_patient[0], study) if len(same_patient) == 1 else None


def _to_context(order: OrderRecord, study: Study) -> ContextOrder:
    has_code = bool(order.procedure_code)
    return ContextOrder(
        reference="order message (HL7)",
        accession_number=order.accession_number or study.accession_number,
        placer_order_number=order.placer_order_number,
        filler_order_number=order.filler_order_number,
        code=Code(order.procedure_code, order.procedure_scheme, order.procedure_meaning) if has_code else None,
        reason=order.reason,
        requester=order.requester,
        priority=_PRIORITY.get(order.priority, ""),
        from_message=True,
        status="on-hold" if order.is_on_hold else _STATUS.get(order.status, ""),
    )

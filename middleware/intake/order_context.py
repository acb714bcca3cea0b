"""The order of a study as messages told it, in the words of the clinical context."""

from mappings.model.codes import Code
from mappings.model.context import ContextOrder
from mappings.model.study import Study
from middleware.store.heard import OrderRecord
from middleware.store.hearing import HearingStore

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


def find_own_orders(heard: HearingStore, study_instance_uid: str, accession_number: str) -> list[OrderRecord]:
    """The orders that name the study's UID or, where none does, its accession number."""
    known = heard.orders_of_study(study_instance_uid, accession_number)
    return [order for order in known if order.study_instance_uid == study_instance_uid] or known


def find_order(heard: HearingStore, study: Study) -> ContextOrder | None:
    """The only order with the study's UID or, where there is none, its accession number; None where there is none, or
    several."""
    orders = find_own_orders(heard, study.study_instance_uid, study.accession_number)
    same_patient = [order for order in orders if not heard.is_other_patient(order, study.patient.patient_id)]
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

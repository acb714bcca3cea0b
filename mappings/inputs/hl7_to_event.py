"""An HL7 v2 message to the events it tells: orders, patients, reports, or one that is kept and not acted on.

Source: HL7 v2.5.1 chapters 3, 4, 7; ../shared/STANDARDS.md lists the messages that are understood. Z-segments
other than ZDS are not looked at; they stay in the message as it came.
"""

from datetime import tzinfo

from mappings.inputs.hl7_elements import ACCESSION_FROM, Site
from mappings.inputs.hl7_to_order import message_to_orders
from mappings.inputs.hl7_to_patient import KIND_OF_TRIGGER, MERGE_TRIGGER, message_to_patients
from mappings.inputs.hl7_to_report import message_to_reports
from mappings.model.events import OrderEvent, PatientEvent, ReportEvent, UnhandledEvent
from mappings.model.message import Message

_MAPPINGS = {
    **dict.fromkeys(("ORM^O01", "OMG^O19", "OMI^O23"), message_to_orders),
    **dict.fromkeys((f"ADT^{trigger}" for trigger in (*KIND_OF_TRIGGER, MERGE_TRIGGER)), message_to_patients),
    "ORU^R01": message_to_reports,
}


def message_to_events(
    message: Message,
    *,
    zone: tzinfo,
    accession_from: tuple[str, ...] = ACCESSION_FROM,
    patient_authority: str = "",
) -> tuple[OrderEvent | PatientEvent | ReportEvent | UnhandledEvent, ...]:
    """What the message tells, in its order; at least one event, never an error.

    `zone` is where its times without an offset were written. `accession_from` names the fields that hold this
    site's accession number; those that hold a value must agree. `patient_authority` is the assigning authority
    (PID-3.4) whose identifier counts where a patient has several.
    """
    mapping = _MAPPINGS.get(message.header.event)
    if mapping is None:
        return (UnhandledEvent(type=message.header.event, reason="messages of this type are not acted on"),)
    return mapping(message, Site(zone, accession_from, patient_authority))

"""Inbound HL7 v2 messages written by hand, and the events they tell."""

from zoneinfo import ZoneInfo

from mappings.inputs.er7_to_message import read_message
from mappings.inputs.hl7_to_event import message_to_events
from mappings.model.events import Event

BERLIN = ZoneInfo("Europe/Berlin")
PID = "PID|1||4711^^^HOSP^MR||Doe^Jane^Q^Jr^Dr||19610203|F"
UID = "1.2.840.99.1"


def tell_events(
    kind: str, *segments: str, authority: str = "", accession_from: tuple[str, ...] = ()
) -> tuple[Event, ...]:
    head = f"MSH|^~\\&|RIS|C|W|A|20260102030405||{kind}|1|P|2.5.1"
    message = read_message("\r".join((head, *segments)).encode())
    if accession_from:
        return message_to_events(message, zone=BERLIN, patient_authority=authority, accession_from=accession_from)
    return message_to_events(message, zone=BERLIN, patient_authority=authority)


def write_obr(**numbered: str) -> str:
    """An OBR with field n given as `fn`."""
    fields = [""] * 50
    for name, value in numbered.items():
        fields[int(name.removeprefix("f"))] = value
    return ("OBR|" + "|".join(fields[1:])).rstrip("|")

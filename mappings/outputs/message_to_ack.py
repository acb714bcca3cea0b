"""HL7 v2 acknowledgements: MSH, MSA and, for errors and rejections, ERR.

Source: HL7 v2.5.1 chapter 2 (2.9 processing rules; 2.14.5 ERR, 2.14.8 MSA; tables 0008, 0155, 0357). An answer is
written in the separators, version and character set of what it answers, and repeats MSH-10 as it was sent.
"""

from datetime import datetime
from typing import Literal

from mappings.model.message import Encoding, Header, Message, drop_controls, sketch_header
from mappings.outputs.er7 import format_time

Code = Literal["AA", "AE", "AR", "CA", "CE", "CR"]
Outcome = Literal["accept", "error", "reject"]

ERROR_TEXTS = {
    "0": "Message accepted",
    "100": "Segment sequence error",
    "101": "Required field missing",
    "102": "Data type error",
    "103": "Table value not found",
    "200": "Unsupported message type",
    "201": "Unsupported event code",
    "202": "Unsupported processing id",
    "203": "Unsupported version id",
    "204": "Unknown key identifier",
    "205": "Duplicate key identifier",
    "206": "Application record locked",
    "207": "Application internal error",
}
"""Table 0357."""

DEFAULT_VERSION = "2.5.1"
_KNOWN_VERSIONS = frozenset({"2.3", "2.3.1", "2.4", "2.5", "2.5.1", "2.6", "2.7", "2.7.1", "2.8", "2.8.1", "2.8.2"})
_OLD_ERR_VERSIONS = frozenset({"2.3", "2.3.1", "2.4"})
"""Versions whose ERR has one field, the error code and location; ERR-3 to ERR-8 came with 2.5."""

MAX_MSA_TEXT_LENGTH = 80
MAX_ERR_TEXT_LENGTH = 250
_CODE_OF: dict[Outcome, tuple[Code, Code]] = {"accept": ("CA", "AA"), "error": ("CE", "AE"), "reject": ("CR", "AR")}


def is_enhanced(header: Header) -> bool:
    """Whether the sender asks for enhanced mode: MSH-15 or MSH-16 is valued (2.9.2)."""
    return bool(header.accept_acknowledgement or header.application_acknowledgement)


def _is_wanted(condition: str, outcome: Outcome) -> bool:
    """Table 0155: AL always, NE never, ER on error or rejection, SU on success; nothing stated is never, and
    what is not of the table always, since a sender that waits for nothing loses nothing."""
    never = ("", "NE", "ER" if outcome == "accept" else "SU")
    return condition not in never


def codes_due(header: Header, outcome: Outcome) -> tuple[Code, ...]:
    """The answers that the sender waits for, in their order; none where it wants none.

    Original mode: AA, AE or AR. Enhanced mode: CA, CE or CR as MSH-15 wants, then AA, AE or AR as MSH-16 wants;
    after CE or CR there is no application answer, since nothing was taken on (2.9.3).
    """
    accept_code, application_code = _CODE_OF[outcome]
    if not is_enhanced(header):
        return (application_code,)
    due: list[Code] = [accept_code] if _is_wanted(header.accept_acknowledgement, outcome) else []
    if _is_wanted(header.application_acknowledgement, outcome) and (outcome == "accept" or not due):
        due.append(application_code)
    return tuple(due)


def build_ack(
    message: Message | Header,
    code: Code,
    *,
    now: datetime,
    control_id: str,
    text: str = "",
    error_code: str = "",
) -> bytes:
    """The acknowledgement, segments ended by CR, without MLLP framing.

    `control_id` is its own MSH-10, `now` (aware) its MSH-7. `text` is for people and holds no patient data; it goes to
    MSA-3 and ERR. ERR is written for every code but AA and CA; `error_code` is of table 0357, 207 where none is given.
    """
    header = message.header if isinstance(message, Message) else message
    is_error = code not in ("AA", "CA")
    segments = [_write_msh(header, now, control_id), _write_msa(header, code, text)]
    if is_error:
        segments.append(_write_err(header, error_code or "207", text))
    return ("\r".join(segments) + "\r").encode(header.encoding.codec, "replace")


def build_reject(
    raw: bytes, reason: str, *, now: datetime, control_id: str, code: Code = "AR", error_code: str = "207"
) -> bytes:
    """The answer to bytes that are no message: AR with ERR; MSA-2 is their MSH-10 if it can be read, else empty."""
    return build_ack(sketch_header(raw), code, now=now, control_id=control_id, text=reason, error_code=error_code)


def _escape(value: str, encoding: Encoding) -> str:
    """`value` on one line, the separators in use as escape sequences."""
    special = {
        encoding.escape: "E",
        encoding.field: "F",
        encoding.component: "S",
        encoding.subcomponent: "T",
        encoding.repetition: "R",
    }
    table = {ord(mark): f"{encoding.escape}{letter}{encoding.escape}" for mark, letter in special.items()}
    return drop_controls(value.replace("\n", " ")).translate(table)


def _join(encoding: Encoding, name: str, *fields: str) -> str:
    return encoding.field.join((name, *fields)).rstrip(encoding.field)


def _answer_version(header: Header) -> str:
    return header.version if header.version in _KNOWN_VERSIONS else DEFAULT_VERSION


def _write_msh(header: Header, now: datetime, control_id: str) -> str:
    """MSH with the parties the other way round. MSH-9 of v2.3 has no structure, and ACK no trigger of its own."""
    encoding = header.encoding
    sender, facility, receiver, receiving_facility = (drop_controls(party) for party in header.parties)
    version = _answer_version(header)
    kind = ("ACK",) if version == "2.3" else ("ACK", _escape(header.trigger, encoding), "ACK")
    quiet = "NE" if is_enhanced(header) else ""
    return _join(
        encoding,
        "MSH",
        encoding.msh_2,
        receiver,
        receiving_facility,
        sender,
        facility,
        format_time(now),
        "",
        encoding.component.join(kind),
        _escape(control_id, encoding),
        _escape(header.processing_id, encoding) or "P",
        version,
        "",
        "",
        quiet,
        quiet,
        "",
        drop_controls(header.character_set),
    )


def _write_msa(header: Header, code: Code, text: str) -> str:
    """MSA-2 repeats their MSH-10 byte for byte (but for control characters, which could end the frame)."""
    clipped = _escape(text[:MAX_MSA_TEXT_LENGTH], header.encoding)
    return _join(header.encoding, "MSA", code, drop_controls(header.control_id), clipped)


def _write_err(header: Header, error_code: str, text: str) -> str:
    encoding = header.encoding
    coded = (_escape(error_code, encoding), ERROR_TEXTS.get(error_code, ""), "HL70357")
    if _answer_version(header) in _OLD_ERR_VERSIONS:
        return _join(encoding, "ERR", encoding.component.join(("", "", "", encoding.subcomponent.join(coded))))
    words = _escape(text[:MAX_ERR_TEXT_LENGTH], encoding)
    return _join(encoding, "ERR", "", "", encoding.component.join(coded), "E", "", "", "", words)

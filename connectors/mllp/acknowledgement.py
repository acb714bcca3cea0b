"""Reads HL7 v2 acknowledgements: the segments MSA and ERR of HL7 v2.5.1 chapter 2, codes of table 0008."""

from dataclasses import dataclass

from connectors.errors import Permanent

ACCEPTED = ("AA", "CA")
FAILED = ("AE", "CE")
REJECTED = ("AR", "CR")
_KNOWN_CODES = (*ACCEPTED, *FAILED, *REJECTED)
_MAX_TEXT = 500


@dataclass(frozen=True)
class Acknowledgement:
    """An answer to one message: MSA-1, MSA-2, the texts of MSA-3 and ERR, and the bytes as they came."""

    code: str
    control_id: str
    text: str
    raw: bytes


class Refused(Permanent):
    """The receiver answered and does not take the message. `code` is MSA-1: AE and CE (error), AR and CR (reject)."""

    def __init__(self, message: str, acknowledgement: Acknowledgement) -> None:
        super().__init__(message)
        self.code = acknowledgement.code
        self.acknowledgement = acknowledgement


def parse_acknowledgement(raw: bytes, encoding: str) -> Acknowledgement | None:
    """The acknowledgement in a message, None if it has no MSH and MSA with a known code (HL7 table 0008)."""
    segments = raw.decode(encoding, errors="replace").replace("\n", "\r").split("\r")
    header = segments[0]
    if not header.startswith("MSH") or len(header) < 8:
        return None
    separator = header[3]
    rows = [segment.split(separator) for segment in segments[1:] if segment]
    msa = next((row for row in rows if row[0] == "MSA"), [])
    if len(msa) < 3 or msa[1].strip() not in _KNOWN_CODES:
        return None
    said = [_field(msa, 3), *(_error_text(row, header[4]) for row in rows if row[0] == "ERR")]
    text = "; ".join(part for part in said if part)
    return Acknowledgement(msa[1].strip(), msa[2].strip(), text[:_MAX_TEXT], raw)


def control_id_of(message: bytes) -> bytes | None:
    """MSH-10 of a message, None if it has no MSH segment of that length."""
    header = message.replace(b"\n", b"\r").split(b"\r", 1)[0]
    fields = header.split(header[3:4]) if header.startswith(b"MSH") and len(header) > 8 else []
    # The separator itself is MSH-1, so MSH-10 is the tenth piece.
    return fields[9] if len(fields) > 9 else None


def _field(row: list[str], number: int) -> str:
    return row[number].strip() if len(row) > number else ""


def _error_text(row: list[str], component: str) -> str:
    """ERR-3 (error code), ERR-7 (diagnostic), ERR-8 (user message), and ERR-1 of versions before 2.5."""
    coded = " ".join(part for part in _field(row, 3).split(component)[:2] if part)
    return " ".join(part for part in (coded, _field(row, 7), _field(row, 8)) if part) or _field(row, 1)

"""Identifiers derived from what they name, so that a retry repeats them and a receiver can drop the copy."""

import uuid

NAMESPACE = uuid.UUID("6b1c2a52-5b0e-5d5e-9a4e-6f1d9f1f7f21")
"""Wetread's own UUIDv5 namespace; changing it would make every resent result look new."""


def derive_uuid(*parts: str | int) -> uuid.UUID:
    """The UUIDv5 of `parts`, joined unambiguously: the same parts always give the same UUID."""
    return uuid.uuid5(NAMESPACE, "\x1f".join(str(part) for part in parts))


def derive_uid(*parts: str | int) -> str:
    """A DICOM UID under `2.25.` (PS3.5 B.2) derived from `parts`; at most 64 characters."""
    return f"2.25.{derive_uuid(*parts).int}"


def derive_control_id(*parts: str | int) -> str:
    """An HL7 MSH-10 of 20 characters (the longest that v2.5.1 allows) derived from `parts`."""
    return f"WR{derive_uuid(*parts).hex[:18].upper()}"

"""One OBX of an ORU, as every kind of result needs it (HL7 v2.5.1 7.4.2)."""

from dataclasses import dataclass

from mappings.model.codes import Code
from mappings.model.measurement import Measurement
from mappings.outputs.er7 import Field, Repetition

HL7_SCHEMES = {"IBSI": "99IBSI", "": "L"}
"""HL7 table 0396 names of the schemes that differ from DICOM's; LN, SCT, DCM, UCUM and RADLEX are the same."""

SHORT_TEXT_LENGTH = 199
"""Longest ST of v2.5.1 (2A.74). Free text is cut to it with an ellipsis; names and identifiers never are."""


@dataclass(frozen=True)
class Common:
    """What every OBX of one message shares."""

    status: str
    observed: str
    analysed: str
    model: tuple[str, ...]


def clip(words: str) -> str:
    """`words`, cut to what ST holds."""
    return words if len(words) <= SHORT_TEXT_LENGTH else f"{words[: SHORT_TEXT_LENGTH - 3]}..."


def coded(code: Code, alternate: tuple[str, str] | None = None) -> tuple[str, ...]:
    """CE/CWE of a code; `alternate` (key, label) names it once more in Wetread's own scheme."""
    first = (code.value, clip(code.meaning), HL7_SCHEMES.get(code.scheme, code.scheme))
    return (*first, *alternate, "99WETREAD") if alternate else first


def write_obx(
    common: Common,
    kind: str,
    observation: tuple[str, ...],
    value: Field,
    *,
    unit: Code | None = None,
    flag: str = "",
    method: Field = "",
) -> list[Field]:
    """OBX-2 to OBX-19 with OBX-4 empty: the message gives the sub-id and OBX-1."""
    coded_unit = coded(unit) if unit else ""
    result: list[Field] = [kind, observation, "", value, coded_unit, "", flag, "", "", common.status]
    source: list[Field] = ["", "", common.observed, "", "", method, common.model, common.analysed]
    return result + source


def methods(measurement: Measurement) -> Field:
    """OBX-17: how the number was made and what it is of its quantity."""
    made: list[Repetition] = [coded(c) for c in (measurement.method, measurement.derivation) if c]
    return made or ""

"""Laboratory Observations (PSA, creatinine, eGFR) to values, each in one unit, or a reason against it."""

from dataclasses import dataclass

from mappings.inputs.fhir_elements import Json, Record, as_dict, as_text, parse_moment, read_codings
from mappings.model.codes import PSA, Code
from mappings.model.context import ContextValue

LOINC = "http://loinc.org"
UCUM = "http://unitsofmeasure.org"

USABLE_STATUSES = frozenset({"final", "amended", "corrected"})

PSA_UNITS = {"ng/mL": 1.0, "ug/L": 1.0, "µg/L": 1.0, "μg/L": 1.0, "ng/ml": 1.0, "ug/l": 1.0}
"""Factors to ng/mL. Both are 1e-9 g per mL: no digit changes."""

_MG_DL = {"mg/dL": 1.0, "mg/dl": 1.0}
_UMOL_L = {"umol/L": 1.0, "µmol/L": 1.0, "μmol/L": 1.0, "umol/l": 1.0}
_PER_AREA = {
    "mL/min/{1.73_m2}": 1.0,
    "mL/min/{1.73m2}": 1.0,
    "mL/min/1.73.m2": 1.0,
    "mL/min/1.73m2": 1.0,
    "mL/min/1.73_m2": 1.0,
}


@dataclass(frozen=True)
class Lab:
    """One laboratory code: its name in problems, the unit it is given in, and the factors of others to it."""

    title: str
    code: Code
    unit: str
    factors: dict[str, float]


def _psa(value: str, meaning: str) -> Lab:
    return Lab("PSA", Code(value, "LN", meaning), "ng/mL", PSA_UNITS)


def _egfr(value: str, method: str) -> Lab:
    meaning = f"Glomerular filtration rate/1.73 sq M.predicted by {method}"
    return Lab("eGFR", Code(value, "LN", meaning), "mL/min/{1.73_m2}", _PER_AREA)


LABS = {
    lab.code.value: lab
    for lab in (
        # Total PSA in serum or plasma as mass per volume. Free PSA (10886-0), the ratio (12841-3), moles
        # (19197-3) and arbitrary units (19195-7) are other quantities: none of them makes a density.
        Lab("PSA", PSA, "ng/mL", PSA_UNITS),
        _psa("35741-8", "Prostate specific Ag [Mass/volume] in Serum or Plasma by Detection limit <= 0.01 ng/mL"),
        _psa("83112-3", "Prostate specific Ag [Mass/volume] in Serum or Plasma by Immunoassay"),
        # Mass and moles stay apart: going from one to the other needs a molar mass, and rounds.
        Lab("creatinine", Code("2160-0", "LN", "Creatinine [Mass/volume] in Serum or Plasma"), "mg/dL", _MG_DL),
        Lab(
            "creatinine",
            Code("14682-9", "LN", "Creatinine [Moles/volume] in Serum or Plasma"),
            "umol/L",
            _UMOL_L,
        ),
        _egfr("33914-3", "creatinine-based formula (MDRD)"),
        _egfr("62238-1", "creatinine-based formula (CKD-EPI)"),
        _egfr("98979-8", "creatinine-based formula (CKD-EPI 2021)"),
    )
}
"""The laboratory codes that are looked for, by LOINC code."""

PSA_CODES = frozenset(code for code, lab in LABS.items() if lab.title == "PSA")


def find_lab(record: Record) -> Lab | None:
    """Which laboratory code this Observation carries, None for others."""
    if record.kind != "Observation":
        return None
    codes = (code for system, code, _ in read_codings(record.resource.get("code")) if system == LOINC)
    return next((LABS[code] for code in codes if code in LABS), None)


def _read_number(quantity: Json, lab: Lab) -> float | str:
    """The value in the lab's unit, or why there is none."""
    value = quantity.get("value")
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e15 < value < 1e15:
        return "it has no number as valueQuantity"
    if quantity.get("comparator"):
        return "its value is a limit, not a number (comparator)"
    if value < 0:
        return "its value is negative"
    unit, factor = _read_unit(quantity, lab)
    return f"its unit {unit!r} is not one of {', '.join(lab.factors)}" if factor is None else value * factor


def _read_unit(quantity: Json, lab: Lab) -> tuple[object, float | None]:
    """The unit and its factor: the UCUM code where there is one, else the unit in words."""
    coded = quantity.get("system") in (UCUM, None) and quantity.get("code")
    unit = quantity.get("code") if coded else quantity.get("unit")
    return unit, lab.factors.get(unit) if isinstance(unit, str) else None


def read_lab(record: Record, lab: Lab) -> ContextValue | str:
    """The value with its time and source, or a reason against it in words."""
    resource = record.resource
    status = as_text(resource.get("status"))
    if status not in USABLE_STATUSES:
        return f"its status is {status or 'missing'}"
    number = _read_number(as_dict(resource.get("valueQuantity")), lab)
    if isinstance(number, str):
        return number
    period = as_dict(resource.get("effectivePeriod"))
    times = (
        resource.get("effectiveDateTime"),
        resource.get("effectiveInstant"),
        period.get("end") or period.get("start"),
        resource.get("issued"),
    )
    stated = next((time for time in times if time), None)
    moment = parse_moment(stated)
    if moment is None:
        return f"its time is {'not exact to a day with zone' if stated else 'missing'}"
    return ContextValue(lab.code, float(number), lab.unit, moment, record.reference)

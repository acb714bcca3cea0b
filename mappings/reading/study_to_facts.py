"""What routing rules may look at: images, order and clinical context of one study as flat facts.

Each is a list of texts, a text, a `whole` number or a `number` with a fraction; None where nothing states it:

    study.modality             list    modalities of its series (MR)
    study.body_part            list    Body Part Examined of its series
    study.description          text    Study Description
    study.series_descriptions  list    Series Descriptions
    study.protocol_names       list    Protocol Names of its series
    study.manufacturer         list    manufacturers of the devices
    study.device_model         list    model names of the devices
    study.institution          text    Institution Name
    study.field_strength_t     number  the highest field strength, T
    study.series_count         whole   series
    study.instance_count       whole   instances
    study.age_days             whole   days from the study date until now
    patient.id                 text    Patient ID of the images (tested, never shown)
    patient.issuer             text    Issuer of Patient ID
    patient.name               text    Patient's Name of the images, Family^Given (tested, never shown)
    patient.sex                text    M, F or O: of the images, else the EHR's
    patient.age_years          whole   full years on the study date (by birth date, else Patient's Age)
    order.code                 text    code of the ordered procedure
    order.title                text    its meaning
    order.reason               text    reason for exam
    order.priority             text    routine, urgent, asap, stat (FHIR request-priority)
    order.status               text    FHIR request-status
    labs.psa                   number  latest total PSA, ng/mL
    labs.psa_age_days          whole   days from that PSA until now
    labs.egfr                  number  latest eGFR, mL/min/{1.73_m2}
    labs.creatinine_mg_dl      number  latest creatinine where given in mg/dL
    labs.creatinine_umol_l     number  latest creatinine where given in umol/L
    context.conditions         list    conditions of the patient
    context.allergies          list    allergies of the patient

An empty text or list counts as not stated. A text fact is cut at 1,000 characters, a text in a list at 256, a list at
200 texts, so that no study can make a rule slow.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Literal

from mappings.model.context import ClinicalContext, ContextOrder, ContextValue
from mappings.model.study import Study

FactValue = str | int | float | tuple[str, ...] | None
Facts = Mapping[str, FactValue]


@dataclass(frozen=True)
class Fact:
    """What kind of value a fact has, its unit (UCUM) if any, and whether it identifies the patient."""

    kind: Literal["list", "text", "number", "whole"]
    unit: str = ""
    private: bool = False


_LIST, _TEXT, _WHOLE = Fact("list"), Fact("text"), Fact("whole")

FACTS: Mapping[str, Fact] = {
    "study.modality": _LIST,
    "study.body_part": _LIST,
    "study.description": _TEXT,
    "study.series_descriptions": _LIST,
    "study.protocol_names": _LIST,
    "study.manufacturer": _LIST,
    "study.device_model": _LIST,
    "study.institution": _TEXT,
    "study.field_strength_t": Fact("number", "T"),
    "study.series_count": _WHOLE,
    "study.instance_count": _WHOLE,
    "study.age_days": _WHOLE,
    "patient.id": Fact("text", private=True),
    "patient.issuer": _TEXT,
    "patient.name": Fact("text", private=True),
    "patient.sex": _TEXT,
    "patient.age_years": _WHOLE,
    "order.code": _TEXT,
    "order.title": _TEXT,
    "order.reason": _TEXT,
    "order.priority": _TEXT,
    "order.status": _TEXT,
    "labs.psa": Fact("number", "ng/mL"),
    "labs.psa_age_days": _WHOLE,
    "labs.egfr": Fact("number", "mL/min/{1.73_m2}"),
    "labs.creatinine_mg_dl": Fact("number", "mg/dL"),
    "labs.creatinine_umol_l": Fact("number", "umol/L"),
    "context.conditions": _LIST,
    "context.allergies": _LIST,
}
"""Every name that a rule may use; the module's docstring says what each one is."""

LONGEST_TEXT, LONGEST_LISTED_TEXT, LONGEST_LIST = 1000, 256, 200
NOTHING: Facts = dict.fromkeys(FACTS)

_PSA = frozenset({"2857-1", "35741-8", "83112-3"})
_EGFR = frozenset({"33914-3", "62238-1", "98979-8"})
_CREATININE = frozenset({"2160-0", "14682-9"})
"""LOINC codes, those that `inputs/fhir_to_labs.py` reads."""
_SEX = {"male": "M", "female": "F", "other": "O"}


def facts_of(study: Study | None, order: ContextOrder | None, context: ClinicalContext | None, now: datetime) -> Facts:
    """Every name of `FACTS` with its value. `order` is the order that the work is done for; without one the
    context's is taken. `now` is aware; laboratory values from after it are not looked at."""
    order = order or (context.order if context else None)
    return {
        **NOTHING,
        **(_study_facts(study, now) if study else {}),
        **_patient_facts(study, context, now),
        **(_order_facts(order) if order else {}),
        **(_lab_facts(context, now) if context else {}),
        "context.conditions": _notes(context, "condition"),
        "context.allergies": _notes(context, "allergy"),
    }


def facts_of_images(study: Study, now: datetime) -> Facts:
    """Those facts that the images alone settle. What an EHR may still add or change is left out, so that a rule that
    hangs on it stays undecided (`evaluate`) until the EHR was asked."""
    facts = facts_of(study, None, None, now)
    settled = {"patient.id", "patient.issuer", "patient.name"}
    settled |= {"patient.sex"} if study.patient.sex else set()
    settled |= {"patient.age_years"} if study.patient.birth_date else set()
    return {name: value for name, value in facts.items() if name.startswith("study.") or name in settled}


def _study_facts(study: Study, now: datetime) -> Facts:
    series = study.series
    return {
        "study.modality": _texts(s.modality for s in series),
        "study.body_part": _texts(s.body_part for s in series),
        "study.description": _text(study.description),
        "study.series_descriptions": _texts(s.description for s in series),
        "study.protocol_names": _texts(s.protocol_name for s in series),
        "study.manufacturer": _texts(s.manufacturer for s in series),
        "study.device_model": _texts(s.device_model for s in series),
        "study.institution": _text(study.institution),
        "study.field_strength_t": max((s.field_strength_t for s in series if s.field_strength_t), default=None),
        "study.series_count": len(series),
        "study.instance_count": sum(len(s.instances) for s in series),
        "study.age_days": (now.date() - study.study_date).days if study.study_date else None,
    }


def _patient_facts(study: Study | None, context: ClinicalContext | None, now: datetime) -> Facts:
    images = study.patient if study else None
    record = context.patient if context else None
    birth = (images.birth_date if images else None) or (record.birth_date if record else None)
    on = (study.study_date if study else None) or now.date()
    return {
        "patient.id": _text(images.patient_id) if images else None,
        "patient.issuer": _text(images.issuer) if images else None,
        "patient.name": _text(images.name) if images else None,
        "patient.sex": (images.sex if images else "") or (_SEX.get(record.gender) if record else None),
        "patient.age_years": _full_years(birth, on) if birth else _stated_years(study.patient_age if study else ""),
    }


def _full_years(birth: date, on: date) -> int | None:
    years = on.year - birth.year - ((on.month, on.day) < (birth.month, birth.day))
    return years if years >= 0 else None


def _stated_years(age: str) -> int | None:
    """Full years of a DICOM age string (VR AS, PS3.5 6.2: three digits and D, W, M or Y)."""
    number, unit = age[:3], age[3:]
    if len(age) != 4 or not number.isdecimal():
        return None
    years = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
    return int(int(number) * years[unit] + 1e-9) if unit in years else None


def _order_facts(order: ContextOrder) -> Facts:
    return {
        "order.code": _text(order.code.value) if order.code else None,
        "order.title": _text(order.code.meaning) if order.code else None,
        "order.reason": _text(order.reason),
        "order.priority": _text(order.priority),
        "order.status": _text(order.status),
    }


def _lab_facts(context: ClinicalContext, now: datetime) -> Facts:
    psa = _latest(context, _PSA, "labs.psa", now)
    egfr = _latest(context, _EGFR, "labs.egfr", now)
    by_mass = _latest(context, _CREATININE, "labs.creatinine_mg_dl", now)
    by_amount = _latest(context, _CREATININE, "labs.creatinine_umol_l", now)
    return {
        "labs.psa": psa.value if psa else None,
        "labs.psa_age_days": (now - psa.effective_at).days if psa else None,
        "labs.egfr": egfr.value if egfr else None,
        "labs.creatinine_mg_dl": by_mass.value if by_mass else None,
        "labs.creatinine_umol_l": by_amount.value if by_amount else None,
    }


def _latest(context: ClinicalContext, loinc: frozenset[str], name: str, now: datetime) -> ContextValue | None:
    """The latest value until `now` with one of these codes and the unit of the fact `name`."""
    fitting = [
        lab
        for lab in context.labs
        if lab.code.scheme == "LN" and lab.code.value in loinc and lab.unit == FACTS[name].unit
    ]
    return max((lab for lab in fitting if lab.effective_at <= now), key=lambda v: v.effective_at, default=None)


def _notes(context: ClinicalContext | None, kind: str) -> tuple[str, ...] | None:
    return _texts(note.text for note in context.notes if note.kind == kind) if context else None


def _texts(values: Iterable[str]) -> tuple[str, ...] | None:
    """Each text once, in order of appearance."""
    kept = dict.fromkeys(_clean(value)[:LONGEST_LISTED_TEXT] for value in values if value)
    return tuple(kept)[:LONGEST_LIST] or None


def _text(value: str) -> str | None:
    return _clean(value)[:LONGEST_TEXT] or None


def _clean(value: str) -> str:
    """The text without lone surrogates, which the rule engine cannot take."""
    return value.encode("utf-8", "replace").decode()

"""Which series plays which role of a protocol, and whether a protocol applies to a study, with the reasons.

Both questions are answered by the protocol's `Condition`s over the attributes named here.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mappings.model.findings import RoleChoice
from mappings.model.protocol import Condition, Protocol, Role, Scalar
from mappings.model.study import Series, Study

Value = tuple[Scalar, ...]
"""An attribute's values; empty where the images do not state it."""

NON_IMAGE_MODALITIES = frozenset({"SEG", "SR", "PR", "KO", "DOC", "RTSTRUCT", "REG", "OT", "SC"})
"""Objects about images, our own earlier results among them: never a candidate for a role."""


def find_plane(series: Series) -> str:
    """`axial`, `coronal` or `sagittal`: the patient axis nearest to the slice normal of the first placed
    instance; empty where none is placed. Oblique stacks count as the plane they are nearest to."""
    orientation = next((i.orientation for i in series.instances if i.orientation), None)
    if orientation is None:
        return ""
    normal = np.abs(np.cross(orientation[:3], orientation[3:]))
    if not normal.any():
        return ""
    return ("sagittal", "coronal", "axial")[int(np.argmax(normal))]


def list_b_values(series: Series) -> tuple[float, ...]:
    """The distinct b-values in s/mm2 that the instances state, ascending."""
    return tuple(sorted({i.b_value_s_mm2 for i in series.instances if i.b_value_s_mm2 is not None}))


def label_series(series: Series) -> str:
    """The series as people name it: its number and description."""
    number = "" if series.series_number is None else str(series.series_number)
    return " ".join(part for part in (number, series.description) if part) or "(unnamed)"


def _one(value: Scalar | None) -> Value:
    return () if value is None or value == "" else (value,)


SERIES_ATTRIBUTES: Mapping[str, Callable[[Series], Value]] = {
    "modality": lambda s: _one(s.modality),
    "plane": lambda s: _one(find_plane(s)),
    "image_type": lambda s: s.image_type,
    "scanning_sequence": lambda s: s.scanning_sequence,
    "sequence_name": lambda s: _one(s.sequence_name),
    "description": lambda s: _one(" ".join(p for p in (s.description, s.protocol_name) if p)),
    "body_part": lambda s: _one(s.body_part),
    "acquisition_type": lambda s: _one(s.acquisition_type),
    "contrast_agent": lambda s: _one(s.contrast_agent),
    "b_value": lambda s: _one(max(list_b_values(s), default=None)),
    "b_value_count": lambda s: (len(list_b_values(s)),),
    "echo_time_ms": lambda s: _one(s.echo_time_ms),
    "repetition_time_ms": lambda s: _one(s.repetition_time_ms),
    "slice_thickness_mm": lambda s: _one(s.slice_thickness_mm),
    "pixel_spacing_mm": lambda s: _one(next((i.pixel_spacing_mm[0] for i in s.instances if i.pixel_spacing_mm), None)),
    "instances": lambda s: (len(s.instances),),
    "series_number": lambda s: _one(s.series_number),
    "acquired": lambda s: _one(s.acquired),
}
"""What a role's conditions can look at."""

STUDY_ATTRIBUTES: Mapping[str, Callable[[Study], Value]] = {
    "modality": lambda s: tuple(sorted({series.modality for series in s.series})),
    "body_part": lambda s: tuple(sorted({series.body_part for series in s.series if series.body_part})),
    "description": lambda s: _one(s.description),
    "series_description": lambda s: tuple(series.description for series in s.series if series.description),
    "sex": lambda s: _one(s.patient.sex),
    "manufacturer": lambda s: tuple(sorted({series.manufacturer for series in s.series if series.manufacturer})),
}
"""What a protocol's `match` can look at."""


def failed(condition: Condition, values: Callable[[str], Value]) -> str | None:
    """Why `condition` does not hold, in words with the value looked at; None where it holds."""
    if condition.any is not None:
        reasons = [failed(each, values) for each in condition.any]
        return None if None in reasons else condition.say or "; ".join(str(r) for r in reasons)
    stated = values(condition.attribute)
    if not stated:
        return None if condition.missing == "pass" else f"{condition.attribute} is not stated"
    if _holds(condition, stated):
        return None
    shown = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in stated[:6])
    return (
        condition.say.format(value=shown) if condition.say else f"{condition.attribute} is {shown}{_wanted(condition)}"
    )


def _holds(condition: Condition, stated: Value) -> bool:
    texts = [str(v).casefold() for v in stated]
    if condition.any_of is not None and not any(str(w).casefold() in texts for w in condition.any_of):
        return False
    if condition.none_of is not None and any(str(w).casefold() in texts for w in condition.none_of):
        return False
    numbers = [float(v) for v in stated if isinstance(v, int | float)]
    if condition.at_least is not None and not any(n >= condition.at_least for n in numbers):
        return False
    if condition.at_most is not None and not any(n <= condition.at_most for n in numbers):
        return False
    if condition.matches is not None and not any(re.search(condition.matches, str(v)) for v in stated):
        return False
    return condition.not_matches is None or not any(re.search(condition.not_matches, str(v)) for v in stated)


def _wanted(condition: Condition) -> str:
    parts = (
        (condition.any_of, "not {}"),
        (condition.none_of, "which may not be {}"),
        (condition.at_least, "under {}"),
        (condition.at_most, "over {}"),
        (condition.matches, "not like {}"),
        (condition.not_matches, "which may not be like {}"),
    )
    for value, words in parts:
        if value is not None:
            shown = " or ".join(map(str, value)) if isinstance(value, tuple) else value
            return ", " + words.format(shown)
    return ""


def match_protocol(study: Study, protocol: Protocol) -> tuple[str, ...]:
    """Why `protocol` does not apply to `study`; empty where it applies."""
    reasons = (failed(condition, lambda name: STUDY_ATTRIBUTES[name](study)) for condition in protocol.match)
    return tuple(reason for reason in reasons if reason is not None)


def choose_series(study: Study, protocol: Protocol) -> tuple[RoleChoice, ...]:
    """One choice a role, in the protocol's order. A series plays at most one role."""
    choices: list[RoleChoice] = []
    taken: dict[str, str] = {}
    for role in protocol.roles:
        choice = _choose_one(study, role, taken)
        if choice.series_instance_uid:
            taken[choice.series_instance_uid] = role.name
        choices.append(choice)
    return tuple(choices)


def _choose_one(study: Study, role: Role, taken: Mapping[str, str]) -> RoleChoice:
    candidates: list[Series] = []
    refusals: list[str] = []
    for series in study.series:
        reason = _refusal(series, role, taken)
        if reason is None:
            candidates.append(series)
        else:
            refusals.append(f"series {label_series(series)} refused: {reason}")
    if not candidates:
        return RoleChoice(role.name, role.title, role.required, None, "", tuple(refusals))
    best, beaten = _prefer(candidates, role.prefer)
    facts = ", ".join(dict.fromkeys(text for text in (_fact(best, c) for c in role.must) if text))
    chosen = f"series {label_series(best)} chosen: {facts}"
    return RoleChoice(
        role.name,
        role.title,
        role.required,
        best.series_instance_uid,
        label_series(best),
        (chosen, *beaten, *refusals),
    )


def _refusal(series: Series, role: Role, taken: Mapping[str, str]) -> str | None:
    if series.modality in NON_IMAGE_MODALITIES:
        return f"modality is {series.modality}"
    if series.series_instance_uid in taken:
        return f"already used as {taken[series.series_instance_uid]}"
    for condition in role.must:
        reason = failed(condition, lambda name: SERIES_ATTRIBUTES[name](series))
        if reason is not None:
            return reason
    b_values = list_b_values(series)
    if len(b_values) > 1 and role.geometry.several_b_values == "refuse":
        return f"several b-values in one series ({', '.join(f'{b:g}' for b in b_values)} s/mm2)"
    return None


def _fact(series: Series, condition: Condition) -> str:
    """What a condition that holds looked at, in words."""
    if condition.any is not None:
        return next((_fact(series, c) for c in condition.any if _is_met(series, c)), "")
    stated = SERIES_ATTRIBUTES[condition.attribute](series)
    return f"{condition.attribute} {'/'.join(map(_show, stated))}" if stated and condition.none_of is None else ""


def _is_met(series: Series, condition: Condition) -> bool:
    return failed(condition, lambda name: SERIES_ATTRIBUTES[name](series)) is None


def _show(value: Scalar) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _prefer(candidates: Sequence[Series], preferences: Sequence[str]) -> tuple[Series, tuple[str, ...]]:
    """The candidate that the first telling preference picks, and why each other one lost."""
    remaining = list(candidates)
    beaten: list[str] = []
    for preference in preferences:
        direction, _, name = preference.partition(":")
        ranked = {s.series_instance_uid: SERIES_ATTRIBUTES[name](s) for s in remaining}
        stated = [value[0] for value in ranked.values() if value]
        if not stated:
            continue
        best = max(stated, key=_sortable) if direction == "high" else min(stated, key=_sortable)
        losers = [s for s in remaining if not ranked[s.series_instance_uid] or ranked[s.series_instance_uid][0] != best]
        word = "higher" if direction == "high" else "lower"
        beaten.extend(
            f"series {label_series(s)} not preferred: {word} {name} ({_show(best)}) elsewhere" for s in losers
        )
        remaining = [s for s in remaining if s not in losers]
    rest = [f"series {label_series(s)} not preferred: another candidate comes first" for s in remaining[1:]]
    return remaining[0], (*beaten, *rest)


def _sortable(value: Scalar) -> tuple[float, str]:
    return (float(value), "") if isinstance(value, int | float) else (0.0, str(value))

"""The current findings against those of a prior study: which lesion is which, and how much each grew.

Registration. Between sittings a gland turns little, but it lies elsewhere in the scanner and may have grown.
`align_glands` puts the centroids of the two glands onto each other and scales by the cube root of the ratio of their
volumes. The volume is used rather than the extents because extents run along the image axes, which are tilted anew at
each sitting, while centroids and volumes do not depend on the tilt.

Matching. Each pair of lesions costs the distance of their registered centroids in mm; a pair further apart than the
gate, or on opposite sides of the gland (unless both lie at its midline), is none; another zone counts as
`zone_penalty_mm` further away. The cheapest 1:1 assignment is taken (`scipy.optimize.linear_sum_assignment`; Crouse,
IEEE Trans Aerosp Electron Syst 2016;52:1679), where leaving a pair apart costs as much as a pair at the gate. Where
another assignment costs less than `margin_mm` more, the lesions that it would exchange are ambiguous.

Growth. Volume doubling time = interval x ln 2 / ln(V2 / V1), for exponential growth (Schwartz, Cancer 1961;14:1272).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from mappings.model import codes
from mappings.model.changes import (
    DAYS,
    DIFFERENCE,
    DOUBLING_TIME,
    PER_YEAR,
    PERCENT,
    PERCENT_CHANGE,
    PERCENT_PER_YEAR,
    YEARLY_RATE,
    Alignment,
    Change,
    Comparison,
    LesionChange,
    LesionRef,
    PriorRefused,
)
from mappings.model.codes import Code
from mappings.model.findings import Finding, Findings
from mappings.model.measurement import Measurement
from mappings.model.study import Vector

Transform = Callable[[Vector], Vector]
"""Takes LPS mm of the prior study to LPS mm of the current one."""

LESION_KEYS = ("volume", "diameter_in_plane", "diameter_3d")
GLAND_KEYS = ("volume_voxels", "volume_ellipsoid")
DAYS_PER_YEAR = 365.25
SHORTEST_RATE_DAYS = 28
"""Under four weeks the scatter of two measurements, spread over a year, hides any growth: no rate is given."""
CREDIBLE_SCALE = (0.8, 1.25)
"""A gland that doubles its volume scales by 1.26: beyond this the two outlines rather than the gland differ."""


@dataclass(frozen=True)
class Gates:
    """When two lesions may be one, in mm. A lesion larger across than twice `gate_mm` may move by half its longest
    diameter: where it grows to one side its centroid moves with it."""

    gate_mm: float = 10.0
    zone_penalty_mm: float = 3.0
    midline_mm: float = 5.0
    margin_mm: float = 2.0


DEFAULT_GATES = Gates()


def compare(current: Findings, prior: Findings, gates: Gates = DEFAULT_GATES) -> Comparison:
    """The whole comparison. Raises PriorRefused where the two may not be compared (`check_prior`, `align_glands`)."""
    days = check_prior(current, prior)
    alignment = align_glands(current, prior)
    assert prior.study_date is not None
    assert current.gland is not None
    assert prior.gland is not None
    return Comparison(
        prior_study_instance_uid=prior.study_instance_uid,
        prior_study_date=prior.study_date,
        prior_job_id=prior.job_id,
        prior_revision=prior.revision,
        prior_protocol_name=prior.protocol_name,
        interval_days=days,
        gland=_changes(current.gland, prior.gland, GLAND_KEYS, days),
        lesions=match_lesions(current, prior, alignment, gates),
        notes=(*_method_notes(current, prior), *alignment.notes),
    )


def check_prior(current: Findings, prior: Findings) -> int:
    """The days between the two studies. Raises PriorRefused for another patient, the same study, a prior that is later
    or undated, and findings that were entered in error."""
    if current.study_instance_uid == prior.study_instance_uid:
        raise PriorRefused("the prior is the study itself")
    if "entered-in-error" in (current.status, prior.status):
        raise PriorRefused("the findings of one of the studies were entered in error")
    _check_patient(current, prior)
    if current.study_date is None or prior.study_date is None:
        raise PriorRefused("one of the studies has no date")
    days = (current.study_date - prior.study_date).days
    if days < 0:
        raise PriorRefused(f"the prior is {-days} days later than the study")
    return days


def _check_patient(current: Findings, prior: Findings) -> None:
    one, other = current.patient, prior.patient
    if not one.patient_id or not other.patient_id:
        raise PriorRefused("one of the studies has no patient ID")
    if one.patient_id != other.patient_id:
        raise PriorRefused("the studies have different patient IDs")
    pairs = (
        ("issuers of the patient ID", one.issuer, other.issuer),
        ("birth dates", one.birth_date, other.birth_date),
        ("sexes", one.sex, other.sex),
    )
    for what, mine, theirs in pairs:
        if mine and theirs and mine != theirs:
            raise PriorRefused(f"the studies have different {what}")


def _method_notes(current: Findings, prior: Findings) -> tuple[str, ...]:
    """What else than the patient may have made the difference."""
    notes = []
    if (current.model.name, current.model.version) != (prior.model.name, prior.model.version):
        notes.append(
            f"The prior was measured by {prior.model.name} {prior.model.version}, this study by "
            f"{current.model.name} {current.model.version}: part of a change may be the model's."
        )
    if current.protocol_name != prior.protocol_name:
        notes.append(f"The prior was read by protocol {prior.protocol_name}, not {current.protocol_name}.")
    return tuple(notes)


def align_glands(current: Findings, prior: Findings) -> Alignment:
    """Where places of the prior gland lie now. Raises PriorRefused where a study has no gland to go by."""
    centres, volumes = [], []
    for findings, which in ((current, "this study"), (prior, "the prior")):
        gland = findings.gland
        volume = gland.measurement("volume_voxels") if gland else None
        if gland is None or gland.centroid_lps_mm is None or volume is None or volume.value <= 0:
            raise PriorRefused(f"{which} has no gland to register by")
        centres.append(gland.centroid_lps_mm)
        volumes.append(volume.value)
    scale = math.cbrt(volumes[0] / volumes[1])
    low, high = CREDIBLE_SCALE
    if low <= scale <= high:
        return Alignment(centres[1], centres[0], scale)
    note = f"The gland volumes differ by a factor of {volumes[0] / volumes[1]:.2f}: positions were not scaled."
    return Alignment(centres[1], centres[0], 1.0, (f"{note} Please check the outlines.",))


# --- matching ------------------------------------------------------------------------------------------------

Costs = npt.NDArray[np.float64]
Pairs = dict[int, int]
"""Which prior lesion (column) goes with each current lesion (row)."""


def match_lesions(
    current: Findings, prior: Findings, transform: Transform | None = None, gates: Gates = DEFAULT_GATES
) -> tuple[LesionChange, ...]:
    """Every lesion of both studies once: the current ones in their order, then those that are gone. `transform` is
    `align_glands` unless given. Raises PriorRefused as `check_prior` and `align_glands` do."""
    days = check_prior(current, prior)
    transform = transform or align_glands(current, prior)
    placed = [move_lesion(lesion, transform) for lesion in prior.lesions]
    best, candidates = pair_lesions(current, placed, gates)
    sitting = _Sitting(current, prior, days)
    rows = [
        _row(sitting, lesion, placed, best.get(i), sorted(candidates.get(i, ())))
        for i, lesion in enumerate(current.lesions)
    ]
    spoken_for = set(best.values()) | {j for some in candidates.values() for j in some}
    gone = [f for j, f in enumerate(prior.lesions) if j not in spoken_for]
    return (*rows, *(LesionChange("gone", days, prior=_ref(prior, lesion)) for lesion in gone))


def pair_lesions(current: Findings, placed: Sequence[Finding], gates: Gates) -> tuple[Pairs, Mapping[int, set[int]]]:
    """Which of `placed` (lesions of another reading, at their places in the current one) each current lesion is, by
    position in both; and for each current lesion that the positions do not decide, those that it may be."""
    costs = _costs(current, placed, gates)
    best, total = _assign(costs, gates)
    return best, _alternatives(costs, best, total, gates)


@dataclass(frozen=True)
class _Sitting:
    current: Findings
    prior: Findings
    days: int


def move_lesion(lesion: Finding, transform: Transform) -> Finding:
    """The prior lesion at its place in the current study."""
    return replace(lesion, centroid_lps_mm=transform(lesion.centroid_lps_mm)) if lesion.centroid_lps_mm else lesion


def _costs(current: Findings, placed: Sequence[Finding], gates: Gates) -> Costs:
    """mm for each pair (current, prior), infinite for pairs that cannot be one lesion."""
    midline_x = current.gland.centroid_lps_mm[0] if current.gland and current.gland.centroid_lps_mm else None
    rows = [[_cost(lesion, other, midline_x, gates) for other in placed] for lesion in current.lesions]
    return np.array(rows, dtype=np.float64).reshape(len(current.lesions), len(placed))


def _cost(one: Finding, other: Finding, midline_x: float | None, gates: Gates) -> float:
    """The distance as a share of what this pair is allowed, in units of the gate, so that large lesions compete
    with small ones on equal terms."""
    distance = _distance_mm(one, other)
    if distance is None or _on_opposite_sides(one, other, midline_x, gates):
        return math.inf
    longest = [m.value for f in (one, other) if (m := f.measurement("diameter_3d"))]
    allowed = max(gates.gate_mm, *(value / 2 for value in longest)) if longest else gates.gate_mm
    elsewhere = one.zone is not None and other.zone is not None and one.zone != other.zone
    cost = distance / allowed * gates.gate_mm + (gates.zone_penalty_mm if elsewhere else 0.0)
    return cost if cost <= gates.gate_mm else math.inf


def _distance_mm(one: Finding, other: Finding) -> float | None:
    if one.centroid_lps_mm is None or other.centroid_lps_mm is None:
        return None
    return math.dist(one.centroid_lps_mm, other.centroid_lps_mm)


def _on_opposite_sides(one: Finding, other: Finding, midline_x: float | None, gates: Gates) -> bool:
    if {one.laterality, other.laterality} != {codes.LEFT, codes.RIGHT}:
        return False
    places = [f.centroid_lps_mm for f in (one, other)]
    return midline_x is None or any(p is None or abs(p[0] - midline_x) > gates.midline_mm for p in places)


def _assign(costs: Costs, gates: Gates) -> tuple[Pairs, float]:
    """The cheapest 1:1 assignment and its cost in mm. Each lesion may instead stay alone at half the gate, so that a
    pair apart costs as much as a pair at the gate."""
    n, m = costs.shape
    alone = gates.gate_mm / 2
    square = np.full((n + m, n + m), np.inf)
    square[:n, :m] = costs
    square[np.arange(n), m + np.arange(n)] = alone
    square[n + np.arange(m), np.arange(m)] = alone
    square[n:, m:] = 0.0
    rows, columns = linear_sum_assignment(square)
    pairs = {int(i): int(j) for i, j in zip(rows, columns, strict=True) if i < n and j < m}
    return pairs, float(square[rows, columns].sum())


def _alternatives(costs: Costs, best: Pairs, total: float, gates: Gates) -> Mapping[int, set[int]]:
    """For each current lesion that another assignment would pair differently at nearly the same cost, the prior
    lesions it may be. An assignment that only leaves a pair apart is no alternative: there is no other candidate."""
    found: dict[int, set[int]] = {}
    for row, column in best.items():
        barred = costs.copy()
        barred[row, column] = np.inf
        other, cost = _assign(barred, gates)
        exchanged = other.get(row) is not None or column in other.values()
        if not exchanged or cost - total >= gates.margin_mm:
            continue
        for i in (i for i in best.keys() | other.keys() if best.get(i) != other.get(i)):
            found.setdefault(i, set()).update(j for j in (best.get(i), other.get(i)) if j is not None)
    return found


def _row(
    sitting: _Sitting, lesion: Finding, placed: Sequence[Finding], column: int | None, candidates: Sequence[int]
) -> LesionChange:
    """What became of one current lesion."""
    ref = _ref(sitting.current, lesion)
    olds = sitting.prior.lesions
    if candidates:
        options = tuple(_ref(sitting.prior, olds[j]) for j in candidates)
        names = " or ".join(o.title for o in options)
        note = f"By its place it may be {names} of the prior; no growth is given. Please match by eye."
        return LesionChange("ambiguous", sitting.days, ref, candidates=options, notes=(note,))
    if column is None:
        return LesionChange("new", sitting.days, ref)
    old = olds[column]
    return LesionChange(
        "matched",
        sitting.days,
        ref,
        _ref(sitting.prior, old),
        changes=_changes(lesion, old, LESION_KEYS, sitting.days),
        doubling_time=find_doubling_time(lesion.measurement("volume"), old.measurement("volume"), sitting.days),
        distance_mm=round(_distance_mm(lesion, placed[column]) or 0.0, 1),
        notes=tuple(_match_notes(lesion, old, sitting.days)),
    )


def _match_notes(lesion: Finding, old: Finding, days: int) -> list[str]:
    notes = []
    if days < SHORTEST_RATE_DAYS:
        notes.append(f"The studies are {days} days apart: too short for a rate of growth.")
    for what, now, before in (("zone", lesion.zone, old.zone), ("side", lesion.laterality, old.laterality)):
        if now and before and now != before:
            notes.append(f"Its {what} was {before.meaning} in the prior and is {now.meaning} now.")
    return notes


def _ref(findings: Findings, lesion: Finding) -> LesionRef:
    assert findings.study_date is not None
    return LesionRef(
        study_instance_uid=findings.study_instance_uid,
        study_date=findings.study_date,
        job_id=findings.job_id,
        revision=findings.revision,
        tracking_id=lesion.tracking_id,
        tracking_uid=lesion.tracking_uid,
        title=lesion.title,
        segment_number=lesion.segment_number,
        centroid_lps_mm=lesion.centroid_lps_mm,
        evidence=lesion.evidence,
    )


# --- growth --------------------------------------------------------------------------------------------------


def _changes(now: Finding, before: Finding, keys: Sequence[str], days: int) -> tuple[Change, ...]:
    """The quantities that both sittings measured, in the same unit."""
    pairs = ((now.measurement(key), before.measurement(key)) for key in keys)
    return tuple(measure_change(a, b, days) for a, b in pairs if a and b and a.unit == b.unit)


def measure_change(current: Measurement, prior: Measurement, interval_days: int) -> Change:
    """The change of one quantity between two sittings, from the values as they are shown."""
    now, before = float(current.text), float(prior.text)
    years = interval_days / DAYS_PER_YEAR
    long_enough = interval_days >= SHORTEST_RATE_DAYS
    rate_unit = PER_YEAR.get(current.unit.value)

    def derive(suffix: str, label: str, value: float, unit: Code, decimals: int, how: Code) -> Measurement:
        # + 0.0: a change of -0.04 % is shown as 0.0, not as -0.0.
        text = f"{current.label}, {label}"
        return Measurement(
            f"{current.key}_{suffix}",
            text,
            current.concept,
            round(value, decimals) + 0.0,
            unit,
            decimals,
            derivation=how,
        )

    ratio = now / before if before > 0 and now > 0 else None
    digits = current.decimals
    return Change(
        key=current.key,
        label=current.label,
        prior=prior,
        current=current,
        difference=derive("difference", "difference", now - before, current.unit, digits, DIFFERENCE),
        percent=derive("percent", "change", (now / before - 1) * 100, PERCENT, 1, PERCENT_CHANGE) if before else None,
        per_year=derive("per_year", "change per year", (now - before) / years, rate_unit, digits, YEARLY_RATE)
        if long_enough and rate_unit
        else None,
        percent_per_year=derive(
            "percent_per_year", "growth per year", (ratio ** (1 / years) - 1) * 100, PERCENT_PER_YEAR, 1, YEARLY_RATE
        )
        if long_enough and ratio
        else None,
    )


def find_doubling_time(current: Measurement | None, prior: Measurement | None, days: int) -> Measurement | None:
    """Volume doubling time in days; None where the volume did not grow by more than its last digit, the interval is too
    short, or a volume is missing or nothing."""
    if current is None or prior is None or current.unit != prior.unit or days < SHORTEST_RATE_DAYS:
        return None
    now, before = float(current.text), float(prior.text)
    last_digit = 10.0 ** -min(current.decimals, prior.decimals)
    if before <= 0 or now - before <= last_digit * 1.001:
        return None
    value = round(days * math.log(2) / math.log(now / before))
    return Measurement("doubling_time", "Volume doubling time", DOUBLING_TIME, float(value), DAYS, 0)

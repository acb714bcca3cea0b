"""PI-RADS v2.1 categories from zone and sequence scores.

Source: PI-RADS v2.1, ACR/ESUR/AdMeTech 2019; Turkbey et al., Eur Urol 2019;76:340-351, assessment
categories for PZ and TZ, and "Assessment without adequate DWI". Codes: PS3.16 CIDs 6324, 6328-6332.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mappings.model import codes
from mappings.model.codes import Code
from mappings.model.findings import Assessment, AssessmentInput

Zone = Literal["PZ", "TZ"]
Dce = Literal["positive", "negative", "not acquired"]

RULE = "pirads_v2_1"
SIZE_OF_CATEGORY_5_MM = 15.0
"""A category 5 lesion measures at least this, or extends beyond the prostate (PI-RADS v2.1, T2W and DWI sections)."""

_WORDS = {"1": "Very low", "2": "Low", "3": "Intermediate", "4": "High", "5": "Very high", "X": "Inadequate or absent"}
_LESION_RID = {"1": "RID50296", "2": "RID50297", "3": "RID50298", "4": "RID50299", "5": "RID50300", "X": "RID50323"}
_OVERALL_RID = {"1": "RID50289", "2": "RID50290", "3": "RID50291", "4": "RID50292", "5": "RID50293", "X": "RID50322"}
_DWI_RID = {"1": "RID50314", "2": "RID50315", "3": "RID50316", "4": "RID50317", "5": "RID50318", "X": "RID50326"}
_T2W_RID: dict[Zone, dict[str, str]] = {
    "PZ": {"1": "RID50302", "2": "RID50303", "3": "RID50304", "4": "RID50305", "5": "RID50306", "X": "RID50324"},
    "TZ": {"1": "RID50308", "2": "RID50309", "3": "RID50310", "4": "RID50311", "5": "RID50312", "X": "RID50325"},
}
_DCE_CODE: dict[Dce, Code] = {
    "positive": Code("RID50321", "RADLEX", "PI-RADS DCE +ve"),
    "negative": Code("RID50320", "RADLEX", "PI-RADS DCE -ve"),
    "not acquired": Code("RID50327", "RADLEX", "PI-RADS X - DCE Inadequate or absent"),
}
_ZONE_CODE: dict[Zone, Code] = {"PZ": codes.PERIPHERAL_ZONE, "TZ": codes.TRANSITION_ZONE}


@dataclass(frozen=True)
class Category:
    """A category ("1".."5" or "X" where none can be given) and the sentence that says how it came about."""

    score: str
    explanation: str


def categorise(zone: Zone | None, t2w: int | None, dwi: int | None, dce: Dce) -> Category:
    """The category of one lesion by the table of PI-RADS v2.1.

    `t2w` and `dwi` are 1..5, None where the sequence is absent or inadequate. DCE that was not acquired
    counts as negative. Raises ValueError for a score outside 1..5.
    """
    for name, score in (("T2W", t2w), ("DWI", dwi)):
        if score is not None and score not in range(1, 6):
            raise ValueError(f"{name} score {score} is not one of 1 to 5")
    if zone is None:
        return Category("X", "The zone is not known, so no table applies.")
    if t2w is None and dwi is None:
        return Category("X", "Neither T2W nor DWI is usable, so no category can be given.")
    return _peripheral(t2w, dwi, dce) if zone == "PZ" else _transition(t2w, dwi)


def _peripheral(t2w: int | None, dwi: int | None, dce: Dce) -> Category:
    if dwi is None:
        sequence, score = "DWI is not usable: T2W", t2w
    else:
        sequence, score = "DWI is dominant: DWI", dwi
    if score != 3:
        return Category(str(score), f"Peripheral zone, {sequence} {score} gives category {score}.")
    category = "4" if dce == "positive" else "3"
    note = " (counts as negative)" if dce == "not acquired" else ""
    return Category(category, f"Peripheral zone, {sequence} 3 with DCE {dce}{note} gives category {category}.")


def _transition(t2w: int | None, dwi: int | None) -> Category:
    if t2w is None:
        return Category("X", "Transition zone, T2W is dominant and not usable, so no category can be given.")
    upgrade_from = {2: 4, 3: 5}.get(t2w)
    if upgrade_from is None:
        return Category(str(t2w), f"Transition zone, T2W is dominant: T2W {t2w} gives category {t2w}.")
    if dwi is None:
        return Category(str(t2w), f"Transition zone, T2W {t2w} without usable DWI gives category {t2w}.")
    category = t2w + 1 if dwi >= upgrade_from else t2w
    return Category(str(category), f"Transition zone, T2W {t2w} with DWI {dwi} gives category {category}.")


def assess_lesion(zone: Zone | None, t2w: int | None, dwi: int | None, dce: Dce) -> Assessment:
    """The coded assessment of one lesion, with every input that gave it."""
    category = categorise(zone, t2w, dwi, dce)
    return Assessment(
        key="pirads",
        label="PI-RADS v2.1 category",
        concept=codes.PIRADS_LESION,
        value=Code(
            _LESION_RID[category.score], "RADLEX", f"PI-RADS {category.score} - {_WORDS[category.score]} (lesion)"
        ),
        score=category.score,
        rule=RULE,
        inputs=(
            _zone_input(zone),
            _score_input("T2W score", codes.PIRADS_T2WI, t2w, zone and _T2W_RID[zone], f"T2WI {zone}"),
            _score_input("DWI score", codes.PIRADS_DWI, dwi, _DWI_RID, "DWI"),
            AssessmentInput("DCE", dce, codes.PIRADS_DCE, _DCE_CODE[dce]),
        ),
        explanation=category.explanation,
    )


def _zone_input(zone: Zone | None) -> AssessmentInput:
    if zone is None:
        return AssessmentInput("zone", "not known")
    return AssessmentInput("zone", {"PZ": "peripheral zone", "TZ": "transition zone"}[zone], None, _ZONE_CODE[zone])


def _score_input(
    name: str, concept: Code, score: int | None, rids: dict[str, str] | None, label: str
) -> AssessmentInput:
    key = "X" if score is None else str(score)
    code = Code(rids[key], "RADLEX", f"PI-RADS {key} - {label} {_WORDS[key]}") if rids else None
    return AssessmentInput(name, "not usable" if score is None else key, concept, code)


def assess_study(lesions: Iterable[Assessment]) -> Assessment | None:
    """The overall category: the highest of the lesions' (X only if none has another). None without lesions:
    category 1 or 2 of a prostate without a candidate is a radiologist's to give."""
    scores = [lesion.score for lesion in lesions]
    if not scores:
        return None
    highest = max(scores, key=lambda score: "X12345".index(score))
    return Assessment(
        key="pirads_overall",
        label="PI-RADS v2.1 overall category",
        concept=codes.PIRADS_OVERALL,
        value=Code(_OVERALL_RID[highest], "RADLEX", f"PI-RADS {highest} - {_WORDS[highest]}"),
        score=highest,
        rule=RULE,
        inputs=(AssessmentInput("lesion categories", ", ".join(scores)),),
        explanation=f"The highest lesion category is {highest}.",
    )


def size_note(score: str, diameter_mm: float) -> str | None:
    """A sentence where a category of 4 or 5 and the size disagree (15 mm, or extraprostatic extension), else None."""
    if score == "4" and diameter_mm >= SIZE_OF_CATEGORY_5_MM:
        return f"Category 4 with a diameter of {diameter_mm:.1f} mm: 15 mm or more would be category 5. Please check."
    if score == "5" and diameter_mm < SIZE_OF_CATEGORY_5_MM:
        return (
            f"Category 5 with a diameter of {diameter_mm:.1f} mm (under 15 mm) holds only with definite "
            "extraprostatic extension. Please check."
        )
    return None

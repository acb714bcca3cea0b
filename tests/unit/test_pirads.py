"""PI-RADS v2.1: the whole table, written out here from the document and not taken from the code under test.

Source: PI-RADS v2.1 (ACR/ESUR/AdMeTech 2019), "PI-RADS Assessment", tables for PZ and TZ and "Assessment without
adequate DWI"; ../shared/STANDARDS.md. DCE that was not acquired counts as negative.
"""

from itertools import product

import pytest
from pydicom.sr.codedict import codes as dicom

from mappings.model import codes
from mappings.model.codes import Code
from mappings.model.findings import Level
from mappings.rules.pirads_sectors_v2_1 import choose_level, choose_sector, sector_name
from mappings.rules.pirads_v2_1 import Dce, Zone, assess_lesion, assess_study, categorise, size_note

SCORES = (1, 2, 3, 4, 5, None)
DCE: tuple[Dce, ...] = ("positive", "negative", "not acquired")
ABSENT = "X"

# One row a T2W score (1 to 5, absent), one column a DWI score (1 to 5, absent).
PZ_DCE_NEGATIVE = """
    1 2 3 4 5 1
    1 2 3 4 5 2
    1 2 3 4 5 3
    1 2 3 4 5 4
    1 2 3 4 5 5
    1 2 3 4 5 X
"""
PZ_DCE_POSITIVE = """
    1 2 4 4 5 1
    1 2 4 4 5 2
    1 2 4 4 5 4
    1 2 4 4 5 4
    1 2 4 4 5 5
    1 2 4 4 5 X
"""
TZ = """
    1 1 1 1 1 1
    2 2 2 3 3 2
    3 3 3 3 4 3
    4 4 4 4 4 4
    5 5 5 5 5 5
    X X X X X X
"""
NO_ZONE = "X X X X X X\n" * 6
TABLES: dict[tuple[Zone | None, Dce], str] = {
    ("PZ", "positive"): PZ_DCE_POSITIVE,
    ("PZ", "negative"): PZ_DCE_NEGATIVE,
    ("PZ", "not acquired"): PZ_DCE_NEGATIVE,
    ("TZ", "positive"): TZ,
    ("TZ", "negative"): TZ,
    ("TZ", "not acquired"): TZ,
    (None, "positive"): NO_ZONE,
    (None, "negative"): NO_ZONE,
    (None, "not acquired"): NO_ZONE,
}
COMBINATIONS = list(product(("PZ", "TZ", None), SCORES, SCORES, DCE))


def expected(zone: Zone | None, t2w: int | None, dwi: int | None, dce: Dce) -> str:
    rows = [line.split() for line in TABLES[zone, dce].strip().splitlines()]
    return rows[SCORES.index(t2w)][SCORES.index(dwi)]


def test_every_combination_is_in_the_table() -> None:
    assert len(COMBINATIONS) == 3 * 6 * 6 * 3
    assert {expected(*c) for c in COMBINATIONS} == {"1", "2", "3", "4", "5", "X"}  # type: ignore[arg-type]


@pytest.mark.parametrize(("zone", "t2w", "dwi", "dce"), COMBINATIONS)
def test_category(zone: Zone | None, t2w: int | None, dwi: int | None, dce: Dce) -> None:
    category = categorise(zone, t2w, dwi, dce)
    assert category.score == expected(zone, t2w, dwi, dce)
    assert category.explanation.endswith(".")
    if category.score != ABSENT:
        assert f"category {category.score}" in category.explanation


@pytest.mark.parametrize("zone", ["PZ", "TZ", None])
@pytest.mark.parametrize("score", [0, 6, -1, 2.5])
def test_refuses_scores_that_do_not_exist(zone: Zone | None, score: int) -> None:
    with pytest.raises(ValueError, match=r"T2W score .* is not one of 1 to 5"):
        categorise(zone, score, 3, "negative")
    with pytest.raises(ValueError, match=r"DWI score .* is not one of 1 to 5"):
        categorise(zone, 3, score, "negative")


@pytest.mark.parametrize("dwi", [3, None])
def test_says_that_absent_dce_counted_as_negative_where_it_mattered(dwi: int | None) -> None:
    assert "not acquired (counts as negative)" in categorise("PZ", 3, dwi, "not acquired").explanation
    assert "counts as negative" not in categorise("PZ", 3, 4, "not acquired").explanation


# Codes, against pydicom's copy of PS3.16


def concept(group: str, name: str) -> tuple[str, str, str]:
    code = getattr(getattr(dicom, group), name)
    return code.value, code.scheme_designator, code.meaning


def described(code: Code | None) -> tuple[str, str, str]:
    assert code is not None
    return code.value, code.scheme, code.meaning


WORDS = {1: "VeryLow", 2: "Low", 3: "Intermediate", 4: "High", 5: "VeryHigh", None: "InadequateOrAbsent"}
LETTER = {1: "1", 2: "2", 3: "3", 4: "4", 5: "5", None: "X"}


@pytest.mark.parametrize(("zone", "t2w", "dwi", "dce"), [c for c in COMBINATIONS if c[0]])
def test_lesion_codes_are_those_of_dicom(zone: Zone, t2w: int | None, dwi: int | None, dce: Dce) -> None:
    found = assess_lesion(zone, t2w, dwi, dce)
    score = None if found.score == ABSENT else int(found.score)
    assert described(found.value) == concept("cid6328", f"PIRADS{LETTER[score]}{WORDS[score]}Lesion")
    inputs = {i.name: i for i in found.inputs}
    t2w_group = {"PZ": "cid6329", "TZ": "cid6330"}[zone]
    assert described(inputs["T2W score"].code) == concept(t2w_group, f"PIRADS{LETTER[t2w]}T2WI{zone}{WORDS[t2w]}")
    assert described(inputs["DWI score"].code) == concept("cid6331", f"PIRADS{LETTER[dwi]}DWI{WORDS[dwi]}")
    dce_name = {"positive": "_DCEPositive", "negative": "_DCENegative", "not acquired": "XDCEInadequateOrAbsent"}[dce]
    assert described(inputs["DCE"].code) == concept("cid6332", f"PIRADS{dce_name}")
    assert inputs["DCE"].value == dce
    assert [i.value for i in found.inputs[1:3]] == [str(s) if s else "not usable" for s in (t2w, dwi)]


def test_lesion_without_a_zone_has_no_zone_code_and_no_t2w_code() -> None:
    found = assess_lesion(None, 4, 4, "negative")
    inputs = {i.name: i for i in found.inputs}
    assert (found.score, inputs["zone"].value, inputs["zone"].code) == ("X", "not known", None)
    assert (inputs["T2W score"].value, inputs["T2W score"].code) == ("4", None)


@pytest.mark.parametrize(
    ("scores", "overall"),
    [
        (["1"], "1"),
        (["2", "4", "3"], "4"),
        (["X"], "X"),
        (["X", "1"], "1"),
        (["5", "X", "4"], "5"),
        (["X", "X"], "X"),
        (["3", "3"], "3"),
    ],
)
def test_overall_category_is_the_highest(scores: list[str], overall: str) -> None:
    lesions = [assess_lesion("PZ", None, None if s == "X" else int(s), "negative") for s in scores]
    found = assess_study(lesions)
    assert found is not None
    number = None if overall == "X" else int(overall)
    assert found.score == overall
    assert described(found.value) == concept("cid6324", f"PIRADS{LETTER[number]}{WORDS[number]}")


def test_no_lesion_gives_no_overall_category() -> None:
    assert assess_study([]) is None


@pytest.mark.parametrize(
    ("score", "diameter_mm", "says"),
    [
        ("4", 14.9, None),
        ("4", 15.0, "would be category 5"),
        ("5", 15.0, None),
        ("5", 14.9, "extraprostatic"),
        ("3", 40.0, None),
        ("X", 40.0, None),
    ],
)
def test_size_and_category_that_disagree_are_named(score: str, diameter_mm: float, says: str | None) -> None:
    note = size_note(score, diameter_mm)
    assert (note is None) if says is None else (note is not None and says in note)


# Sectors, against CID 6304

LEVELS: dict[Level, str] = {"base": "basal", "mid": "middle", "apex": "apical"}
PLACES: dict[tuple[Zone, float, float], str] = {
    ("PZ", 0.1, 0.1): "anterior {} peripheral zone",
    ("PZ", 0.9, 0.1): "anterior {} peripheral zone",
    ("PZ", 0.1, 0.9): "posteromedial {} peripheral zone",
    ("PZ", 0.9, 0.9): "posterolateral {} peripheral zone",
    ("TZ", 0.1, 0.1): "anterior {} transition zone",
    ("TZ", 0.9, 0.1): "anterior {} transition zone",
    ("TZ", 0.1, 0.9): "posterior {} transition zone",
    ("TZ", 0.9, 0.9): "posterior {} transition zone",
}


def sectors_of_dicom() -> dict[str, str]:
    members = (getattr(dicom.cid6304, name) for name in dir(dicom.cid6304))
    return {code.meaning: code.value for code in members if hasattr(code, "meaning")}


@pytest.mark.parametrize("side", ["R", "L"])
@pytest.mark.parametrize("level", list(LEVELS))
@pytest.mark.parametrize(("zone", "lateral", "posterior"), list(PLACES))
def test_sector_code_and_meaning_are_those_of_cid_6304(
    side: str, level: Level, zone: Zone, lateral: float, posterior: float
) -> None:
    found = choose_sector(zone, side, level, lateral, posterior)
    where = PLACES[zone, lateral, posterior].format(LEVELS[level])
    meaning = f"{'Right' if side == 'R' else 'Left'} {where} of prostate"
    assert described(found) == (sectors_of_dicom()[meaning], "SCT", meaning)


def test_all_thirty_sectors_of_gland_and_zones_have_a_code_of_their_own() -> None:
    found = {
        choose_sector(zone, side, level, lateral, posterior).value
        for side, level, (zone, lateral, posterior) in product("RL", LEVELS, PLACES)
    }
    assert len(found) == 30


def test_borders_of_levels_and_sectors() -> None:
    assert [choose_level(h) for h in (0, 0.33, 1 / 3, 0.66, 2 / 3, 1)] == ["apex", "apex", "mid", "mid", "base", "base"]
    assert "posteromedial" in choose_sector("PZ", "R", "mid", 0.49, 0.5).meaning
    assert "posterolateral" in choose_sector("PZ", "R", "mid", 0.5, 0.5).meaning
    assert "posterior " in choose_sector("TZ", "L", "mid", 0.5, 0.5).meaning


@pytest.mark.parametrize(
    ("meaning", "name"),
    [
        ("Right posterolateral middle peripheral zone of prostate", "right mid PZpl"),
        ("Left posteromedial basal peripheral zone of prostate", "left base PZpm"),
        ("Left anterior apical transition zone of prostate", "left apex TZa"),
    ],
)
def test_short_names_of_sectors(meaning: str, name: str) -> None:
    assert sector_name(Code(sectors_of_dicom()[meaning], "SCT", meaning)) == name
    assert sector_name(codes.PROSTATE) == "Prostate"

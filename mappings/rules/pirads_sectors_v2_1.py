"""The sector map of PI-RADS v2.1 (38 prostate sectors; PS3.16 CID 6304), as far as masks of gland, PZ and TZ
can tell sectors apart.

A reference model gives no central zone and no anterior stroma, so those sectors are never proposed.
Borders (our reading of the map's drawing, stated here because v2.1 gives no numbers):
- levels are thirds of the gland's craniocaudal extent: base is the upper, apex the lower third;
- PZ is anterior in front of the gland's anteroposterior middle; behind it, posteromedial within half of
  the gland's half-width from the midline, posterolateral outside;
- TZ is anterior or posterior of the transition zone's own anteroposterior middle.
"""

from mappings.model.codes import Code
from mappings.model.findings import Level
from mappings.rules.pirads_v2_1 import Zone

_CODES = {
    ("R", "base", "PZa"): "716904003", ("L", "base", "PZa"): "716905002",
    ("R", "mid", "PZa"): "716919002", ("L", "mid", "PZa"): "716920008",
    ("R", "apex", "PZa"): "716936005", ("L", "apex", "PZa"): "716937001",
    ("R", "base", "PZpl"): "716906001", ("L", "base", "PZpl"): "716907005",
    ("R", "mid", "PZpl"): "716921007", ("L", "mid", "PZpl"): "716922000",
    ("R", "apex", "PZpl"): "716938006", ("L", "apex", "PZpl"): "716939003",
    ("R", "base", "PZpm"): "836428004", ("L", "base", "PZpm"): "836427009",
    ("R", "mid", "PZpm"): "716923005", ("L", "mid", "PZpm"): "716924004",
    ("R", "apex", "PZpm"): "716940001", ("L", "apex", "PZpm"): "716941002",
    ("R", "base", "TZa"): "716896009", ("L", "base", "TZa"): "716897000",
    ("R", "mid", "TZa"): "716913001", ("L", "mid", "TZa"): "716914007",
    ("R", "apex", "TZa"): "716930004", ("L", "apex", "TZa"): "716931000",
    ("R", "base", "TZp"): "716898005", ("L", "base", "TZp"): "716899002",
    ("R", "mid", "TZp"): "716915008", ("L", "mid", "TZp"): "716916009",
    ("R", "apex", "TZp"): "716932007", ("L", "apex", "TZp"): "716933002",
}  # fmt: skip
_LEVEL_WORD: dict[Level, str] = {"base": "basal", "mid": "middle", "apex": "apical"}
_PART_WORD = {
    "PZa": ("anterior", "peripheral zone"),
    "PZpl": ("posterolateral", "peripheral zone"),
    "PZpm": ("posteromedial", "peripheral zone"),
    "TZa": ("anterior", "transition zone"),
    "TZp": ("posterior", "transition zone"),
}


def choose_level(height: float) -> Level:
    """The level of a point at `height`, 0 at the gland's lowest and 1 at its highest end."""
    if height >= 2 / 3:
        return "base"
    return "apex" if height < 1 / 3 else "mid"


def choose_sector(zone: Zone, side: str, level: Level, lateral: float, posterior: float) -> Code:
    """The sector of a point. `side` is "R" or "L"; `lateral` is its distance from the midline as a fraction of
    the gland's half-width; `posterior` is 0 at the front and 1 at the back of the gland (PZ) or of the TZ (TZ).
    """
    if zone == "TZ":
        part = "TZa" if posterior < 0.5 else "TZp"
    elif posterior < 0.5:
        part = "PZa"
    else:
        part = "PZpm" if lateral < 0.5 else "PZpl"
    where, tissue = _PART_WORD[part]
    meaning = f"{'Right' if side == 'R' else 'Left'} {where} {_LEVEL_WORD[level]} {tissue} of prostate"
    return Code(_CODES[side, level, part], "SCT", meaning)


def sector_name(code: Code) -> str:
    """The radiologist's short name ("right mid PZpl") of a sector code; its meaning where it is not one of ours."""
    for (side, level, part), value in _CODES.items():
        if value == code.value:
            return f"{'right' if side == 'R' else 'left'} {level} {part}"
    return code.meaning

"""The colours that tell structures apart, the same in the SEG as in the key images."""

from highdicom.color import CIELabColor

from mappings.model.codes import PERIPHERAL_ZONE, TRANSITION_ZONE
from mappings.model.findings import Segment

Rgb = tuple[int, int, int]

GLAND_RGB: Rgb = (79, 195, 247)
PERIPHERAL_ZONE_RGB: Rgb = (129, 212, 92)
TRANSITION_ZONE_RGB: Rgb = (186, 140, 255)
OTHER_ZONE_RGB: Rgb = (200, 200, 200)
LESION_RGBS: tuple[Rgb, ...] = ((255, 82, 82), (255, 167, 38), (255, 235, 59), (255, 105, 180))


def lesion_rgb(label: int) -> Rgb:
    """The colour of the lesion with this label (from 1); after four lesions the colours come again."""
    return LESION_RGBS[(label - 1) % len(LESION_RGBS)]


def segment_rgb(segment: Segment) -> Rgb:
    """The colour of a segment: by its mask, and for zones by the zone's code."""
    if segment.mask == "lesions":
        return lesion_rgb(segment.label)
    if segment.mask == "gland":
        return GLAND_RGB
    zones = {PERIPHERAL_ZONE.value: PERIPHERAL_ZONE_RGB, TRANSITION_ZONE.value: TRANSITION_ZONE_RGB}
    return zones.get(segment.type.value, OTHER_ZONE_RGB)


def to_cielab(rgb: Rgb) -> CIELabColor:
    """The colour as RecommendedDisplayCIELabValue wants it (PS3.3 C.10.7.1.1)."""
    return CIELabColor.from_rgb(*rgb)

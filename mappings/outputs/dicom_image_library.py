"""The Image Library of a measurement report (PS3.16 TID 1600): which images were read.

highdicom's own library repeats all descriptors below every image; TID 1600 lets images share them, which makes
the report of a three-series study several times smaller and faster to write.
"""

from collections.abc import Sequence

from highdicom.sr import (
    CodedConcept,
    ContainerContentItem,
    ContentItem,
    ContentSequence,
    ImageContentItem,
    ImageLibraryEntryDescriptors,
    RelationshipTypeValues,
)
from pydicom.dataset import Dataset

CONTAINS = RelationshipTypeValues.CONTAINS
IMAGE_LIBRARY = CodedConcept("111028", "DCM", "Image Library")
IMAGE_LIBRARY_GROUP = CodedConcept("126200", "DCM", "Image Library Group")
SOURCE = CodedConcept("260753009", "SCT", "Source")
POSITIONS = ("110901", "110902", "110903")
"""Image Position (Patient) X, Y and Z: the only descriptors (TID 1604) that differ within a group."""
NEEDED = ("PixelSpacing", "SliceThickness", "ImageOrientationPatient", "ImagePositionPatient", "Rows", "Columns")
SHARED = ("SeriesInstanceUID", "Rows", "Columns", "PixelSpacing", "ImageOrientationPatient", "SliceThickness")


def build_image_library(images: Sequence[Dataset]) -> ContainerContentItem:
    """One group for each series, with the descriptors (TID 1602) that its images share, then its images."""
    library = ContainerContentItem(name=IMAGE_LIBRARY, relationship_type=CONTAINS)
    library.ContentSequence = ContentSequence()
    groups: dict[tuple[str, ...], list[Dataset]] = {}
    for image in images:
        groups.setdefault(tuple(str(image.get(keyword)) for keyword in SHARED), []).append(image)
    for members in groups.values():
        library.ContentSequence.append(_build_group(members))
    return library


def _build_group(images: Sequence[Dataset]) -> ContainerContentItem:
    group = ContainerContentItem(name=IMAGE_LIBRARY_GROUP, relationship_type=CONTAINS)
    group.ContentSequence = ContentSequence(_describe(images[0]))
    for image in images:
        group.ContentSequence.append(
            ImageContentItem(SOURCE, image.SOPClassUID, image.SOPInstanceUID, relationship_type=CONTAINS)
        )
    return group


def _describe(image: Dataset) -> list[ContentItem]:
    """The descriptors that hold for the whole group; all are optional (TID 1602), so none of a bare header."""
    if any(image.get(keyword) in (None, "") for keyword in NEEDED):
        return []
    descriptors = ImageLibraryEntryDescriptors(image)
    return [item for item in descriptors if item.ConceptNameCodeSequence[0].CodeValue not in POSITIONS]

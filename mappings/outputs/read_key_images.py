"""Reads key images back: which finding and slice, what the caption says, and that PNG and DICOM show the same."""

from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import SecondaryCaptureImageStorage

from mappings.model.findings import Finding, Findings
from mappings.outputs.read_dicom import (
    DOCUMENT,
    expect_header,
    items_of,
    merge,
    read_header,
    text_of,
)
from mappings.outputs.read_facts import Facts, compare, find_slips, lesion_pieces, place_words
from mappings.outputs.read_revision import verification_of

FOLDER = "key-images"


def key_image_names(findings: Findings) -> tuple[str, ...]:
    """The names of the key images that the findings ask for, without folder and ending, in their order. A withdrawn
    result has none."""
    if findings.status == "entered-in-error":
        return ()
    overview = "gland" if findings.gland is not None else "overview"
    return (overview, *(lesion.tracking_id for lesion in findings.lesions))


def check_key_image(image: Dataset, name: str, findings: Findings, png: bytes | None) -> list[str]:
    """Everything in which the key image `name` disagrees with the findings, or with its own PNG where given."""
    artifact = f"{FOLDER}/{name}.dcm"
    expected = expect_header(findings, SecondaryCaptureImageStorage, f"sc-{name}", "sc-series")
    finding = next((f for f in findings.findings if f.tracking_id == name), None)
    expected = merge(expected, _expect_image(name, findings, finding))
    messages = compare(artifact, expected, merge(read_header(image, findings), _read_image(image, finding)))
    caption = text_of(image, "ImageComments")
    required, allowed = _caption_pieces(findings, finding)
    pieces = [[piece.replace("\\", "/") for piece in part] for part in (required, allowed)]
    messages += [f"{artifact}: {name}: caption: {slip}" for slip in find_slips(caption, *pieces)]
    if png is not None and not _same_picture(image, png):
        messages.append(f"{FOLDER}/{name}.png: {name}: picture: expected the pixels of {artifact}, found others")
    return messages


def _read_image(image: Dataset, finding: Finding | None) -> Facts:
    facts = Facts()
    for keyword in ("InstanceNumber", "BurnedInAnnotation", "Modality"):
        facts.add(DOCUMENT, keyword, text_of(image, keyword))
    if finding is not None and finding.evidence:
        for item in items_of(image, "SourceImageSequence"):
            facts.add(DOCUMENT, "source image", text_of(item, "ReferencedSOPInstanceUID"))
    return facts


def _expect_image(name: str, findings: Findings, finding: Finding | None) -> Facts:
    facts = Facts()
    facts.add(DOCUMENT, "InstanceNumber", str(key_image_names(findings).index(name) + 1))
    facts.add(DOCUMENT, "BurnedInAnnotation", "YES")
    facts.add(DOCUMENT, "Modality", "OT")
    if finding is not None and finding.evidence:
        facts.add(DOCUMENT, "source image", finding.evidence[0].sop_instance_uid)
    return facts


def _caption_pieces(findings: Findings, finding: Finding | None) -> tuple[list[str], list[str]]:
    """What the caption must say, and what it may say besides."""
    if finding is not None and finding in findings.lesions:
        required, allowed = lesion_pieces(finding)
        words = place_words(finding)
        short_zone = [finding.zone.meaning.partition(" of ")[0]] if finding.zone else []
        sector = [finding.sector.meaning.partition(" of ")[0]] if finding.sector else []
        return [*required, verification_of(findings)], [*allowed, words, *short_zone, *sector]
    count = len(findings.lesions)
    overall = [f"{a.label} {a.score}" for a in findings.assessments]
    lesions = "No lesion found" if count == 0 else f"{count} lesion{'s' if count > 1 else ''} found"
    measured = finding.measurements if finding is not None else ()
    return [*overall, lesions, verification_of(findings)], [f"{m.label} {m.text} {m.unit.value}" for m in measured]


def _same_picture(image: Dataset, png: bytes) -> bool:
    shape = (int(image.Rows), int(image.Columns), 3)
    pixels = np.frombuffer(image.PixelData, dtype=np.uint8)[: int(np.prod(shape))].reshape(shape)
    shown: npt.NDArray[np.uint8] = np.asarray(Image.open(BytesIO(png)).convert("RGB"))
    return shown.shape == shape and bool(np.array_equal(shown, pixels))

"""Findings, masks and volumes -> key images: the picture a radiologist looks at first, as PNG and as Secondary
Capture (PS3.3 A.8.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from mappings.model.codes import PROSTATE, Code
from mappings.model.findings import Finding, Findings
from mappings.model.ids import derive_uid
from mappings.model.measurement import Measurement
from mappings.model.study import Volume
from mappings.outputs.dicom_display import (
    GLAND_RGB,
    TRANSITION_ZONE_RGB,
    Rgb,
    lesion_rgb,
)
from mappings.outputs.dicom_header import (
    MANUFACTURER,
    PRODUCT,
    add_study,
    concept,
    describe_model,
    local_time,
    serial_number,
    set_times,
    shorten,
    software_versions,
    verification_words,
)
from mappings.outputs.dicom_panel import (
    PANEL_PX,
    WHITE,
    Outline,
    View,
    draw_panel,
    find_focus,
    load_font,
    name_direction,
    trace_outline,
)

SOURCE_FOR_PROCESSING = Code("121322", "DCM", "Source image for image processing operation")
REFERENCE = "t2w"
TRANSITION_ZONE_LABEL = 2
PANELS = ((REFERENCE, "T2W"), ("adc", "ADC"), ("hbv", "High b-value"))
SERIES_NUMBER = 1003
GAP_PX, HEADER_PX, FOOTER_PX = 4, 54, 108
SEPARATOR = "   |   "
BACKGROUND: Rgb = (24, 27, 30)
MUTED: Rgb = (176, 184, 190)
AMBER: Rgb = (255, 193, 7)
MARGIN_MM, MINIMUM_SIDE_MM, FOCUS_MARGIN_MM = 12.0, 60.0, 6.0
SHOWN_OF_LESION = ("diameter_in_plane", "diameter_3d", "volume", "adc_mean")
SHOWN_OF_GLAND = ("volume_ellipsoid", "volume_voxels", "psa_density")
Mask = npt.NDArray[np.uint8]
Bits = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class KeyImage:
    """One picture: `number` counts from 1 over the study, `finding_ids` are the tracking ids that it shows,
    `rgb` is `(rows, columns, 3)`, `frame_index` and `source_sop_uid` say which reference slice it is."""

    number: int
    name: str
    finding_ids: tuple[str, ...]
    caption: str
    png: bytes
    rgb: npt.NDArray[np.uint8]
    source_sop_uid: str
    frame_index: int


def findings_to_key_images(
    findings: Findings, masks: Mapping[str, Mask], volumes: Mapping[str, Volume]
) -> tuple[KeyImage, ...]:
    """Draws one overview ("gland", or "overview" where no gland was found) and one image for each lesion.

    `masks` and `volumes` `(z, y, x)` are on the grid of `volumes["t2w"]`; "adc" and "hbv" may be absent, and the
    picture says so. What a person rejected is not drawn, of a withdrawn result nothing at all. Nothing that names the
    patient is drawn. Equal arguments give equal bytes.
    """
    if findings.status == "entered-in-error":
        return ()
    masks = _without_dropped(findings, masks)
    overview = _draw_overview(findings, masks, volumes)
    lesions = [
        _draw_lesion(number, findings, lesion, masks, volumes) for number, lesion in enumerate(findings.lesions, 2)
    ]
    return (overview, *lesions)


def _without_dropped(findings: Findings, masks: Mapping[str, Mask]) -> Mapping[str, Mask]:
    """The masks with what is still reported only, where former revisions reported more."""
    if not findings.dropped:
        return masks
    shown = [lesion.label for lesion in findings.lesions if lesion.label is not None]
    lesions = np.where(np.isin(masks["lesions"], shown), masks["lesions"], np.uint8(0))
    gland = masks["gland"] if findings.gland is not None else np.zeros_like(masks["gland"])
    return {**masks, "lesions": lesions, "gland": gland}


def key_image_to_sc(findings: Findings, key_image: KeyImage, source: Dataset) -> Dataset:
    """The key image as an RGB Secondary Capture in the study of `source`, the slice that it shows.

    Raises ValueError where `source` is another instance than the key image names.
    """
    if source.SOPInstanceUID != key_image.source_sop_uid:
        raise ValueError(
            f"key image '{key_image.name}' shows instance {key_image.source_sop_uid}, "
            f"the source given is {source.SOPInstanceUID}"
        )
    sc = Dataset()
    sc.SOPClassUID = SecondaryCaptureImageStorage
    sc.SOPInstanceUID = derive_uid(findings.job_id, findings.revision, f"sc-{key_image.name}")
    sc.file_meta = FileMetaDataset()
    sc.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    add_study(sc, source)
    _add_series(sc, findings, key_image)
    sc.BodyPartExamined = source.get("BodyPartExamined") or _body_part(findings)
    _add_references(sc, key_image, source)
    _add_pixels(sc, key_image.rgb)
    set_times(sc, local_time(findings, source))
    return sc


def _draw_overview(findings: Findings, masks: Mapping[str, Mask], volumes: Mapping[str, Volume]) -> KeyImage:
    """The slice where the gland is largest, or the middle slice with a note where there is no gland."""
    gland = findings.gland
    outlined = masks["gland"] > 0
    found = gland is not None and bool(outlined.any())
    frame = _largest_slice(outlined) if found else outlined.shape[0] // 2
    title = gland.title if gland is not None and found else "No prostate gland found by the model"
    lines = [_count_lesions(findings), _list_measurements(gland, SHOWN_OF_GLAND) if gland else ""]
    finding_ids = ("gland",) if found else ()
    name = "gland" if found else "overview"
    headline = [title, *(f"{a.label} {a.score}" for a in findings.assessments)]
    words = verification_words(findings)
    return _compose(1, name, finding_ids, frame, headline, lines, words, masks, volumes)


def _draw_lesion(
    number: int, findings: Findings, lesion: Finding, masks: Mapping[str, Mask], volumes: Mapping[str, Volume]
) -> KeyImage:
    """The slice that the finding's evidence names, else the slice where the lesion is largest."""
    evidence = next((e for e in lesion.evidence if e.role == REFERENCE), None)
    frame = evidence.frame_index if evidence else _largest_slice(masks["lesions"] == lesion.label)
    headline = [lesion.title, *(f"{a.label} {a.score}" for a in lesion.assessments)]
    lines = [describe_place(lesion), _list_measurements(lesion, SHOWN_OF_LESION)]
    words, shown = verification_words(findings), (lesion.tracking_id,)
    return _compose(number, lesion.tracking_id, shown, frame, headline, lines, words, masks, volumes)


def _largest_slice(mask: Bits) -> int:
    return int(np.argmax(mask.sum(axis=(1, 2))))


def describe_place(lesion: Finding) -> str:
    """Side, zone, level and sector in words, as far as they are known."""
    side = lesion.laterality.meaning.capitalize() if lesion.laterality else ""
    zone = lesion.zone.meaning.split(" of ")[0].lower() if lesion.zone else ""
    sector = f"sector: {_without_organ(lesion.sector.meaning)}" if lesion.sector else ""
    return ", ".join(part for part in (side, zone, lesion.level or "", sector) if part)


def _without_organ(meaning: str) -> str:
    text = meaning.removesuffix(" of prostate").removesuffix(" of the prostate")
    return text[:1].lower() + text[1:]


def _count_lesions(findings: Findings) -> str:
    count = len(findings.lesions)
    return "No lesion found" if count == 0 else f"{count} lesion{'s' if count > 1 else ''} found"


def _list_measurements(finding: Finding, keys: Sequence[str]) -> str:
    """The measurements with these keys, each as label, number and unit."""
    known = [finding.measurement(key) for key in keys]
    return SEPARATOR.join(_show(measurement) for measurement in known if measurement is not None)


def _show(measurement: Measurement) -> str:
    return f"{measurement.label} {measurement.text} {measurement.unit.value}"


def _compose(
    number: int,
    name: str,
    finding_ids: tuple[str, ...],
    frame: int,
    headline: Sequence[str],
    lines: Sequence[str],
    words: str,
    masks: Mapping[str, Mask],
    volumes: Mapping[str, Volume],
) -> KeyImage:
    """Header bar, the panels side by side, footer bar."""
    reference = volumes[REFERENCE]
    view = find_view(frame, masks, reference)
    width = len(PANELS) * PANEL_PX + (len(PANELS) - 1) * GAP_PX
    canvas = Image.new("RGB", (width, HEADER_PX + PANEL_PX + FOOTER_PX), BACKGROUND)
    traces = [trace for outline in _choose_outlines(masks) if (trace := trace_outline(view, outline))]
    focus = find_focus(traces, view, FOCUS_MARGIN_MM)
    for index, (role, title) in enumerate(PANELS):
        array = volumes[role].array if role in volumes else None
        shown = [t for t in traces if role == REFERENCE or t.outline.rgb != TRANSITION_ZONE_RGB]
        canvas.paste(draw_panel(array, view, shown, title, focus), (index * (PANEL_PX + GAP_PX), HEADER_PX))
    _draw_header(canvas, headline, words)
    _draw_footer(canvas, lines, f"T2W slice {frame + 1} of {reference.array.shape[0]}", masks, frame)
    caption = "; ".join(part.replace(SEPARATOR, ", ") for part in (*headline, *lines, words) if part)
    uid = reference.sop_instance_uids[frame] if reference.sop_instance_uids else ""
    return KeyImage(number, name, finding_ids, caption, _to_png(canvas), np.asarray(canvas), uid, frame)


def find_view(frame: int, masks: Mapping[str, Mask], reference: Volume) -> View:
    """A square around all that was found, the same for each image of the study; the whole slice if nothing was."""
    _, row_mm, column_mm = reference.geometry.spacing_mm
    _, rows, columns = reference.array.shape
    found = np.any([(mask > 0).any(axis=0) for mask in masks.values()], axis=0)
    if not found.any():
        side_mm = max(rows * row_mm, columns * column_mm)
        return View(frame, ((rows - 1) / 2, (columns - 1) / 2), side_mm, reference.geometry)
    top, bottom = np.flatnonzero(found.any(axis=1))[[0, -1]]
    left, right = np.flatnonzero(found.any(axis=0))[[0, -1]]
    extent_mm = max((bottom - top + 1) * row_mm, (right - left + 1) * column_mm)
    side_mm = max(MINIMUM_SIDE_MM, float(extent_mm) + 2 * MARGIN_MM)
    return View(frame, ((top + bottom) / 2, (left + right) / 2), side_mm, reference.geometry)


def _choose_outlines(masks: Mapping[str, Mask]) -> list[Outline]:
    """The transition zone thin (what is left of the gland is peripheral), the gland thin above it, then lesions."""
    labels = [int(label) for label in np.unique(masks["lesions"]) if label]
    return [
        Outline(masks["zones"] == TRANSITION_ZONE_LABEL, TRANSITION_ZONE_RGB, 1.3),
        Outline(masks["gland"] > 0, GLAND_RGB, 1.6),
        *(Outline(masks["lesions"] == label, lesion_rgb(label), 2.4, str(label)) for label in labels),
    ]


def _draw_header(canvas: Image.Image, headline: Sequence[str], words: str) -> None:
    """What it is at the left; at the right, whether a person has verified it."""
    draw = ImageDraw.Draw(canvas)
    middle = HEADER_PX / 2
    box = draw.textbbox((canvas.width - 26, middle), words, font=load_font(22), anchor="rm")
    title = fit_text(draw, SEPARATOR.join(headline), 26, box[0] - 44)
    draw.text((16, middle), title, font=load_font(26), fill=WHITE, anchor="lm")
    draw.rounded_rectangle((box[0] - 12, 9, box[2] + 12, HEADER_PX - 9), radius=8, fill=AMBER)
    draw.text((canvas.width - 26, middle), words, font=load_font(22), fill=(0, 0, 0), anchor="rm")


def _draw_footer(
    canvas: Image.Image, lines: Sequence[str], slice_text: str, masks: Mapping[str, Mask], frame: int
) -> None:
    """Place and numbers, then what the colours mean; at the right, which slice it is."""
    draw = ImageDraw.Draw(canvas)
    first, second, third = (HEADER_PX + PANEL_PX + offset for offset in (23, 54, 85))
    for middle, line, width in ((first, lines[0], canvas.width - 240), (second, lines[1], canvas.width - 32)):
        draw.text((16, middle), fit_text(draw, line, 20, width), font=load_font(20), fill=WHITE, anchor="lm")
    draw.text((canvas.width - 16, first), slice_text, font=load_font(20), fill=MUTED, anchor="rm")
    left = 16.0
    for text, rgb in _legend(masks, frame):
        draw.line((left, third, left + 22, third), fill=rgb, width=3)
        draw.text((left + 30, third), text, font=load_font(18), fill=MUTED, anchor="lm")
        left += 30 + draw.textlength(text, font=load_font(18)) + 28


def fit_text(draw: ImageDraw.ImageDraw, text: str, size_px: int, width_px: float) -> str:
    """`text`, cut with an ellipsis where it is wider than `width_px`."""
    if draw.textlength(text, font=load_font(size_px)) <= width_px:
        return text
    while text and draw.textlength(text + "...", font=load_font(size_px)) > width_px:
        text = text[:-1]
    return text.rstrip() + "..."


def _legend(masks: Mapping[str, Mask], frame: int) -> list[tuple[str, Rgb]]:
    """Name and colour of each outline that is on this slice."""
    rows: list[tuple[str, Rgb]] = []
    if masks["gland"][frame].any():
        rows.append(("Gland", GLAND_RGB))
    if (masks["zones"][frame] == TRANSITION_ZONE_LABEL).any():
        rows.append(("Transition zone", TRANSITION_ZONE_RGB))
    labels = [int(label) for label in np.unique(masks["lesions"][frame]) if label]
    return rows + [(f"Lesion {label}", lesion_rgb(label)) for label in labels]


def _to_png(canvas: Image.Image) -> bytes:
    buffer = BytesIO()
    canvas.save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def _add_series(sc: Dataset, findings: Findings, key_image: KeyImage) -> None:
    """General Series, SC Equipment (C.8.6.1) and General Equipment."""
    sc.Modality = "OT"
    sc.SeriesInstanceUID = derive_uid(findings.job_id, findings.revision, "sc-series")
    sc.SeriesNumber = SERIES_NUMBER
    sc.InstanceNumber = key_image.number
    sc.SeriesDescription = shorten(f"{verification_words(findings)}: key images, {findings.protocol_title}")
    sc.ConversionType = "WSD"
    sc.Manufacturer = MANUFACTURER
    sc.ManufacturerModelName = PRODUCT
    sc.DeviceSerialNumber = serial_number(findings)
    sc.SoftwareVersions = software_versions(findings)
    sc.ContributingEquipmentSequence = [describe_model(findings)]
    sc.ImageComments = shorten(key_image.caption, 1024)


def _body_part(findings: Findings) -> str:
    """The term (PS3.16 Annex L) for the organ that the findings are about, where we know it."""
    sites = {finding.site for finding in findings.findings}
    return "PROSTATE" if not sites or PROSTATE in sites else ""


def _add_references(sc: Dataset, key_image: KeyImage, source: Dataset) -> None:
    """General Image and General Reference: derived from this slice, with text burned in."""
    sc.ImageType = ["DERIVED", "SECONDARY"]
    directions = np.array(source.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    sc.PatientOrientation = [name_direction(direction) for direction in directions]
    sc.BurnedInAnnotation = "YES"
    sc.LossyImageCompression = "00"
    sc.DerivationDescription = f"Key image of the AI result '{key_image.name}': outlines drawn on resampled slices"
    reference = Dataset()
    reference.ReferencedSOPClassUID = source.SOPClassUID
    reference.ReferencedSOPInstanceUID = source.SOPInstanceUID
    reference.PurposeOfReferenceCodeSequence = [concept(SOURCE_FOR_PROCESSING)]
    sc.SourceImageSequence = [reference]


def _add_pixels(sc: Dataset, rgb: npt.NDArray[np.uint8]) -> None:
    sc.SamplesPerPixel = 3
    sc.PhotometricInterpretation = "RGB"
    sc.PlanarConfiguration = 0
    sc.Rows, sc.Columns, _ = rgb.shape
    sc.BitsAllocated = sc.BitsStored = 8
    sc.HighBit = 7
    sc.PixelRepresentation = 0
    data = rgb.tobytes()
    sc.PixelData = data + b"\0" * (len(data) % 2)

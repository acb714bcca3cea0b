"""findings_to_key_images and key_image_to_sc: what is drawn where, what is said, and what is never drawn."""

from dataclasses import replace
from datetime import datetime
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from scipy import ndimage

from mappings.model import codes
from mappings.model.findings import Findings
from mappings.model.ids import derive_uid
from mappings.model.study import Geometry, PatientIdentity
from mappings.outputs.dicom_display import GLAND_RGB, Rgb, lesion_rgb
from mappings.outputs.dicom_header import write_dicom
from mappings.outputs.dicom_panel import PANEL_PX, name_direction, name_directions
from mappings.outputs.findings_to_key_images import (
    GAP_PX,
    HEADER_PX,
    KeyImage,
    describe_place,
    find_view,
    findings_to_key_images,
    key_image_to_sc,
)
from tests.builders import build_findings, build_lesion, build_masks
from tests.dicom_sources import build_sources, build_volumes


@cache
def render(findings: Findings | None = None) -> tuple[KeyImage, ...]:
    """The key images of the builders' study, drawn once."""
    return draw(findings or build_findings())


def draw(findings: Findings) -> tuple[KeyImage, ...]:
    """The key images of these findings on the builders' masks and volumes."""
    return findings_to_key_images(findings, build_masks(), build_volumes())


def build_nothing() -> tuple[Findings, dict[str, npt.NDArray[np.uint8]]]:
    """Findings and masks of a model that saw no gland."""
    empty = {name: np.zeros_like(mask) for name, mask in build_masks().items()}
    return build_findings(lesions=(), findings=(), segments=(), assessments=()), empty


def find_colour(panel: npt.NDArray[np.uint8], rgb: Rgb) -> npt.NDArray[np.bool_]:
    """Where the panel is nearly of this colour."""
    return np.asarray((np.abs(panel.astype(int) - np.array(rgb)) < 40).all(axis=2))


def keep_largest_piece(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The largest connected piece: the outline without the number written beside it."""
    pieces, _ = ndimage.label(mask, np.ones((3, 3)))
    return np.asarray(pieces == np.argmax(np.bincount(pieces.ravel())[1:]) + 1)


def read_panel(image: KeyImage, index: int) -> npt.NDArray[np.uint8]:
    """One of the three panels."""
    left = index * (PANEL_PX + GAP_PX)
    return image.rgb[HEADER_PX : HEADER_PX + PANEL_PX, left : left + PANEL_PX]


def test_one_overview_then_one_image_for_each_lesion() -> None:
    images = render()
    assert [(i.number, i.name, i.finding_ids) for i in images] == [
        (1, "gland", ("gland",)),
        (2, "lesion-1", ("lesion-1",)),
        (3, "lesion-2", ("lesion-2",)),
    ]


def test_a_lesion_is_shown_on_the_slice_of_its_evidence() -> None:
    image = render()[1]
    assert image.frame_index == 5
    assert image.source_sop_uid == derive_uid("test-study", "t2w", 5)


def test_without_evidence_the_largest_slice_is_shown() -> None:
    masks = build_masks()
    masks["lesions"][6, 20:26, 10:16] = 1
    lesion = replace(build_lesion(), evidence=())
    images = findings_to_key_images(build_findings(lesions=(lesion,)), masks, build_volumes())
    assert images[1].frame_index == 6


def test_png_holds_the_same_pixels() -> None:
    for image in render():
        assert np.array_equal(np.asarray(Image.open(BytesIO(image.png))), image.rgb)


@pytest.mark.parametrize("panel", [0, 1, 2])
def test_outlines_lie_on_the_border_of_the_mask_in_each_panel(panel: int) -> None:
    image, masks, volume = render()[1], build_masks(), build_volumes()["t2w"]
    view = find_view(5, masks, volume)
    for mask, rgb in ((masks["lesions"] == 1, lesion_rgb(1)), (masks["gland"] > 0, GLAND_RGB)):
        pixels = np.argwhere(keep_largest_piece(find_colour(read_panel(image, panel), rgb)))
        for axis, ends in enumerate(np.flatnonzero(mask[5].any(axis=other))[[0, -1]] for other in (1, 0)):
            edges = (ends + np.array([-0.5, 0.5]) - view.centre[axis]) / view.mm_per_px + (PANEL_PX - 1) / 2
            assert pixels[:, axis].min() == pytest.approx(edges[0], abs=3)
            assert pixels[:, axis].max() == pytest.approx(edges[1], abs=3)


def test_the_right_lesion_is_drawn_at_the_right_of_the_patient() -> None:
    panel = read_panel(render()[1], 0)
    right_of_patient = np.argwhere(find_colour(panel, lesion_rgb(1)))[:, 1].mean()
    left_of_patient = np.argwhere(find_colour(panel, lesion_rgb(2)))[:, 1].mean()
    assert name_directions(build_volumes()["t2w"].geometry)["left"] == "R"
    assert right_of_patient < PANEL_PX / 2 < left_of_patient


@pytest.mark.parametrize(
    ("vector", "letters"),
    [
        ((1, 0, 0), "L"),
        ((-1, 0, 0), "R"),
        ((0, 0.95, -0.31), "P"),
        ((0, -0.8, 0.6), "AH"),
        ((0, 0, -1), "F"),
        ((-0.7, 0.69, 0.1), "RP"),
    ],
)
def test_direction_letters_come_from_the_affine(vector: tuple[float, float, float], letters: str) -> None:
    assert name_direction(np.array(vector, dtype=float)) == letters


def test_a_stack_stored_feet_up_gets_the_letters_turned_round() -> None:
    affine = ((-1.0, 0, 0, 0), (0, -1.0, 0, 0), (0, 0, 3.0, 0), (0, 0, 0, 1.0))
    letters = name_directions(Geometry((1, 2, 2), affine, "1.2"))
    assert letters == {"left": "L", "right": "R", "top": "P", "bottom": "A"}


def test_caption_says_what_where_how_large_and_unverified() -> None:
    caption = render()[1].caption
    for part in (
        "Lesion 1",
        "category 4",
        "Right, peripheral zone, mid",
        "right posterolateral middle peripheral zone",
        "9.5 mm",
        "0.31 mL",
        "812 um2/s",
        "AI result, not verified",
    ):
        assert part in caption
    assert "Left" in render()[2].caption


def test_place_leaves_out_what_is_not_known() -> None:
    lesion = replace(build_lesion(), sector=None, zone=None, level=None)
    assert describe_place(lesion) == "Right"
    assert describe_place(replace(lesion, laterality=None)) == ""


def test_nothing_names_the_patient() -> None:
    other = PatientIdentity("OTHER-99", "", "Someone^Else", None, "M")
    assert [i.png for i in render(build_findings(patient=other))] == [i.png for i in render()]


def test_the_warning_is_burned_in() -> None:
    findings, masks = build_nothing()
    for image in (*render(), *findings_to_key_images(findings, masks, build_volumes())):
        amber = find_colour(image.rgb[:HEADER_PX], (255, 193, 7))
        assert amber.sum() > 3000


def test_a_long_title_does_not_run_into_the_warning() -> None:
    lesion = replace(build_lesion(), title="Lesion with a very long title " * 6)
    image = draw(build_findings(lesions=(lesion,)))[1]
    assert np.array_equal(image.rgb[:HEADER_PX, -260:], render()[1].rgb[:HEADER_PX, -260:])


def test_no_lesion_still_gives_the_overview() -> None:
    (image,) = render(build_findings(lesions=()))
    assert image.name == "gland"
    assert "No lesion found" in image.caption


def test_no_gland_shows_the_middle_slice_and_says_so() -> None:
    findings, masks = build_nothing()
    (image,) = findings_to_key_images(findings, masks, build_volumes())
    assert (image.name, image.finding_ids, image.frame_index) == ("overview", (), 5)
    assert "No prostate gland found" in image.caption
    assert not find_colour(read_panel(image, 0), GLAND_RGB).any()


def test_a_missing_volume_leaves_its_panel_empty() -> None:
    volumes = build_volumes()
    del volumes["adc"]
    image = findings_to_key_images(build_findings(), build_masks(), volumes)[1]
    assert read_panel(image, 1)[:200].max() < 30
    assert read_panel(image, 2)[:200].max() > 200


def test_values_that_are_not_numbers_or_all_alike_do_not_break_the_picture() -> None:
    volumes = build_volumes()
    volumes["adc"].array[:] = np.nan
    volumes["hbv"].array[:] = 7.0
    image = findings_to_key_images(build_findings(), build_masks(), volumes)[1]
    assert find_colour(read_panel(image, 1), lesion_rgb(1)).any()


def test_a_single_voxel_is_still_outlined() -> None:
    masks = build_masks()
    masks["lesions"][:] = 0
    masks["lesions"][5, 20, 12] = 1
    image = findings_to_key_images(build_findings(lesions=(build_lesion(),)), masks, build_volumes())[1]
    assert find_colour(read_panel(image, 0), lesion_rgb(1)).any()


def test_equal_arguments_give_equal_bytes() -> None:
    assert [i.png for i in draw(build_findings())] == [i.png for i in render()]


def render_sc(index: int = 1, **changes: Any) -> Dataset:
    """A key image as Secondary Capture, written and read again."""
    image = render()[index]
    source = build_sources(**changes)[image.frame_index]
    return pydicom.dcmread(BytesIO(write_dicom(key_image_to_sc(build_findings(), image, source))))


def test_secondary_capture_holds_the_picture_and_says_what_it_is() -> None:
    sc = render_sc()
    assert np.array_equal(sc.pixel_array, render()[1].rgb)
    assert (sc.BurnedInAnnotation, sc.ConversionType) == ("YES", "WSD")
    assert sc.SOPInstanceUID == derive_uid("test-job", 1, "sc-lesion-1")
    assert sc.SourceImageSequence[0].ReferencedSOPInstanceUID == derive_uid("test-study", "t2w", 5)
    assert "lesion-1" in sc.DerivationDescription
    assert "not verified" in sc.SeriesDescription
    assert sc.ContributingEquipmentSequence[0].ManufacturerModelName == "prostate_reference"
    assert list(sc.PatientOrientation) == ["L", "P"]


def test_secondary_captures_of_a_study_are_one_series() -> None:
    first, second = render_sc(1), render_sc(2)
    assert first.SeriesInstanceUID == second.SeriesInstanceUID
    assert (first.InstanceNumber, second.InstanceNumber) == (2, 3)
    assert first.SOPInstanceUID != second.SOPInstanceUID


def test_secondary_capture_belongs_to_the_patient_and_study_of_the_source() -> None:
    name = "Yamada^Tarou=山田^太郎"
    sc, source = render_sc(SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientName=name), build_sources()[5]
    assert str(sc.PatientName) == name
    for keyword in ("PatientID", "StudyInstanceUID", "AccessionNumber", "StudyDate"):
        assert sc[keyword].value == source[keyword].value


def test_secondary_capture_takes_nothing_from_the_clock() -> None:
    image, source = render()[1], build_sources()[5]
    first, second = (write_dicom(key_image_to_sc(build_findings(), image, source)) for _ in range(2))
    assert first == second
    assert datetime.now().strftime("%Y%m%d").encode() not in first


def test_another_slice_as_source_is_refused() -> None:
    with pytest.raises(ValueError, match="shows instance"):
        key_image_to_sc(build_findings(), render()[1], build_sources()[4])


def test_lesion_side_is_the_model_s_code() -> None:
    assert describe_place(build_lesion(2, codes.LEFT, "2")).startswith("Left")

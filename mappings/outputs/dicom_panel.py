"""One square picture of one slice: resampled, windowed, with outlines, direction letters and a scale bar."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from mappings.model.study import Geometry
from mappings.outputs.dicom_display import Rgb

PANEL_PX = 480
WHITE: Rgb = (236, 239, 241)
BLACK: Rgb = (0, 0, 0)
WINDOW_PERCENTILES = (0.5, 99.8)
SECOND_LETTER_FROM = 0.5
LETTERS = (("L", "R"), ("P", "A"), ("H", "F"))
"""Letter of the positive and the negative direction of each LPS axis (PS3.3 C.7.6.1.1.1)."""


@dataclass(frozen=True)
class View:
    """A square window on slice `frame`: its centre in fractional `(row, column)` and its side in mm."""

    frame: int
    centre: tuple[float, float]
    side_mm: float
    geometry: Geometry

    @property
    def mm_per_px(self) -> float:
        """Size of one pixel of the panel."""
        return self.side_mm / PANEL_PX

    def sample(self, array: npt.NDArray[np.generic], order: Literal[1, 3]) -> npt.NDArray[np.float64]:
        """The slice of `array` `(z, y, x)` on the panel's pixels, by splines of `order`; 0 outside."""
        _, row_mm, column_mm = self.geometry.spacing_mm
        steps = np.array([self.mm_per_px / row_mm, self.mm_per_px / column_mm])
        first = np.array(self.centre) - steps * (PANEL_PX - 1) / 2
        plane = np.nan_to_num(np.asarray(array[self.frame], dtype=np.float64))
        # A diagonal matrix lets scipy sample rows and columns apart, twice as fast as point by point.
        result: npt.NDArray[np.float64] = ndimage.affine_transform(
            plane, steps, offset=first, output_shape=(PANEL_PX, PANEL_PX), order=order, cval=0.0
        )
        return result


@dataclass(frozen=True)
class Outline:
    """The border of `mask` `(z, y, x)`, drawn in `rgb` with a line of `width_px`; `tag` is written beside it."""

    mask: npt.NDArray[np.bool_]
    rgb: Rgb
    width_px: float
    tag: str = ""


@dataclass(frozen=True)
class Trace:
    """An outline on a view's pixels: `distance_px` to the border, positive inside."""

    outline: Outline
    distance_px: npt.NDArray[np.float64]


@cache
def load_font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font: the same on every machine."""
    return ImageFont.load_default(size=size_px)


def draw_panel(
    array: npt.NDArray[np.generic] | None,
    view: View,
    traces: Sequence[Trace],
    title: str,
    focus: npt.NDArray[np.bool_],
) -> Image.Image:
    """The panel as an RGB image of PANEL_PX squared; a plain note where `array` is None.

    The grey window is chosen for the pixels of `focus`, so that a bright bladder does not darken the gland.
    """
    if array is None:
        return _draw_missing(title)
    grey = apply_window(view.sample(array, order=3), focus)
    picture = np.repeat(grey[:, :, None], 3, axis=2)
    for trace in traces:
        _draw_line(picture, trace)
    image = Image.fromarray(np.round(picture * 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for trace in traces:
        _draw_tag(draw, trace)
    _draw_marks(draw, view, title)
    return image


def apply_window(values: npt.NDArray[np.float64], focus: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """`values` between their robust extremes inside `focus` as 0..1; all 0 where they do not differ."""
    low, high = np.percentile(values[focus] if focus.any() else values, WINDOW_PERCENTILES)
    if high <= low:
        return np.zeros_like(values)
    result: npt.NDArray[np.float64] = np.clip((values - low) / (high - low), 0.0, 1.0)
    return result


def trace_outline(view: View, outline: Outline) -> Trace | None:
    """Finds the outline on the view's pixels; None where the mask is not on this slice.

    The voxels' stairs are rounded by less than half a voxel, but never so that a small region disappears.
    """
    field = view.sample(outline.mask.astype(np.uint8), order=1)
    smooth = ndimage.gaussian_filter(field, 2.0)
    inside = smooth > 0.5 if (smooth > 0.5).any() else field > 0.5
    if not inside.any():
        return None
    inner, outer = ndimage.distance_transform_edt(inside), ndimage.distance_transform_edt(~inside)
    distance = np.where(inside, inner - 0.5, 0.5 - outer)
    return Trace(outline, np.asarray(ndimage.gaussian_filter(distance, 1.8), dtype=np.float64))


def find_focus(traces: Sequence[Trace], view: View, margin_mm: float) -> npt.NDArray[np.bool_]:
    """The view's pixels within `margin_mm` of what is outlined; none where nothing is."""
    focus = np.zeros((PANEL_PX, PANEL_PX), np.bool_)
    for trace in traces:
        focus |= trace.distance_px > -margin_mm / view.mm_per_px
    return focus


def _draw_line(picture: npt.NDArray[np.float64], trace: Trace) -> None:
    """Draws the line on `picture` (0..1) with soft edges, over a dark halo that parts it from bright tissue."""
    width_px = trace.outline.width_px
    for rgb, line_px, strength in ((BLACK, width_px + 2.0, 0.4), (trace.outline.rgb, width_px, 1.0)):
        alpha = strength * np.clip(line_px / 2 + 0.5 - np.abs(trace.distance_px), 0.0, 1.0)
        rows, columns = np.nonzero(alpha)
        weight = alpha[rows, columns][:, None]
        picture[rows, columns] = (1 - weight) * picture[rows, columns] + weight * (np.array(rgb) / 255)


def _draw_tag(draw: ImageDraw.ImageDraw, trace: Trace) -> None:
    """Writes the outline's tag above its upper right end."""
    if trace.outline.tag:
        # Smoothing can leave a tiny region without a pixel above zero; its deepest one still says where it is.
        rows, columns = np.nonzero(trace.distance_px >= min(0.0, float(trace.distance_px.max())))
        position = (float(columns.max()) + 4, float(rows.min()) - 2)
        write(draw, position, trace.outline.tag, 18, trace.outline.rgb, anchor="lb")


def name_directions(geometry: Geometry) -> dict[str, str]:
    """Letters of the patient directions at the panel's left, right, top and bottom edge."""
    columns, rows = geometry.matrix[:3, 0], geometry.matrix[:3, 1]
    return {
        "left": name_direction(-columns),
        "right": name_direction(columns),
        "top": name_direction(-rows),
        "bottom": name_direction(rows),
    }


def name_direction(vector: npt.NDArray[np.float64]) -> str:
    """The letter of the nearest patient axis, and of the second one where the vector is clearly oblique."""
    unit = vector / np.linalg.norm(vector)
    order = np.argsort(-np.abs(unit), kind="stable")
    axes = [order[0], *(axis for axis in order[1:2] if abs(unit[axis]) >= SECOND_LETTER_FROM)]
    return "".join(LETTERS[axis][0 if unit[axis] > 0 else 1] for axis in axes)


def _draw_missing(title: str) -> Image.Image:
    image = Image.new("RGB", (PANEL_PX, PANEL_PX), (18, 20, 22))
    draw = ImageDraw.Draw(image)
    middle = (PANEL_PX / 2, PANEL_PX / 2)
    draw.text(middle, f"{title}: not available", font=load_font(22), fill=(144, 150, 154), anchor="mm")
    return image


def _draw_marks(draw: ImageDraw.ImageDraw, view: View, title: str) -> None:
    """Title, direction letters and scale bar."""
    last, middle = PANEL_PX - 10, PANEL_PX / 2
    write(draw, (12, 10), title, 22, anchor="lt")
    letters = name_directions(view.geometry)
    write(draw, (10, middle), letters["left"], 22, anchor="lm")
    write(draw, (last, middle), letters["right"], 22, anchor="rm")
    write(draw, (middle, 10), letters["top"], 22, anchor="mt")
    write(draw, (middle, last), letters["bottom"], 22, anchor="mb")
    _draw_scale_bar(draw, view)


def _draw_scale_bar(draw: ImageDraw.ImageDraw, view: View) -> None:
    """A bar of 10, 20 or 50 mm, whichever is the largest within a quarter of the panel."""
    fitting = [mm for mm in (10, 20, 50) if mm <= view.side_mm / 4]
    length_mm = fitting[-1] if fitting else 5
    right, bottom = PANEL_PX - 14, PANEL_PX - 14
    left = right - round(length_mm / view.mm_per_px)
    draw.rectangle((left - 1, bottom - 4, right + 1, bottom + 1), fill=BLACK)
    draw.rectangle((left, bottom - 3, right, bottom), fill=WHITE)
    write(draw, ((left + right) / 2, bottom - 9), f"{length_mm} mm", 17, anchor="mb")


def write(
    draw: ImageDraw.ImageDraw,
    position: tuple[float, float],
    text: str,
    size_px: int,
    rgb: Rgb = WHITE,
    anchor: str = "la",
) -> None:
    """Text with a dark edge, readable on any tissue."""
    draw.text(position, text, font=load_font(size_px), fill=rgb, anchor=anchor, stroke_width=2, stroke_fill=BLACK)

"""One picture of all boxes of an image: each map within its box, all on one scale, verdicts by line and word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detxai.output.lettering import (
    DARK,
    FOOTER,
    LIGHT,
    TEXT,
    WARNING,
    Flow,
    Lettering,
    Rect,
    drawn_box,
    height_of_text,
    outline,
    with_footer,
)
from detxai.output.overlays import AGAINST, FOR, MIN_LONG_SIDE, SIGMA_OF_BOX, painted, reached_by, signed_bar
from detxai.values import Box, Map, Pixels, shared_area

#: The long side of a stamp, in cells, and of an overview, in pixels, are at most this.
STAMP_SIDE, MOST_LONG_SIDE = 64, 1600
#: The strongest cells of all boxes, this share of their area, are drawn in full colour.
SATURATED = 0.02
#: Dash and gap in line widths by verdict or kind, worst first; None: a whole line.
LINES: dict[str, tuple[int, int] | None] = {
    "unsupported": (3, 3), "weak": (8, 5), "unknown": (3, 8), "missed": (2, 5), "candidate": (2, 5), "supported": None,
    "none": None,
}  # fmt: skip
#: More boxes than this carry their number alone; the footer names those to look at.
MOST_NAMED, MOST_LISTED = 12, 8


@dataclass(frozen=True, eq=False)
class Stamp:
    """A map within its box, coarse: `values` (rows, columns) float16, mean attribution a source pixel in each cell.

    `place`: x0, y0, x1, y1 in source pixels, whole numbers within the picture.
    """

    place: Rect
    values: NDArray[np.float16]


@dataclass(frozen=True)
class ShownBox:
    """One box of an overview: `verdict` is one of LINES, `reason` what decided it."""

    id: int
    box: Box
    label: str
    score: float
    verdict: str
    reason: str = ""
    stamp: Stamp | None = None

    @property
    def asks(self) -> bool:
        """Whether it asks for another look."""
        return asks(self.verdict)


def asks(verdict: str) -> bool:
    """Whether a box of this verdict, one of LINES, asks for another look."""
    return verdict not in ("supported", "none")


def stamp(attribution: Map, box: Box) -> Stamp:
    """The part of a map (H, W) within `box`, xyxy in its pixels, in at most STAMP_SIDE cells a side."""
    x0, y0, x1, y1 = drawn_box(box, 1, attribution.shape[::-1])
    part = np.ascontiguousarray(attribution[y0:y1, x0:x1], np.float32)
    cells = min(1.0, STAMP_SIDE / max(part.shape))
    size = max(1, round((x1 - x0) * cells)), max(1, round((y1 - y0) * cells))
    return Stamp((x0, y0, x1, y1), cv2.resize(part, size, interpolation=cv2.INTER_AREA).astype(np.float16))


def common_scale(stamps: Sequence[Stamp], size: tuple[int, int]) -> float:
    """From how much attribution a pixel colour is full where `stamps` share a picture of `size` (width, height)."""
    times = _times(max(size))
    return _scale(_field(stamps, _drawn(size, times), times))


def draw(
    pixels: Pixels, boxes: Sequence[ShownBox], *, caption: str = "", unit: str = "logits", font: Path | None = None,
    scale: float | None = None,
) -> Image.Image:  # fmt: skip
    """All `boxes` on `pixels` (H, W, 3) uint8; where boxes overlap the stronger attribution shows.

    Supported boxes have a whole line, the others dashes and, up to MOST_NAMED boxes, their verdict in words. `scale`:
    as `common_scale` gives it; None: that of these boxes.
    """
    height, width = pixels.shape[:2]
    times = _times(max(width, height))
    drawn = _drawn((width, height), times)
    text = Lettering(height_of_text(drawn), font)
    scan = Image.fromarray(pixels).resize(drawn, Image.Resampling.BOX if times < 1 else Image.Resampling.NEAREST)
    legend = text.words(f"no attribution · {unit}")
    field = _field([shown.stamp for shown in boxes if shown.stamp is not None], drawn, times)
    scale = scale or _scale(field)
    if scale:
        legend = ["against", signed_bar(text), "for"]
        legend += text.words(f"· one scale for all boxes: full colour from {scale:.2g} {unit} a pixel")
    strength = np.asarray(np.abs(field) / (scale or 1), np.float32)
    panel = painted(scan, (field < 0).astype(np.uint8), strength, (FOR, AGAINST))
    _draw_boxes(panel, boxes, times, text)
    footer = _footer(boxes, legend, caption, text)
    return with_footer(panel, [text.block(flow, panel.width, *colours) for flow, colours in footer if flow])


def _times(long: int) -> float:
    """How many times as large as the picture, of this long side, the overview is."""
    return MOST_LONG_SIDE / long if long > MOST_LONG_SIDE else float(max(1, -(-MIN_LONG_SIDE // long)))


def _drawn(size: tuple[int, int], times: float) -> tuple[int, int]:
    """(width, height) of a picture of `size` drawn `times` as large."""
    return max(1, round(size[0] * times)), max(1, round(size[1] * times))


def _field(stamps: Sequence[Stamp], drawn: tuple[int, int], times: float) -> NDArray[np.float32]:
    """(rows, columns): the attribution of the stamp that has the strongest there; 0 outside all boxes."""
    field = np.zeros(drawn[::-1], np.float32)
    for own in stamps:
        x0, y0, x1, y1 = drawn_box(own.place, times, drawn)
        values = own.values.astype(np.float32)
        sigma = max(SIGMA_OF_BOX * max(values.shape), 0.5)
        values = cv2.GaussianBlur(values, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
        part = cv2.resize(values, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
        there = field[y0:y1, x0:x1]
        np.copyto(there, part, where=np.abs(part) > np.abs(there))
    return field


def _scale(field: NDArray[np.float32]) -> float:
    """The size of attribution from which on colour is full; 0 where there is none."""
    strength = np.abs(field[field != 0])
    return reached_by(strength, SATURATED) if strength.size else 0.0


def _draw_boxes(panel: Image.Image, boxes: Sequence[ShownBox], times: float, text: Lettering) -> None:
    """Outlines, those to look at last and on top, then tags where they cover no other."""
    order = sorted(boxes, key=lambda shown: shown.asks)
    frames = {}
    for shown in order:
        inner = drawn_box(shown.box, times, panel.size)
        tint = WARNING if shown.asks else LIGHT
        frames[shown.id] = outline(panel, inner, (tint,) * 4, text.line, LINES[shown.verdict])
    taken: list[Rect] = []
    for shown in reversed(order):
        said = _said(shown, text) if len(boxes) <= MOST_NAMED else f"{shown.id}"
        place = _free(frames[shown.id], text.tag_size(said), panel.size, taken)
        taken.append(place)
        colours = (DARK, WARNING) if shown.asks else (LIGHT, DARK)
        text.tag(panel, place[:2], said, *colours)


def _said(shown: ShownBox, text: Lettering) -> str:
    word = f" {shown.verdict}" if shown.asks else ""
    return f"{shown.id} {text.shortened(shown.label, 12 * text.em)} {shown.score:.2f}{word}"


def _free(frame: Rect, size: tuple[int, int], panel: tuple[int, int], taken: Sequence[Rect]) -> Rect:
    """Where a tag of `size` goes: above, below or within the frame, where it covers the least of the others."""
    (x0, y0, x1, y1), (width, height) = frame, size
    corners = [(x0, y0 - height), (x1 - width, y0 - height), (x0, y1), (x1 - width, y1), (x0, y0), (x0, y1 - height)]
    places = []
    for x, y in corners:
        x, inside = min(max(x, 0), max(panel[0] - width, 0)), 0 <= y <= panel[1] - height
        y = min(max(y, 0), max(panel[1] - height, 0))
        place = (x, y, x + width, y + height)
        places.append((sum(shared_area(place, other) for other in taken), not inside, place))
    return min(places, key=lambda known: known[:2])[2]


def _footer(
    boxes: Sequence[ShownBox], legend: Flow, caption: str, text: Lettering
) -> list[tuple[Flow, tuple[tuple[int, int, int], tuple[int, int, int]]]]:
    """What stands below: the scale, how it was made, and the boxes to look at with their reasons."""
    worst = [*LINES].index
    asking = sorted((shown for shown in boxes if shown.asks), key=lambda shown: worst(shown.verdict))
    named: Flow = []
    for shown in asking[:MOST_LISTED]:
        reason = f": {shown.reason}" if shown.reason else ""
        named += [*(["\n"] if named else []), *text.words(f"{_said(shown, text)}{reason}")]
    if len(asking) > MOST_LISTED:
        named += ["\n", *text.words(f"and {len(asking) - MOST_LISTED} more that ask for another look")]
    return [(legend, (TEXT, FOOTER)), (text.words(caption), (TEXT, FOOTER)), (named, (WARNING, FOOTER))]

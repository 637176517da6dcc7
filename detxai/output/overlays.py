"""Pixels for people: a signed attribution drawn over the scan, with a legend that explains it.

The scan is gray under the layer, because X-rays are themselves orange, green and blue: on an
overlay every hue is attribution. Nothing covers the picture but the box and its tag; the rest
stands in a footer, and a small box enlarged beside it. Same input, same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detxai.output.lettering import (
    DARK,
    DASH,
    FOOTER,
    LIGHT,
    RGB,
    TAG,
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
from detxai.values import Box, Map, Pixels

Ramp = tuple[RGB, RGB]

#: Gray range of the scan under the layer: off black and white, where thin colour would drown.
GROUND = (56, 232)
#: Weak and full colour for and against: apart in yellow-blue and lightness, which all eyes see.
FOR: Ramp = ((255, 190, 40), (238, 72, 0))
AGAINST: Ramp = ((70, 170, 255), (62, 20, 190))
#: One tint an edge: yellowish and bluish, each light and dark.
EDGES: dict[str, RGB] = {
    "left": (45, 85, 245), "top": (255, 214, 0), "right": (232, 84, 10), "bottom": (70, 215, 255)
}  # fmt: skip
#: Alpha is FULL_ALPHA * (|a| / scale) ** ALPHA_GAMMA: never opaque, noise floor out of sight.
FULL_ALPHA, ALPHA_GAMMA = 0.75, 1.25
#: Display smoothing: sigma as a share of sqrt(box area), within shares of the picture's long side.
SIGMA_OF_BOX, SIGMA_OF_PICTURE = 0.04, (0.004, 0.02)
#: Edges are smoothed so many times as far: whole parts of an object, not pixels, are said to hold an edge.
SMOOTHER_EDGES = 1.5
#: The strongest pixels, this share of the box area in number, are drawn in full colour.
SATURATED = 0.02
#: Of so many pixels one is looked at first, to see which may be among the strongest.
SAMPLED = 16
#: Below this sum of |a| (target units, whole picture) there is only rounding to amplify.
NEGLIGIBLE = 1e-3
#: Smaller pictures are enlarged by a whole factor to this long side; thin ones get a mat.
MIN_LONG_SIDE, MIN_PANEL = 384, (256, 64)
#: Wider pictures than this are stacked in a strip, not set side by side.
STACK_ASPECT = 2.0
#: File types of pictures: Pillow's name and what it is told. PNG at level 2 takes a third of the time of 6 for 8 %
#: more bytes.
FILE_TYPES: dict[str, tuple[str, dict[str, int]]] = {
    "png": ("PNG", {"compress_level": 2}),
    "webp": ("WEBP", {"quality": 90, "method": 2}),
}
#: JPEG without chroma subsampling, which would blur orange into blue. Of OpenCV, which lets other threads go on
#: meanwhile; Pillow would write the same bytes.
JPEG = (cv2.IMWRITE_JPEG_QUALITY, 92, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)

#: A box whose long side is less than this share of the picture's short side is shown enlarged as well: with
#: `INSET_AROUND` times its size around it, to `INSET` of the drawn height.
SMALL_BOX, INSET_AROUND, INSET = 0.2, 2.0, 0.6


def draw(
    pixels: Pixels, attribution: Map, *, box: Box, label: str, score: float, caption: str = "",
    warning: str | None = None, strip: bool = False, unit: str = "logits", dashed: bool = False,
    poles: tuple[str, str] = ("against", "for"), font: Path | None = None, scale: float | None = None,
) -> Image.Image:  # fmt: skip
    """Overlay of one signed map: vermilion for, blue-violet against, both on one scale, zero clear.

    `pixels` (H, W, 3) uint8 RGB; `attribution` (H, W) float, source pixels, `unit` a pixel; `box`
    xyxy, source pixels, `dashed` where nothing was reported. `strip` sets the untouched scan before
    the overlay. `poles`: what negative and positive values speak for. `font`: a file for names in
    scripts that the usual fonts lack. `scale`: from how much a pixel colour is full; None: from what
    the strongest pixels have. Raises ValueError on another shape or dtype and on values that
    are not finite.
    """
    sheet = _Sheet(pixels, box, dashed=dashed, font=font)
    smooth = sheet.smooth(attribution)
    key: Flow = [*sheet.text.words(poles[0]), signed_bar(sheet.text), *sheet.text.words(poles[1])]
    parts = [np.maximum(smooth, 0), np.maximum(-smooth, 0)]
    overlay, legend = sheet.paint(parts, (FOR, AGAINST), key, unit, scale)
    return sheet.compose(overlay, legend, (LIGHT,) * 4, (label, score), caption, warning, strip=strip)


def draw_edges(
    pixels: Pixels, maps: Mapping[str, Map], *, box: Box, label: str, score: float,
    caption: str = "", warning: str | None = None, strip: bool = False, unit: str = "px",
    dashed: bool = False, font: Path | None = None, scale: float | None = None,
) -> Image.Image:  # fmt: skip
    """Overlay of what holds the edges of a box: every part in the tint of the edge it moves most.

    `maps`: any of `left`, `top`, `right`, `bottom` -> (H, W) float as in `draw`, on one scale. How
    much an edge is pushed counts, not which way. The box wears the tints. Raises as `draw` does.
    """
    if not maps or set(maps) - set(EDGES):
        raise ValueError(f"maps must be named {', '.join(EDGES)}; got {', '.join(maps) or 'none'}")
    sheet = _Sheet(pixels, box, dashed=dashed, font=font)
    sheet.sigma *= SMOOTHER_EDGES
    used = {name: tint for name, tint in EDGES.items() if name in maps}
    key: Flow = []
    for name, tint in used.items():
        key += [_bar(np.array([[*tint, 255]], np.uint8), " ", sheet.text), name]
    parts = [sheet.smooth(np.abs(maps[name])) for name in used]
    overlay, legend = sheet.paint(parts, [(tint, tint) for tint in used.values()], key, unit, scale)
    tints = tuple(used.get(name, LIGHT) for name in EDGES)
    return sheet.compose(overlay, legend, tints, (label, score), caption, warning, strip=strip)


def encode(image: Image.Image, kind: str = "png") -> bytes:
    """Bytes of `image` as png, jpg or webp: no clock, no metadata, the same bytes for the same pixels."""
    if kind == "jpg":
        done, content = cv2.imencode(".jpg", cv2.cvtColor(np.asarray(image.convert("RGB")), cv2.COLOR_RGB2BGR), JPEG)
        assert done, "a picture in memory is written to memory"
        return content.tobytes()
    buffer, (name, options) = BytesIO(), FILE_TYPES[kind]
    plain = image.copy() if image.info else image
    plain.info = {}
    plain.save(buffer, name, **options)
    return buffer.getvalue()


def painted(
    scan: Image.Image, owner: NDArray[np.uint8], level: NDArray[np.float32], ramps: Sequence[Ramp]
) -> Image.Image:
    """RGB: `scan` in gray, each pixel under the ramp of its `owner`, from clear at `level` 0 to full from 1 on."""
    table = _blends(tuple(ramps))
    steps = _steps(ramps)
    colour = owner * steps + np.minimum(cv2.convertScaleAbs(level, alpha=steps - 1), steps - 1)
    at = cv2.merge([np.asarray(scan.convert("L")), colour]).view("<u2")[..., 0]  # the colour counts 256
    pixels = table.take(at)  # four bytes at once
    return Image.fromarray(cv2.cvtColor(pixels.view(np.uint8).reshape(*pixels.shape, 4), cv2.COLOR_RGBA2RGB))


@lru_cache(maxsize=64)
def signed_bar(text: Lettering) -> Pixels:
    """The colours from fully against over none to fully for."""
    table = _colours((FOR, AGAINST))
    half = len(table) // 2
    return _bar(np.concatenate([table[:half:-1], table[:half]]), "-0+", text)


class _Sheet:
    """One page: its zoom, type size and smoothing, and how the parts are put together."""

    def __init__(self, pixels: Pixels, box: Box, *, dashed: bool = False, font: Path | None = None) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise ValueError(f"pixels must be (H, W, 3) uint8, got {pixels.shape} {pixels.dtype}")
        if not np.isfinite(box).all():
            raise ValueError(f"the box has corners that are not finite: {box}")
        self.pixels, self.box, self.dash = pixels, box, DASH if dashed else None
        self.size = width, height = pixels.shape[1], pixels.shape[0]
        long = max(self.size)
        self.zoom = zoom = max(1, -(-MIN_LONG_SIDE // long))
        self.drawn = width * zoom, height * zoom
        self.scan = Image.fromarray(pixels).resize(self.drawn, Image.Resampling.NEAREST)
        self.text = Lettering(height_of_text(self.size, zoom), font)
        x, y = np.clip(box[::2], 0, width), np.clip(box[1::2], 0, height)
        self.box_side = max(float(x[1] - x[0]), float(y[1] - y[0]), 1.0)
        box_area = max(float((x[1] - x[0]) * (y[1] - y[0])), 1.0)
        self.share = SATURATED * box_area / (width * height)
        low, high = (max(bound * long, 0.5) for bound in SIGMA_OF_PICTURE)
        self.sigma = min(max(SIGMA_OF_BOX * math.sqrt(box_area), low), high)

    def smooth(self, attribution: Map) -> Map:
        """Gaussian of `sigma`, borders mirrored, (H, W) float32."""
        if attribution.shape != self.pixels.shape[:2]:
            raise ValueError(f"map {attribution.shape} on picture {self.pixels.shape[:2]}")
        if not np.isfinite(attribution).all():
            raise ValueError("the attribution map holds values that are not finite")
        return smoothed(attribution, self.sigma)

    def paint(
        self, parts: Sequence[Map], ramps: Sequence[Ramp], key: Flow, unit: str, common: float | None
    ) -> tuple[Image.Image, Flow]:
        """Gray scan, each pixel under the strongest of `parts` (>= 0, `smooth`), on a `common` scale if any; legend."""
        strongest = np.maximum.reduce(parts)
        owner = np.zeros(self.drawn[::-1], np.uint8)
        if strongest.sum(dtype=np.float64) < NEGLIGIBLE:
            nothing = self.text.words(f"no attribution: sum of |a| below {NEGLIGIBLE:g} {unit}")
            return painted(self.scan, owner, owner.astype(np.float32), ramps), nothing
        own = reached_by(strongest, self.share) or float(strongest.max())
        scale = common or own
        if self.zoom > 1:
            parts = [cv2.resize(part, self.drawn, interpolation=cv2.INTER_LINEAR) for part in parts]
        best = parts[0]
        for index, part in enumerate(parts[1:], 1):
            np.copyto(owner, np.uint8(index), where=part > best)
            best = np.maximum(best, part)
        best = best / np.float32(scale)
        whose = f"the strongest {100 * self.share:.2g} % of the picture"
        if common:
            whose = f"one scale for all boxes, of which this one reaches {100 * own / scale:.0f} %"
        words = f"· full colour from {scale:.2g} {unit} a pixel, {whose} · smoothed over {self.sigma:.2g} px"
        return painted(self.scan, owner, best, ramps), [*key, *self.text.words(words)]

    def compose(
        self, overlay: Image.Image, legend: Flow, tints: tuple[RGB, ...], tag: tuple[str, float],
        caption: str, warning: str | None, *, strip: bool,
    ) -> Image.Image:  # fmt: skip
        """The painted `overlay`, box and tag; before them the scan if `strip`; below them the footer."""
        (columns, rows), line = self.drawn, self.text.line
        width, height = max(columns, MIN_PANEL[0]), max(rows, MIN_PANEL[1])
        at = (width - columns) // 2, (height - rows) // 2
        panels = [Image.new("RGB", (width, height), FOOTER) for _ in range(1 + strip)]
        for panel, picture in zip(panels, (self.scan, overlay)[1 - strip :], strict=True):
            panel.paste(picture, at)
        inner = self._corners(at)
        frame = outline(panels[-1], inner, tints, line, self.dash)
        enlarged = self._enlarged(overlay, tints, height)
        _tag(panels[-1], frame, tag, self.text)
        panels += [enlarged] if enlarged is not None else []
        stacked, gap = columns > STACK_ASPECT * rows, 2 * line
        corners = _placed([panel.size for panel in panels], gap, stacked=stacked)
        right = max(x + panel.width for panel, (x, _) in zip(panels, corners, strict=True))
        bottom = max(y + panel.height for panel, (_, y) in zip(panels, corners, strict=True))
        texts = [(legend, TEXT, FOOTER), (self.text.words(caption), TEXT, FOOTER),
                 (self.text.words(warning), DARK, WARNING)]  # fmt: skip
        page = panels[0] if len(panels) == 1 else Image.new("RGB", (right, bottom), FOOTER)
        for panel, corner in zip(panels, corners, strict=True) if len(panels) > 1 else ():
            page.paste(panel, corner)
        return with_footer(page, [self.text.block(flow, right, ink, ground) for flow, ink, ground in texts if flow])

    def _corners(self, at: tuple[int, int]) -> Rect:
        """The box within the picture whose corner is `at`, canvas pixels; see `drawn_box`."""
        x0, y0, x1, y1 = drawn_box(self.box, self.zoom, self.drawn)
        return x0 + at[0], y0 + at[1], x1 + at[0], y1 + at[1]

    def _enlarged(self, overlay: Image.Image, tints: tuple[RGB, ...], height: int) -> Image.Image | None:
        """The surroundings of a small box, enlarged, with what is drawn there; None for a box that is large enough."""
        if self.box_side >= SMALL_BOX * min(self.size) or min(self.size) < MIN_PANEL[1]:
            return None
        inner = self._corners((0, 0))
        side = min(round(INSET_AROUND * self.box_side * self.zoom) + 8, *self.drawn)
        shown = min(max(round(INSET * height), MIN_PANEL[1]), height)
        x0 = min(max((inner[0] + inner[2] - side) // 2, 0), self.drawn[0] - side)
        y0 = min(max((inner[1] + inner[3] - side) // 2, 0), self.drawn[1] - side)
        part = overlay.resize((shown, shown), Image.Resampling.BICUBIC, (x0, y0, x0 + side, y0 + side))
        times = shown / side
        x = [round((value - x0) * times) for value in inner[::2]]
        y = [round((value - y0) * times) for value in inner[1::2]]
        outline(part, (x[0], y[0], x[1], y[1]), tints, self.text.line, self.dash)
        self.text.tag(part, (0, shown - self.text.tag_size("x")[1]), f"{times:.1f} times as large")
        return part


def reached_by(values: Map, share: float) -> float:
    """What a `share` (0 to 0.5) of `values` reach: their quantile 1 − share, for which only the greatest are sorted."""
    flat = values.ravel()
    at = (flat.size - 1) * (1 - share)
    wanted = flat.size - int(at)
    some = flat[::SAMPLED]
    near = max(int(some.size * (1 - 2 * share)) - 1, 0)
    most = flat[flat >= np.partition(some, near)[near]]
    most = most if most.size >= wanted else flat
    first = most.size - wanted
    pair = [first, min(first + 1, most.size - 1)]
    low, high = np.partition(most, pair)[pair]
    t = at - int(at)
    return float(low + (high - low) * t if t < 0.5 else high - (high - low) * (1 - t))  # as NumPy does


def smoothed(attribution: Map, sigma: float) -> Map:
    """Gaussian of `sigma` pixels, borders mirrored, (H, W) float32; the sum stays."""
    return np.asarray(
        cv2.GaussianBlur(np.ascontiguousarray(attribution, np.float32), (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    )


def _placed(sizes: Sequence[tuple[int, int]], gap: int, *, stacked: bool) -> list[tuple[int, int]]:
    """Upper left corners of panels of these sizes, side by side or `stacked`."""
    corners, x, y = [], 0, 0
    for width, height in sizes:
        corners.append((x, y))
        x, y = (0, y + height + gap) if stacked else (x + width + gap, 0)
    return corners


def _tag(panel: Image.Image, frame: Rect, tag: tuple[str, float], text: Lettering) -> None:
    """Class and score above the frame, else below, else inside; always whole."""
    score = f" {tag[1]:.2f}"
    room = min(panel.width - 2 * text.pad, TAG * text.em) - text.tag_size(score)[0] + 2 * text.pad
    said = text.shortened(tag[0], room) + score
    width, height = text.tag_size(said)
    x, above, below = max(0, min(frame[0], panel.width - width)), frame[1] - height, frame[3]
    inside = max(0, min(frame[1], panel.height - height))
    text.tag(panel, (x, above if above >= 0 else below if below + height <= panel.height else inside), said)


def _bar(colours: NDArray[np.uint8], marks: str, text: Lettering) -> Pixels:
    """A colour bar (n, 4) RGBA over mid gray, with `marks` spread along it."""
    height, width = text.em + 2, (text.em + 2) * (3 * len(marks) - 2)
    bar = Image.new("RGBA", (width, height), (sum(GROUND) // 2,) * 3 + (255,))
    bar.alpha_composite(Image.fromarray(colours[None]).resize((width, height)))
    return np.asarray(text.marked(bar.convert("RGB"), marks))


def _steps(ramps: Sequence[Ramp]) -> int:
    """Colours of a ramp, so that those of all fit into a byte."""
    return 256 // max(len(ramps), 2)


@lru_cache(maxsize=8)
def _colours(ramps: tuple[Ramp, ...]) -> NDArray[np.uint8]:
    """(n, 4) RGBA, n <= 256: for each ramp in turn equal steps from clear to full."""
    level = np.linspace(0, 1, _steps(ramps))[:, None]
    alpha = 255 * FULL_ALPHA * level**ALPHA_GAMMA
    shades = [np.array(weak) * (1 - level) + np.array(full) * level for weak, full in ramps]
    table = np.concatenate([np.hstack([shade, alpha]) for shade in shades])
    return np.asarray(np.rint(table), np.uint8)


@lru_cache(maxsize=8)
def _blends(ramps: tuple[Ramp, ...]) -> NDArray[np.uint32]:
    """(256 · 256,): at 256 c + g the colour c of `_colours` over the level g of a scan, RGBA in one number."""
    table = _colours(ramps)[:, None].astype(np.float64)
    low, high = GROUND
    ground = (low + (high - low) * np.arange(256) / 255)[None, :, None]
    alpha = table[..., 3:] / 255
    blends = np.full((256, 256, 4), 255, np.uint8)
    blends[: len(table), :, :3] = np.rint(ground + alpha * (table[..., :3] - ground))
    return blends.view(np.uint32).ravel()

"""Pixels for people: a signed attribution drawn over the scan, with a legend that explains it.

The scan is gray under the layer, because X-rays are themselves orange, green and blue: on an
overlay every hue is attribution. Nothing covers the picture but the box and its tag; the rest
stands in a footer. Same input, same bytes. Only numpy and Pillow.
"""

from __future__ import annotations

import math
import unicodedata
from bisect import bisect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from detxai.values import Box, Map, Pixels

RGB = tuple[int, int, int]
Ramp = tuple[RGB, RGB]
Rect = tuple[int, int, int, int]
Font = ImageFont.FreeTypeFont
Flow = list[str | Image.Image]

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
#: The strongest pixels, this share of the box area in number, are drawn in full colour.
SATURATED = 0.02
#: Below this sum of |a| (target units, whole picture) there is only rounding to amplify.
NEGLIGIBLE = 1e-3
#: Smaller pictures are enlarged by a whole factor to this long side; thin ones get a mat.
MIN_LONG_SIDE, MIN_PANEL = 384, (256, 64)
#: Text height: the lesser of these shares of the long and the short side, but legible.
FONT_OF_LONG, FONT_OF_SHORT, MIN_FONT = 0.021, 0.05, 13
#: Line width and longest tag, in text heights; dashes and their gaps, in line widths.
LINE, TAG, DASH = 1 / 7, 20, (8, 6)
#: Wider pictures than this are stacked in a strip, not set side by side.
STACK_ASPECT = 2.0
#: File types of pictures: Pillow's name and what it is told. PNG at level 3 takes half the time of 6 for a few per cent
#: of size; JPEG without chroma subsampling, which would blur orange into blue.
FILE_TYPES: dict[str, tuple[str, dict[str, int]]] = {
    "png": ("PNG", {"compress_level": 3}),
    "jpg": ("JPEG", {"quality": 92, "subsampling": 0}),
    "webp": ("WEBP", {"quality": 90, "method": 2}),
}

DARK, LIGHT, WARNING = (16, 16, 20), (255, 255, 255), (255, 214, 10)
FOOTER, TEXT = (30, 30, 36), (236, 236, 236)
#: Stand-ins for signs that Pillow's built-in font lacks; accents are dropped, the rest is escaped.
PLAIN = str.maketrans({"\u2212": "-", "\u2013": "-", "≤": "<=", "≥": ">=", "ß": "ss"})


def draw(
    pixels: Pixels, attribution: Map, *, box: Box, label: str, score: float, caption: str = "",
    warning: str | None = None, strip: bool = False, unit: str = "logits", dashed: bool = False,
) -> Image.Image:  # fmt: skip
    """Overlay of one signed map: vermilion for, blue-violet against, both on one scale, zero clear.

    `pixels` (H, W, 3) uint8 RGB; `attribution` (H, W) float, source pixels, `unit` a pixel; `box`
    xyxy, source pixels, `dashed` where nothing was reported. `strip` sets the untouched scan before
    the overlay. Raises ValueError on another shape or dtype and on values that are not finite.
    """
    sheet = _Sheet(pixels, box, dashed=dashed)
    smooth = sheet.smooth(attribution)
    ramps = (FOR, AGAINST)
    half = len(_colours(ramps)) // 2
    bar = np.concatenate([_colours(ramps)[:half:-1], _colours(ramps)[:half]])
    key: Flow = ["against", _bar(bar, "-0+", sheet.em), "for"]
    parts = [np.maximum(smooth, 0), np.maximum(-smooth, 0)]
    layer, legend = sheet.paint(parts, ramps, key, unit)
    return sheet.compose(layer, legend, (LIGHT,) * 4, (label, score), caption, warning, strip=strip)


def draw_edges(
    pixels: Pixels, maps: Mapping[str, Map], *, box: Box, label: str, score: float,
    caption: str = "", warning: str | None = None, strip: bool = False, unit: str = "px",
    dashed: bool = False,
) -> Image.Image:  # fmt: skip
    """Overlay of what holds the edges of a box: every pixel in the tint of the edge it moves most.

    `maps`: any of `left`, `top`, `right`, `bottom` -> (H, W) float as in `draw`, on one scale. The
    sign (which way an edge is pushed) is not shown. The box wears the tints. Raises as `draw` does.
    """
    if not maps or set(maps) - set(EDGES):
        raise ValueError(f"maps must be named {', '.join(EDGES)}; got {', '.join(maps) or 'none'}")
    sheet = _Sheet(pixels, box, dashed=dashed)
    used = {name: tint for name, tint in EDGES.items() if name in maps}
    key: Flow = []
    for name, tint in used.items():
        key += [_bar(np.array([[*tint, 255]], np.uint8), " ", sheet.em), name]
    parts = [np.abs(sheet.smooth(maps[name])) for name in used]
    layer, legend = sheet.paint(parts, [(tint, tint) for tint in used.values()], key, unit)
    tints = [used.get(name, LIGHT) for name in EDGES]
    return sheet.compose(layer, legend, tints, (label, score), caption, warning, strip=strip)


def encode(image: Image.Image, kind: str = "png") -> bytes:
    """Bytes of `image` as one of FILE_TYPES: no clock, no metadata, the same bytes for the same pixels."""
    buffer, (name, options) = BytesIO(), FILE_TYPES[kind]
    Image.fromarray(np.asarray(image)).save(buffer, name, **options)
    return buffer.getvalue()


class _Sheet:
    """One page: its zoom, type size and smoothing, and how the parts are put together."""

    def __init__(self, pixels: Pixels, box: Box, *, dashed: bool = False) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise ValueError(f"pixels must be (H, W, 3) uint8, got {pixels.shape} {pixels.dtype}")
        if not np.isfinite(box).all():
            raise ValueError(f"the box has corners that are not finite: {box}")
        self.pixels, self.box, self.dash = pixels, box, DASH if dashed else None
        self.size = width, height = pixels.shape[1], pixels.shape[0]
        short, long = sorted(self.size)
        self.zoom = zoom = max(1, -(-MIN_LONG_SIDE // long))
        self.drawn = width * zoom, height * zoom
        self.em = max(MIN_FONT, round(zoom * min(FONT_OF_LONG * long, FONT_OF_SHORT * short)))
        x, y = np.clip(box[::2], 0, width), np.clip(box[1::2], 0, height)
        box_area = max(float((x[1] - x[0]) * (y[1] - y[0])), 1.0)
        self.share = SATURATED * box_area / (width * height)
        low, high = (max(bound * long, 0.5) for bound in SIGMA_OF_PICTURE)
        self.sigma = min(max(SIGMA_OF_BOX * math.sqrt(box_area), low), high)
        self.step = max(1, int(self.sigma / 2))  # blocks of half a sigma do not show after blurring

    def smooth(self, attribution: Map) -> Map:
        """Gaussian of `sigma`, borders mirrored, on a grid of `step` x `step` blocks."""
        if attribution.shape != self.pixels.shape[:2]:
            raise ValueError(f"map {attribution.shape} on picture {self.pixels.shape[:2]}")
        if not np.isfinite(attribution).all():
            raise ValueError("the attribution map holds values that are not finite")
        image = Image.fromarray(np.ascontiguousarray(attribution, np.float32))
        grid: Map = np.asarray(image.reduce(self.step), np.float32)
        sigma = self.sigma / self.step
        reach = math.ceil(3 * sigma)
        taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2).astype(np.float32)
        for _ in range(2):  # down the columns, transpose, again
            wide = np.pad(grid, ((reach, reach), (0, 0)), mode="symmetric")
            windows = (wide[i : i + len(grid)] for i in range(len(taps)))
            grid = sum((t * w for t, w in zip(taps / taps.sum(), windows, strict=True)), 0 * grid).T
        return grid

    def paint(
        self, parts: Sequence[Map], ramps: Sequence[Ramp], key: Flow, unit: str
    ) -> tuple[Image.Image | None, Flow]:
        """RGBA layer, each pixel coloured by the strongest of `parts` (>= 0, `smooth`); legend."""
        strongest = np.maximum.reduce(parts)
        if strongest.sum(dtype=np.float64) * self.step**2 < NEGLIGIBLE:
            return None, _words(f"no attribution: sum of |a| below {NEGLIGIBLE:g} {unit}")
        scale = float(np.quantile(strongest, 1 - self.share)) or float(strongest.max())
        best = np.zeros(self.drawn[::-1], np.float32)
        owner = np.zeros(self.drawn[::-1], np.uint8)
        extent = (0.0, 0.0, self.size[0] / self.step, self.size[1] / self.step)
        for index, part in enumerate(parts):
            image = Image.fromarray(np.ascontiguousarray(part / scale))
            level = np.asarray(image.resize(self.drawn, Image.Resampling.BILINEAR, extent))
            owner[level > best] = index
            np.maximum(best, level, out=best)
        table = _colours(tuple(ramps))
        steps = len(table) // len(ramps)
        rows = owner * steps + np.rint(np.minimum(best, 1) * (steps - 1)).astype(np.uint8)
        meaning = f"· full colour from {scale:.2g} {unit}/px (top {100 * self.share:.2g} %)"
        return Image.fromarray(table[rows]), [*key, meaning, f"· blur sigma {self.sigma:.2g} px"]

    def compose(
        self, layer: Image.Image | None, legend: Flow, tints: Sequence[RGB], tag: tuple[str, float],
        caption: str, warning: str | None, *, strip: bool,
    ) -> Image.Image:  # fmt: skip
        """Gray scan, layer, box and tag; before them the scan if `strip`; below them the footer."""
        scan = Image.fromarray(self.pixels).resize(self.drawn, Image.Resampling.NEAREST)
        low, high = GROUND
        gray = scan.convert("L").point([round(low + (high - low) * v / 255) for v in range(256)])
        overlay = gray.convert("RGBA")
        if layer is not None:
            overlay.alpha_composite(layer)
        (columns, rows), line = self.drawn, max(1, round(self.em * LINE))
        width, height = max(columns, MIN_PANEL[0]), max(rows, MIN_PANEL[1])
        at = (width - columns) // 2, (height - rows) // 2
        panels = [Image.new("RGB", (width, height), FOOTER) for _ in range(1 + strip)]
        panels[0].paste(scan, at)
        panels[-1].paste(overlay.convert("RGB"), at)
        frame = _outline(panels[-1], self._corners(at), tints, line, self.dash)
        _tag(panels[-1], frame, tag, self.em)
        stacked, gap = columns > STACK_ASPECT * rows, 2 * line
        shift = (0, height + gap) if stacked else (width + gap, 0)
        corners = [(i * shift[0], i * shift[1]) for i in range(len(panels))]
        right, bottom = corners[-1][0] + width, corners[-1][1] + height
        texts = [(legend, TEXT, FOOTER), (_words(caption), TEXT, FOOTER),
                 (_words(warning), DARK, WARNING)]  # fmt: skip
        blocks = [_block(flow, right, self.em, ink, bg) for flow, ink, bg in texts if flow]
        canvas = Image.new("RGB", (right, bottom + sum(block.height for block in blocks)), FOOTER)
        for panel, corner in zip(panels, corners, strict=True):
            canvas.paste(panel, corner)
        for block in blocks:
            canvas.paste(block, (0, bottom))
            bottom += block.height
        return canvas

    def _corners(self, at: tuple[int, int]) -> Rect:
        """The box within the picture, canvas pixels: first and one past the last column and row."""
        (columns, rows), (x0, y0, x1, y1) = self.drawn, (round(v * self.zoom) for v in self.box)
        x0, y0 = min(max(x0, 0), columns - 1), min(max(y0, 0), rows - 1)
        x1, y1 = min(max(x1, x0 + 1), columns), min(max(y1, y0 + 1), rows)
        return x0 + at[0], y0 + at[1], x1 + at[0], y1 + at[1]


def _outline(
    panel: Image.Image, inner: Rect, tints: Sequence[RGB], line: int, dash: tuple[int, int] | None = None
) -> Rect:
    """Dark-tint-dark lines around the box, kept within the panel; returns their outer corners."""
    pen = ImageDraw.Draw(panel)
    x0, y0 = max(inner[0] - 3 * line, 0), max(inner[1] - 3 * line, 0)
    x1, y1 = min(inner[2] + 3 * line, panel.width) - 1, min(inner[3] + 3 * line, panel.height) - 1
    pen.rectangle((x0, y0, x1, y1), outline=DARK, width=3 * line)
    near, far = line, 2 * line - 1
    left, top, right, bottom = x0 + near, y0 + near, x1 - near, y1 - near
    sides = [(left, top, x0 + far, bottom), (left, top, right, y0 + far),
             (x1 - far, top, right, bottom), (left, y1 - far, right, bottom)]  # fmt: skip
    for side, tint in zip(sides, tints, strict=True):
        for part in _dashes(side, dash[0] * line, dash[1] * line) if dash else [side]:
            pen.rectangle(part, fill=tint)
    return x0, y0, x1 + 1, y1 + 1


def _dashes(side: Rect, length: int, gap: int) -> list[Rect]:
    """The thin rectangle `side` (first and last pixels) in dashes with gaps between; both its ends are drawn."""
    x0, y0, x1, y1 = side
    along = 0 if x1 - x0 > y1 - y0 else 1
    first, last = side[along], side[along + 2]
    count = max(1, round((last - first - length) / (length + gap)))
    starts = [first + round(i * max(last - first - length, 0) / count) for i in range(count + 1)]
    ends = [min(start + length, last) for start in starts]
    return [(s, y0, e, y1) if along == 0 else (x0, s, x1, e) for s, e in zip(starts, ends, strict=True)]


def _tag(panel: Image.Image, frame: Rect, tag: tuple[str, float], em: int) -> None:
    """Class and score above the frame, else below, else inside; always whole."""
    font, score, pad = _font(em), f" {tag[1]:.2f}", max(2, em // 4)
    room = min(panel.width - 2 * pad, TAG * em) - font.getlength(score)
    text = _shortened(_plain(tag[0]), font, room) + score
    width, height = math.ceil(font.getlength(text)) + 2 * pad, em + 2 * pad
    x, above, below = max(0, min(frame[0], panel.width - width)), frame[1] - height, frame[3]
    inside = max(0, min(frame[1], panel.height - height))
    y = above if above >= 0 else below if below + height <= panel.height else inside
    pen = ImageDraw.Draw(panel)
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=DARK)
    pen.text((x + pad, y + height / 2), text, LIGHT, font, anchor="lm")


def _block(items: Flow, width: int, em: int, ink: RGB, ground: RGB) -> Image.Image:
    """Texts and pictures set in lines of `width`, none of them cut."""
    font, pad = _font(em), em // 2
    leading, x, y = em + pad, pad, pad // 2
    placed: list[tuple[str | Image.Image, int, int]] = []
    for item in items:
        item = _shortened(item, font, width - 2 * pad) if isinstance(item, str) else item
        advance = math.ceil(font.getlength(item)) if isinstance(item, str) else item.width
        if x > pad and x + advance > width - pad:
            x, y = pad, y + leading
        placed.append((item, x, y))
        x += advance + em // 3
    block = Image.new("RGB", (width, y + leading + pad // 2), ground)
    for item, x, y in placed:
        if isinstance(item, str):
            ImageDraw.Draw(block).text((x, y + leading / 2), item, ink, font, anchor="lm")
        else:
            block.paste(item, (x, y + (leading - item.height) // 2))
    return block


def _bar(colours: NDArray[np.uint8], marks: str, em: int) -> Image.Image:
    """A colour bar (n, 4) RGBA over mid gray, with `marks` spread along it."""
    height, width = em + 2, (em + 2) * (3 * len(marks) - 2)
    bar = Image.new("RGBA", (width, height), (sum(GROUND) // 2,) * 3 + (255,))
    bar.alpha_composite(Image.fromarray(colours[None]).resize((width, height)))
    for index, mark in enumerate(marks):
        at = height / 2 + index * (width - height) / max(len(marks) - 1, 1), height / 2
        ImageDraw.Draw(bar).text(at, mark, DARK if mark == "0" else LIGHT, _font(em), anchor="mm")
    return bar.convert("RGB")


@lru_cache(maxsize=8)
def _colours(ramps: tuple[Ramp, ...]) -> NDArray[np.uint8]:
    """(n, 4) RGBA, n <= 256: for each ramp in turn equal steps from clear to full."""
    level = np.linspace(0, 1, 256 // len(ramps))[:, None]
    alpha = 255 * FULL_ALPHA * level**ALPHA_GAMMA
    shades = [np.array(weak) * (1 - level) + np.array(full) * level for weak, full in ramps]
    table = np.concatenate([np.hstack([shade, alpha]) for shade in shades])
    return np.asarray(np.rint(table), np.uint8)


@lru_cache(maxsize=8)
def _font(size: int) -> Font:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "this Pillow was built without FreeType"
    return font


def _words(text: str | None) -> Flow:
    return list(_plain(text or "").split())


def _plain(text: str) -> str:
    """`text` on one line in signs that the font has: stand-ins, bare letters, else escapes."""
    return "".join(_sign(c) if c.isprintable() else " " for c in text.translate(PLAIN))


@lru_cache(maxsize=4096)
def _sign(character: str) -> str:
    drawn, missing = (bytes(_font(MIN_FONT).getmask(c)) for c in (character, "\uffff"))
    if drawn != missing:
        return character
    bare = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return bare or ascii(character)[1:-1]


def _shortened(text: str, font: Font, room: float) -> str:
    """`text`, or as much of its beginning as fits into `room` with an ellipsis."""
    if font.getlength(text) <= room:
        return text
    fits = bisect(range(len(text)), room, key=lambda n: font.getlength(text[:n] + "…")) - 1
    return text[: max(fits, 0)].rstrip() + "…"

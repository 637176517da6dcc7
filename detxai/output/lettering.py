"""Words on pictures: fonts for names in any script, tags beside boxes, and footers of which nothing is cut."""

from __future__ import annotations

import math
import unicodedata
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from detxai.values import Box, Pixels

RGB = tuple[int, int, int]
Rect = tuple[int, int, int, int]
Font = ImageFont.FreeTypeFont
Flow = list[str | Pixels]

DARK, LIGHT, WARNING = (16, 16, 20), (255, 255, 255), (255, 214, 10)
FOOTER, TEXT = (30, 30, 36), (236, 236, 236)
#: Text height: the lesser of these shares of the long and the short side, but legible.
FONT_OF_LONG, FONT_OF_SHORT, MIN_FONT = 0.021, 0.05, 13
#: Line width and longest tag, in text heights; dashes and their gaps, in line widths.
LINE, TAG, DASH = 1 / 7, 20, (8, 6)
#: Stand-ins for signs that Pillow's built-in font lacks; where no font has a sign, accents are dropped, the rest is
#: escaped.
PLAIN = str.maketrans({"\u2212": "-", "\u2013": "-", "≤": "<=", "≥": ">=", "ß": "ss"})
#: Scripts that are written from right to left, and need a shaper for it.
RIGHT_TO_LEFT = {"R", "AL", "AN"}


@dataclass(frozen=True)
class Lettering:
    """Text of one height `em`, pixels. A word takes the first font that has its signs: Pillow's own, `extra`, DejaVu.

    `extra`: a font file of the user's, for scripts that the others lack. Raises OSError where it is none.
    """

    em: int
    extra: Path | None = None

    @property
    def line(self) -> int:
        """Width of lines, pixels."""
        return max(1, round(self.em * LINE))

    def set(self, text: str) -> tuple[str, Font]:
        """`text` on one line, as it can be written, and the font that has it."""
        return _set(text, self.em, self.extra)

    def words(self, text: str | None) -> Flow:
        """`text` in words, for a footer."""
        return list((text or "").split())

    def tag(self, panel: Image.Image, at: tuple[int, int], text: str, ink: RGB = LIGHT, ground: RGB = DARK) -> None:
        """Write `text` on a label whose upper left corner is `at`."""
        text, font = self.set(text)
        width, height = self.tag_size(text)
        (x, y), pen = at, ImageDraw.Draw(panel)
        pen.rectangle((x, y, x + width - 1, y + height - 1), fill=ground)
        pen.text((x + self.pad, y + height / 2), text, ink, font, anchor="lm")

    @property
    def pad(self) -> int:
        """Room around the text of a tag, pixels."""
        return max(2, self.em // 4)

    def tag_size(self, text: str) -> tuple[int, int]:
        """(width, height) of the label that `tag` makes, pixels."""
        text, font = self.set(text)
        return math.ceil(font.getlength(text)) + 2 * self.pad, self.em + 2 * self.pad

    def shortened(self, text: str, room: float) -> str:
        """`text`, or as much of its beginning as fits into `room` pixels with an ellipsis."""
        text, font = self.set(text)
        if font.getlength(text) <= room:
            return text
        fits = bisect(range(len(text)), room, key=lambda n: font.getlength(text[:n] + "…")) - 1
        return text[: max(fits, 0)].rstrip() + "…"

    def block(self, items: Flow, width: int, ink: RGB = TEXT, ground: RGB = FOOTER) -> Image.Image:
        """Words and pictures set in lines of `width` pixels, none of them cut; "\\n" begins a new line."""
        pad = self.em // 2
        leading, x, y = self.em + pad, pad, pad // 2
        placed: list[tuple[Pixels, int, int]] = []
        for item in items:
            if isinstance(item, str) and item == "\n":
                x, y = pad, y + leading
                continue
            shown = _word(self, item, width - 2 * pad, ink, ground) if isinstance(item, str) else item
            if x > pad and x + shown.shape[1] > width - pad:
                x, y = pad, y + leading
            placed.append((shown, x, y))
            x += shown.shape[1] + self.em // 3
        block = np.full((y + leading + pad // 2, width, 3), ground, np.uint8)
        for shown, x, y in placed:
            top = y + (leading - len(shown)) // 2
            there = block[top : top + len(shown), x : x + shown.shape[1]]
            there[:] = shown[:, : there.shape[1]]
        return Image.fromarray(block)

    def marked(self, bar: Image.Image, marks: str) -> Image.Image:
        """A colour bar with `marks` spread along it."""
        for index, mark in enumerate(marks):
            at = bar.height / 2 + index * (bar.width - bar.height) / max(len(marks) - 1, 1), bar.height / 2
            ImageDraw.Draw(bar).text(at, mark, DARK if mark == "0" else LIGHT, _font(self.em, None), anchor="mm")
        return bar


def height_of_text(size: tuple[int, int], zoom: int = 1) -> int:
    """Text height for a picture of `size` (width, height) drawn `zoom` times as large, pixels."""
    short, long = sorted(size)
    return max(MIN_FONT, round(zoom * min(FONT_OF_LONG * long, FONT_OF_SHORT * short)))


def drawn_box(box: Box, times: float, size: tuple[int, int]) -> Rect:
    """Where `box` lies drawn `times` as large, within `size` (width, height): its first pixels, and one past the last.

    At least one pixel, also of a box beyond the picture.
    """
    x0, y0, x1, y1 = (round(v * times) for v in box)
    x0, y0 = min(max(x0, 0), size[0] - 1), min(max(y0, 0), size[1] - 1)
    return x0, y0, min(max(x1, x0 + 1), size[0]), min(max(y1, y0 + 1), size[1])


def with_footer(panel: Image.Image, blocks: Sequence[Image.Image]) -> Image.Image:
    """`panel` with `blocks` of its width below it."""
    canvas = Image.new("RGB", (panel.width, panel.height + sum(block.height for block in blocks)), FOOTER)
    bottom = 0
    for part in (panel, *blocks):
        canvas.paste(part, (0, bottom))
        bottom += part.height
    return canvas


def outline(panel: Image.Image, inner: Rect, tints: tuple[RGB, ...], line: int, dash: tuple[int, int] | None) -> Rect:
    """Dark-tint-dark lines around the box `inner`, kept within the panel; returns their outer corners."""
    pen = ImageDraw.Draw(panel)
    x0, y0 = max(inner[0] - 3 * line, 0), max(inner[1] - 3 * line, 0)
    x1, y1 = min(inner[2] + 3 * line, panel.width) - 1, min(inner[3] + 3 * line, panel.height) - 1
    pen.rectangle((x0, y0, x1, y1), outline=DARK, width=3 * line)
    near, far = line, 2 * line - 1
    left, top, right, bottom = x0 + near, y0 + near, x1 - near, y1 - near
    sides = [(left, top, x0 + far, bottom), (left, top, right, y0 + far),
             (x1 - far, top, right, bottom), (left, y1 - far, right, bottom)]  # fmt: skip
    for side, tint in zip(sides, tints, strict=True):
        for part in dashes(side, dash[0] * line, dash[1] * line) if dash else [side]:
            pen.rectangle(part, fill=tint)
    return x0, y0, x1 + 1, y1 + 1


def dashes(side: Rect, length: int, gap: int) -> list[Rect]:
    """The thin rectangle `side` (first and last pixels) in dashes with gaps between; both its ends are drawn."""
    x0, y0, x1, y1 = side
    along = 0 if x1 - x0 > y1 - y0 else 1
    first, last = side[along], side[along + 2]
    count = max(1, round((last - first - length) / (length + gap)))
    starts = [first + round(i * max(last - first - length, 0) / count) for i in range(count + 1)]
    ends = [min(start + length, last) for start in starts]
    return [(s, y0, e, y1) if along == 0 else (x0, s, x1, e) for s, e in zip(starts, ends, strict=True)]


def require_font(file: Path) -> None:
    """Raise OSError where `file` is no font that FreeType reads."""
    _font(MIN_FONT, str(file))


@lru_cache(maxsize=4096)
def _set(text: str, em: int, extra: Path | None) -> tuple[str, Font]:
    text = "".join(c if c.isprintable() else " " for c in text)
    own = str(extra) if extra else None
    for name in dict.fromkeys((None, own, *_dejavu())):
        if all(_has(c, name) for c in text):
            return text, _font(em, name)
    plain = "".join(c if _has(c, own) else _bare(c) for c in text.translate(PLAIN))
    return plain, _font(em, own)


@lru_cache(maxsize=1024)
def _word(lettering: Lettering, text: str, room: float, ink: RGB, ground: RGB) -> Pixels:
    """A word of a footer in at most `room` pixels: most words are those of the picture before."""
    text, font = lettering.set(lettering.shortened(text, room))
    height = lettering.em + lettering.em // 2
    word = Image.new("RGB", (max(math.ceil(font.getlength(text)), 1), height), ground)
    ImageDraw.Draw(word).text((0, height / 2), text, ink, font, anchor="lm")
    return np.asarray(word)


@lru_cache(maxsize=16)
def _font(size: int, file: str | None) -> Font:
    font = ImageFont.truetype(file, size) if file else ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "this Pillow was built without FreeType"
    return font


@lru_cache(maxsize=1)
def _dejavu() -> tuple[str, ...]:
    """DejaVu Sans (Greek, Cyrillic, Arabic and more), which matplotlib brings, and ultralytics brings matplotlib."""
    spec = find_spec("matplotlib")
    folders = spec.submodule_search_locations if spec else None
    files = [Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf" for folder in folders or ()]
    return tuple(str(file) for file in files if file.is_file())


@lru_cache(maxsize=4096)
def _has(character: str, file: str | None) -> bool:
    """Whether a font can write `character`; right to left only where Pillow has a shaper."""
    if unicodedata.bidirectional(character) in RIGHT_TO_LEFT and not features.check("raqm"):
        return False
    drawn, missing = (bytes(_font(MIN_FONT, file).getmask(c)) for c in (character, "\uffff"))
    return drawn != missing


def _bare(character: str) -> str:
    return unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode() or ascii(character)[1:-1]

"""What a comparison looks like: mean curves, and the maps of all methods on the same detection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from detxai.evaluation.perturbation import FILLS, MODES
from detxai.output import overlays
from detxai.values import Box, Map, Pixels

#: Colours of Okabe & Ito (2008), told apart by all eyes; yellow is left out, it drowns on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
#: Baselines are dark or grey and broken, each in its own way.
BROKEN: tuple[tuple[str, Any], ...] = (
    ("#000000", (0, (6, 2))),
    ("#8A8A8A", (0, (1, 1.2))),
    ("#555555", (0, (4, 1.5, 1, 1.5))),
    ("#B0A08A", "-"),
)
TICKS = (0, 1, 5, 10, 25, 50, 75, 100)
#: Panels beside each other on the contact sheet at most, and its type size.
COLUMNS, EM = 6, 20
INK, QUIET, GROUND = (236, 236, 236), (170, 170, 178), (30, 30, 36)


def curves(shares: Sequence[float], methods: Mapping[str, Mapping[str, Any]]) -> bytes:
    """PNG of the mean deletion and insertion curves, a panel a fill; baselines are grey and broken."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    lines = []
    for name, style in _styles(methods).items():
        for row, mode in zip(axes, MODES, strict=True):
            for axis, fill in zip(row, FILLS, strict=True):
                values = methods[name]["curves"][fill][mode]
                (line,) = axis.plot([100 * s for s in shares], values, label=name, **style)
        lines.append(line)
    for row, mode in zip(axes, MODES, strict=True):
        better = "lower is better" if mode == "deletion" else "higher is better"
        for axis, fill in zip(row, FILLS, strict=True):
            axis.set_title(f"{mode}, {fill} fill: {better}", fontsize=12, loc="left")
            axis.grid(color="#E3E3E3", linewidth=0.8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xscale("function", functions=(_root, np.square))
            axis.set_xticks(TICKS, [str(t) for t in TICKS])
            axis.set_xlim(0, 100)
            axis.set_ylim(bottom=0)
    for axis in axes[-1]:
        axis.set_xlabel("% of the picture's area, best pixels first", fontsize=11)
    for axis in axes[:, 0]:
        axis.set_ylabel("best IoU × class score", fontsize=11)
    names = [_legend(line.get_label(), methods) for line in lines]
    figure.legend(lines, names, loc="outside right upper", frameon=False, fontsize=11)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _root(values: Any) -> Any:
    return np.sqrt(np.maximum(values, 0))


def _legend(name: str, methods: Mapping[str, Mapping[str, Any]]) -> str:
    """The name of a method with its margin."""
    return f"{name}\nins − del {methods[name]['metrics']['margin']['mean']:+.3f}"


def _styles(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Line styles of the methods that have curves."""
    drawn = [name for name, method in methods.items() if method["curves"]]
    own = [name for name in drawn if not methods[name]["baseline"]]
    styles: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(own):
        dash = "-" if i < len(COLOURS) else "--"
        styles[name] = {"color": COLOURS[i % len(COLOURS)], "linestyle": dash, "linewidth": 2.4}
    for i, name in enumerate(name for name in drawn if name not in own):
        colour, dash = BROKEN[i % len(BROKEN)]
        styles[name] = {"color": colour, "linestyle": dash, "linewidth": 1.8}
    return styles


def row(
    pixels: Pixels, window: tuple[int, int, int, int], maps: Mapping[str, Map],
    figures: Mapping[str, Mapping[str, Any]], *, box: Box, label: str, score: float, title: str,
) -> Image.Image:  # fmt: skip
    """One detection under every method: the `window` of an image, and `maps` (h, w) of that window.

    `box` xyxy and `window` in pixels of the image `pixels`; `figures`: margin and energy of each map.
    """
    left, top, right, bottom = window
    height, width = next(iter(maps.values())).shape
    scan = Image.fromarray(pixels[top:bottom, left:right]).resize((width, height), Image.Resampling.BICUBIC)
    gain = width / (right - left)
    inner = ((box[0] - left) * gain, (box[1] - top) * gain, (box[2] - left) * gain, (box[3] - top) * gain)
    panels = []
    for name, values in maps.items():
        drawn = overlays.draw(np.asarray(scan, np.uint8), values, box=inner, label=label, score=score, unit="")
        panels.append(_headed(drawn, name, figures[name]))
    wide, high = max(p.width for p in panels), max(p.height for p in panels)
    lines = math.ceil(len(panels) / COLUMNS)
    columns = math.ceil(len(panels) / lines)
    gap, head = EM // 2, 2 * EM
    sheet = Image.new("RGB", (columns * (wide + gap) + gap, head + lines * (high + gap)), GROUND)
    name = title.encode("ascii", "replace").decode()  # Pillow's own font has few signs
    ImageDraw.Draw(sheet).text((gap, head / 2), name, INK, ImageFont.load_default(EM), anchor="lm")
    for index, panel in enumerate(panels):
        at = gap + (index % columns) * (wide + gap), head + (index // columns) * (high + gap)
        sheet.paste(panel, at)
    return sheet


def encode(picture: Image.Image) -> bytes:
    """PNG bytes of a row or sheet."""
    return overlays.encode(picture)


def _headed(panel: Image.Image, name: str, figures: Mapping[str, Any]) -> Image.Image:
    """`panel` below a method's name, its margin and its energy in the box."""
    height = math.ceil(2.6 * EM)
    result = Image.new("RGB", (panel.width, panel.height + height), GROUND)
    pen = ImageDraw.Draw(result)
    note = f"ins-del {figures['margin']:+.2f}"
    note += "" if figures.get("energy") is None else f"   in box {100 * figures['energy']:.0f} %"
    pen.text((0, 0.3 * height), name, INK, ImageFont.load_default(EM), anchor="lm")
    pen.text((0, 0.75 * height), note, QUIET, ImageFont.load_default(round(0.8 * EM)), anchor="lm")
    result.paste(panel, (0, height))
    return result


def sheet(rows: Sequence[bytes]) -> bytes:
    """PNG of the contact sheet from its rows, PNG bytes each, one below the other."""
    parts = [Image.open(BytesIO(data)).convert("RGB") for data in rows]
    result = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), GROUND)
    top = 0
    for part in parts:
        result.paste(part, (0, top))
        top += part.height
    return overlays.encode(result)

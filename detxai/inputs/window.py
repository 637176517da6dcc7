"""The window: a linear ramp from deep samples to 8 bits, as `--window` asks for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detxai.errors import UsageError
from detxai.values import Pixels, Window

AUTO_PERCENTILES = (0.5, 99.5)
#: `auto` keeps the nominal range of data that spread over at least this share of it.
FILLS_RANGE = 0.5
#: Values that are computed at a time.
BLOCK = 2**20
#: (`auto` | `full` | `fixed` | `percentile`, low, high).
Method = tuple[str, float, float]


def parse_window(text: str) -> Method:
    """(`auto` | `full` | `fixed` | `percentile`, low, high) of a `--window`, or UsageError."""
    words = text.strip().lower()
    if words in ("auto", "full"):
        return words, 0.0, 0.0
    if match := re.fullmatch(r"(percentile\s+)?([-+.\w]+)\s*,\s*([-+.\w]+)", words):
        kind, least, most = ("percentile", 0.0, 100.0) if match[1] else ("fixed", -1e300, 1e300)
        try:
            low, high = float(match[2]), float(match[3])
        except ValueError:
            low = high = np.nan
        if least <= low < high <= most:
            return kind, low, high
    raise UsageError(
        f"--window {text!r} is not a window.",
        "Write auto, full, LOW,HIGH (as 0,4095) or 'percentile P,Q' (as 'percentile 1,99').",
    )


def window_of(seen: NDArray[Any], nominal: tuple[float, float], kind: str, low: float, high: float) -> Window:
    """The window for the finite, visible values `seen`; its `method` says what `auto` became."""
    if kind == "fixed":
        return Window(f"{low:g},{high:g}", low, high)
    # Where nearly all values are equal, `auto` stretches over the few others: all there is to see.
    for ends in ((low, high),) if kind == "percentile" else (AUTO_PERCENTILES, (0.0, 100.0)):
        if kind == "full" or not seen.size:
            break
        least, most = map(float, np.percentile(seen, ends))
        if kind == "auto" and most - least >= FILLS_RANGE * (nominal[1] - nominal[0]):
            break
        if least < most:
            return Window(f"percentile {ends[0]:g},{ends[1]:g}", least, most)
    return Window("full", *nominal)


def ramp(values: NDArray[Any], low: float, high: float) -> Pixels:
    """`values` as uint8: `low` and less 0, `high` and more 255, NaN 0, linear between."""
    table = ramp(np.arange(2**16, dtype=np.float64), low, high) if values.dtype == np.uint16 else None
    made = np.empty(values.shape, np.uint8)
    for rows in _blocks(made):
        if table is not None:
            made[rows] = np.take(table, values[rows])
            continue
        with np.errstate(all="ignore"):
            share = (values[rows].astype(np.float64) - low) / ((high - low) or 1.0)
            made[rows] = np.rint(255 * np.nan_to_num(np.clip(share, 0, 1)))
    return made


def over_white(pixels: Pixels, alpha: NDArray[np.uint8]) -> Pixels:
    """`pixels` (height, width, 3) on white, by `alpha` (height, width), 255 where they cover it."""
    made = np.empty(pixels.shape, np.uint8)
    for rows in _blocks(made):
        share = alpha[rows, :, None].astype(np.uint16)
        made[rows] = (pixels[rows] * share + 255 * (255 - share) + 127) // 255
    return made


def _blocks(values: NDArray[Any]) -> Iterator[slice]:
    """Some rows after the other: what is computed on the way takes several times the memory of what is made."""
    step = max(1, BLOCK * len(values) // max(1, values.size))
    yield from (slice(start, start + step) for start in range(0, len(values), step))

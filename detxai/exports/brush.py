"""Run-length code of a mask, as Label Studio's brush has it: thi.ng's rle-pack.

A bit stream: 32 bits for the number of words, 5 for their width less 1, four times 4 for the widths less 1 that the
length of a run may have; then a run: 1 bit (1: one word repeated), 2 bits for which width, the length less 1, the word.
See https://github.com/thi-ng/umbrella/tree/develop/packages/rle-pack.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Bits of a word, and of the length of a run: short ones, and up to 65,536 words.
WORD, LENGTHS = 8, (4, 8, 12, 16)
CHANNELS = 4  # red, green, blue, alpha: alike in a mask


def encoded(mask: NDArray[np.bool_]) -> list[int]:
    """The bytes of `mask` (height, width), 255 where it holds in all four channels."""
    flat = mask.ravel()
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]) + 1, flat.size)
    bits = [f"{CHANNELS * flat.size:032b}{WORD - 1:05b}", *(f"{width - 1:04b}" for width in LENGTHS)]
    start = 0
    for end in ends.tolist():
        bits += _run(CHANNELS * (end - start), 255 * int(flat[start]))
        start = end
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def _run(length: int, word: int) -> list[str]:
    """The bits of `length` words of one value."""
    parts = []
    while length:
        now = min(length, 2 ** LENGTHS[-1])
        which = next(n for n, width in enumerate(LENGTHS) if now <= 2**width)
        parts.append(f"1{which:02b}{now - 1:0{LENGTHS[which]}b}{word:0{WORD}b}")
        length -= now
    return parts

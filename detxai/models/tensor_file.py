"""Files of tensors without code, `.safetensors`: a header that says what lies where, and the numbers behind it."""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detxai.models import tensors

LONGEST_HEADER = 1 << 24
DTYPES = {
    "BF16": torch.bfloat16, "BOOL": torch.bool, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its numbers are the bytes from `start` to `end`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def read(self, data: bytes | mmap.mmap) -> Tensor:
        """It, fractions in float32. Of a `mmap` its part is given back to the system."""
        return tensors.numbers(data, self.start, self.end, self.dtype).reshape(self.shape)


def entries(data: bytes | mmap.mmap) -> dict[str, Entry]:
    """The tensors of a file by name, in the order of their bytes.

    Raises ValueError where they do not lie one behind the other from the header to the end.
    """
    header = _header(data)
    about = {name: said for name, said in header.items() if name != "__metadata__"}
    at = first = 8 + int.from_bytes(data[:8], "little")
    own: dict[str, Entry] = {}
    for name, said in sorted(about.items(), key=lambda pair: pair[1]["data_offsets"]):
        dtype, shape = DTYPES.get(said["dtype"]), tuple(said["shape"])
        if dtype is None or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError(f"its tensor {name:.100} is {said['dtype']!s:.20} {shape!s:.100}")
        own[name] = Entry(dtype, shape, at, at + math.prod(shape) * dtype.itemsize)
        if said["data_offsets"] != [at - first, own[name].end - first]:
            raise ValueError(f"its tensor {name:.100} does not lie where it should")
        at = own[name].end
    if at != len(data):
        raise ValueError(f"its tensors end at byte {at} of {len(data)}")
    return own


def metadata(data: bytes | mmap.mmap) -> dict[str, str]:
    """What a file says of itself. Raises ValueError where there is no header."""
    about: dict[str, str] = _header(data).get("__metadata__", {})
    return about


def _header(data: bytes | mmap.mmap) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(LONGEST_HEADER, len(data) - 8):
        raise ValueError("it has no header of tensors")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return header


def packed(own: dict[str, Tensor], about: dict[str, str]) -> bytes:
    """The bytes of a file of the tensors `own`, with `about` as its metadata: the same content gives the same bytes."""
    from safetensors.torch import save as serialized

    data: bytes = serialized(own, metadata=about)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    # safetensors orders its metadata by chance.
    text = json.dumps(header | {"__metadata__": about}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]

"""Torch's two file formats read as data: the zip of torch 1.6 and later, and the stream of pickles before it.

Tensors are made of bytes that the file holds and of no others: dtype, offset, sizes and strides are checked here.
"""

from __future__ import annotations

import bisect
import io
import itertools
import math
import mmap
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from detxai.models.pickles import Function, Name, Node, Reader, Refused

MOST_TENSORS = 100_000
MOST_ENTRIES = 200_000
MOST_DIMENSIONS = 8

DTYPES = {
    "BFloat16Storage": torch.bfloat16, "BoolStorage": torch.bool, "ByteStorage": torch.uint8,
    "CharStorage": torch.int8, "DoubleStorage": torch.float64, "FloatStorage": torch.float32,
    "HalfStorage": torch.float16, "IntStorage": torch.int32, "LongStorage": torch.int64, "ShortStorage": torch.int16,
}  # fmt: skip
NUMBERS = ("b1", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
#: How a stream of pickles begins: the pickle of a magic number.
OLD_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


@final
class Storage:
    """`data` (n,): the numbers that tensors of a checkpoint are views of, fractions in float32; `dtype`: as stored."""

    __slots__ = ("data", "dtype")

    def __init__(self, data: Tensor, dtype: torch.dtype) -> None:
        self.data, self.dtype = data, dtype


def read(data: bytes | mmap.mmap) -> Any:
    """The content of a torch checkpoint: plain values, tensors (fractions in float32), `Node`s and `Name`s.

    Of a `mmap` each part is given back to the system once it is read: `data` is of no more use then. Raises Refused for
    what would run code; ValueError, EOFError, KeyError, … for damage, and for bytes in none of the two formats.
    """
    if data[:2] == b"PK":
        return _from_zip(data)
    if data[: len(OLD_MAGIC)] == OLD_MAGIC:
        return _from_stream(bytes(data))
    raise ValueError("it is not a torch checkpoint")


class _Anything(dict[str, Function]):
    """A table in which every name stands for a function that makes an empty object."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Function:
        return lambda _: Node(name)


def names(data: bytes) -> set[str]:
    """What the pickle of a checkpoint names, without what every checkpoint does: nothing of it is imported.

    Raises as `read` does, but not for what would run code, unless it is an instruction that torch does not write.
    """
    at, named = 0, set[str]()
    if data[:2] == b"PK":
        archive = _Archive(data)
        (stream,) = (name for name in archive.entries if name.count("/") == 1 and name.endswith("/data.pkl"))
        data = archive.read(stream)
    for _ in range(5 if data[: len(OLD_MAGIC)] == OLD_MAGIC else 1):
        reader = Reader(data, _Anything(), lambda _: Node("storage"), at)
        reader.load()
        at, named = reader.at, named | reader.names
    return named - _FUNCTIONS.keys()


class _Archive:
    """The entries of a zip in `data`, by name."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self.data, self.view = data, memoryview(data)
        directory = re.finditer(rb"PK\x01\x02", data)
        if next(itertools.islice(directory, MOST_ENTRIES, None), None):
            raise ValueError("it has too many entries")
        infos = zipfile.ZipFile(io.BytesIO(data) if isinstance(data, bytes) else data).infolist()  # type: ignore[arg-type]
        compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in infos)
        if compressed or sum(entry.file_size for entry in infos) > len(data):
            raise ValueError("it declares more data than it holds")
        self.entries = {entry.filename: entry for entry in infos}
        self.places = [*sorted(entry.header_offset for entry in infos), len(data)]
        if len({*self.places}) != len(infos) + 1 or self.places[0] < 0:
            raise ValueError("its entries lie one upon the other")

    def span(self, name: str) -> tuple[int, int]:
        """Where the bytes of an entry begin and end; they have their checksum."""
        entry = self.entries[name]
        header = bytes(self.view[entry.header_offset :][:30])
        if not header.startswith(b"PK\x03\x04") or len(header) < 30:
            raise ValueError("its entries are not where its directory says")
        start = entry.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
        end = start + entry.file_size
        if end > self.places[bisect.bisect(self.places, entry.header_offset)]:
            raise ValueError("it declares more data than it holds")
        if zlib.crc32(self.view[start:end]) != entry.CRC:
            raise ValueError(f"its entry {name:.100} is damaged")
        return start, end

    def read(self, name: str) -> bytes:
        return bytes(self.view[slice(*self.span(name))])

    def numbers(self, name: str, dtype: torch.dtype) -> Tensor:
        return numbers(self.data, *self.span(name), dtype)


def numbers(data: bytes | mmap.mmap, start: int, end: int, dtype: torch.dtype) -> Tensor:
    """(n,) of the bytes from `start` to `end`; where those can be let go, they are, and the numbers are a copy."""
    own = _numbers(memoryview(data)[start:end], dtype)
    if isinstance(data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        if own.dtype == dtype:
            own = own.clone()
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            data.madvise(mmap.MADV_DONTNEED, first, last - first)
    return own


def _from_zip(data: bytes | mmap.mmap) -> Any:
    archive = _Archive(data)
    entries = archive.entries
    if any(name.endswith("constants.pkl") for name in entries):
        raise ValueError("it is a TorchScript archive: give the .pt checkpoint that it was exported from")
    streams = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(streams) != 1:
        raise ValueError("it holds no data.pkl, so it is not a torch checkpoint")
    folder = streams[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in entries and archive.read(f"{folder}byteorder").strip() != b"little":
        raise ValueError("it was written on a big-endian machine")
    known: dict[str, Storage] = {}

    def storage(dtype: torch.dtype, key: str, count: int) -> Storage:
        if key not in known:
            known[key] = Storage(archive.numbers(f"{folder}data/{key}", dtype), dtype)
        stored = known[key]
        if stored.dtype != dtype or not 0 <= count <= len(stored.data):
            raise ValueError("it declares more data than it holds")
        return stored

    return Reader(archive.read(streams[0]), functions(), _persistent(storage)).load()


def _from_stream(data: bytes) -> Any:
    """Magic number, protocol, system, content, keys of the storages: five pickles, then the storages themselves."""
    known: dict[str, Storage] = {}
    left = len(data)

    def storage(dtype: torch.dtype, key: str, count: int) -> Storage:
        nonlocal left
        if key not in known:
            left -= count * dtype.itemsize
            if count < 0 or left < 0:
                raise ValueError("it declares more data than it holds")
            known[key] = Storage(torch.empty(count, dtype=torch.float32 if dtype.is_floating_point else dtype), dtype)
        if known[key].dtype != dtype or len(known[key].data) < count:
            raise ValueError("its storages disagree")
        return known[key]

    at, parts = 0, []
    for _ in range(5):
        reader = Reader(data, functions(), _persistent(storage), at)
        parts.append(reader.load())
        at = reader.at
    *_, system, content, keys = parts
    if not isinstance(system, dict) or not system.get("little_endian", True):
        raise ValueError("it was written on a big-endian machine")
    if not isinstance(keys, list) or len(keys) != len(known) or {*map(str, keys)} != set(known):
        raise ValueError("its storages are not those that it names")
    for key in keys:
        own = known[key]
        (count,) = struct.unpack_from("<q", data, at)
        at, end = at + 8, at + 8 + len(own.data) * own.dtype.itemsize
        if count != len(own.data) or end > len(data):
            raise EOFError("it ends early")
        own.data.copy_(_numbers(memoryview(data)[at:end], own.dtype))
        at = end
    return content


def _numbers(content: memoryview, dtype: torch.dtype) -> Tensor:
    """(n,) of the little-endian bytes `content`, fractions in float32; a view of them where it can be one."""
    whole = len(content) // dtype.itemsize
    if not whole:
        return torch.empty(0, dtype=torch.float32 if dtype.is_floating_point else dtype)
    if content.readonly or np.frombuffer(content, np.uint8).ctypes.data % dtype.itemsize:
        content = memoryview(bytearray(content))
    numbers = torch.frombuffer(content, dtype=dtype, count=whole)
    return numbers.float() if dtype.is_floating_point else numbers


def _persistent(storage: Callable[[torch.dtype, str, int], Storage]) -> Callable[[Any], Any]:
    """What an outside reference stands for: ("storage", type, key, place, count), or a class with its source."""

    def storage_of(reference: Any) -> Any:
        if type(reference) is not tuple or len(reference) < 4:
            raise ValueError("its pickle refers to what is no storage")
        if reference[0] == "module" and type(reference[1]) is Name:
            return reference[1]
        kind, name, key, _, count, *view = reference
        if kind != "storage" or type(name) is not Name or type(count) is not int or any(v is not None for v in view):
            raise ValueError("its pickle refers to what is no storage")
        module, _, item = name.name.rpartition(".")
        if module not in ("torch", "torch.cuda") or item not in DTYPES:
            raise Refused(f"its pickle has a storage of the kind {name.name:.100}")
        return storage(DTYPES[item], str(key), count)

    return storage_of


# -- the functions that a checkpoint may call ---------------------------------------------------------


def functions() -> dict[str, Function]:
    """What a stream may call, by name; one set a stream: it counts its tensors."""
    made = 0

    def tensor(args: tuple[Any, ...]) -> Tensor:
        nonlocal made
        made += 1
        if made > MOST_TENSORS:
            raise ValueError(f"it has more than {MOST_TENSORS} tensors")
        return _view(*args[:4])

    def typed(args: tuple[Any, ...]) -> Tensor:
        function, kind, own, _ = args
        if getattr(function, "name", "") not in rebuild or getattr(kind, "name", "") not in _TENSORS:
            raise Refused("its pickle makes a tensor of an unknown kind")
        return rebuild[function.name](own)  # type: ignore[no-any-return]

    rebuild: dict[str, Function] = {
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_parameter_with_state": _parameter,
    }
    return _FUNCTIONS | rebuild | {"torch._tensor._rebuild_from_type_v2": typed}


_TENSORS = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch._C.TensorBase", "torch._C._TensorBase")


def _view(storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    whole = [size, stride]
    if type(storage) is not Storage or any(type(w) is not tuple or len(w) > MOST_DIMENSIONS for w in whole):
        raise TypeError("its pickle makes a tensor of what is no storage")
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)) or len(size) != len(stride):
        raise ValueError("its pickle makes a tensor of an impossible shape")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else offset
    if count > len(storage.data) or last >= len(storage.data) + (not count):
        raise ValueError("it declares more data than it holds")
    return torch.as_strided(storage.data, size, stride, offset)


def _parameter(args: tuple[Any, ...]) -> Tensor:
    if type(args[0]) is not Tensor:
        raise TypeError("its pickle makes a parameter of what is no tensor")
    return args[0]


def _pairs(args: tuple[Any, ...]) -> dict[Any, Any]:
    """An OrderedDict, Counter or defaultdict; the latter's factory is left out."""
    pairs: dict[Any, Any] = {}
    for pair in args[0] if args and type(args[0]) is list else ():
        key, value = pair
        if type(key) is not str:
            raise ValueError("its pickle has a key that is not text")
        pairs[key] = value
    return pairs


def _items(args: tuple[Any, ...]) -> list[Any]:
    return list(args[0]) if args else []


def _encoded(args: tuple[Any, ...]) -> bytes:
    """Bytes as protocol 2 writes them: text in Latin-1. Other codecs may explode, or run long."""
    text, codec = args
    if type(text) is not str or codec not in ("latin1", "latin-1"):
        raise Refused("its pickle asks for a codec")
    return text.encode("latin-1")


def _path(args: tuple[Any, ...]) -> str:
    return "/".join(part for part in args if type(part) is str)


def _device(args: tuple[Any, ...]) -> str:
    return str(args[0]) if args and type(args[0]) is str else ""


def _dtype(args: tuple[Any, ...]) -> Node:
    return Node("numpy.dtype", args)


def _scalar(args: tuple[Any, ...]) -> float | int | bool:
    """A numpy scalar as the plain number that it is."""
    kind, content = args
    code = kind.args[0] if type(kind) is Node and kind.name == "numpy.dtype" and kind.args else None
    if code not in NUMBERS or type(content) is not bytes:
        raise ValueError("its pickle has a numpy scalar of an unknown kind")
    (value,) = np.frombuffer(content, f"<{code}")
    return value.item()  # type: ignore[no-any-return]


def _array(args: tuple[Any, ...]) -> Node:
    return Node("numpy.ndarray")


def _method(args: tuple[Any, ...]) -> Node:
    """`object.name`: how a pickle stores a bound method. It stays a note that nobody follows."""
    return Node("builtins.getattr", args)


def _object(args: tuple[Any, ...]) -> Node:
    if type(args[0]) is not Name:
        raise TypeError("its pickle makes an object of what is no class")
    return Node(args[0].name)


_FUNCTIONS: dict[str, Function] = {
    **{f"collections.{name}": _pairs for name in ("OrderedDict", "Counter", "defaultdict")},
    **{f"{room}.{name}": _items for room in ("builtins", "__builtin__") for name in ("set", "frozenset")},
    **{f"{room}.getattr": _method for room in ("builtins", "__builtin__")},
    **{f"{room}._reconstructor": _object for room in ("copyreg", "copy_reg")},
    **{f"{room}.{kind}Path": _path for room in ("pathlib", "pathlib._local")
       for kind in ("Posix", "Windows", "PurePosix", "PureWindows")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("core", "_core")},
    "numpy.dtype": _dtype,
    "torch.Size": lambda args: tuple(_items(args)),
    "torch.device": _device,
    "_codecs.encode": _encoded,
}  # fmt: skip

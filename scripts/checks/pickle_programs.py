"""Attacks the reader of checkpoints with random pickles, and shows that nothing of them executes.

The programs are made of opcodes over names that would do harm; the known bypasses of other scanners are here too.

    python scripts/checks/pickle_programs.py --count 1000000
"""

from __future__ import annotations

import argparse
import io
import random
import struct
import sys
import zipfile
from collections import Counter
from typing import Any

import torch

from detxai.models import networks, tensors
from detxai.models.layers import Unbuildable
from detxai.models.pickles import Name, Node, Refused

NAMES = (
    "os system", "posix system", "subprocess Popen", "builtins eval", "builtins exec", "__builtin__ getattr",
    "builtins getattr", "builtins set", "pkgutil resolve_name", "logging FileHandler", "importlib import_module",
    "shutil rmtree", "socket create_connection", "operator attrgetter", "functools partial", "builtins str.format",
    "collections OrderedDict", "collections defaultdict", "_codecs encode", "copyreg _reconstructor",
    "numpy.core.multiarray scalar", "numpy dtype", "torch Size", "torch device", "torch FloatStorage",
    "torch.storage _load_from_bytes", "torch.hub load", "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter", "torch._tensor _rebuild_from_type_v2", "torch.nn.parameter Parameter",
    "torch.nn.modules.container Sequential", "torch.nn.modules.conv Conv2d", "torch.nn.modules.activation SiLU",
    "ultralytics.nn.tasks DetectionModel", "ultralytics.nn.tasks parse_model", "ultralytics.nn.modules.conv Conv",
    "ultralytics.nn.modules.head Detect", "ultralytics.utils IterableSimpleNamespace", "models.yolo Model",
)  # fmt: skip
WORDS = ("model", "ema", "_modules", "_parameters", "yaml", "names", "forward", "__deepcopy__", "__class__",
         "__reduce__",
         "__setstate__", "__getattr__", "state", "storage", "0", "cpu", "latin1", "zlib", "id", "{0.__class__}"
)  # fmt: skip
PLAIN = (b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f", b"K\x05", b"M\x00\x01", b"J\xff\xff\xff\x7f",
         b"G?\xf0\x00\x00\x00\x00\x00\x00", b"\x8a\x01\x7f"
)  # fmt: skip
ACTIONS = (b"R", b"R", b"R", b"b", b"b", b"\x81", b"\x92", b"a", b"s", b"u", b"e", b"t", b"\x85", b"\x86", b"\x87",
           b"(", b"(", b"Q", b"\x94", b"0", b"2", b"o", b"i", b"\x93", b"\x90", b"\x91", b"P", b".", b"\x82\x01"
)  # fmt: skip
#: What a refusal may be inside; `checkpoints.load` makes one sentence of each. Anything else is a bug.
EXPECTED = (
    Refused, Unbuildable, ArithmeticError, AttributeError, EOFError, LookupError, TypeError, ValueError, struct.error,
)  # fmt: skip
#: What leaves the reader, type-exact.
INERT = (dict, list, tuple, str, bytes, int, float, bool, type(None), torch.Tensor, torch.nn.Parameter, Node, Name,
         tensors.Storage
)  # fmt: skip


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def named(name: str) -> bytes:
    module, item = name.split(" ")
    return b"c" + module.encode() + b"\n" + item.encode() + b"\n"


def program(dice: random.Random) -> bytes:
    """A random program, most of whose steps find what they need on the stack."""
    made = [b"\x80\x02"]
    for _ in range(dice.randrange(4, 40)):
        kind = dice.random()
        if kind < 0.3:
            made.append(named(dice.choice(NAMES)) + dice.choice((b")", text(dice.choice(WORDS)) + b"\x85", b"")))
            made.append(dice.choice((b"R", b"\x81", b"\x81}", b"")))
        elif kind < 0.5:
            made.append(text(dice.choice(WORDS)))
        elif kind < 0.65:
            made.append(dice.choice(PLAIN))
        elif kind < 0.75:
            made.append(dice.choice((b"q", b"h")) + bytes([dice.randrange(6)]))
        else:
            made.append(dice.choice(ACTIONS))
    whole = b"".join(made) + b"."
    return whole[: dice.randrange(len(whole))] if dice.random() < 0.05 else whole


def archive(stream: bytes) -> bytes:
    """`stream` as torch.save packs it, with one storage of sixteen bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("a/data.pkl", stream)
        packed.writestr("a/data/0", bytes(16))
    return file.getvalue()


class Watch:
    """Counts what a process does while `on`: imports, programs, files written, connections."""

    EVENTS = ("import", "exec", "compile", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.remove",
              "os.mkdir", "os.rename", "socket.connect", "socket.__new__", "shutil.rmtree", "pickle.find_class",
    )  # fmt: skip

    def __init__(self) -> None:
        self.on, self.seen = False, list[str]()
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in self.EVENTS or (event == "open" and any(c in str(arguments[1]) for c in "wax+")):
            self.seen.append(f"{event} {arguments[:2]}")


def inert(value: Any) -> bool:
    """Whether nothing in `value` is of another type than the reader promises."""
    seen: set[int] = set()
    left = [value]
    while left:
        item = left.pop()
        if type(item) not in INERT:
            return False
        if id(item) in seen:
            continue
        seen.add(id(item))
        if type(item) is dict:
            left.extend((*item.keys(), *item.values()))
        elif type(item) in (list, tuple):
            left.extend(item)
        elif type(item) is Node:
            left.extend((item.name, item.args, item.state, item.items))
    return True


def attack(stream: bytes) -> str:
    """How the reader takes `stream`: the name of the exception, or `read`, or `built` (by which a network came)."""
    data = archive(stream)
    try:
        content = tensors.read(data)
    except EXPECTED as error:
        return type(error).__name__
    assert inert(content)
    try:
        networks.network(content, len(data))
    except EXPECTED as error:
        return f"read, {type(error).__name__}"
    return "built"


BYPASSES = {
    "os.system": named("os system") + text("true") + b"\x85R.",
    "result dropped": named("os system") + text("true") + b"\x85R0N.",
    "truncated after the call": named("os system") + text("true") + b"\x85R",
    "resolve_name": named("pkgutil resolve_name") + text("os:system") + b"\x85R" + text("true") + b"\x85R.",
    "attribute walk": named("builtins str.format") + text("{0.__class__.__mro__}") + b")\x86R.",
    "getattr": named("builtins getattr") + named("os system") + text("__call__") + b"\x86R)R.",
    "log file": named("logging FileHandler") + text("/tmp/detxai-was-here") + b"\x85R.",
    "inst": b"(" + text("true") + b"ios\nsystem\n.",
    "obj": b"(" + named("os system") + text("true") + b"o.",
    "extension": b"\x82\x01)R.",
    "stack global": text("os") + text("system") + b"\x93" + text("true") + b"\x85R.",
    "subclass of tensor": named("torch._tensor _rebuild_from_type_v2") + b"("
    + named("torch._utils _rebuild_parameter") + named("ultralytics.nn.tasks DetectionModel") + b")}tR.",
    "as_subclass in the state": named("torch._tensor _rebuild_from_type_v2") + b"("
    + named("torch._utils _rebuild_tensor_v2") + named("torch.nn.parameter Parameter") + b")}"
    + text("as_subclass") + named("os system") + b"stR.",
    "as_subclass of what was rebuilt": named("torch._tensor _rebuild_from_type_v2") + b"("
    + named("collections OrderedDict") + named("os system") + b")}tR.",
    "load_from_bytes": named("torch.storage _load_from_bytes") + b"C\x01x\x85R.",
    "bytearray": named("builtins bytearray") + b"\x8a\x05\x00\x00\x00\x00\x02\x85R.",
    "codec bomb": named("_codecs encode") + text("a" * 100) + text("punycode") + b"\x86R.",
    "tuple as key": b"})q\x00" + b"h\x00\x86q\x00" * 60 + b"Ns.",
    "huge integer": b"\x8b\xff\xff\xff\x7f.",
    "huge text": b"\x8d" + struct.pack("<Q", 1 << 62) + b".",
    "lists without end": b"]" * 100_000,
}  # fmt: skip


def main() -> None:
    """Run random programs and print how they ended; leaves with 1 where anything executed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000, help="how many programs")
    parser.add_argument("--seed", type=int, default=1, help="of the first one")
    options = parser.parse_args()
    attack(b"N.")  # whatever the reader imports itself
    watch, dice, ends = Watch(), random.Random(options.seed), Counter[str]()
    watch.on = True
    for _ in range(options.count):
        ends[attack(program(dice))] += 1
    watch.on = False
    print(f"{options.count} programs, {len(watch.seen)} executed something")
    for end, count in ends.most_common():
        print(f"{count:>9} {end}")
    for seen in watch.seen[:20]:
        print(seen)
    sys.exit(bool(watch.seen))


if __name__ == "__main__":
    main()

"""Pickles read as data: every object of the stream becomes a `Node`, a name with plain state, and nothing is called.

A pickle is a program for a small machine. This is that machine without its one dangerous part: no name is imported, no
class is made, no method runs. What a stream calls must be in a literal table of pure functions of our own. What comes
out is made of dict, list, tuple, str, bytes, int, float, bool, None, torch.Tensor, `Node` and `Name`, of exactly these
types (a set is a list). Time and memory are bounded by the length of the stream.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

#: Bounds of a stream. The largest published detectors take some 200,000 steps.
MOST_STEPS = 3_000_000
#: Items and bytes that functions may copy in all: a short stream could ask for one long list a thousand times.
MOST_COPIED = 1 << 24
LONGEST_INTEGER = 16

PROTO, STOP, PERSISTENT = 0x80, 0x2E, 0x51
_KEYS = (str, int, float, bool, type(None), bytes)


class Refused(Exception):
    """The stream asks for what is not on the list: it would run code."""


@final
class Name:
    """A class or function that a stream names, as text."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


@final
class Node:
    """An object of a stream without its class: `name`, constructor `args`, `state`, and `items` put into it."""

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...] = (), state: Any = None) -> None:
        self.name, self.args, self.state = name, args, state
        self.items: list[Any] = []


Function = Callable[[tuple[Any, ...]], Any]


class Reader:
    """Reads one pickle of `data`, from position `at`; afterwards `at` is the position behind it.

    `functions`: what a stream may call, by its full name; each takes the tuple of arguments. `persistent`: what an
    outside reference of torch (a storage) stands for. `names`: the classes and functions that were named so far.
    """

    def __init__(
        self, data: bytes, functions: Mapping[str, Function], persistent: Callable[[Any], Any], at: int = 0
    ) -> None:
        self.data, self.functions, self.persistent, self.at = data, functions, persistent, at
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0
        self.names: set[str] = set()

    def load(self) -> Any:
        """The object that the stream describes.

        Raises Refused for what would run code, ValueError, EOFError, IndexError, KeyError or TypeError for damage.
        """
        for _ in range(MOST_STEPS):
            if self.at >= len(self.data):
                raise EOFError("its pickle ends early")
            code = self.data[self.at]
            self.at += 1
            if code == STOP:
                return self.stack.pop()
            if code not in STEPS:
                raise Refused(f"its pickle has an instruction that torch does not write ({code:#04x})")
            STEPS[code](self)
        raise ValueError(f"its pickle has more than {MOST_STEPS} steps")

    def count(self, copied: int) -> None:
        """Take `copied` items or bytes from the budget of copies."""
        self.copied += copied
        if self.copied > MOST_COPIED:
            raise ValueError("its pickle asks for more data than it holds")

    # -- reading the stream -------------------------------------------------------------------------------

    def _bytes(self, length: int) -> bytes:
        start, self.at = self.at, self.at + length
        if self.at > len(self.data):
            raise EOFError("its pickle ends early")
        return self.data[start : self.at]

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            raise EOFError("its pickle ends early")
        return self._bytes(end + 1 - self.at)[:-1].decode()

    def _popped(self) -> list[Any]:
        """What lies above the last mark, which goes too."""
        above, self.stack = self.stack, self.marks.pop()
        return above

    # -- plain values ---------------------------------------------------------------------------------------

    def _none(self) -> None:
        self.stack.append(None)

    def _true(self) -> None:
        self.stack.append(True)

    def _false(self) -> None:
        self.stack.append(False)

    def _byte(self) -> None:
        self.stack.append(self._bytes(1)[0])

    def _short(self) -> None:
        self.stack.append(self._number("<H"))

    def _int(self) -> None:
        self.stack.append(self._number("<i"))

    def _long(self) -> None:
        self._integer(self._number("<B"))

    def _long4(self) -> None:
        self._integer(self._number("<I"))

    def _integer(self, length: int) -> None:
        if length > LONGEST_INTEGER:
            raise ValueError(f"its pickle has an integer of {length} bytes")
        self.stack.append(int.from_bytes(self._bytes(length), "little", signed=True))

    def _float(self) -> None:
        self.stack.append(self._number(">d"))

    def _text1(self) -> None:
        self.stack.append(self._bytes(self._number("<B")).decode())

    def _text4(self) -> None:
        self.stack.append(self._bytes(self._number("<I")).decode())

    def _text8(self) -> None:
        self.stack.append(self._bytes(self._number("<Q")).decode())

    def _bytes1(self) -> None:
        self.stack.append(self._bytes(self._number("<B")))

    def _bytes4(self) -> None:
        self.stack.append(self._bytes(self._number("<I")))

    def _bytes8(self) -> None:
        self.stack.append(self._bytes(self._number("<Q")))

    # -- containers -------------------------------------------------------------------------------------------

    def _dict(self) -> None:
        self.stack.append({})

    def _list(self) -> None:
        self.stack.append([])

    def _tuple0(self) -> None:
        self.stack.append(())

    def _tuple1(self) -> None:
        self.stack.append((self.stack.pop(),))

    def _tuple2(self) -> None:
        second, first = self.stack.pop(), self.stack.pop()
        self.stack.append((first, second))

    def _tuple3(self) -> None:
        third, second, first = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append((first, second, third))

    def _tuple(self) -> None:
        above = self._popped()
        self.stack.append(tuple(above))

    def _frozenset(self) -> None:
        above = self._popped()
        self.stack.append(above)

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _appends(self) -> None:
        self._extend(self._popped())

    def _extend(self, items: list[Any]) -> None:
        into = self.stack[-1]
        if type(into) is Node:
            into = into.items
        if type(into) is not list:
            raise TypeError(f"its pickle appends to a {type(into).__name__}")
        into.extend(items)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _set_items(self) -> None:
        self._update(self._popped())

    def _update(self, items: list[Any]) -> None:
        into = self.stack[-1]
        if type(into) is Node:
            into.items.extend(items)
            return
        if type(into) is not dict:
            raise TypeError(f"its pickle puts items into a {type(into).__name__}")
        if len(items) % 2:
            raise ValueError("its pickle has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in _KEYS:  # hashes of nested tuples take exponential time
                raise ValueError(f"its pickle has a {type(key).__name__} as a key")
            into[key] = value

    # -- the machine's own memory -----------------------------------------------------------------------

    def _proto(self) -> None:
        self._bytes(1)

    def _frame(self) -> None:
        self._bytes(8)

    def _mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def _put1(self) -> None:
        self.memo[self._number("<B")] = self.stack[-1]

    def _put4(self) -> None:
        self.memo[self._number("<I")] = self.stack[-1]

    def _memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _get1(self) -> None:
        self.stack.append(self.memo[self._number("<B")])

    def _get4(self) -> None:
        self.stack.append(self.memo[self._number("<I")])

    # -- names, objects, calls ---------------------------------------------------------------------------

    def _global(self) -> None:
        module, name = self._line(), self._line()
        self._named(f"{module}.{name}")

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError("its pickle has a name that is not text")
        self.count(len(module) + len(name))
        self._named(f"{module}.{name}")

    def _named(self, name: str) -> None:
        self.names.add(name)
        self.stack.append(Name(name))

    def _new(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        if type(cls) is not Name or type(args) is not tuple:
            raise TypeError("its pickle makes an object of what is no class")
        self.stack.append(Node(cls.name, args))

    def _new_with_keywords(self) -> None:
        self.stack.pop()
        self._new()

    def _reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Name or type(args) is not tuple:
            raise TypeError("its pickle calls what is no function")
        if function.name not in self.functions:
            raise Refused(f"its pickle calls {function.name:.200}")
        self.count(sum(len(part) for part in args if isinstance(part, Sequence)))
        self.stack.append(self.functions[function.name](args))

    def _build(self) -> None:
        state, into = self.stack.pop(), self.stack[-1]
        if type(into) is Node:
            into.state = state
        elif type(into) is not dict:  # the metadata of a state dict is nobody's business
            raise TypeError(f"its pickle sets the state of a {type(into).__name__}")

    def _persistent(self) -> None:
        self.stack.append(self.persistent(self.stack.pop()))


#: The instructions that torch's pickles are made of (protocols 2 to 5), by name; all others are refused.
_NAMES = {
    PROTO: "proto", 0x95: "frame", 0x28: "mark", PERSISTENT: "persistent",
    0x4E: "none", 0x88: "true", 0x89: "false",
    0x4B: "byte", 0x4D: "short", 0x4A: "int", 0x8A: "long", 0x8B: "long4", 0x47: "float",
    0x8C: "text1", 0x58: "text4", 0x8D: "text8", 0x55: "text1", 0x54: "text4",
    0x43: "bytes1", 0x42: "bytes4", 0x8E: "bytes8",
    0x7D: "dict", 0x5D: "list", 0x8F: "list", 0x91: "frozenset",
    0x29: "tuple0", 0x85: "tuple1", 0x86: "tuple2", 0x87: "tuple3", 0x74: "tuple",
    0x61: "append", 0x65: "appends", 0x90: "appends", 0x73: "set_item", 0x75: "set_items",
    0x71: "put1", 0x72: "put4", 0x94: "memoize", 0x68: "get1", 0x6A: "get4",
    0x63: "global", 0x93: "stack_global", 0x81: "new", 0x92: "new_with_keywords", 0x52: "reduce", 0x62: "build",
}  # fmt: skip
#: Functions of the class, not methods of a reader: that would hold itself, and all that it has read, until it is found.
STEPS: dict[int, Callable[[Reader], None]] = {code: getattr(Reader, f"_{name}") for code, name in _NAMES.items()}

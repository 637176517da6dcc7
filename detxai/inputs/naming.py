"""Names of images in the output tree: printable, short enough, each once."""

from __future__ import annotations

import hashlib
import itertools
import os
import unicodedata

#: Longer components are cut: file systems stop at 255 bytes, and the pictures' names add to them.
MAX_COMPONENT = 180


def printable(path: str) -> str:
    """`path` without control characters, undecodable bytes and overlong components; injective."""
    lengths = map(len, path.encode(errors="surrogatepass").split(b"/"))
    if path.isprintable() and "\\" not in path and max(lengths) <= MAX_COMPONENT:
        return path
    odd = {"Cc", "Cs", "Zl", "Zp"}
    escaped = "".join(
        char.encode("unicode_escape").decode() if char == "\\" or unicodedata.category(char) in odd else char
        for char in path
    )
    parts = escaped.split("/")
    return "/".join(p if len(p.encode()) <= MAX_COMPONENT else marked(p, p) for p in parts)


def marked(path: str, key: str) -> str:
    """`path` with a hash of `key` before its suffix, its last component short enough."""
    folder, slash, name = path.rpartition("/")
    stem, suffix = os.path.splitext(name)
    stem = stem.encode(errors="surrogatepass")[: MAX_COMPONENT - 40].decode(errors="ignore")
    return f"{folder}{slash}{stem}~{digest(key)[:8]}{suffix if len(suffix) < 8 else ''}"


def unused(stem: str, suffix: str, taken: set[str]) -> str:
    """`stem` + `suffix`, or `stem-2` and so on where it is taken; taken from now on."""
    numbered = (f"{stem}-{n}" if n > 1 else stem for n in itertools.count(1))
    name = next(name + suffix for name in numbered if name + suffix not in taken)
    taken.add(name)
    return name


def digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()

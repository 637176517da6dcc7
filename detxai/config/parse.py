"""Values as people type them, in options, environment and YAML, made uniform; ValueError says what was expected."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import AfterValidator

#: An output tree in an object store; a path that was made of the address has lost a slash.
_TREE = re.compile(r"(s3|gs|az|memory):/+([^/].*)", re.IGNORECASE | re.DOTALL)
_STORE = re.compile(r"(s3|gs|az|https?)://?\w", re.IGNORECASE)


def items(value: Any) -> Any:
    """A list from a scalar, from text with commas, or as it is."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int) else value


def names(value: Any) -> Any:
    """As `items`, and a repeated option may have commas in each of its values."""
    value = items(value)
    if not isinstance(value, (list, tuple)):
        return value
    return [name for item in value for name in (items(item) if isinstance(item, str) else [item])]


def selectors(value: Any) -> Any:
    """Class ids and names; names keep their commas when given as a list."""
    value = items(value)
    if not isinstance(value, (list, tuple)):
        return value
    return [int(v) if isinstance(v, str) and v.isdecimal() and str(int(v)) == v else v for v in value]


def distinct(value: tuple[Any, ...]) -> tuple[Any, ...]:
    """`value` without repetitions, in order."""
    return tuple(dict.fromkeys(value))


def known(what: str, words: Sequence[str], least: int = 1) -> AfterValidator:
    """Accept these `words` only, `least` of them, and say which they are."""

    def check(given: tuple[str, ...]) -> tuple[str, ...]:
        if len(given) < least:
            raise ValueError(f"must name at least one {what} (known: {', '.join(words)})")
        for word in given:
            if word not in words:
                raise ValueError(f"unknown {what} {word!r}{nearest(word, words)} (known: {', '.join(words)})")
        return distinct(given)

    return AfterValidator(check)


def nearest(word: str, words: Sequence[str]) -> str:
    """`; did you mean 'x'?` where one of `words` is near, comparing last components too."""
    lower = {known.lower(): known for known in words}
    tails = {known.rpartition(".")[2]: known for known in lower}
    close = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.5)
    near = difflib.get_close_matches(word.lower().rpartition(".")[2], tails, n=1, cutoff=0.75)
    best = lower[tails[near[0]]] if near else lower[close[0]] if close else None
    return f"; did you mean {best!r}?" if best else ""


def window(value: Any) -> Any:
    """A window of deep images as the one way to write it; other types pass."""
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    if not isinstance(text, str):
        return value
    number = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)"
    match = re.fullmatch(rf"(percentile\s+)?{number}\s*,\s*{number}", text.strip(), re.IGNORECASE)
    if text.strip().lower() in ("auto", "full"):
        return text.strip().lower()
    if match is None:
        raise ValueError("must be 'auto', 'full', 'LOW,HIGH' or 'percentile P,Q'")
    low, high = float(match[2]), float(match[3])
    if low >= high or (match[1] and not 0 <= low < high <= 100):
        raise ValueError("the first number must be below the second (percentiles: 0 to 100)")
    return f"{'percentile ' if match[1] else ''}{low:.15g},{high:.15g}"


def imgsz(value: Any) -> Any:
    """A side, or rows and columns from text with a comma or an x; other types pass."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d{1,6})(?:\s*[,x]\s*(\d{1,6}))?", value.strip().lower())
    if match is None:
        raise ValueError("must be PIXELS, as 640, or ROWS,COLUMNS, as 384,640")
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


def square(value: Any) -> Any:
    """One side of rows and columns that are alike."""
    return value[0] if isinstance(value, tuple) and value[0] == value[1] else value


def given(value: Any) -> Any:
    """A path that is not empty: that would be the working folder."""
    if value == "":
        raise ValueError("must not be empty; write . for the working folder")
    if _STORE.match(str(value)):
        raise ValueError("must be a folder here; only trees of detxai explain go to s3://, gs:// and az://")
    return value


def place(value: Any) -> Path | str:
    """Where an output tree lies: a folder, or the address of a place in an object store, without credentials."""
    if not isinstance(value, str | Path):
        raise ValueError("must be a folder or the address of a place in an object store")
    match = _TREE.fullmatch(str(value))
    if match is None:
        return Path(given(value))
    if re.search(r"[@?#]", match[2]):
        raise ValueError("must not hold @, ? or #: credentials come from the environment")
    return f"{match[1].lower()}://{match[2].rstrip('/')}"


def overlays(value: Any) -> Any:
    """Which pictures are written; a plain yes is all of them, a no none."""
    return {
        "true": "all",
        "yes": "all",
        "on": "all",
        "1": "all",
        "false": "none",
        "no": "none",
        "off": "none",
        "0": "none",
    }.get(str(value).lower(), value)


#: `--pair` for both energies in one file.
BANDS = "bands"


def energies(value: str) -> str:
    """`bands`, or `LOW,HIGH` as `pair` has it."""
    try:
        return value if value == BANDS else pair(value)
    except ValueError as error:
        raise ValueError(f"{error}, or {BANDS} where one file holds both") from error


def one_or_three(value: tuple[int, ...]) -> tuple[int, ...]:
    """One band as gray, or three as colours."""
    if len(value) not in (1, 3):
        raise ValueError("must be one band, shown as gray, or three as red, green and blue, as 4,3,2")
    return value


def pair(value: str) -> str:
    """`ONE,OTHER`: two texts of which neither holds the other."""
    low, comma, high = value.partition(",")
    if not comma or low in high or high in low or "," in high:
        raise ValueError("must be two texts by which paths differ, as _low,_high or low/,high/")
    return value


def device(value: Any) -> Any:
    """A device's name; a bare number is a CUDA device."""
    name = f"cuda:{value}" if str(value).isdecimal() else str(value).strip().lower()
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name):
        raise ValueError("must be 'auto', 'cpu', 'mps', 'cuda' or 'cuda:N'")
    return name


def shard(value: str) -> str:
    """I/N without leading zeros."""
    match = re.fullmatch(r"(\d+)/(\d+)", value)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError("must be I/N with 1 <= I <= N, for example 1/4")
    return f"{int(match[1])}/{int(match[2])}"

"""Boxes that people or other systems drew (YOLO txt, COCO results), and which prediction meets which label.

Coordinates are xyxy in source pixels unless they are called relative (0 to 1 of the picture's width and height).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detxai.errors import ImageError, UsageError
from detxai.values import Box, ImageRef, Label, Match

CLASSES = "classes.txt"
#: Drawn by hand or rounded: relative coordinates may leave the picture by this much; the box is clipped.
SLACK = 0.01
#: IoU from which a box is on its label, and from which it at least means it (Bolya et al. 2020, arXiv:2008.08045).
ON, NEAR = 0.5, 0.1
#: Neighbouring anchors give all but the same box with very unlike scores: within this of the best IoU they are equal.
EQUAL = 0.1


@dataclass(frozen=True)
class Drawn:
    """What somebody drew on one image; the boxes are `relative`, or in source pixels. `code` names an error's kind."""

    labels: tuple[Label, ...] = ()
    relative: bool = True
    code: str = "labels"

    def at(self, width: int, height: int) -> tuple[Label, ...]:
        """The labels with boxes in source pixels, clipped to a picture of `width` x `height`.

        Raises ImageError for a box that lies outside the picture.
        """
        size = np.array([width, height] * 2, dtype=np.float64)
        sized = []
        for label in self.labels:
            x0, y0, x1, y1 = np.clip(np.array(label.box) * (size if self.relative else 1), 0, size).tolist()
            if x0 >= x1 or y0 >= y1:
                raise ImageError(self.code, f"a box of class {label.class_name} lies outside the picture: {label.box}")
            sized.append(replace(label, box=(x0, y0, x1, y1)))
        return tuple(sized)

    @property
    def digest(self) -> str:
        """Hex SHA-256 of all that the labels say: an image is done again when it changes."""
        return hashlib.sha256(repr((self.relative, self.labels)).encode(errors="backslashreplace")).hexdigest()


@dataclass(frozen=True)
class Folder:
    """YOLO txt files: `<relative path>.txt` of an image, else `<stem>.txt`.

    A line is `class cx cy w h`, or a class and the corners of a polygon or rotated box (its hull is taken); `scored`
    lines are predictions, of classes that the model has, and may end in a score. All relative. Class numbers are the
    model's, or lines of a `classes.txt` in the folder or beside it, counted from 0. Raises UsageError for a
    `classes.txt` that cannot be used with the model's `names`.
    """

    folder: Path
    names: Mapping[int, str]
    scored: bool = False
    listed: tuple[str, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "listed", _listed(self.folder, self.names))

    @property
    def code(self) -> str:
        """`labels` or `predictions`: the kind of error of a file that is malformed."""
        return "predictions" if self.scored else "labels"

    def read(self, ref: ImageRef) -> Drawn | None:
        """What is drawn on an image; None where it has no file. Raises ImageError naming file and line."""
        candidates = [PurePosixPath(ref.path).with_suffix(".txt"), PurePosixPath(ref.file.stem + ".txt")]
        if ref.frame is not None:  # one page's labels are not another's
            candidates = [PurePosixPath(f"{ref.path}.txt")]
        file = next((f for f in candidates if f.name != CLASSES and (self.folder / f).is_file()), None)
        if file is None:
            return None
        try:
            text = (self.folder / file).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ImageError(self.code, f"{file}: cannot be read: {reason}") from error
        labels = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    labels.append(self._label(*_line(line, scored=self.scored)))
                except ValueError as error:
                    raise ImageError(self.code, f"{file}, line {number}: {error}") from error
        return Drawn(tuple(labels), code=self.code)

    def _label(self, number: int, box: Box, score: float | None) -> Label:
        if self.listed is None:
            class_id, name = (number if number in self.names else None), self.names.get(number, f"class {number}")
        elif number < len(self.listed):
            class_id = _id_of(self.listed[number], self.names)
            name = self.listed[number] if class_id is None else self.names[class_id]
        else:
            raise ValueError(f"class {number}, but {CLASSES} names {len(self.listed)} classes")
        if class_id is None and self.scored:
            raise ValueError(f"the model has no {name!r} that could explain the box")
        return Label(class_id, name, box, score)


def _listed(folder: Path, names: Mapping[int, str]) -> tuple[str, ...] | None:
    """The names in `classes.txt`, in the folder or beside it, None without one."""
    file = next((f for f in (folder / CLASSES, folder.parent / CLASSES) if f.is_file()), None)
    if file is None:
        return None
    try:
        listed = tuple(line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read {file}: {error}.") from error
    if all(_id_of(name, names) is None for name in listed):
        raise UsageError(f"{file}: the model has none of these classes.", f"It has: {', '.join(names.values())}.")
    return listed


def _id_of(name: str, names: Mapping[int, str]) -> int | None:
    return next((i for i, known in names.items() if known.casefold() == name.casefold()), None)


def _line(text: str, *, scored: bool) -> tuple[int, Box, float | None]:
    """(class number, relative box, score) of one line; raises ValueError saying what is wrong."""
    try:
        first, *values = [float(word) for word in text.split()]
    except ValueError:
        raise ValueError(f"these are not all numbers: {text.strip()[:60]!r}") from None
    if not all(map(math.isfinite, (first, *values))) or first < 0 or first != int(first):
        raise ValueError(f"it must begin with a class number: {text.strip()[:60]!r}")
    score = values.pop() if scored and len(values) >= 5 and len(values) % 2 else None
    if score is not None and not 0 <= score <= 1:
        raise ValueError(f"the score {score:g} is not between 0 and 1")
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        more = ", a score after either" if scored else ""
        raise ValueError(f"{len(values)} numbers after the class; 4 make a box, pairs from 6 on a polygon{more}")
    if min(values) < -SLACK or max(values) > 1 + SLACK:
        raise ValueError("the coordinates are not relative to the picture (0 to 1)")
    if len(values) == 4:
        cx, cy, w, h = values
        box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
    else:
        box = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError("the box has no area")
    return int(first), box, score


class Results:
    """A COCO results file: a JSON list of `{image_id or file_name, category_id, bbox: [x, y, w, h], score}`.

    `bbox` is in source pixels, `category_id` the model's own class id. An entry belongs to the image whose path, file
    name, path or name without suffix, or number (`000139.jpg` is 139) is its `file_name`, else its `image_id`.
    `base`: the number of the model's first class in the file; ultralytics' `val` may count from 1. None where nobody
    said: then the file must hold a class 0. Raises UsageError where it does not, or naming an entry that is wrong.
    """

    def __init__(self, file: Path, names: Mapping[int, str], base: int | None = None) -> None:
        self.names, self.base = names, base or 0
        self.by_key: dict[str, list[Label]] = {}
        try:
            entries = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"--predictions {file}: cannot be read as JSON: {reason}.") from error
        if not isinstance(entries, list):
            raise UsageError(f"--predictions {file}: COCO results are a list, this is a {type(entries).__name__}.")
        numbers: list[Any] = [entry.get("category_id") for entry in entries if isinstance(entry, dict)]
        if base is None and len(names) > 1 and numbers and all(_is_number(n) and n >= 1 for n in numbers):
            raise UsageError(
                f"--predictions {file}: no entry has category_id 0; it may count classes from 1, as `yolo val` can.",
                f"Say where it begins: --predictions-base 1, or 0 where 1 is {names.get(1, 'the second class')!r}.",
            )
        for number, entry in enumerate(entries, 1):
            try:
                key, label = self._entry(entry)
            except ValueError as error:
                raise UsageError(f"--predictions {file}: entry {number}: {error}.") from error
            self.by_key.setdefault(key, []).append(label)

    def read(self, ref: ImageRef) -> Drawn:
        """The predictions on an image, possibly none, in source pixels."""
        path, name = PurePosixPath(ref.path), ref.file.name
        keys = [ref.path, name, str(path.with_suffix("")), ref.file.stem]
        keys += [str(int(ref.file.stem))] if ref.file.stem.isdecimal() else []
        keys = keys if ref.frame is None else [ref.path]
        entries = next((self.by_key[key] for key in keys if key in self.by_key), [])
        return Drawn(tuple(entries), relative=False, code="predictions")

    def _entry(self, entry: Any) -> tuple[str, Label]:
        if not isinstance(entry, dict):
            raise ValueError("it must be an object")
        key = entry.get("file_name", entry.get("image_id"))
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            raise ValueError("'file_name' or 'image_id' must be a name or a number")
        class_id: Any = entry.get("category_id")
        bbox, score = entry.get("bbox"), entry.get("score")
        if not _is_number(class_id) or class_id - self.base not in self.names:
            known = f"{min(self.names)} to {max(self.names)}, counted from {self.base}; see --predictions-base"
            raise ValueError(f"'category_id' is {class_id!r}, the model's ids are {known}")
        class_id = int(class_id) - self.base
        if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)) or min(bbox[2:]) <= 0:
            raise ValueError("'bbox' must be [x, y, width, height] in pixels")
        if score is not None and not (_is_number(score) and 0 <= score <= 1):
            raise ValueError("'score' must be between 0 and 1")
        x, y, w, h = map(float, bbox)
        confidence = None if score is None else float(score)
        return str(key), Label(int(class_id), self.names[int(class_id)], (x, y, x + w, y + h), confidence)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e9 < value < 1e9


def overlaps(boxes: ArrayLike, others: ArrayLike) -> NDArray[np.float64]:
    """IoU (n, m) of `boxes` (n, 4) with `others` (m, 4), xyxy in one frame; 0 where a box has no area."""
    a, b = (np.asarray(v, np.float64).reshape(-1, 4) for v in (boxes, others))
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = np.clip(sides, 0, None).prod(2)
    union = (a[:, 2:] - a[:, :2]).prod(1)[:, None] + (b[:, 2:] - b[:, :2]).prod(1)[None] - shared
    iou: NDArray[np.float64] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return iou


def match(
    boxes: Sequence[Box],
    class_ids: Sequence[int],
    scores: Sequence[float],
    labels: Sequence[Label],
    taken: Collection[int] = (),
) -> list[Match]:
    """How each prediction meets the labels, best score first; every label can be taken once (`taken`: already so).

    In this order: `true`: IoU >= 0.5 with a free label of its class (the best such, which it takes); `duplicate`: with
    one that is taken; `wrong-class`: with one of another class; `badly-placed`: IoU >= 0.1 with one of its class;
    else `background`, with the best IoU of any. The statuses are those of Bolya et al. 2020 (arXiv:2008.08045).
    """
    table = overlaps(boxes, [label.box for label in labels])
    gone = set(taken)
    matches: dict[int, Match] = {}
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        own = [k for k, label in enumerate(labels) if label.class_id == class_ids[i]]
        rules = (
            ("true", [k for k in own if k not in gone], ON),
            ("duplicate", [k for k in own if k in gone], ON),
            ("wrong-class", [k for k in range(len(labels)) if k not in own], ON),
            ("badly-placed", own, NEAR),
        )
        for status, among, least in rules:
            best = max(among, key=lambda k: table[i, k], default=None)
            if best is not None and table[i, best] >= least:
                matches[i] = Match(status, best, float(table[i, best]))
                gone |= {best} if status == "true" else set()
                break
        else:
            matches[i] = Match("background", None, float(table[i].max(initial=0.0)))
    return [matches[i] for i in range(len(boxes))]


def nearest(boxes: ArrayLike, scores: ArrayLike, box: Box) -> tuple[int, float]:
    """(index, IoU) of the prediction nearest to `box` among `boxes` (n, 4) with `scores` (n,) of its class.

    The best IoU; of those within 0.1 of it, the best score. Where nothing overlaps, the nearest centre. Predictions of
    score 0 (some exports tell one class a box) count only where there are no others. Raises ValueError where there is
    no prediction.
    """
    predicted, weights = np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(scores, np.float64)
    if not len(predicted):
        raise ValueError("the model makes no prediction at all")
    eligible = weights > 0 if (weights > 0).any() else np.ones(len(predicted), bool)
    iou = np.where(eligible, overlaps(predicted, [box])[:, 0], -1)
    if iou.max() > 0:
        index = int(np.where(iou >= iou.max() - EQUAL, weights, -1).argmax())
    else:
        away = np.hypot(*(predicted[:, [0, 1]] + predicted[:, [2, 3]] - (box[0] + box[2], box[1] + box[3])).T)
        index = int(np.where(eligible, away, np.inf).argmin())
    return index, max(float(iou[index]), 0.0)

"""The values that pass from stage to stage: frozen, plain, without torch.

Frames: *source* pixels are those of the image after EXIF rotation, x to the right, y down, the
pixel (0, 0) covering [0, 1) x [0, 1). *Letterbox* pixels are those of the picture that the network sees.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Map = NDArray[np.float32]
Box = tuple[float, float, float, float]
#: Rows and columns of the picture that a network sees.
InputShape = tuple[int, int]


def as_imgsz(shape: InputShape) -> int | InputShape:
    """`shape` as --imgsz takes it: the side of a square, else rows and columns."""
    return shape[0] if shape[0] == shape[1] else shape


def written(size: int | InputShape) -> str:
    """A side or a shape for people: `640`, `384x640` (rows first, as --imgsz takes it)."""
    rows, columns = (size, size) if isinstance(size, int) else size
    return str(rows) if rows == columns else f"{rows}x{columns}"


def geometry(size: int | InputShape, *, rect: bool) -> str:
    """What pictures become, for people: `640 px`, `384x640 px`, `640 px with --rect`."""
    return f"{written(size)} px{' with --rect' if rect else ''}"


def shared_area(a: Box, b: Box) -> float:
    """The area that two xyxy boxes have in common."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two xyxy boxes, in [0, 1]; 0 where neither has an area."""
    shared = shared_area(a, b)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


@dataclass(frozen=True)
class Pair:
    """The high-energy half of an image: its `file`, its `path` as people name it, and how both become colours."""

    file: Path
    path: str
    colors: str


@dataclass(frozen=True)
class View:
    """Which view of which bag: `bag` is the image's path without the `name` of the view."""

    bag: str
    name: str


@dataclass(frozen=True)
class ImageRef:
    """One input: `file` on disk and `path`, its POSIX name in the output tree (unique in a run).

    `problem` says why the name cannot be used (then the image ends in a failed record). `frame`: which picture of a
    file that holds several, counted from 1; None: the first. `data`: the content of an image that is in memory and not
    on disk. `pair`: the other half of a dual-energy image, of which `file` is the one of low energy.
    `view`: which of two views of one bag it is. `url`: of an image that lies in an object store.
    """

    path: str
    file: Path
    problem: str | None = None
    frame: int | None = None
    data: bytes | None = field(default=None, repr=False)
    pair: Pair | None = None
    view: View | None = None
    url: str | None = None


@dataclass(frozen=True)
class Window:
    """How more than 8 bits became 8: values below `low` are 0, above `high` 255, linear between."""

    method: str
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Image:
    """A decoded image. `pixels`: (height, width, 3) uint8 RGB, upright, alpha composed on white.

    `sha256` of the file's bytes, `pair_sha256` of the high-energy half's. `bands`: (height, width, n) uint8 of a
    picture of other channels, for a network that reads so many; `pixels` show those in `shown`, counted from 1.
    """

    ref: ImageRef
    pixels: Pixels
    sha256: str
    window: Window | None = None
    notes: tuple[str, ...] = ()
    pair_sha256: str | None = None
    bands: Pixels | None = None
    shown: tuple[int, ...] = ()

    @property
    def seen(self) -> Pixels:
        """(height, width, channels) uint8: what a network reads."""
        return self.pixels if self.bands is None else self.bands

    @property
    def digest(self) -> str:
        """Of all the bytes that it was made of, as `decode.digest` has it."""
        return self.sha256 if self.pair_sha256 is None else f"{self.sha256}+{self.pair_sha256}"

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])


@dataclass(frozen=True)
class Letterbox:
    """Where a source of `width` x `height` lies in what the network sees, `shape` (rows, columns) pixels.

    `gain`, `left`, `top` map box coordinates (x_letterbox = x * gain + left), as ultralytics does;
    the picture itself covers the columns [left, left + inner_width) and the rows alike.
    """

    shape: InputShape
    width: int
    height: int
    gain: float
    left: int
    top: int
    inner_width: int
    inner_height: int

    @property
    def place(self) -> Box:
        """Where the picture itself lies, xyxy letterbox pixels."""
        return self.left, self.top, self.left + self.inner_width, self.top + self.inner_height


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A loaded model before it becomes a detector.

    `kind`: `ultralytics` (`module` is a live torch network), `legacy` (`module` holds state and yaml of an original
    YOLOv5/v3 model, no code) or `darknet` (`module` is the parsed network). `trusted`: its pickle was run in full.
    `imgsz`: the size that it was made for, as --imgsz takes it.
    """

    name: str
    sha256: str
    kind: str
    module: Any
    family: str
    names: dict[int, str]
    imgsz: int | InputShape | None = None
    trusted: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """One scalar of one pinned prediction: what is differentiated and explained.

    `anchor` indexes the detector's flat list of predictions on the letterboxed image, `level` the scale
    it belongs to. `kind`: `class` (a logit of `class_id`), `objectness`, or a box edge
    (`left`, `top`, `right`, `bottom`); the letterbox value times `scale` plus `offset` is in source pixels.
    `box` is the prediction's own box, xyxy letterbox pixels, for methods that see only what is detected.
    `context` is whatever else pins the prediction (RT-DETR: the queries selected on the image).
    `contrast` is a kind too: the logit of `class_id` less that of the class `other`.
    """

    anchor: int
    level: int
    kind: str = "class"
    class_id: int = 0
    scale: float = 1.0
    offset: float = 0.0
    context: Any = None
    box: Box | None = None
    other: int | None = None


@dataclass(frozen=True)
class ClassScore:
    """Score in [0, 1] and logit of one class at a prediction."""

    class_id: int
    class_name: str
    score: float
    logit: float


@dataclass(frozen=True)
class Label:
    """A box that a person or another system drew, xyxy; `class_id` is None for a class that the model does not have.

    `score`: how sure the other system was, if it said so.
    """

    class_id: int | None
    class_name: str
    box: Box
    score: float | None = None


@dataclass(frozen=True)
class Match:
    """How a prediction meets the labels: its `status`, the index of the `label` it meets, and their `iou`."""

    status: str
    label: int | None
    iou: float


@dataclass(frozen=True)
class Nearest:
    """The prediction at which a box that is not its own is explained: its `box`, their `iou`, its `score`."""

    box: Box
    iou: float
    score: float


@dataclass(frozen=True)
class Detection:
    """One explained prediction; `box` is xyxy in source pixels, `classes` all classes by falling score.

    A miss has the box of its label, a given box its own; both are explained at the prediction `nearest` to them.
    """

    anchor: int
    level: int
    class_id: int
    class_name: str
    score: float
    logit: float
    box: Box
    classes: tuple[ClassScore, ...]
    kind: str = "detection"
    obb: tuple[float, float, float, float, float] | None = None
    match: Match | None = None
    nearest: Nearest | None = None


@dataclass(frozen=True, eq=False)
class Attribution:
    """A signed map of one target with the account of how it was computed.

    `map`: (height, width) float32 in source pixels, summed over colour; its sum plus `padding_sum` is
    `total` (target units), and `padding_mass` the sum of |attribution| on the padding. `completeness_error`,
    `error_bound`, `map_error` and `converged` are None for methods without a completeness promise.
    """

    method: str
    target: Target
    baseline: str
    precision: str
    path: str
    map: Map
    total: float
    padding_sum: float
    value_at_input: float
    value_at_baseline: float | None
    evaluations: int
    completeness_error: float | None = None
    error_bound: float | None = None
    map_error: float | None = None
    converged: bool | None = None
    notes: tuple[str, ...] = ()
    padding_mass: float = 0.0
    gradient: str = "plain"
    extra: dict[str, Any] = field(default_factory=dict)

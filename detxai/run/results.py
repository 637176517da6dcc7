"""The values that pass through a run: a prepared image, its maps in groups, and what came of it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field

import PIL.Image

from detxai.attribution.ablation import TrialOutcome
from detxai.attribution.points import TargetMap
from detxai.evidence.maps import MapSums
from detxai.evidence.model import Evidence
from detxai.models.detector import DetectorInfo
from detxai.output import overlays
from detxai.output.overview import Stamp
from detxai.output.records import AttributionRecord, ModelInfo, Record
from detxai.run.targets import MapKey, Variant, WantedTarget
from detxai.values import Attribution, Detection, Image, ImageRef, InputShape, Label, Letterbox, Map, Pixels


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image as the device gets it: `canvas` (rows, columns, channels) uint8, the letterboxed picture.

    `baselines`: by name, the one asked for first; letterboxed like `canvas` where a file is one. `ground`: the colour
    of its empty ground; `labels`, `given`: boxes in source pixels, None where there are none. `parts`: what an earlier
    run has finished of it, as the tree has it.
    """

    ref: ImageRef
    image: Image
    letterbox: Letterbox
    canvas: Pixels
    baselines: dict[str, Pixels | None]
    fingerprint: str
    labels: tuple[Label, ...] | None = None
    given: tuple[Label, ...] | None = None
    ground: tuple[int, ...] | None = None
    parts: dict[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class MapGroup:
    """Some detections of an image with their maps: `wanted` are their targets, `detections` all of the image.

    `maps`: by variant, one for each of `wanted`; `trials` and `second_maps` (from the baseline named) by map;
    `neighbours`: by detection and neighbour the logits by class id that are left without it. `scales`: those of the
    image's first group (see PublishedGroup), None in it.
    """

    prepared: PreparedImage
    detections: tuple[Detection, ...]
    wanted: tuple[WantedTarget, ...]
    maps: dict[Variant, list[TargetMap]]
    trials: dict[MapKey, list[TrialOutcome]] = field(default_factory=dict)
    second_maps: dict[MapKey, tuple[str, TargetMap]] = field(default_factory=dict)
    neighbours: dict[int, dict[int, dict[int, float]]] = field(default_factory=dict)
    scales: dict[str, float] | None = None


@dataclass(frozen=True, eq=False)
class Explanation:
    """One target of one detection: its map, `sums` over the box, and its picture for notebooks."""

    detection: int
    class_name: str
    as_class: bool
    attribution: Attribution
    sums: MapSums
    evidence: Evidence | None = None
    draw: Callable[[], bytes] | None = field(default=None, repr=False)

    @property
    def map(self) -> Map:
        """(height, width) float32, signed, in source pixels and the target's unit."""
        return self.attribution.map

    def overlay(self) -> PIL.Image.Image | None:
        """The map on its picture, as the command writes it."""
        return _opened(self._repr_png_())

    def _repr_png_(self) -> bytes | None:
        return None if self.draw is None else self.draw()


@dataclass(frozen=True, eq=False)
class PublishedGroup:
    """What is kept of some detections: by detection its records, evidence and map on the overview; files by name.

    `explanations`: with their maps, where no files are written; `written`: names of files that the tree has already;
    `scales`: with `--scale common`, by what was made (see `publish.scale_key`), from how much a pixel colour is full.
    """

    rows: dict[int, list[AttributionRecord]] = field(default_factory=dict)
    evidence: dict[int, Evidence] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    explanations: list[Explanation] = field(default_factory=list)
    written: frozenset[str] = frozenset()
    stamps: dict[int, Stamp] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Result:
    """What came of one image. `record` is what the output tree holds; `image` is None if skipped or failed.
    `explanations`: with their maps, where there is no tree to write. `skipped`: an earlier run had done it."""

    ref: ImageRef
    record: Record
    image: Image | None = None
    explanations: tuple[Explanation, ...] = ()
    skipped: bool = False
    bug: str | None = None

    @property
    def map(self) -> Map | None:
        """The map of the first explanation; None where nothing was found."""
        return self.explanations[0].map if self.explanations else None

    def overlay(self) -> PIL.Image.Image | None:
        """The picture of the first explanation, else the plain image; None for a failed image."""
        return _opened(self._repr_png_())

    def _repr_png_(self) -> bytes | None:
        if self.explanations or self.image is None:
            return self.explanations[0]._repr_png_() if self.explanations else None
        return overlays.encode(PIL.Image.fromarray(self.image.pixels))


def _opened(png: bytes | None) -> PIL.Image.Image | None:
    return None if png is None else PIL.Image.open(io.BytesIO(png))


def model_record(
    info: DetectorInfo, imgsz: int, shape: InputShape, fit: str, rect: InputShape | None = None
) -> ModelInfo:
    """What records and summaries say of the detector.

    `imgsz`: the longer side asked for; `shape` of its input (rows, columns); `fit`: how that was made of a picture;
    `rect`: the largest shape, where each picture has its own.
    """
    return ModelInfo(
        name=info.name,
        sha256=info.sha256,
        family=info.family,
        head=info.head,
        imgsz=imgsz,
        channels=None if info.channels == 3 else info.channels,
        shape=None if shape == (imgsz, imgsz) else shape,
        rect=rect,
        letterbox=None if fit == "letterbox" else fit,
    )

"""Channel statistics of one model: gathered in a single pass, tested with scipy, kept in one file tied to the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from detxai.errors import UsageError
from detxai.models import checkpoints
from detxai.parchgrad.channels import FEWEST, Statistics
from detxai.statistics import Moments
from detxai.values import InputShape, as_imgsz, geometry, written

FORMAT = "detxai.parchgrad/1"
SUFFIX = ".parchgrad.safetensors"
#: What a channel is averaged over: the whole picture, or the box of one detection.
REGIONS = ("whole", "detection")
#: Samples kept for the Shapiro–Wilk test, which needs them all at once, and the seed that chooses them.
RESERVOIR, SEED = 1000, 0

Row = NDArray[np.float64]


class Gathering:
    """The GAPs over one kind of box, as they come: memory does not grow with their number."""

    def __init__(self, classes: int, channels: int) -> None:
        self.all = Moments(channels)
        self.of_class = [Moments(channels) for _ in range(classes)]
        self.kept: list[NDArray[np.float32]] = []
        self._chance = np.random.default_rng(SEED)

    def add(self, row: Row, class_ids: Iterable[int]) -> None:
        """Take in the GAPs (channels,) of one box, which shows these classes."""
        self.all.add(row)
        for class_id in set(class_ids):
            self.of_class[class_id].add(row)
        if len(self.kept) < RESERVOIR:
            self.kept.append(row.astype(np.float32))
        elif (place := int(self._chance.integers(self.all.count))) < RESERVOIR:  # Vitter 1985, algorithm R
            self.kept[place] = row.astype(np.float32)

    def statistics(self) -> Statistics:
        """What the tests say of all that was taken in."""
        t, p = zip(*(welch(own, self.all.without(own)) for own in self.of_class), strict=True)
        normal = shapiro(self.kept, len(self.all.mean))
        rows = (np.stack(t), np.stack(p), normal, self.all.mean, self.all.std)
        welch_t, welch_p, shapiro_p, mean, std = (torch.from_numpy(row).float() for row in rows)
        count = torch.tensor([own.count for own in self.of_class])
        return Statistics(count, welch_t, welch_p, shapiro_p, mean, std)


def welch(own: Moments, rest: Moments) -> tuple[Row, Row]:
    """(t, p) of Welch's test that the mean of `own` is larger, one-sided; (0, 1) where there is nothing to test."""
    from scipy.stats import ttest_ind_from_stats

    t, p = np.zeros_like(own.mean), np.ones_like(own.mean)
    if min(own.count, rest.count) >= FEWEST:
        varied = (own.std > 0) | (rest.std > 0)
        t[varied], p[varied] = ttest_ind_from_stats(
            own.mean[varied], own.std[varied], own.count, rest.mean[varied], rest.std[varied], rest.count,
            equal_var=False, alternative="greater",
        )  # fmt: skip
    return t, p


def shapiro(rows: Sequence[NDArray[np.float32]], channels: int) -> Row:
    """(channels,) p of the Shapiro–Wilk test of each column of `rows`; 1 where it is constant or too short."""
    from scipy.stats import shapiro as test

    p = np.ones(channels)
    if len(rows) >= FEWEST:
        for channel, column in enumerate(np.stack(rows, 1).astype(np.float64)):
            if np.ptp(column) > 0:
                p[channel] = test(column).pvalue
    return p


@dataclass(frozen=True, eq=False)
class ChannelCalibration:
    """A file of statistics. `layers`: name and width of every convolution in the order they run; `statistics` by
    region; `images`, and whether their boxes were `labelled` or the model's own; `sha256` of the file itself; `rect`:
    whether pictures became no larger than each needs."""

    model_sha256: str
    imgsz: int | InputShape
    layers: tuple[tuple[str, int], ...]
    names: Mapping[int, str]
    statistics: Mapping[str, Statistics]
    images: int
    labelled: bool
    note: str = ""
    sha256: str = field(default="")
    rect: bool = False

    @property
    def widths(self) -> list[int]:
        return [width for _, width in self.layers]

    def packed(self) -> bytes:
        """The bytes of the file."""
        about = {
            "format": FORMAT,
            "model_sha256": self.model_sha256,
            "imgsz": written(self.imgsz),
            "layers": json.dumps(self.layers),
            "names": json.dumps(self.names),
            "images": str(self.images),
            "labelled": json.dumps(self.labelled),
            "note": self.note,
        } | ({"rect": "true"} if self.rect else {})
        tensors = {
            f"{region}.{part.name}": getattr(statistics, part.name)
            for region, statistics in self.statistics.items()
            for part in fields(Statistics)
        }
        return checkpoints.packed(tensors, about)


def read(file: Path) -> ChannelCalibration:
    """The calibration in `file`. Raises UsageError for a file that is none, or is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = file.read_bytes()
        about = checkpoints.metadata(data) if len(data) > 8 else {}
        if about.get("format") != FORMAT:
            raise ValueError(f"its header does not say {FORMAT}")
        tensors = load(data)
        layers = tuple((str(name), int(width)) for name, width in json.loads(about["layers"]))
        names = {int(k): str(v) for k, v in json.loads(about["names"]).items()}
        statistics = {
            region: Statistics(*(tensors[f"{region}.{part.name}"] for part in fields(Statistics))) for region in REGIONS
        }
        for each in statistics.values():
            _check(each, len(names), sum(width for _, width in layers))
        return ChannelCalibration(
            about["model_sha256"], _imgsz(about["imgsz"]), layers, names, statistics, int(about["images"]),
            about["labelled"] == "true", about.get("note", ""), hashlib.sha256(data).hexdigest(),
            about.get("rect") == "true",
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"Cannot read the calibration {file}: {error.strerror}.") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{file} holds no channel statistics: {error!s:.200}.",
            "Make them with: detxai calibrate parchgrad SOURCE",
        ) from error


def _check(statistics: Statistics, classes: int, channels: int) -> None:
    wide = ((classes,), (classes, channels), (classes, channels), (channels,), (channels,), (channels,))
    for part, shape in zip(fields(Statistics), wide, strict=True):
        tensor: torch.Tensor = getattr(statistics, part.name)
        if tensor.shape != shape or not bool(tensor.isfinite().all()):
            raise ValueError(f"{part.name} is {tuple(tensor.shape)}, not {shape}, or not finite")


def _option(imgsz: int | InputShape, *, rect: bool) -> str:
    return f"--imgsz {written(imgsz)}{' --rect' if rect else ''}"


def _imgsz(text: str) -> int | InputShape:
    rows, _, columns = text.partition("x")
    return as_imgsz((int(rows), int(columns or rows)))


def beside(model: str | None) -> Path:
    """Where the statistics of a model (None: the bundled one) are written and looked for: beside it."""
    file = checkpoints.BUNDLED if model is None else Path(model).expanduser()
    return file.with_name(file.stem + SUFFIX)


def found_for(
    model: str | None,
    name: str,
    sha256: str,
    imgsz: int | InputShape,
    given: Sequence[Path] = (),
    *,
    rect: bool = False,
) -> ChannelCalibration:
    """The statistics of a model: of the files `given` the one made with it, else what lies beside it or is bundled.

    `model`: its path, `name` its file name. Raises UsageError where there are none, or none for this model and size.
    """
    command = f"detxai calibrate parchgrad SOURCE{f' -m {model}' if model else ''} {_option(imgsz, rect=rect)}"
    files = [file for file in given if file.name.endswith(".safetensors")]
    if not files:
        files = [file for file in (beside(model), beside(None)) if file.is_file()]
        if not files or (model and not beside(model).is_file() and read(files[0]).model_sha256 != sha256):
            raise UsageError(
                f"ParchGrad needs channel statistics of {name}, and there is no {beside(model)}.",
                f"Make them on your images: {command} (or name a file with --calibration).",
            )
    known = {file: read(file) for file in files}
    own = {file: calibration for file, calibration in known.items() if calibration.model_sha256 == sha256}
    if not own:
        raise UsageError(
            f"{files[0]} was made with another model than {name} (sha256 {known[files[0]].model_sha256[:12]}…, not "
            f"{sha256[:12]}…).",
            f"Make new statistics: {command}",
        )
    fitting = [calibration for calibration in own.values() if (calibration.imgsz, calibration.rect) == (imgsz, rect)]
    if not fitting:
        file, calibration = next(iter(own.items()))
        raise UsageError(
            f"{file} was made at {geometry(calibration.imgsz, rect=calibration.rect)}, this run is at "
            f"{geometry(imgsz, rect=rect)}.",
            f"Run with {_option(calibration.imgsz, rect=calibration.rect)}, or make new statistics: {command}",
        )
    return fitting[0]

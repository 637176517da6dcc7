"""One run of `detxai calibrate parchgrad`: images in, one file of channel statistics out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from detxai.attribution.baselines import picture
from detxai.config.settings import AttributionConfig, RunConfig
from detxai.errors import ExitCode, UsageError
from detxai.inputs.letterbox import boxes_to_letterbox
from detxai.inputs.sources import ImageSource
from detxai.models.detector import Candidates
from detxai.models.predictions import predictions_on, reported
from detxai.models.trunk import convolutions
from detxai.output.records import ErrorInfo
from detxai.parchgrad.channels import gap, in_order, outputs
from detxai.parchgrad.session import Selection
from detxai.parchgrad.statistics import REGIONS, ChannelCalibration, Gathering, beside
from detxai.run.calibrate import calibrate
from detxai.run.console import Console
from detxai.run.plan import make_plan
from detxai.run.prepare import prepared_image
from detxai.run.results import PreparedImage, Result
from detxai.values import Box, ImageRef, Letterbox


class ChannelPass:
    """One pass of a model over images: the GAPs of all convolutions below its head, by region and class.

    With labels their boxes and classes count, without, what the model itself reports. `note` is kept in the file.
    Raises UsageError for a model without convolutions that gradients pass through.
    """

    def __init__(self, config: RunConfig, note: str = "") -> None:
        # Nothing is attributed here: no option of a method may stand in the way.
        plain = config.model_copy(update={"attribution": AttributionConfig(method=("drise",), evidence="none")})
        self.plan, self.note = make_plan(plain), note
        if self.plan.network is None:
            raise UsageError(
                f"ParchGrad changes gradients inside a network, and {self.plan.info.name} is a black box "
                f"({self.plan.info.family})."
            )
        layers = convolutions(self.plan.network.trunk)
        gray = torch.full((1, self.plan.info.channels, *self.plan.shape), 0.5, device=self.plan.device)
        with torch.no_grad():
            self.convolutions = in_order(layers, lambda: self.plan.detector.predict(gray))
        self.classes = sorted(self.plan.info.names)
        channels = sum(conv.out_channels for conv in self.convolutions.values())
        self.gathered = {region: Gathering(len(self.classes), channels) for region in REGIONS}
        self.images = self.boxes = 0

    def gather(self, refs: Iterable[ImageRef]) -> Iterator[tuple[ImageRef, ErrorInfo | None]]:
        """Take in images one by one: each of them, with the reason where it failed."""
        for ref in refs:
            item = prepared_image(self.plan, ref, None)
            if isinstance(item, PreparedImage):
                self.add(item)
            yield ref, item.record.error if isinstance(item, Result) else None

    @torch.no_grad()
    def add(self, item: PreparedImage) -> None:
        """Take in one image."""
        with outputs(list(self.convolutions.values())) as seen:
            candidates = predictions_on(self.plan.detector, picture(item.canvas, self.plan.device))
        if item.labels is None:
            boxes = self._reported(candidates)
        else:
            drawn = boxes_to_letterbox([label.box for label in item.labels] or [(0.0,) * 4], item.letterbox).tolist()
            boxes = [(label.class_id, tuple(b)) for label, b in zip(item.labels, drawn, strict=False)]
        known = [(self.classes.index(i), b) for i, b in boxes if i in self.plan.info.names]
        self._gather([seen[i][0] for i in range(len(seen))], item.letterbox, known)

    def _reported(self, candidates: Candidates) -> list[tuple[int | None, Box]]:
        d = self.plan.config.detection
        kept = reported(candidates, conf=d.conf, iou=d.iou, max_det=d.max_det, classes=self.plan.classes)
        return [(class_id, tuple(candidates.boxes[anchor].tolist())) for anchor, class_id in kept]

    def _gather(self, features: Sequence[torch.Tensor], box: Letterbox, items: Sequence[tuple[int, Box]]) -> None:
        """Pool over the picture (without its padding) and over each of `items` (class, box in letterbox pixels)."""
        boxes = torch.tensor([box.place, *(b for _, b in items)], device=self.plan.device)
        rows = gap(features, boxes, box.shape).double().cpu().numpy()
        self.gathered["whole"].add(rows[0], [class_id for class_id, _ in items])
        for row, (class_id, _) in zip(rows[1:], items, strict=True):
            self.gathered["detection"].add(row, [class_id])
        self.images, self.boxes = self.images + 1, self.boxes + len(items)

    def calibration(self) -> ChannelCalibration:
        """What came of the pass."""
        info = self.plan.info
        return ChannelCalibration(
            info.sha256,
            self.plan.imgsz,
            tuple((name, conv.out_channels) for name, conv in self.convolutions.items()),
            {i: info.names[i] for i in self.classes},
            {region: gathered.statistics() for region, gathered in self.gathered.items()},
            self.images,
            self.plan.labels is not None,
            self.note,
            rect=self.plan.rect,
        )

    def files(self, output: Path) -> dict[Path, bytes]:
        """The statistics, to be written to `output`."""
        return {output: self.calibration().packed()}

    def report(self, console: Console, output: Path) -> None:
        """Say how many boxes and images each class has, and how many channels parchgrad-cls keeps for it."""
        made = self.calibration()
        selection = Selection(self.plan.config.parchgrad, made)
        rows = []
        for index, (class_id, name) in enumerate(made.names.items()):
            parts = [name]
            for region in REGIONS:
                kept = float(selection.of_class(class_id, region).float().mean())
                parts += [str(int(made.statistics[region].count[index])), f"{100 * kept:.0f} %"]
            rows.append(tuple(parts))
        columns = ("class", "images", "over the picture", "boxes", "over the box")
        console.table("Channels that parchgrad-cls keeps", columns, rows)
        console.say(f"{self.images} images, {self.boxes} boxes: {output}")


def parchgrad(
    config: RunConfig, source: ImageSource, console: Console, output: Path | None, limit: int | None, note: str
) -> ExitCode:
    """Gather statistics over `source` (its first `limit` images) and write them to `output`, else beside the model.

    Raises UsageError, ModelError, OutputError, and NoInputError where no image could be used.
    """
    source.require_some()
    return calibrate(ChannelPass(config, note), source, limit, output or beside(config.model.path), console)

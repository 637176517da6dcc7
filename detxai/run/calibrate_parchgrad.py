"""One run of `detxai calibrate parchgrad`: images in, one file of channel statistics out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from detxai.attribution.baselines import picture
from detxai.config.settings import AttributionConfig, RunConfig
from detxai.errors import ExitCode, ImageError, NoInputError, UsageError
from detxai.inputs import decode
from detxai.inputs.letterbox import boxes_to_letterbox
from detxai.inputs.sources import ImageSource
from detxai.models.detector import Candidates
from detxai.models.predictions import reported
from detxai.models.trunk import convolutions
from detxai.output import atomic
from detxai.parchgrad.channels import gap, in_order, outputs
from detxai.parchgrad.session import Selection
from detxai.parchgrad.statistics import REGIONS, ChannelCalibration, Gathering, beside
from detxai.run import checks
from detxai.run.console import Console, Signals, Stopped
from detxai.run.plan import make_plan
from detxai.values import Box, ImageRef, Letterbox


class Pass:
    """One pass of a model over images: the GAPs of all convolutions below its head, by region and class.

    With labels their boxes and classes count; images without a label file are passed over. Without, what the model
    itself reports. Raises UsageError for a model without convolutions that gradients pass through.
    """

    def __init__(self, config: RunConfig) -> None:
        # Nothing is attributed here: no option of a method may stand in the way.
        plain = config.model_copy(update={"attribution": AttributionConfig(method=("drise",), evidence="none")})
        self.plan = make_plan(plain)
        if self.plan.network is None:
            raise UsageError(
                f"ParchGrad changes gradients inside a network, and {self.plan.info.name} is a black box "
                f"({self.plan.info.family})."
            )
        layers = convolutions(self.plan.network.trunk)
        gray = torch.full((1, 3, self.plan.size, self.plan.size), 0.5, device=self.plan.device)
        with torch.no_grad():
            self.convolutions = in_order(layers, lambda: self.plan.detector.predict(gray))
        self.classes = sorted(self.plan.info.names)
        channels = sum(conv.out_channels for conv in self.convolutions.values())
        self.gathered = {region: Gathering(len(self.classes), channels) for region in REGIONS}
        self.images = self.boxes = 0

    @torch.no_grad()
    def add(self, ref: ImageRef) -> bool:
        """Take in one image; False where it has no label file. Raises ImageError for one that cannot be used."""
        plan, settings = self.plan, self.plan.config.images
        drawn = None if plan.labels is None else plan.labels.read(ref)
        if plan.labels is not None and drawn is None:
            return False
        image = decode.load(ref, settings.window, settings.max_pixels)
        labels = None if drawn is None else drawn.at(image.width, image.height)
        square, box = plan.letterboxed(image.pixels)
        x = picture(square, plan.device)[None]
        with outputs(list(self.convolutions.values())) as seen:
            (candidates,) = plan.detector.predict(x.contiguous(memory_format=torch.channels_last))
        if labels is None:
            items = self._reported(candidates)
        else:
            drawn_boxes = boxes_to_letterbox([label.box for label in labels] or [(0.0,) * 4], box).tolist()
            items = [(label.class_id, tuple(b)) for label, b in zip(labels, drawn_boxes, strict=False)]
        known = [(self.classes.index(i), b) for i, b in items if i in plan.info.names]
        self._gather([seen[i][0] for i in range(len(seen))], box, known)
        return True

    def _reported(self, candidates: Candidates) -> list[tuple[int | None, Box]]:
        d = self.plan.config.detection
        kept = reported(candidates, conf=d.conf, iou=d.iou, max_det=d.max_det, classes=self.plan.classes)
        return [(class_id, tuple(candidates.boxes[anchor].tolist())) for anchor, class_id in kept]

    def _gather(self, features: Sequence[torch.Tensor], box: Letterbox, items: Sequence[tuple[int, Box]]) -> None:
        """Pool over the picture (without its padding) and over each of `items` (class, box in letterbox pixels)."""
        boxes = torch.tensor([inner(box), *(b for _, b in items)], device=self.plan.device)
        rows = gap(features, boxes, self.plan.size).double().cpu().numpy()
        self.gathered["whole"].add(rows[0], [class_id for class_id, _ in items])
        for row, (class_id, _) in zip(rows[1:], items, strict=True):
            self.gathered["detection"].add(row, [class_id])
        self.images, self.boxes = self.images + 1, self.boxes + len(items)

    def calibration(self, note: str) -> ChannelCalibration:
        """What came of the pass."""
        info = self.plan.info
        return ChannelCalibration(
            info.sha256,
            self.plan.size,
            tuple((name, conv.out_channels) for name, conv in self.convolutions.items()),
            {i: info.names[i] for i in self.classes},
            {region: gathered.statistics() for region, gathered in self.gathered.items()},
            self.images,
            self.plan.labels is not None,
            note,
        )


def inner(box: Letterbox) -> Box:
    """The picture's own place in its letterbox, xyxy pixels."""
    return (box.left, box.top, box.left + box.inner_width, box.top + box.inner_height)


def parchgrad(
    config: RunConfig, source: ImageSource, console: Console, output: Path | None, limit: int | None, note: str
) -> ExitCode:
    """Gather statistics over `source` (its first `limit` images) and write them to `output`, else beside the model.

    Raises UsageError, ModelError, OutputError, and NoInputError where no image could be used.
    """
    refs = checks.some_images(source)
    file = output or beside(config.model.path)
    work = Pass(config)
    atomic.require_writable(file.parent)
    failed = unlabelled = 0
    try:
        with Signals(), console.progress(source.count if limit is None else None):
            for ref in islice(refs, limit):
                try:
                    unlabelled += not work.add(ref)
                except ImageError as error:
                    failed += 1
                    console.say(f"{ref.path}: {error.message} ({error.code})", kind="warning")
                console.advance(work.images, f"{work.boxes} boxes")
    except Stopped as stop:
        console.say(f"{stop}; nothing was written", level=-1, kind="error")
        return ExitCode(stop.code)
    if not work.images:
        raise NoInputError(
            f"No image could be used: {failed} failed, {unlabelled} have no label file.", "Check SOURCE and --labels."
        )
    made = work.calibration(note)
    atomic.write_file(file, made.packed())
    _report(console, config, made)
    if unlabelled:
        console.say(f"{unlabelled} images without a label file were passed over")
    console.say(f"{work.images} images, {work.boxes} boxes: {file}")
    return ExitCode.SOME_FAILED if failed else ExitCode.OK


def _report(console: Console, config: RunConfig, made: ChannelCalibration) -> None:
    """How many boxes and images each class has, and how many channels parchgrad-cls keeps for it."""
    selection = Selection(config.parchgrad, made)
    rows = []
    for index, (class_id, name) in enumerate(made.names.items()):
        parts = [name]
        for region in REGIONS:
            kept = float(selection.of_class(class_id, region).float().mean())
            parts += [str(int(made.statistics[region].count[index])), f"{100 * kept:.0f} %"]
        rows.append(tuple(parts))
    console.table(
        "Channels that parchgrad-cls keeps", ("class", "images", "over the picture", "boxes", "over the box"), rows
    )

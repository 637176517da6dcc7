"""ParchGrad in a run: the hooked convolutions of the detector, and which channels are kept for each target."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from detxai.attribution.methods import METHODS, Settings
from detxai.attribution.points import Ask, Segment
from detxai.config.settings import ParchGradConfig
from detxai.errors import UsageError
from detxai.models.detector import Differentiable
from detxai.models.trunk import convolutions
from detxai.parchgrad.channels import FEWEST, Choice, Statistics, first, gap, outputs
from detxai.parchgrad.gradient import ParchGrad, with_channels
from detxai.parchgrad.statistics import ChannelCalibration
from detxai.values import Letterbox, Target

CLASS, INSTANCE = "parchgrad-cls", "parchgrad-ins"
#: The channels that are kept for each target of one image.
Masks = dict[Target, Tensor]


class Selection:
    """What the statistics `made` say under the settings `config`: only of the convolutions that are hooked."""

    def __init__(self, config: ParchGradConfig, made: ChannelCalibration) -> None:
        self.config, self.made = config, made
        self.choice = Choice(config.alpha, config.quantile, config.normality)
        start = first(len(made.layers), config.ratio)
        self.names, self.widths = [name for name, _ in made.layers[start:]], made.widths[start:]
        self._below = sum(made.widths[:start])
        self.classes = list(made.names)

    def statistics(self, region: str) -> Statistics:
        """Those over `whole` pictures or over the box of a `detection`."""
        return self.made.statistics[region].upper(self._below)

    def of_class(self, class_id: int, region: str) -> Tensor:
        """(channels,) bool: what parchgrad-cls keeps for a class of the model."""
        return self.choice.of_class(self.statistics(region), self.classes.index(class_id), self.widths)


class ParchGradSession:
    """ParchGrad for one detector on its device, with the statistics `made` for it.

    `hooks` is what the engine needs; `sha256` is that of the statistics. Raises UsageError where these name
    convolutions that the detector has not.
    """

    def __init__(
        self,
        config: ParchGradConfig,
        made: ChannelCalibration,
        detector: Differentiable,
        device: torch.device,
    ) -> None:
        self.selection, self.region, self.device = Selection(config, made), config.region, device
        layers = convolutions(detector.trunk)
        widths = {name: conv.out_channels for name, conv in layers.items()}
        if any(widths.get(name) != width for name, width in made.layers):
            raise UsageError(
                f"The channel statistics of {detector.info.name} name convolutions that it has not.",
                "Make new ones with: detxai calibrate parchgrad SOURCE",
            )
        hooked = [layers[name] for name in self.selection.names]
        self.hooks = ParchGrad(hooked, config.gamma, config.variance, detector.trunk.whole)
        self.sha256 = made.sha256
        self._of_class: dict[int, Tensor] = {}

    @cached_property
    def _statistics(self) -> Statistics:
        return self.selection.statistics(self.region).to(self.device)

    @contextlib.contextmanager
    def watching(self, gradients: Sequence[str]) -> Iterator[dict[int, Tensor]]:
        """What the hooked convolutions put out in a forward pass in here, if any of `gradients` needs it, by index."""
        with outputs(self.hooks.convolutions if INSTANCE in gradients else ()) as seen:
            yield seen

    def masks(self, gradient: str, targets: Sequence[Target], seen: dict[int, Tensor], letterbox: Letterbox) -> Masks:
        """Which channels the modified `gradient` keeps for `targets`, (channels,) bool by target.

        `seen`: what the hooked convolutions put out at the image; `letterbox`: its place in the input.
        """
        if gradient == CLASS:
            return {target: self._class(target.class_id) for target in targets}
        if not targets:
            return {}
        boxes = torch.tensor(
            [letterbox.place if self.region == "whole" else t.box for t in targets], device=self.device
        )
        rows = gap([seen[i][0] for i in range(len(self.hooks.convolutions))], boxes, letterbox.shape)
        choice, widths = self.selection.choice, self.selection.widths
        return {
            target: choice.of_instance(self._statistics, row, widths) for target, row in zip(targets, rows, strict=True)
        }

    def _class(self, class_id: int) -> Tensor:
        if class_id not in self._of_class:
            self._of_class[class_id] = self.selection.of_class(class_id, self.region).to(self.device)
        return self._of_class[class_id]

    def ask(
        self,
        method: str,
        gradient: str,
        paths: Sequence[Segment],
        targets: Sequence[Target],
        settings: Settings,
        masks: Masks,
    ) -> Ask:
        """The coroutine of `method` with the modified `gradient`, in float32: its range is too wide for less."""
        settings = replace(settings, modified=True, dtype=torch.float32)
        maps = yield from with_channels(METHODS[method](paths, targets, settings), masks)
        return [
            one if bool(masks[one.target].any()) else replace(one, notes=(*one.notes, self._why(gradient, one.target)))
            for one in maps
        ]

    def _why(self, gradient: str, target: Target) -> str:
        """Why nothing is kept, for the record."""
        plain = "the plain gradient is shown"
        if gradient == INSTANCE:
            return f"{gradient}: no channel is above its calibration; {plain}"
        name = self.selection.made.names[target.class_id]
        count = int(self._statistics.count[self.selection.classes.index(target.class_id)])
        if count < FEWEST:
            return f"{gradient}: {count} samples of {name} in the calibration are too few; {plain}"
        return f"{gradient}: no channel passes the tests for {name}; {plain}"

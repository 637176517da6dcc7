"""The three that are compared, on one model, one device and the same targets: detxai, Captum, the plain loop."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from captum.attr import IntegratedGradients
from compare_rules import Case
from torch import Tensor

from detxai.attribution.engine import Engine
from detxai.attribution.integral import DEFAULT_RULE, integrated_gradients
from detxai.attribution.methods import METHODS
from detxai.attribution.points import Ask, Entered, TargetMap
from detxai.attribution.quadrature import Mesh, Rule
from detxai.attribution.rules import gauss_legendre
from detxai.models.detector import Detector
from detxai.models.heads.anchor_based import AnchorBased, score_logit
from detxai.models.heads.anchor_free import AnchorFree
from detxai.run.engine import engine
from detxai.run.plan import Plan
from detxai.values import Target

#: Largest completeness error that a user wants to see, relative to max(|Δ|, 1).
ERROR = 0.05

ImageSource = list[list[TargetMap]]
Pins = Sequence[tuple[Case, Target]]


@dataclass(frozen=True, eq=False)
class Bench:
    """One model on one device, and how long things may take."""

    plan: Plan
    options: argparse.Namespace

    @property
    def detector(self) -> Detector:
        """The model that all contenders run."""
        return self.plan.detector

    @property
    def device(self) -> torch.device:
        """Where they run it."""
        return self.plan.device

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision that all contenders run in."""
        if self.plan.settings.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.plan.settings.dtype)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # detxai

    @cached_property
    def engine(self) -> Engine:
        """The engine as `detxai explain` makes it, once a run."""
        return engine(self.plan)

    def detxai(self, work: Sequence[Case], tolerance: float = ERROR, rule: Rule | None = None) -> ImageSource:
        """detxai's maps of the targets of each case; with a `rule`, that and no refinement."""

        def ask(case: Case, part: tuple[Target, ...]) -> Ask:
            settings = replace(self.plan.settings, tolerance=tolerance)
            if rule is None:
                return METHODS["ig"]([case.line], part, settings)
            fixed: dict[str, Any] = {"tolerance": math.inf, "max_evaluations": gradients(rule)}
            line = case.line if settings.stem is None else Entered(case.line, settings.stem)
            return integrated_gradients(line, part, rule=rule, dtype=settings.dtype, **fixed)

        def job(case: Case) -> Ask:
            step, maps = self.plan.targets_at_once, []
            for start in range(0, len(case.targets), step):
                maps += yield from ask(case, case.targets[start : start + step])
            return maps

        jobs = ((i, job(case)) for i, case in enumerate(work))
        done = dict(self.engine.run(jobs, self.plan.in_flight))
        self.synchronize()
        return [done[i] for i in range(len(work))]

    # the whole network

    def forward(self, x: Tensor, anchors: Tensor, classes: Tensor) -> Tensor:
        """(n,) logits of the pinned anchors and classes, one a row of x, all layers and heads."""
        rows = torch.arange(len(x), device=x.device)
        with self.autocast():
            outputs = self._outputs(x)
        if isinstance(self.detector, AnchorBased):
            return score_logit(outputs[rows, 4, anchors], outputs[rows, 5 + classes, anchors])
        return outputs[rows, classes, anchors]

    def _outputs(self, x: Tensor) -> Tensor:
        """(n, channels, anchors) raw outputs of the whole network that the logits come from."""
        d = self.detector
        if isinstance(d, AnchorBased):
            maps = d.trunk(x, {head.feed for head in d.heads})
            raw = [head.conv(maps[head.feed]).unflatten(1, (len(head.anchors), -1)) for head in d.heads]
            return torch.cat([r.transpose(1, 2).flatten(2) for r in raw], 2).float()
        if not isinstance(d, AnchorFree):
            raise SystemExit(f"{d.info.name}: no forward of its whole network is known here.")
        features = d.features(x)
        logits = [head(f).flatten(2) for head, f in zip(d.class_heads, features, strict=True)]
        for head, f in zip([*d.box_heads, *(d.angle_heads or [])], features * 2, strict=False):
            head(f)
        return torch.cat(logits, 2).float()

    def captum(self, pins: Pins, nodes: int, batch: int, at_once: int) -> list[Tensor]:
        """Captum's maps (size, size) of the pinned targets, `at_once` of them in a call."""
        method = IntegratedGradients(self.forward)
        maps: list[Tensor] = []
        for start in range(0, len(pins), at_once):
            part = pins[start : start + at_once]
            x, b = (_batch([getattr(case.line, end) for case, _ in part]) for end in ("x", "b"))
            anchors, classes = (
                torch.tensor([getattr(target, name) for _, target in part], device=self.device)
                for name in ("anchor", "class_id")
            )
            attributed = method.attribute(
                x, b, additional_forward_args=(anchors, classes), n_steps=nodes, internal_batch_size=batch
            )
            maps += attributed.detach().sum(1).unbind()
        self.synchronize()
        return maps

    def plain(self, pins: Pins, nodes: int, batch: int) -> list[Tensor]:
        """The same with a loop as one writes it: Gauss–Legendre nodes, a gradient each, `batch` at a time."""
        rule = gauss_legendre(nodes)
        maps = []
        for case, target in pins:
            total = torch.zeros_like(case.line.x)
            for start in range(0, nodes, batch):
                alphas, weight = (part[start : start + batch] for part in (rule.nodes, rule.weights))
                x = _batch([case.line.at(alpha) for alpha in alphas]).requires_grad_()
                pin = (torch.full((len(x),), n, device=x.device) for n in (target.anchor, target.class_id))
                (gradient,) = torch.autograd.grad(self.forward(x, *pin).sum(), x)
                w = torch.tensor(weight, device=x.device, dtype=x.dtype)
                total += (w[:, None, None, None] * gradient).sum(0)
            maps.append(case.line.product(total))
        self.synchronize()
        return maps


def _batch(images: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(images)).contiguous(memory_format=torch.channels_last)


def pins_of(work: Iterable[Case], limit: int) -> list[tuple[Case, Target]]:
    """At most `limit` (case, target), those of different images first."""
    rows = [(k, i, case, target) for i, case in enumerate(work) for k, target in enumerate(case.targets)]
    return [(case, target) for *_, case, target in sorted(rows, key=lambda row: row[:2])[:limit]]


def with_nodes(nodes: int) -> Rule:
    """The default rule with as many panels as make `nodes` gradients, or just more."""
    rules = (replace(DEFAULT_RULE, panels=panels) for panels in range(1, nodes + 1))
    return next((rule for rule in rules if gradients(rule) >= nodes), DEFAULT_RULE)


def gradients(rule: Rule) -> int:
    """How many gradients `rule` takes before any refinement."""
    return sum(Mesh(rule).missing().values())

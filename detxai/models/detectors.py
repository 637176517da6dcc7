"""Detectors: one file a family of heads, one entry in `HEADS`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detxai.errors import ImageError, ModelError, memory_refused, sound_if_it_had_room
from detxai.models import upstream  # noqa: F401  (before any ultralytics.*)
from detxai.models.bounds import Bounds
from detxai.models.detector import Candidates, Detector, Differentiable, Pin
from detxai.models.heads.anchor_based import AnchorBased
from detxai.models.heads.anchor_free import AnchorFree
from detxai.models.heads.black_box import BlackBox
from detxai.models.heads.open_vocabulary import OpenVocabulary
from detxai.models.heads.rtdetr import RTDETR
from detxai.models.trunk import channels_of, read_colour
from detxai.values import Checkpoint, Target

#: Class of the last layer -> detector.
HEADS: dict[str, Callable[..., Detector]] = {
    "Detect": AnchorFree,
    "Segment": AnchorFree,
    "Segment26": AnchorFree,
    "Pose": AnchorFree,
    "Pose26": AnchorFree,
    "OBB": AnchorFree,
    "OBB26": AnchorFree,
    "v10Detect": AnchorFree,
    "WorldDetect": OpenVocabulary,
    "YOLOEDetect": OpenVocabulary,
    "YOLOESegment": OpenVocabulary,
    "YOLOESegment26": OpenVocabulary,
    "RTDETRDecoder": RTDETR,
    "legacy": AnchorBased,
    "darknet": AnchorBased,
    "export": BlackBox,
}

#: Two ways to the same logit, in float32, differ by less than this.
SAME = 1e-3
#: What layers raise that do not fit together.
MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@sound_if_it_had_room()
def build(checkpoint: Checkpoint, branch: str | None = None, *, keep: bool = True) -> Detector:
    """The detector for `checkpoint`, whose network stays as it is; not `keep`: it becomes the detector's own.

    Then nothing is in memory twice. Raises ModelError for a head that cannot be explained, DeviceError.
    """
    if checkpoint.kind == "ultralytics":
        layers = getattr(checkpoint.module, "model", None)
        head = type(layers[-1]).__name__ if layers is not None else type(checkpoint.module).__name__
    else:
        head = checkpoint.kind
    if head not in HEADS:
        raise ModelError(
            f"{checkpoint.name} ends in a {head} head, which is not a detector that detxai explains.",
            f"Supported: {', '.join(HEADS)}.",
        )
    try:
        own = replace(checkpoint, module=copy.deepcopy(checkpoint.module)) if keep else checkpoint
        _see_colour(own)
        return HEADS[head](own, branch)
    except MISFITS as error:
        raise ModelError(f"{checkpoint.name}: its {head} head is not built as expected: {error!s:.200}") from error


def _see_colour(checkpoint: Checkpoint) -> None:
    """Make its network read RGB where it reads gray, in place; one of more channels stays as it is."""
    if checkpoint.kind not in ("ultralytics", "legacy"):
        return
    network: Any = checkpoint.module
    first = (network.model if checkpoint.kind == "ultralytics" else network.layers)[0]
    if channels_of(first) == 1:
        read_colour(first)


def contrasting(values: Callable[[Tensor, Sequence[tuple[int, Target]]], Tensor]) -> Callable[..., Tensor]:
    """`values` of a detector, for targets of the kind `contrast` too: the difference of two class logits."""

    def both(x: Tensor, pins: Sequence[tuple[int, Target]]) -> Tensor:
        differences = [i for i, (_, target) in enumerate(pins) if target.kind == "contrast"]
        if not differences:
            return values(x, pins)
        first = [(row, replace(t, kind="class") if t.kind == "contrast" else t) for row, t in pins]
        others = [(row, replace(t, kind="class", class_id=t.other or 0)) for row, t in (pins[i] for i in differences)]
        logits = values(x, [*first, *others])
        at = torch.tensor(differences, device=logits.device)
        return logits[: len(pins)].index_add(0, at, logits[len(pins) :], alpha=-1)

    return both


@torch.no_grad()
def sound(detector: Detector, x: Tensor, *, asked: bool = False) -> Candidates:
    """What `detector` predicts on x (1, 3, rows, columns).

    `asked`: the user gave that size. Raises ModelError where that is not finite, or impossible, or without bounds.
    """
    try:
        with Bounds(detector.info.name, x.shape[-2] * x.shape[-1], asked=asked):
            (made,) = detector.predict(x)
            candidates = made.brought()
    except ImageError as error:
        message = f"{detector.info.name} is broken: on a test picture, {error}."
        raise ModelError(message, "Nothing was explained; export or train the model again.") from error
    except MISFITS as error:
        if x.device.type != "cpu" or memory_refused(error):
            raise  # the machine's fault
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"{detector.info.name} cannot be run: {said:.200}.", "Export or train it again.") from error
    return candidates


def self_test(detector: Differentiable, x: Tensor, *, asked: bool = False) -> float:
    """Largest |gradient| of the strongest class logit on x (1, 3, rows, columns).

    Where the sparse values are not those of the whole network, a layer computes in another way than its kind is known
    for: then `detector` runs whole from now on, and its `info.sparse` says so. Raises ModelError as `sound` does; where
    the values are not those predicted even so; or when the gradient is zero or not finite: then no gradient method can
    work (a detached or quantised head).
    """
    candidates = sound(detector, x, asked=asked)
    targets = [_strongest(candidates, level) for level in candidates.levels.unique().tolist()]
    whole = torch.stack([candidates.logits[target.anchor, target.class_id] for target in targets])
    x = x.detach().clone().requires_grad_(True)
    values = detector.values(x, [Pin(0, target) for target in targets])
    wrong = _unlike(values, whole)
    if wrong and detector.info.sparse:
        detector.trunk.give_up_windows()
        detector.info = replace(detector.info, sparse=False)
        values = detector.values(x, [Pin(0, target) for target in targets])
        wrong = _unlike(values, whole)
    if wrong:
        raise ModelError(f"{detector.info.name}: {wrong}.")
    (gradient,) = torch.autograd.grad(values[whole.argmax()], x)
    largest = float(gradient.abs().max())
    if not 0 < largest < float("inf"):
        raise ModelError(
            f"{detector.info.name}: the gradient at the input is {largest}; the model cannot be explained by gradients."
        )
    return largest


def _strongest(candidates: Candidates, level: int) -> Target:
    """The strongest class logit of a level."""
    here = candidates.logits.masked_fill((candidates.levels != level)[:, None], -torch.inf)
    anchor, class_id = divmod(int(here.argmax()), here.shape[1])
    return Target(anchor, level, "class", class_id, context=candidates.context)


def _unlike(values: Tensor, whole: Tensor) -> str | None:
    """How one of `values` differs from what the `whole` network says; None where none does."""
    for value, own in zip(values.tolist(), whole.tolist(), strict=True):
        if not abs(value - own) <= SAME * max(abs(own), 1.0):  # so that NaN differs
            return f"{value:.6g} where the whole network says {own:.6g}"
    return None

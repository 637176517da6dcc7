"""What makes no sense for this model or this machine, refused before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from detxai.config.settings import AttributionConfig, DetectionConfig, RunConfig
from detxai.errors import UsageError
from detxai.evidence.model import EvidenceLevel
from detxai.models.detector import DetectorInfo
from detxai.output.lettering import require_font
from detxai.vocabulary import BLACK_BOX_METHODS, EDGES, GRADIENT_METHODS, METHODS


def device_of(name: str) -> torch.device:
    """The torch device for `--device`; raises UsageError for one that is not there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(f"--device {name}: this machine has {count} CUDA devices.", "Use --device cpu.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: not available on this machine.", "Use --device cpu.")
    return device


def check_font(file: Path | None) -> None:
    """Raise UsageError for a `file` that is no font."""
    if file is None:
        return
    try:
        require_font(file)
    except OSError as error:
        raise UsageError(f"--font {file}: {error}.", "Give a TrueType or OpenType file.") from error


def target_kinds(wanted: Sequence[str], info: DetectorInfo) -> tuple[str, ...]:
    """The targets `wanted`, `box` as its edges. Raises UsageError for those that the model does not have."""
    expanded = [kind for name in wanted for kind in (EDGES if name == "box" else (name,))]
    for kind in expanded:
        if kind == "contrast" and len(info.names) == 1:
            raise UsageError("--target contrast: the model has one class, and nothing to tell it from.")
        if kind not in (*info.targets, "contrast"):
            raise UsageError(
                f"--target {kind}: a {info.family} model with its {info.head} head has none.",
                f"It has: {', '.join(info.targets)}.",
            )
    return tuple(dict.fromkeys(expanded))


def check_gate(config: RunConfig, targets: Sequence[str]) -> None:
    """Raise UsageError for a policy gate on verdicts that nobody gives."""
    nobody = EvidenceLevel(config.attribution.evidence) is EvidenceLevel.NONE or "class" not in targets
    if config.run.fail_on and nobody:
        raise UsageError("--fail-on needs verdicts.", "Leave out --evidence none, and keep class among --target.")


def check_boxes(config: DetectionConfig) -> None:
    """Raise UsageError where candidates and given predictions make no sense."""
    if config.candidates is not None and config.predictions is not None:
        raise UsageError("--candidates asks the model for boxes, --predictions brings its own.", "Leave one out.")
    if config.candidates is not None and config.candidates >= config.conf:
        raise UsageError(f"--candidates {config.candidates:g} must be below --conf {config.conf:g}.")


def check_inputs(config: RunConfig, info: DetectorInfo) -> None:
    """Raise UsageError as `check_boxes` does, and for bands to show that pictures of the model do not have."""
    check_boxes(config.detection)
    band = config.images.band
    if band and info.channels == 3:
        raise UsageError(f"--band chooses among many, and {info.name} reads pictures of 3 channels.", "Leave it out.")
    if band and max(band) > info.channels:
        raise UsageError(f"--band {max(band)}: {info.name} reads pictures of {info.channels} channels, counted from 1.")


def check_methods(methods: Sequence[str], targets: Sequence[str], info: DetectorInfo, *, black_box: bool) -> None:
    """Raise UsageError for methods that make no sense for the model or the targets."""
    for name in methods:
        if name in BLACK_BOX_METHODS and tuple(targets) != ("class",):
            raise UsageError(f"--method {name} sees detections only: it explains --target class, nothing else.")
        if name not in BLACK_BOX_METHODS and black_box:
            raise UsageError(
                f"--method {name} needs gradients, and {info.name} is a black box ({info.family}).",
                f"These methods work for it: --method {', '.join(BLACK_BOX_METHODS)}.",
            )
        if METHODS[name].one_sided and any(kind in EDGES for kind in targets):
            raise UsageError(
                f"--method {name} keeps what pushes a score up, and an edge has no up.",
                "For edges: --method gradcam or odam.",
            )


def check_gradients(attribution: AttributionConfig) -> None:
    """Raise UsageError for modified gradients with a method that shows none at the picture."""
    modified = [name for name in attribution.gradient if name != "plain"]
    for name in attribution.method if modified else ():
        if name not in GRADIENT_METHODS:
            raise UsageError(
                f"--gradient {modified[0]} changes the gradient at the picture; --method {name} shows none.",
                f"It goes with --method {', '.join(GRADIENT_METHODS)}.",
            )


def check_baseline_folder(baseline: str, methods: Sequence[str]) -> None:
    """Raise UsageError for a folder of baselines with a method that takes one."""
    if Path(baseline).is_dir() and tuple(methods) != ("expected",):
        other = next(m for m in methods if m != "expected")
        raise UsageError(
            f"--baseline {baseline} is a folder: only --method expected averages over pictures, {other} takes one.",
            "Give a file, or only --method expected.",
        )

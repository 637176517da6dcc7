"""What of the settings decides an image's files: the key by which a second run knows what is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from detxai.config.settings import RunConfig
from detxai.vocabulary import BASELINES


@lru_cache(maxsize=16)
def _digest(file: str, _changed: int) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _content(file: str | Path | None) -> str | None:
    """SHA-256 of a file (read once while it does not change) or of a folder's files; None where there is none."""
    path = Path(file) if file is not None else None
    if path and path.is_dir():
        parts = [f"{part.name} {_content(part)}" for part in sorted(path.iterdir()) if part.is_file()]
        return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
    return _digest(str(path), path.stat().st_mtime_ns) if path and path.is_file() else None


def fingerprint_keys(cfg: RunConfig) -> dict[str, Any]:
    """Every setting that changes a file of the tree; files count by name or content, not by place.

    `run.precision` counts as it stands: resolve `auto` first where machines must not share a tree.
    """
    sections = cfg.plain()
    keys: dict[str, Any] = {
        "model.name": Path(cfg.model.path).name if cfg.model.path else None,
        "model.names": _content(cfg.model.names),
        "model.head": cfg.model.head,
        "images.window": cfg.images.window,
        "run.precision": cfg.run.precision,
    }
    if cfg.images.pair:
        keys["images.energy_colors"] = cfg.images.energy_colors
    if cfg.images.band:
        keys["images.band"] = list(cfg.images.band)
    if cfg.images.views:
        keys["images.views"] = cfg.images.views
    if cfg.model.module_path:
        keys["model.module_path"] = _content(cfg.model.module_path)
    for section in ("detection", "attribution"):
        keys.update({f"{section}.{name}": value for name, value in sections[section].items()})
    del keys["detection.letterbox"], keys["detection.predictions_base"]  # what became of them counts
    if not cfg.detection.rect:
        del keys["detection.rect"]
    if cfg.attribution.map_tolerance is None:
        del keys["attribution.map_tolerance"]
    for key in ("detection.labels", "detection.predictions"):
        keys[key] = sections["detection"][key.partition(".")[2]] is not None
    keys["attribution.calibration"] = [_content(file) for file in cfg.attribution.calibration]
    if cfg.attribution.baseline not in BASELINES:
        keys["attribution.baseline"] = _content(cfg.attribution.baseline)
        keys["attribution.baseline.name"] = Path(cfg.attribution.baseline).name
    if cfg.attribution.gradient != ("plain",):
        keys.update({f"parchgrad.{name}": value for name, value in sections["parchgrad"].items()})
    keys.update({f"output.{name}": sections["output"][name] for name in ("overlays", "maps")})
    drawn = cfg.output.overlays != "none"
    keys["output.strip"] = cfg.output.strip and drawn
    if drawn and cfg.output.font is not None:
        keys["output.font"] = _content(cfg.output.font)
    if drawn and cfg.output.scale != "own":
        keys["output.scale"] = cfg.output.scale
    if drawn and cfg.output.overlay_format != "png":
        keys["output.overlay_format"] = cfg.output.overlay_format
    return keys


def fingerprint(
    cfg: RunConfig,
    image_sha256: str,
    model_sha256: str,
    schema: str,
    drawn: Sequence[str | None] = (),
    calibrations: Sequence[str] = (),
    fit: str | None = None,
) -> str:
    """Hex SHA-256 of all that decides an image's files.

    `drawn`: digests of its labels and given predictions; `calibrations`: of the statistics that are used, given or
    found beside the model; `fit`: how the picture becomes the network's input, None where that was never another way.
    """
    parts: dict[str, Any] = {
        "config": fingerprint_keys(cfg),
        "image": image_sha256,
        "model": model_sha256,
        "schema": schema,
    }
    if any(drawn):
        parts["drawn"] = list(drawn)
    if fit is not None:
        parts["letterbox"] = fit
    if calibrations:
        parts["calibrations"] = list(calibrations)
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

"""What is compared: methods with gradients, each under the name it has in every table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from detxai.config.settings import OutputConfig, RunConfig
from detxai.vocabulary import GRADIENT_METHODS


@dataclass(frozen=True)
class Variant:
    """A method with a gradient; `label` is its name in every table."""

    method: str
    gradient: str

    @property
    def label(self) -> str:
        return self.method if self.gradient == "plain" else f"{self.method}.{self.gradient}"


def variants(config: RunConfig) -> list[Variant]:
    """Every method with every gradient; those that show no gradient at the picture, with the plain one where asked."""
    a = config.attribution
    return [
        Variant(m, g) for m in a.method for g in a.gradient
        if g == "plain" or m in GRADIENT_METHODS or "plain" not in a.gradient
    ]  # fmt: skip


def bare(config: RunConfig) -> RunConfig:
    """`config` for maps of what is detected and nothing else: one target, no evidence, no files."""
    detection: dict[str, Any] = {"labels": None, "candidates": None, "predictions": None}
    attribution: dict[str, Any] = {"target": ("class",), "as_class": (), "evidence": "none"}
    return config.model_copy(
        update={
            "detection": config.detection.model_copy(update=detection),
            "attribution": config.attribution.model_copy(update=attribution),
            "output": OutputConfig(overlays="none"),
        }
    )

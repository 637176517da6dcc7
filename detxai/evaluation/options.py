"""What `detxai evaluate` may be told beside the settings it shares with `detxai explain`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from detxai.errors import UsageError

#: Steps of a curve, by default; detections judged in an image, unless the run's settings say otherwise.
STEPS, MAX_DET = 16, 2
#: Gaussian over a map before its pixels are ranked: standard deviation as a share of sqrt(box area). As much as the
#: overlays are smoothed: a map is judged as it is shown. Single pixels in the order of a map are speckle, which blinds
#: a detector whatever the map says.
SMOOTH = 0.04
#: What decides which pixel goes first: what speaks for the class, or what matters either way.
ORDERS = ("signed", "absolute")
#: How many images `--sanity` takes: enough to see correlations fall, and few enough to afford six networks on each.
SANITY_IMAGES = 8


@dataclass(frozen=True)
class Options:
    """`stability`, `sanity`: on how many of the first images. `masks`: a folder of part masks (`samples/README.md`)."""

    output: Path = Path("runs/evaluate")
    steps: int = STEPS
    smooth: float = SMOOTH
    order: str = "signed"
    seed: int = 0
    limit: int | None = None
    stability: int = 0
    sanity: int = 0
    masks: Path | None = None
    baselines: bool = True
    score_precision: str = "fp32"
    force: bool = False

    def __post_init__(self) -> None:
        for name, least in (("steps", 2), ("limit", 1), ("stability", 0), ("sanity", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name} {value}: it must be at least {least}.")
        if not 0 <= self.smooth <= 1:
            raise UsageError(f"--smooth {self.smooth:g}: it is a share of the box's side, from 0 to 1.")
        if self.order not in ORDERS:
            raise UsageError(f"--order {self.order!r}: it is signed or absolute.")
        if self.score_precision not in ("fp32", "bf16"):
            raise UsageError(f"--score-precision {self.score_precision!r}: it is fp32 or bf16.")
        if self.masks is not None and not self.masks.is_dir():
            raise UsageError(f"--masks {self.masks}: there is no such folder.")

"""The reliability diagram of a calibration: how often detections of a trust are right. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

from detxai.errors import UsageError
from detxai.evidence.calibration import Bin

KINDS = (".svg", ".png", ".pdf")


def require_drawable(file: Path) -> None:
    """Raise UsageError for a file that is no picture, and where matplotlib is not installed."""
    if file.suffix.lower() not in KINDS:
        raise UsageError(
            f"--plot {file}: the diagram is written as {', '.join(KINDS)}.", "Give a name such as plot.svg."
        )
    if find_spec("matplotlib") is None:
        raise UsageError("--plot draws with matplotlib.", "pip install matplotlib")


def draw(bins: Sequence[Bin], title: str, kind: str) -> bytes:
    """The diagram of `bins` as `kind` (svg, png, pdf): on the diagonal trust keeps its word."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="#8A8A8A", linestyle="--")
    axis.plot([b.trust for b in bins], [b.right for b in bins], color="#0072B2")
    most = max(b.detections for b in bins)
    sizes = [max(400 * b.detections / most, 20) for b in bins]
    axis.scatter([b.trust for b in bins], [b.right for b in bins], sizes, color="#0072B2", alpha=0.6)
    for b in bins:
        axis.annotate(str(b.detections), (b.trust, b.right), textcoords="offset points", xytext=(8, -12))
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="trust", ylabel="share that is right", title=title, aspect="equal")
    file = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "detxai"}):  # the same calibration, the same bytes
        figure.savefig(
            file, format=kind, metadata=None if kind == "png" else {"Date" if kind == "svg" else "CreationDate": None}
        )
    return file.getvalue()

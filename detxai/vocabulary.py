"""The words with a fixed meaning, every fact about each once: methods, targets, baselines, trials, verdicts.

Plain Python, imported by everybody: help, settings, checks, captions and records read the same facts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

#: Name and number of the format of records and summaries.
RECORD_SCHEMA: Final = "detxai.record/1"
SUMMARY_SCHEMA: Final = "detxai.summary/1"


@dataclass(frozen=True)
class Method:
    """An attribution method. To add one: a row in `METHODS` here, and its coroutine in `attribution/methods.py`.

    `title`: its name in the literature, for captions. `needs`: gradients of the network, or nothing but detections
    (then every model will do). `where` its map is made:
    at the picture or in a layer. `promise`: the sum of its map is known to be near F(x) − F(baseline), with a bound.
    `unit` of its map; None: that of the target. `baseline`: what it always compares with; None: what the run says.
    `one_sided`: it keeps what pushes a target up, and an edge of a box is as much held by what pushes it down.
    """

    title: str
    about: str
    needs: Literal["gradients", "detections"] = "gradients"
    where: Literal["picture", "layer"] = "picture"
    promise: bool = False
    unit: str | None = None
    baseline: str | None = None
    one_sided: bool = False


#: In the order of help and README.
METHODS: dict[str, Method] = {
    "ig": Method("integrated gradients", "integrated gradients, to a known error", promise=True),
    "expected": Method("expected gradients", "integrated gradients, mean over several baselines", promise=True),
    "idgi": Method("IDGI", "integration weighted by the gradient's direction"),
    "grad": Method("the gradient", "the gradient at the picture", baseline="none"),
    "inputxgrad": Method("input times gradient", "picture times gradient", baseline="black"),
    "smoothgrad": Method("SmoothGrad", "mean gradient under noise", baseline="none"),
    "gradcam": Method(
        "Grad-CAM", "a layer's channels by their mean gradient", where="layer", unit="activation", baseline="none"
    ),
    "gradcam++": Method(
        "Grad-CAM++",
        "a layer's channels by what pushes up",
        where="layer",
        unit="activation",
        baseline="none",
        one_sided=True,
    ),
    "layercam": Method(
        "LayerCAM",
        "a layer's cells by what pushes up",
        where="layer",
        unit="activation",
        baseline="none",
        one_sided=True,
    ),
    "odam": Method(
        "ODAM", "a layer's cells by their smoothed gradient", where="layer", unit="activation", baseline="none"
    ),
    "drise": Method("D-RISE", "masked pictures, for every model", needs="detections", unit="similarity"),
}
#: Methods that show a gradient at the picture: those that `--gradient` changes.
GRADIENT_METHODS = tuple(n for n, m in METHODS.items() if m.needs == "gradients" and m.where == "picture")
#: Methods that weigh what a layer responds to.
LAYER_METHODS = tuple(n for n, m in METHODS.items() if m.where == "layer")
#: Methods that only look at detections: for every model.
BLACK_BOX_METHODS = tuple(n for n, m in METHODS.items() if m.needs == "detections")

GRADIENTS = ("plain", "parchgrad-cls", "parchgrad-ins")

#: The targets that are edges of the box, in the order of xyxy.
EDGES = ("left", "top", "right", "bottom")
#: Units of the outputs that are explained.
UNITS: dict[str, str] = {"class": "logits", "contrast": "logits", "objectness": "logits", **dict.fromkeys(EDGES, "px")}
#: What `--target` takes; `box` is the four edges, on one picture.
TARGETS = (*UNITS, "box")

#: Baselines in one colour, in [0, 1]; `gray` is the padding every YOLO has learned to ignore.
COLOURS: dict[str, float] = {"black": 0.0, "white": 1.0, "gray": 114 / 255}
#: What `--baseline` takes beside files: `auto` follows the picture's own ground.
BASELINES = ("auto", *COLOURS, "blur", "mean")
#: What `expected` averages over beside the baseline asked for.
EXPECTED_BASELINES = (*COLOURS, "blur")

#: Trials of the evidence: what is replaced. `FADED`: places on the path from the fill to the picture, earlier first.
WITHOUT_BOX, ONLY_BOX, WITHOUT_TOP, SOFTENED = "without box", "only box", "without top", "softened"
FADED: dict[str, float] = {"quarter of the way": 0.25, "half of the way": 0.5}

#: Which pictures are written. `look`: the overview of an image, and boxes that are not supported.
OVERLAYS = ("all", "look", "overview", "none")
#: Scales of colour on single overlays.
SCALES = ("own", "common")

EVIDENCE = ("none", "basic", "full")
#: From good to bad; `unknown`: unconverged, degenerate or not an integral.
VERDICTS = ("supported", "weak", "unsupported", "unknown")


def unit(method: str, target: str, gradient: str = "plain") -> str:
    """The unit of a map of `target` by `method`, as captions write it."""
    own = METHODS[method].unit
    if own is not None:
        return own
    return UNITS[target] if gradient == "plain" else f"modified {UNITS[target]}"

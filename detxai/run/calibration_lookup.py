"""What labelled images said of this model, found for a run: trust and thresholds, and the promise of a list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detxai.config.settings import AttributionConfig, RunConfig
from detxai.errors import UsageError
from detxai.evidence.calibration import SUFFIX, EvidenceCalibration, read
from detxai.evidence.model import EvidenceLevel
from detxai.evidence.promise import Promise
from detxai.models import checkpoints
from detxai.models.detector import DetectorInfo
from detxai.values import InputShape, geometry
from detxai.vocabulary import METHODS


def evidence_beside(model: str | None) -> Path:
    """Where the evidence calibration of a model (None: the bundled one) is written and looked for: beside it."""
    file = checkpoints.BUNDLED if model is None else Path(model).expanduser()
    return file.with_name(file.stem + SUFFIX)


def gives_verdicts(a: AttributionConfig) -> bool:
    """Whether the first map of a detection is one that verdicts are made for: an integral of the class."""
    return METHODS[a.method[0]].promise and a.gradient[0] == "plain" and "class" in a.target


def calibration_of(
    config: RunConfig, info: DetectorInfo, imgsz: int | InputShape, *, rect: bool
) -> tuple[EvidenceCalibration | None, tuple[str, ...]]:
    """The evidence calibration of this model, a given one or what lies beside it, and warnings.

    `rect`: whether pictures become no larger than each needs. Raises UsageError for a given one that was made with
    another model, size, method or baseline.
    """
    a = config.attribution
    given = [file for file in a.calibration if file.suffix != ".safetensors"]
    beside = evidence_beside(config.model.path)
    if EvidenceLevel(a.evidence) is EvidenceLevel.NONE or not (given or beside.is_file()):
        return None, ()
    problems = []
    for file in given or [beside]:
        calibration = read(file)
        problem = _difference(calibration, a, info, imgsz, rect=rect)
        if problem is None:
            return calibration, ()
        problems.append(f"{file} was made {problem}.")
    if given:
        raise UsageError(problems[0], "Make a new one: detxai calibrate evidence SOURCE --labels DIR.")
    return None, (f"{problems[0]} It is not used, and verdicts are not calibrated.",)


def _difference(
    made: EvidenceCalibration, a: AttributionConfig, info: DetectorInfo, imgsz: int | InputShape, *, rect: bool
) -> str | None:
    """How a calibration differs from this run, None where it fits."""
    if made.model_sha256 != info.sha256:
        return f"with another model than {info.name} (sha256 {made.model_sha256[:12]}…, not {info.sha256[:12]}…)"
    sizes = geometry(made.imgsz, rect=made.rect is True), geometry(imgsz, rect=rect)
    if sizes[0] != sizes[1]:
        return f"at {sizes[0]}, and this run is at {sizes[1]}"
    if (made.method, made.baseline) != (a.method[0], a.baseline) or not gives_verdicts(a):
        return f"with --method {made.method} --baseline {made.baseline}"
    return None


def box_settings(config: RunConfig, classes: Sequence[int], fit: str) -> dict[str, str]:
    """The settings of a run that decide which boxes there are: those that a promise was made with must be the same."""
    d, ids = config.detection, ",".join(map(str, sorted(classes))) or "all"
    more = {"classes": ids, "letterbox": fit, "window": config.images.window}
    return {"iou": f"{d.iou:g}", "max-det": str(d.max_det), **more}


def promise_of(
    calibration: EvidenceCalibration | None, config: RunConfig, classes: Sequence[int], fit: str
) -> tuple[Promise | None, tuple[str, ...]]:
    """The promise of the list that this run can keep, None where there is none, and a warning where it cannot."""
    promise, d = None if calibration is None else calibration.promise, config.detection
    if promise is None:
        return None, ()
    least = d.conf if d.candidates is None else d.candidates
    own = box_settings(config, classes, fit)
    other = [f"--{name} {value}" for name, value in promise.settings.items() if own.get(name) != value]
    if d.predictions is not None:
        needs = "the model's own boxes, without --predictions"
    elif other:
        needs = " ".join(other)
    elif least > promise.threshold:
        needs = f"--candidates {promise.threshold:g}"
    else:
        return promise, ()
    return None, (
        f"No list of this run holds the {promise.recall:.4g} of the items that the calibration promises: it takes"
        f" {needs}.",
    )

"""A configuration made definite for one model and one machine, and refused where it makes no sense."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from detxai.attribution.devices import PROGRAM_ROWS, ROWS, rows_for
from detxai.attribution.memory import saved_bytes
from detxai.attribution.methods import Settings
from detxai.config.selectors import class_ids
from detxai.config.settings import AttributionConfig, ModelConfig, RunConfig
from detxai.errors import ImageError, ModelError, UsageError
from detxai.evidence.calibration import EvidenceCalibration
from detxai.evidence.model import EvidenceLevel
from detxai.evidence.promise import Promise
from detxai.inputs import decode, sources
from detxai.inputs.labels import Folder, Results
from detxai.inputs.letterbox import letterboxed
from detxai.models import checkpoints, detectors
from detxai.models.detector import Detector, DetectorInfo, Differentiable, differentiable
from detxai.parchgrad import statistics
from detxai.parchgrad.session import ParchGradSession
from detxai.run import checks
from detxai.run.budget import Budget, budget
from detxai.run.calibration_lookup import calibration_of, promise_of
from detxai.values import Checkpoint, Image, ImageRef, InputShape, Letterbox, Pixels, Target, as_imgsz, written
from detxai.vocabulary import BASELINES, BLACK_BOX_METHODS, LAYER_METHODS

#: A gradient behind the first convolution is kept where it has no more numbers than this times the picture's pixels.
MOST_KEPT = 4
#: Targets of one image that share forward passes, at most; more are done in turn, so that memory stays bounded.
TARGETS_AT_ONCE = 16
#: The arithmetic below the head under `precision: auto`, where half precision is faster and its error is known:
#: float16 changes maps by 1–3 % in L2 (bfloat16: 5–12 %, too much), but is slower than float32 on CPUs.
AUTO_DTYPE = {"cuda": torch.float16}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALF_TOLERANCE = 0.05
#: Pictures of a baseline folder that it averages over, at most.
MOST_BASELINES = 8
#: Pixels a side of the network's input.
SMALLEST, LARGEST = 32, 8192
#: Seed of every random choice of a method.
SEED = 0


@dataclass(frozen=True, eq=False)
class Plan:
    """What a run does: the detector on its device, class ids, targets, arithmetic, and how much at once.

    `shape`: (rows, columns) of the network's input; `fit`: how a picture becomes that; `targets`: kinds, edges by name;
    `contrasts`: whether differences of logits are explained; `labels`, `given`: who reads labels and given boxes;
    `calibration`: of the evidence; `promise`: of its list, where this run can keep it; `warnings`: what the user should
    know; `parchgrad`: None where every gradient is plain.
    """

    config: RunConfig
    device: torch.device
    detector: Detector
    shape: InputShape
    fit: str
    classes: list[int] | None
    as_class: list[int]
    targets: tuple[str, ...]
    contrasts: bool
    level: EvidenceLevel
    labels: Folder | None
    given: Folder | Results | None
    calibration: EvidenceCalibration | None
    promise: Promise | None
    warnings: tuple[str, ...]
    parchgrad: ParchGradSession | None
    baseline_images: dict[str, Pixels]
    settings: Settings
    budget: Budget

    def letterboxed(self, pixels: Pixels) -> tuple[Pixels, Letterbox]:
        """What the network sees of `pixels` (height, width, channels)."""
        return letterboxed(pixels, self.shape, self.fit, self.info.stride if self.rect else None)

    def load(self, ref: ImageRef, admit: Callable[[int], None] = lambda size: None) -> Image:
        """The picture of `ref`, with as many channels as the network reads; see `decode.load`."""
        settings = self.config.images
        band = settings.band or (1,)
        return decode.load(ref, settings.window, settings.max_pixels, admit, self.info.channels, band)

    @property
    def rect(self) -> bool:
        """Whether the network's input is no larger than each picture needs."""
        return _is_rect(self.config, self.info, self.fit)

    @property
    def side(self) -> int:
        """The longer side of the network's input."""
        return max(self.shape)

    @property
    def imgsz(self) -> int | InputShape:
        """The size of the network's input, as --imgsz takes it."""
        return as_imgsz(self.shape)

    @property
    def counted_fit(self) -> str | None:
        """`fit` for the fingerprint. That of legacy models and of exports of no square was another once, and what was
        made so is done again."""
        once_other = self.info.head == "anchors" or (self.info.head == "export" and self.info.shape is not None)
        return None if self.fit == "letterbox" and not once_other else self.fit

    @property
    def in_flight(self) -> int:
        """Images on the device at a time."""
        return self.budget.in_flight

    @property
    def targets_at_once(self) -> int:
        """Targets of one image that are explained together."""
        return self.budget.targets_at_once

    @property
    def info(self) -> DetectorInfo:
        return self.detector.info

    @property
    def network(self) -> Differentiable | None:
        """The detector, where it has gradients."""
        return _network(self.detector)

    @property
    def dtype(self) -> torch.dtype:
        """The arithmetic of the network below the head."""
        return self.settings.dtype


def make_plan(
    config: RunConfig, checkpoint: Checkpoint | None = None, detector: Detector | None = None, memory_share: float = 1.0
) -> Plan:
    """The plan of a run: loads and checks the model, and runs it on a gray picture where methods need to know it.

    `memory_share`: see `Explainer`. Raises UsageError for what model or machine lack, ModelError for a useless model.
    """
    device, a = checks.device_of(config.run.device), config.attribution
    set_arithmetic(device)
    detector = detector or _detector(config.model, checkpoint)
    info, network = detector.info, _network(detector)
    if network is not None:
        network.module.to(device)
    (shape, rounded), fit = _shape(config, info), _fit(config, info)
    classes = class_ids(config.detection.classes or (), info.names, "--classes")
    as_class = class_ids(a.as_class, info.names, "--as-class")
    targets = checks.target_kinds(a.target, info)
    checks.check_inputs(config, info)
    drawn, given = _readers(config, info)
    checks.check_gate(config, targets)
    calibration, warnings = calibration_of(config, info, as_imgsz(shape), rect=_is_rect(config, info, fit))
    promise, unkept = promise_of(calibration, config, classes, fit)
    checks.check_methods(a.method, targets, info, black_box=network is None)
    activations, whole = _tested(config, detector, _shapes(config, info, fit, shape), device)
    info = detector.info
    parchgrad = _parchgrad(config, detector, shape, device)
    checks.check_baseline_folder(a.baseline, a.method)
    checks.check_font(config.output.font)
    settings, numbers = _settings(config, network, shape, device)
    return Plan(
        config=config,
        device=device,
        detector=detector,
        shape=shape,
        fit=fit,
        classes=classes or None,
        as_class=as_class,
        targets=targets,
        contrasts="contrast" in targets or _full_evidence(a, info),
        level=EvidenceLevel(a.evidence),
        labels=drawn,
        given=given,
        calibration=calibration,
        promise=promise,
        warnings=rounded + warnings + unkept + whole,
        parchgrad=parchgrad,
        baseline_images=_baseline_images(a.baseline, info.channels),
        settings=settings,
        budget=_budget(config, device, settings, memory_share, (info.channels, *shape), activations, numbers),
    )


def _budget(
    config: RunConfig,
    device: torch.device,
    settings: Settings,
    share: float,
    picture: tuple[int, int, int],
    activations: int,
    numbers: int,
) -> Budget:
    """The memory of the run, and what fits into it: `activations` bytes a `picture`, `numbers` of a gradient kept."""
    rows = rows_for(device, picture[1:], PROGRAM_ROWS if device.type in PROGRAM_ROWS else ROWS)
    return budget(
        None if config.run.memory == "auto" else config.run.memory,
        device,
        share,
        picture=picture,
        pack=activations * settings.dtype.itemsize // 4 * rows,
        gradient=4 * numbers,
        in_flight=None if config.run.batch == "auto" else int(config.run.batch),
        targets=TARGETS_AT_ONCE,
    )


def _shape(config: RunConfig, info: DetectorInfo) -> tuple[InputShape, tuple[str, ...]]:
    """Rows and columns, rounded up to whole cells as ultralytics does, and a warning where they were.

    Raises ModelError for a size that is none.
    """
    asked, stride = config.detection.imgsz, info.stride
    wanted = info.own_shape if asked is None else (asked, asked) if isinstance(asked, int) else asked
    if not SMALLEST <= min(wanted) <= max(wanted) <= LARGEST:
        message = f"{info.name} says it was trained at {written(wanted)} pixels."
        raise ModelError(message, "Give the size with --imgsz, as 640.")
    rows, columns = (-(-side // stride) * stride for side in wanted)
    if (rows, columns) == wanted:
        return wanted, ()
    became = f"{written(wanted)} pixels became {written((rows, columns))}"
    return (rows, columns), (f"{became}: the coarsest cells of {info.name} are {stride} pixels.",)


def _is_rect(config: RunConfig, info: DetectorInfo, fit: str) -> bool:
    return config.detection.rect and fit == "letterbox" and not info.fixed


def _shapes(config: RunConfig, info: DetectorInfo, fit: str, shape: InputShape) -> list[InputShape]:
    """Shapes that pictures have: the largest and, where each has its own, a wide and a tall half of it."""
    if not _is_rect(config, info, fit):
        return [shape]
    rows, columns = (-(-side // (2 * info.stride)) * info.stride for side in shape)
    return [shape, (rows, shape[1]), (shape[0], columns)]


def _fit(config: RunConfig, info: DetectorInfo) -> str:
    """How a picture becomes what the network sees."""
    wanted = config.detection.letterbox
    fit = info.fit if wanted == "auto" else wanted
    if fit != "letterbox" and info.rotated:
        raise UsageError(f"--letterbox {fit}: stretched, a rotated box is none any more.", "Leave it out.")
    return fit


def _tested(
    config: RunConfig, detector: Detector, shapes: Sequence[InputShape], device: torch.device
) -> tuple[int, tuple[str, ...]]:
    """The bytes that a forward pass of one picture keeps for its backward pass, 0 without gradients, and warnings.

    `shapes` that pictures have, the largest first. Raises ModelError for a model that is broken.
    """
    methods, asked = config.attribution.method, config.detection.imgsz is not None
    # Noise: on a picture of one colour a layer that is off by some cells gives what it should.
    noise, *more = (
        torch.rand(1, detector.info.channels, *s, generator=torch.Generator().manual_seed(SEED)).to(device)
        for s in shapes
    )
    network, sparse = _network(detector), detector.info.sparse
    if network is None or all(name in BLACK_BOX_METHODS for name in methods):
        detectors.sound(detector, noise, asked=asked)
        return 0, ()
    with saved_bytes(network.module) as kept:
        detectors.self_test(network, noise, asked=asked)
    for picture in more:
        detectors.self_test(network, picture, asked=asked)
    if network.info.sparse == sparse:
        return kept[0], ()
    return kept[0], (
        f"Parts of {network.info.name} do not give what the whole gives: all of it is run for every target, which "
        "takes longer.",
    )


def set_arithmetic(device: torch.device) -> None:
    """Switch TF32 off, which would call itself float32, and kernels that give other bytes the second time."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        # The same bytes twice: not the fastest kernel of the moment, and none that adds in any order.
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True


def _network(detector: Detector) -> Differentiable | None:
    return detector if isinstance(detector, Differentiable) else None


def _detector(model: ModelConfig, checkpoint: Checkpoint | None) -> Detector:
    loaded = checkpoint or checkpoints.load(
        model.path,
        sha256=model.sha256,
        trust_pickle=model.trust_pickle,
        module_path=model.module_path,
        names=model.names,
    )
    return detectors.build(loaded, None if model.head == "auto" else model.head, keep=checkpoint is not None)


def _gray(network: Differentiable, shape: InputShape, device: torch.device) -> torch.Tensor:
    return torch.full((1, network.info.channels, *shape), 0.5, device=device)


def _full_evidence(a: AttributionConfig, info: DetectorInfo) -> bool:
    """Whether there is evidence that costs more maps: contrasts."""
    gradients = not any(name in BLACK_BOX_METHODS for name in a.method)
    full = EvidenceLevel(a.evidence) is EvidenceLevel.FULL
    return full and gradients and "class" in a.target and len(info.names) > 1


def _readers(config: RunConfig, info: DetectorInfo) -> tuple[Folder | None, Folder | Results | None]:
    """Who reads labels and given predictions."""
    d = config.detection
    drawn = None if d.labels is None else Folder(d.labels, info.names)
    if d.predictions is None:
        return drawn, None
    if d.predictions.is_dir():
        return drawn, Folder(d.predictions, info.names, scored=True)
    return drawn, Results(d.predictions, info.names, d.predictions_base)


def _parchgrad(
    config: RunConfig, detector: Detector, shape: InputShape, device: torch.device
) -> ParchGradSession | None:
    """ParchGrad's part of the run, None where every gradient is plain."""
    a, info = config.attribution, detector.info
    if all(name == "plain" for name in a.gradient):
        return None
    checks.check_gradients(a)
    rect = _is_rect(config, info, _fit(config, info))
    made = statistics.found_for(config.model.path, info.name, info.sha256, as_imgsz(shape), a.calibration, rect=rect)
    return ParchGradSession(config.parchgrad, made, differentiable(detector), device)


def _settings(
    config: RunConfig, network: Differentiable | None, shape: InputShape, device: torch.device
) -> tuple[Settings, int]:
    """What methods are told, and how many numbers of a gradient are kept a node and target."""
    layer_of, early = _layers(config.attribution, network, shape, device)
    stem, numbers = _stem(network, shape)
    settings = Settings(
        config.attribution.tolerance,
        config.attribution.max_evaluations,
        config.attribution.map_tolerance,
        _dtype(config, device),
        SEED,
        layer_of=layer_of,
        early=early,
        stem=stem,
    )
    return settings, numbers


def _dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    if config.run.precision != "auto":
        return DTYPES[config.run.precision]
    exact = config.attribution.tolerance < HALF_TOLERANCE
    return torch.float32 if exact else AUTO_DTYPE.get(device.type, torch.float32)


def _stem(network: Differentiable | None, shape: InputShape) -> tuple[nn.Conv2d | None, int]:
    """The first convolution, where integrals are taken behind it, and how many numbers of a gradient are kept."""
    stem, pixels = network.trunk.stem if network and network.info.sparse else None, math.prod(shape)
    if stem is None:
        return None, pixels
    kept = stem.out_channels * pixels // (stem.stride[0] * stem.stride[1])
    return (stem, kept) if kept <= MOST_KEPT * pixels else (None, pixels)


@torch.no_grad()
def _layers(
    a: AttributionConfig, network: Differentiable | None, shape: InputShape, device: torch.device
) -> tuple[Callable[[Target], int] | None, dict[int, int]]:
    """Where activation methods look, see `Settings`. Raises UsageError for a --layer without a feature map."""
    wanted = a.layer
    if network is None:
        return None, {}
    if not any(name in LAYER_METHODS for name in a.method):
        return network.layer_of, {}
    gray = _gray(network, shape, device)
    if wanted is None:
        return network.layer_of, network.trunk.early(gray)
    with network.trunk.tap(wanted) as tapped:
        network.predict(gray)
    if not tapped:
        raise UsageError(
            f"--layer {wanted}: below its head the {network.info.family} model has no such layer with a feature map.",
            "Without --layer it is chosen by the prediction's scale.",
        )
    return lambda _: wanted, {}


def _baseline_images(name: str, channels: int) -> dict[str, Pixels]:
    """The picture of --baseline FILE by its name, or a seeded choice of those in --baseline FOLDER."""
    if name in BASELINES:
        return {}
    files = [Path(name)]
    if Path(name).is_dir():
        known = sources.IMAGE_SUFFIXES
        files = sorted(f for f in Path(name).iterdir() if f.suffix.lower() in known and f.is_file())
        if not files:
            raise UsageError(f"--baseline {name}: the folder has no image in it.")
        files = sorted(random.Random(SEED).sample(files, min(MOST_BASELINES, len(files))))
    try:
        return {file.name: decode.load(ImageRef(file.name, file), channels=channels).seen for file in files}
    except ImageError as error:
        raise UsageError(f"--baseline {name}: {error}") from error

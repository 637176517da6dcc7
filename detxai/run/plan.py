"""A configuration made definite for one model and one machine, and refused where it makes no sense."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from detxai.attribution.engine import PROGRAM_ROWS, ROWS, rows_for
from detxai.attribution.memory import saved_bytes
from detxai.attribution.methods import Settings
from detxai.config.selectors import class_ids
from detxai.config.settings import RunConfig
from detxai.errors import ImageError, ModelError, UsageError
from detxai.evidence.calibration import SUFFIX, Calibration
from detxai.evidence.calibration import read as read_calibration
from detxai.inputs import decode, labels, sources
from detxai.inputs.letterbox import letterboxed
from detxai.models import checkpoints, detectors
from detxai.models.detector import Detector, Differentiable
from detxai.parchgrad import statistics
from detxai.parchgrad.session import Keeping
from detxai.run.budget import budget
from detxai.values import Checkpoint, ImageRef, Letterbox, Pixels, Target
from detxai.vocabulary import BASELINES, BLACK_BOX_METHODS, EDGES, GRADIENT_METHODS, LAYER_METHODS, METHODS

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


def evidence_beside(model: str | None) -> Path:
    """Where the evidence calibration of a model (None: the bundled one) is written and looked for: beside it."""
    file = checkpoints.BUNDLED if model is None else Path(model).expanduser()
    return file.with_name(file.stem + SUFFIX)


class Plan:
    """What a run does: the detector on its device, class ids, targets, arithmetic, and how much at once.

    Raises UsageError for what the model or the machine does not have, ModelError for a model that cannot be used.
    """

    def __init__(
        self,
        config: RunConfig,
        checkpoint: Checkpoint | None = None,
        detector: Detector | None = None,
    ) -> None:
        self.config = config
        self.device = device_of(self.config.run.device)
        self.detector = detector or self._detector(checkpoint)
        self.network = self.detector if isinstance(self.detector, Differentiable) else None
        if self.network:
            self.network.module.to(self.device)
        self.info = self.detector.info
        self.warnings: tuple[str, ...] = ()
        self.size = self._size()
        self.fit = self._fit()
        self.classes = self._class_ids(self.config.detection.classes, "--classes")
        self.as_class = self._class_ids(self.config.attribution.as_class, "--as-class") or []
        self.targets = self._target_kinds()
        self.contrasts = "contrast" in self.targets or self._full()
        self.labels, self.given = self._drawn()
        self._check_evidence()
        self.calibrated = self._calibrated()
        self.dtype = self._dtype()
        activations = self._check_methods()
        self.keeping = self._keeping()
        self.baseline_images = self._baseline_images()
        a = self.config.attribution
        layer_of, early = self._layers()
        stem, kept = self._stem()
        self.settings = Settings(
            a.tolerance, a.max_evaluations, self.dtype, SEED, layer_of=layer_of, early=early, stem=stem
        )
        run = self.config.run
        rows = rows_for(self.device, self.size, PROGRAM_ROWS if self.device.type in PROGRAM_ROWS else ROWS)
        self.budget = budget(
            None if run.memory == "auto" else run.memory,
            self.device,
            size=self.size,
            pack=activations * self.dtype.itemsize // 4 * rows,
            gradient=4 * kept,
            in_flight=None if run.batch == "auto" else int(run.batch),
            targets=TARGETS_AT_ONCE,
        )
        self.in_flight, self.targets_at_once = self.budget.in_flight, self.budget.targets_at_once

    def _size(self) -> int:
        """Pixels a side, rounded up to whole cells as ultralytics does. Raises ModelError for a size that is none."""
        wanted, stride = self.config.detection.imgsz or self.info.imgsz, self.info.stride
        if not SMALLEST <= wanted <= LARGEST:
            raise ModelError(
                f"{self.info.name} says it was trained at {wanted} pixels.", "Give the size with --imgsz, as 640."
            )
        size = -(-wanted // stride) * stride
        if size != wanted:
            why = f"the coarsest cells of {self.info.name} are {stride} pixels"
            self.warnings += (f"{wanted} pixels became {size}: {why}.",)
        return size

    def _fit(self) -> str:
        wanted = self.config.detection.letterbox
        fit = self.info.fit if wanted == "auto" else wanted
        if fit != "letterbox" and self.info.rotated:
            raise UsageError(f"--letterbox {fit}: stretched, a rotated box is none any more.", "Leave it out.")
        return fit

    @property
    def counted_fit(self) -> str | None:
        """`fit` for the fingerprint. That of legacy models was another once, and what was made so is done again."""
        return None if self.fit == "letterbox" and self.info.head != "anchors" else self.fit

    def letterboxed(self, pixels: Pixels) -> tuple[Pixels, Letterbox]:
        """The square that the network sees of `pixels` (height, width, 3)."""
        shape = self.info.shape if self.size == self.info.imgsz else None
        return letterboxed(pixels, self.size, self.fit, shape)

    def _dtype(self) -> torch.dtype:
        wanted = self.config.run.precision
        if self.device.type == "cuda":  # TF32 would call itself float32
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
            # The same bytes twice: not the fastest kernel of the moment, and none that adds in any order.
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        if wanted != "auto":
            return DTYPES[wanted]
        exact = self.config.attribution.tolerance < HALF_TOLERANCE
        return torch.float32 if exact else AUTO_DTYPE.get(self.device.type, torch.float32)

    def _detector(self, checkpoint: Checkpoint | None) -> Detector:
        model = self.config.model
        loaded = checkpoint or checkpoints.load(
            model.path,
            sha256=model.sha256,
            trust_pickle=model.trust_pickle,
            module_path=model.module_path,
            names=model.names,
        )
        return detectors.build(loaded, None if model.head == "auto" else model.head)

    def _class_ids(self, wanted: Sequence[int | str] | None, option: str) -> list[int] | None:
        if not wanted:
            return None
        return class_ids(wanted, self.info.names, option)

    def _check_evidence(self) -> None:
        """Raise UsageError for a policy gate on verdicts that nobody gives."""
        a = self.config.attribution
        if self.config.run.fail_on and (a.evidence == "none" or "class" not in self.targets):
            raise UsageError("--fail-on needs verdicts.", "Leave out --evidence none, and keep class among --target.")

    @property
    def judges(self) -> bool:
        """Whether the first map of a detection is one that verdicts are made for: an integral of the class."""
        a = self.config.attribution
        return METHODS[a.method[0]].promise and a.gradient[0] == "plain" and "class" in self.targets

    def _calibrated(self) -> Calibration | None:
        """The evidence calibration of this model: a given one, else what lies beside it.

        Raises UsageError for a given one that was made with another model, size, method or baseline.
        """
        a = self.config.attribution
        given = [file for file in a.calibration if file.suffix != ".safetensors"]
        beside = evidence_beside(self.config.model.path)
        if a.evidence == "none" or not (given or beside.is_file()):
            return None
        problems = []
        for file in given or [beside]:
            found = read_calibration(file)
            problem = self._unlike(found)
            if problem is None:
                return found
            problems.append(f"{file} was made {problem}.")
        if given:
            raise UsageError(problems[0], "Make a new one: detxai calibrate evidence SOURCE --labels DIR.")
        self.warnings += (f"{problems[0]} It is not used, and verdicts are not calibrated.",)
        return None

    def _unlike(self, found: Calibration) -> str | None:
        """How a calibration differs from this run, None where it fits."""
        a, info = self.config.attribution, self.info
        if found.model_sha256 != info.sha256:
            return f"with another model than {info.name} (sha256 {found.model_sha256[:12]}…, not {info.sha256[:12]}…)"
        if found.imgsz != self.size:
            return f"at {found.imgsz} pixels, and this run is at {self.size}"
        if (found.method, found.baseline) != (a.method[0], a.baseline) or not self.judges:
            return f"with --method {found.method} --baseline {found.baseline}"
        return None

    def _full(self) -> bool:
        """Whether there is evidence that costs more maps: contrasts, and a second baseline."""
        a = self.config.attribution
        gradients = not any(name in BLACK_BOX_METHODS for name in a.method)
        return a.evidence == "full" and gradients and "class" in a.target and len(self.info.names) > 1

    def _target_kinds(self) -> tuple[str, ...]:
        wanted = self.config.attribution.target
        expanded = [k for name in wanted for k in (EDGES if name == "box" else (name,))]
        for kind in expanded:
            if kind == "contrast" and len(self.info.names) == 1:
                raise UsageError("--target contrast: the model has one class, and nothing to tell it from.")
            if kind not in (*self.info.targets, "contrast"):
                raise UsageError(
                    f"--target {kind}: a {self.info.family} model with its {self.info.head} head has none.",
                    f"It has: {', '.join(self.info.targets)}.",
                )
        return tuple(dict.fromkeys(expanded))

    def _drawn(self) -> tuple[labels.Folder | None, labels.Folder | labels.Results | None]:
        """Who reads labels and given predictions. Raises UsageError where they or --candidates make no sense."""
        d, names = self.config.detection, self.info.names
        if d.candidates is not None and d.predictions is not None:
            raise UsageError("--candidates asks the model for boxes, --predictions brings its own.", "Leave one out.")
        if d.candidates is not None and d.candidates >= d.conf:
            raise UsageError(f"--candidates {d.candidates:g} must be below --conf {d.conf:g}.")
        folder = labels.Folder(d.labels, names) if d.labels is not None else None
        if d.predictions is None or not d.predictions.is_dir():
            return folder, labels.Results(
                d.predictions, names, d.predictions_base
            ) if d.predictions is not None else None
        return folder, labels.Folder(d.predictions, names, scored=True)

    def _check_methods(self) -> int:
        """The bytes that a forward pass of one picture keeps for its backward pass, 0 where no gradient is wanted.

        Raises UsageError for methods that make no sense here, ModelError for a model that is broken.
        """
        for name in self.config.attribution.method:
            if name in BLACK_BOX_METHODS and self.targets != ("class",):
                raise UsageError(f"--method {name} sees detections only: it explains --target class, nothing else.")
            if name not in BLACK_BOX_METHODS and self.network is None:
                raise UsageError(
                    f"--method {name} needs gradients, and {self.info.name} is a black box ({self.info.family}).",
                    f"These methods work for it: --method {', '.join(BLACK_BOX_METHODS)}.",
                )
            if METHODS[name].one_sided and any(kind in EDGES for kind in self.targets):
                raise UsageError(
                    f"--method {name} keeps what pushes a score up, and an edge has no up.",
                    "For edges: --method gradcam or odam.",
                )
        # Noise: on a picture of one colour a layer that is off by some cells gives what it should.
        noise = torch.rand(1, 3, self.size, self.size, generator=torch.Generator().manual_seed(SEED)).to(self.device)
        if self.network is None or all(name in BLACK_BOX_METHODS for name in self.config.attribution.method):
            detectors.sound(self.detector, noise)
            return 0
        sparse = self.info.sparse
        with saved_bytes(self.network.module) as found:
            detectors.self_test(self.network, noise)
        self.info = self.network.info
        if self.info.sparse != sparse:
            self.warnings += (
                f"Parts of {self.info.name} do not give what the whole gives: all of it is run for every target, "
                "which takes longer.",
            )
        return found[0]

    def _stem(self) -> tuple[nn.Conv2d | None, int]:
        """The first convolution, where integrals are taken behind it, and how many numbers of a gradient are kept."""
        stem, pixels = self.network.trunk.stem if self.network and self.info.sparse else None, self.size**2
        if stem is None:
            return None, pixels
        kept = stem.out_channels * pixels // (stem.stride[0] * stem.stride[1])
        return (stem, kept) if kept <= MOST_KEPT * pixels else (None, pixels)

    def _keeping(self) -> Keeping | None:
        """ParchGrad's part of the run, None where every gradient is plain. Raises UsageError where there is none."""
        wanted = self.config.attribution
        gradients = [name for name in wanted.gradient if name != "plain"]
        if not gradients:
            return None
        for name in wanted.method:
            if name not in GRADIENT_METHODS:
                raise UsageError(
                    f"--gradient {gradients[0]} changes the gradient at the picture; --method {name} shows none.",
                    f"It goes with --method {', '.join(GRADIENT_METHODS)}.",
                )
        made = statistics.found_for(
            self.config.model.path, self.info.name, self.info.sha256, self.size, wanted.calibration
        )
        assert self.network is not None, "methods with a gradient are refused for black boxes"
        return Keeping(self.config.parchgrad, made, self.network, self.size, self.device)

    @torch.no_grad()
    def _layers(self) -> tuple[Callable[[Target], int] | None, dict[int, int]]:
        """Where activation methods look, see `Settings`. Raises UsageError for a --layer without a feature map."""
        detector, wanted = self.network, self.config.attribution.layer
        if detector is None:
            return None, {}
        if not any(name in LAYER_METHODS for name in self.config.attribution.method):
            return detector.layer_of, {}
        gray = torch.full((1, 3, self.size, self.size), 0.5, device=self.device)
        if wanted is None:
            return detector.layer_of, detector.trunk.early(gray)
        with detector.trunk.tap(wanted) as found:
            detector.predict(gray)
        if not found:
            raise UsageError(
                f"--layer {wanted}: below its head the {self.info.family} model has no such layer with a feature map.",
                "Without --layer it is chosen by the prediction's scale.",
            )
        return lambda _: wanted, {}

    def _baseline_images(self) -> dict[str, Pixels]:
        """The picture of --baseline FILE by its name, or a seeded choice of those in --baseline FOLDER."""
        name, methods = self.config.attribution.baseline, self.config.attribution.method
        if name in BASELINES:
            return {}
        files = [Path(name)]
        if Path(name).is_dir():
            if methods != ("expected",):
                other = next(m for m in methods if m != "expected")
                raise UsageError(
                    f"--baseline {name} is a folder: only --method expected averages over pictures, {other} takes one.",
                    "Give a file, or only --method expected.",
                )
            known = sources.IMAGE_SUFFIXES
            files = sorted(f for f in Path(name).iterdir() if f.suffix.lower() in known and f.is_file())
            if not files:
                raise UsageError(f"--baseline {name}: the folder has no image in it.")
            files = sorted(random.Random(SEED).sample(files, min(MOST_BASELINES, len(files))))
        try:
            return {file.name: decode.load(ImageRef(file.name, file)).pixels for file in files}
        except ImageError as error:
            raise UsageError(f"--baseline {name}: {error}") from error

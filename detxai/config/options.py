"""The one table of options: command line, `--help`, environment, YAML, JSON schema and README are made from it.

Plain Python, so that `--help` imports nothing slow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from detxai.vocabulary import BASELINES, EVIDENCE, GRADIENTS, METHODS, OVERLAYS, SCALES, TARGETS, VERDICTS


@dataclass(frozen=True)
class Shorthand:
    """A further flag of an option: it stands for `value`, or says how often it was given where `value` is None."""

    flags: tuple[str, ...]
    value: Any
    about: str


@dataclass(frozen=True)
class Option:
    """A setting: `key` is its section and name in YAML, `about` what it sets, for help, YAML and schema alike.

    `name`: of the option, where it is not the key's own. `letter`: its short flag. `value`: what stands for its value
    in the help. `repeats`: it may be given several times. `words`: values that a shell completes. A bool is a flag.
    """

    key: str
    default: Any
    about: str
    value: str = ""
    name: str = ""
    letter: str = ""
    repeats: bool = False
    words: tuple[str, ...] = ()
    shorthands: tuple[Shorthand, ...] = ()

    @property
    def section(self) -> str:
        return self.key.partition(".")[0]

    @property
    def option(self) -> str:
        """The option's name, with underscores."""
        return self.name or self.key.partition(".")[2]

    @property
    def flag(self) -> str:
        return f"--{self.option.replace('_', '-')}"

    @property
    def help(self) -> str:
        """What it sets, and its default."""
        text = self.about.replace("null: ", "default: ").replace("empty: ", "default: ")
        if self.default is None or isinstance(self.default, bool) or self.default == () or "default: " in text:
            return text
        plain = ", ".join(self.default) if isinstance(self.default, tuple) else str(self.default)
        return f"{text} [{plain}]"


def _words(words: Sequence[str]) -> str:
    return ", ".join(words)


#: To add an option: a row here (it is on `detxai explain`, in the environment and in --help then; other commands name
#: the keys they take), a field of that name in its section of `settings.py` (its type and bounds), and
#: `configs/default.yaml` written anew.
ROWS: tuple[Option, ...] = (
    Option(
        "model.path",
        None,
        "checkpoint, safetensors, Darknet .cfg, ONNX, or an Ultralytics name; null: the bundled sample detector",
        "PATH",
        name="model",
        letter="-m",
    ),
    Option("model.names", None, "file with one class name a line (Darknet, ONNX)", "FILE"),
    Option("model.sha256", None, "refuse a model file with another SHA-256", "HEX"),
    Option("model.trust_pickle", False, "unpickle this checkpoint fully, in this run only"),
    Option("model.module_path", None, "with --trust-pickle: folder of the Python code of its own layers", "DIR"),
    Option(
        "model.head",
        "auto",
        "which head to explain where a model has two",
        "HEAD",
        words=("auto", "one2many", "one2one"),
    ),
    Option("detection.conf", 0.25, "lowest score of a reported box", "SCORE"),
    Option("detection.iou", 0.7, "overlap above which NMS drops the weaker box", "SHARE"),
    Option(
        "detection.imgsz",
        None,
        "side of the network's input in pixels, or its rows,columns, rounded up to whole cells of its coarsest map;"
        " null: the checkpoint's training size, else 640. Boxes are those of `yolo predict` with rect=False; see rect",
        "PIXELS",
    ),
    Option(
        "detection.rect",
        False,
        "no more gray around a picture than fills the network's last cells: boxes are those of `yolo predict` as it"
        " comes (rect=True). Nothing changes for models that stretch pictures and exports of one size",
    ),
    Option(
        "detection.letterbox",
        "auto",
        "how a picture becomes the network's square: letterbox (in its proportions, on gray), stretch (all of it),"
        " darknet (likewise, by Darknet's own filter), or auto: as the model's own code does",
        "FIT",
        words=("auto", "letterbox", "stretch", "darknet"),
    ),
    Option("detection.max_det", 300, "most boxes reported an image", "N"),
    Option("detection.classes", None, "report only these classes (ids or names); null: all", "CLASS", repeats=True),
    Option(
        "detection.candidates",
        None,
        "also explain boxes from this score up to conf (an image without any box gives its strongest); null: off",
        "SCORE",
    ),
    Option(
        "detection.predictions",
        None,
        "explain these boxes (COCO results JSON or a folder of YOLO txt) instead of detecting",
        "PATH",
    ),
    Option(
        "detection.predictions_base",
        None,
        "number of the model's first class in a COCO results file, 0 or 1 (`yolo val` may count from 1); null: 0, and"
        " refused where no entry has it",
        "N",
    ),
    Option(
        "detection.labels",
        None,
        "folder of YOLO txt labels: marks right and wrong boxes, explains what was missed",
        "DIR",
    ),
    Option(
        "attribution.method",
        ("ig",),
        f"attribution methods: {_words(tuple(METHODS))}",
        "NAME",
        repeats=True,
        words=tuple(METHODS),
    ),
    Option(
        "attribution.gradient",
        ("plain",),
        f"the gradient that a method integrates or shows: {_words(GRADIENTS)}",
        "NAME",
        repeats=True,
        words=GRADIENTS,
    ),
    Option(
        "attribution.target",
        ("class",),
        f"explained outputs of a prediction: {_words(TARGETS)}",
        "NAME",
        repeats=True,
        words=TARGETS,
    ),
    Option("attribution.as_class", (), "also explain each box as these classes (ids or names)", "CLASS", repeats=True),
    Option(
        "attribution.baseline",
        "auto",
        f"the picture that shows nothing: {_words(BASELINES)}, an image file, or"
        " (expected only) a folder of them; auto follows the picture's own ground",
        "NAME",
        words=BASELINES,
    ),
    Option(
        "attribution.layer",
        None,
        "layer of the network that activation methods look at; null: the one that feeds the head at the"
        " prediction's scale (layercam: the backbone's of that scale)",
        "N",
    ),
    Option("attribution.tolerance", 0.05, "wanted bound on the relative completeness error", "SHARE"),
    Option(
        "attribution.map_tolerance",
        None,
        "go on, on halved intervals, where the map itself may be further off than this (map_error): on photos 0.2"
        " pays; null: the completeness error decides alone",
        "SHARE",
    ),
    Option("attribution.max_evaluations", 256, "most gradient evaluations a detection", "N"),
    Option("attribution.evidence", "basic", "how much evidence to compute", "|".join(EVIDENCE), words=EVIDENCE),
    Option(
        "attribution.calibration",
        (),
        "files of `detxai calibrate`; empty: those found for the model by its sha256",
        "FILE",
        repeats=True,
    ),
    Option(
        "parchgrad.gamma",
        math.inf,
        "weight of kept channels against pruned ones, by their standard deviations; .inf prunes them",
        "X",
        name="parchgrad_gamma",
    ),
    Option(
        "parchgrad.variance",
        "on",
        "variance conservation: on (of the two groups), off, or exact (of their sum, as measured)",
        "on|off|exact",
        name="parchgrad_variance",
        words=("on", "off", "exact"),
    ),
    Option("parchgrad.alpha", 0.05, "level of the tests by which channels are kept", "P", name="parchgrad_alpha"),
    Option(
        "parchgrad.quantile",
        None,
        "keep this share of each convolution's channels instead; null: use alpha",
        "SHARE",
        name="parchgrad_quantile",
    ),
    Option(
        "parchgrad.ratio",
        0.5,
        "upper share of the convolutions below the head that is modified",
        "SHARE",
        name="parchgrad_ratio",
    ),
    Option(
        "parchgrad.normality",
        0.05,
        "parchgrad-cls keeps channels with a Shapiro-Wilk p below this only",
        "P",
        name="parchgrad_normality",
    ),
    Option(
        "parchgrad.region",
        "detection",
        "what channels are averaged over: the whole picture or the detection's box",
        "whole|detection",
        name="parchgrad_region",
        words=("whole", "detection"),
    ),
    Option(
        "images.window",
        "auto",
        "16-bit and float images to 8 bits: 'auto', 'full', 'LOW,HIGH' or 'percentile P,Q'",
        "WINDOW",
        words=("auto", "full"),
    ),
    Option("images.max_pixels", 100_000_000, "images with more pixels fail instead of filling the memory", "N"),
    Option(
        "images.frames",
        "first",
        "pictures of files that hold several (TIFF, GIF, APNG, WebP, DICOM): the first, or all, each as x.tif#2",
        "first|all",
        words=("first", "all"),
    ),
    Option(
        "images.pair",
        None,
        "dual energy, two files one picture: by what their paths differ, as _low,_high or low/,high/;"
        " bands: both in one file, two channels, pages or frames, low first",
        "LOW,HIGH|bands",
    ),
    Option(
        "images.energy_colors",
        "materials",
        "what the network sees of both energies: materials (hue by effective atomic number, brightness by what passed),"
        " or channels (low, high, effective atomic number)",
        "COLORS",
        words=("materials", "channels"),
    ),
    Option(
        "images.views",
        None,
        "two views of one bag: by what their paths differ, as _top,_side; records link them, list and page show them"
        " together",
        "ONE,OTHER",
    ),
    Option(
        "images.band",
        None,
        "for models of other channels than 3: the band that pictures show as gray, counted from 1, or three as red,"
        " green and blue; null: the first",
        "N[,N,N]",
    ),
    Option(
        "output.dir",
        Path("runs/explain"),
        "folder of the output tree, or s3://, gs://, az://",
        "DIR",
        name="output",
        letter="-o",
    ),
    Option(
        "output.overlays",
        "all",
        "which pictures are written: overview (one per image, with all its boxes), look (also one per attribution of"
        " boxes that are not supported), all (of every box), or none",
        "all|look|overview|none",
        words=OVERLAYS,
        shorthands=(Shorthand(("--no-overlays",), "none", "write no picture"),),
    ),
    Option(
        "output.overlay_format",
        "png",
        "file type of overlays; jpg is about a third of png's size, webp a sixth",
        "png|jpg|webp",
        words=("png", "jpg", "webp"),
    ),
    Option(
        "output.scale",
        "own",
        "colours on overlays of single boxes: own (each is full at its strongest), or common (one scale for all boxes"
        " of a picture, that of its overview)",
        "own|common",
        words=SCALES,
    ),
    Option("output.font", None, "TrueType file for class names in scripts that the usual fonts lack", "FILE"),
    Option("output.strip", False, "put the plain picture beside the heat map in overlays"),
    Option(
        "output.maps",
        "none",
        "also write the raw signed maps, in source-image pixels",
        "none|npz|png",
        words=("none", "npz", "png"),
    ),
    Option("output.report", False, "also write the page report.html into the tree, as `detxai report` does"),
    Option(
        "output.metrics",
        None,
        "also write the run's figures as Prometheus metrics (node_exporter's textfile collector reads *.prom)",
        "FILE",
    ),
    Option("output.lock_timeout", 0, "seconds to wait for another run on the same tree", "SECONDS"),
    Option(
        "run.engine",
        "local",
        "local: this process alone; ray: a pool of workers by Ray, on all GPUs of this machine or of a cluster",
        "local|ray",
        words=("local", "ray"),
    ),
    Option("run.device", "auto", "auto, cpu, mps, cuda or cuda:N", "NAME", words=("auto", "cpu", "mps", "cuda")),
    Option(
        "run.precision",
        "auto",
        "arithmetic of the network",
        "auto|fp32|bf16|fp16",
        words=("auto", "fp32", "bf16", "fp16"),
    ),
    Option("run.batch", "auto", "images in flight: auto or a number", "N", words=("auto",)),
    Option(
        "run.memory",
        "auto",
        "bytes that the run may take beside the model, as in 4GiB; auto: a quarter of the machine's memory,"
        " half of a GPU's",
        "BYTES",
        words=("auto",),
    ),
    Option("run.force", False, "do images again that are done already"),
    Option(
        "run.skip",
        "by-hash",
        "how images are known that are done already: by-hash reads each; by-stat opens none whose size and time are"
        " those of when its record was made",
        "by-hash|by-stat",
        words=("by-hash", "by-stat"),
    ),
    Option("run.shard", None, "do only part I of N of the images: I/N, from 1/N to N/N", "I/N"),
    Option(
        "run.fail_on",
        (),
        f"leave with 10 when a reported box has one of these verdicts: {_words(VERDICTS)}",
        "VERDICT",
        repeats=True,
        words=VERDICTS,
    ),
    Option("run.max_failures", None, "stop after this many failed images", "N"),
    Option("run.max_seconds", None, "stop after this time, within 10 s; boxes that are done are kept", "SECONDS"),
    Option("run.dry_run", False, "say what would be done, write nothing"),
    Option("run.json", False, "one JSON line a record on stdout, the summary last"),
    Option(
        "ray.address",
        None,
        "the cluster to join, as HOST:PORT or ray://HOST:PORT; null: RAY_ADDRESS, else a Ray of its own here",
        "ADDRESS",
        name="ray_address",
    ),
    Option(
        "ray.workers",
        None,
        "workers, each with a model of its own; null: as many as there are GPUs, or as the CPUs suffice for",
        "N",
        name="ray_workers",
    ),
    Option(
        "ray.gpus",
        None,
        "GPUs of a worker, as 0.5 for two on one; null: 1, or 0 where there is none",
        "N",
        name="ray_gpus",
    ),
    Option("ray.cpus", None, "CPUs of a worker; null: 1 beside a GPU, else 4", "N", name="ray_cpus"),
    Option(
        "ray.tries",
        3,
        "an image that its worker has died over so often, with no other image beside it, is a failed one",
        "N",
        name="ray_tries",
    ),
    Option(
        "talk.verbosity",
        0,
        "-1 quiet, 0 normal, 1 verbose, 2 debug",
        "N",
        shorthands=(
            Shorthand(("-q", "--quiet"), -1, "errors only"),
            Shorthand(("-v", "--verbose"), None, "more; twice: tracebacks"),
        ),
    ),
    Option("talk.color", "auto", "coloured messages", "auto|always|never", words=("auto", "always", "never")),
    Option("talk.log_format", "text", "messages as text or JSON lines", "text|json", words=("text", "json")),
)
#: By name, with underscores.
OPTIONS: dict[str, Option] = {row.option: row for row in ROWS}


def taken(patterns: Sequence[str]) -> list[Option]:
    """The options whose keys match one of `patterns`, as `model.*`, in the order of the table."""
    return [row for row in ROWS if any(fnmatchcase(row.key, pattern) for pattern in patterns)]

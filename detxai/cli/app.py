"""The commands, thin: options to a RunConfig, a run to an exit code."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from detxai.cli.calibrate import calibrate
from detxai.cli.evaluate import evaluate
from detxai.cli.options import INPUT, MODEL, OUTPUT, PARCHGRAD, RUN, WHAT
from detxai.cli.options import option as _option
from detxai.cli.review import list_
from detxai.errors import DetxaiError, ExitCode, NoInputError

ABOUT = """\
Shows, for whole folders of images, [bold]why[/bold] a YOLO detector reported what it reported.

\b
  detxai explain samples/images             overlays and records in runs/explain
  detxai explain scans/ -m best.pt -o out   your model, a folder, recursively
  detxai explain 'bags/**/*.jpg' --target class,box --as-class gun
  find . -name '*.png' | detxai explain - --json | jq .status

A map or a verdict means: look again. It never clears a bag and never hides a detection.
"""

#: The root of what typer raises for wrong usage; newer typers carry a click of their own.
ClickException: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="detxai",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code: usage errors 2, DetxaiError its own, the rest 1."""
    from detxai.run.console import Console

    try:
        code = app(list(arguments), prog_name="detxai", standalone_mode=False)
        return int(code or 0)
    except typer.Exit as leave:
        return int(leave.exit_code)
    except ClickException as error:
        error.show(sys.stderr)
        return int(ExitCode.USAGE)
    except (typer.Abort, KeyboardInterrupt):
        return int(ExitCode.INTERRUPTED)
    except DetxaiError as error:
        Console().error(error)
        return int(error.exit_code)
    except BrokenPipeError:
        _silence_stdout()
        return int(ExitCode.READER_GONE)
    except Exception as error:
        if "-vv" in arguments or os.environ.get("DETXAI_VERBOSITY") == "2":
            raise
        Console().say(f"a bug: {type(error).__name__}: {error} (-vv shows where)", level=-1, kind="error")
        return int(ExitCode.BUG)


def _silence_stdout() -> None:
    """Python flushes stdout when it ends; give it somewhere to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    import torch

    import detxai
    from detxai.output.records import RECORD_SCHEMA

    print(f"detxai {detxai.__version__}")
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda if torch.cuda.is_available() else 'none'}")
    print(f"ultralytics {_ultralytics_version()}")
    print(f"record {RECORD_SCHEMA}")
    raise typer.Exit


def _ultralytics_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    for name in ("ultralytics-opencv-headless", "ultralytics"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "missing"


@app.callback(help=ABOUT)
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions and leave."),
    ] = False,
) -> None:
    pass


@app.command()
def explain(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="File, folder (recursive), 'glob', or - for paths on stdin."),
    ],
    config: Annotated[Path | None, _option("-c", "--config", panel=INPUT, help="YAML run config.")] = None,
    sets: Annotated[
        list[str] | None,
        _option("--set", panel=INPUT, help="Override any config key.", metavar="KEY.PATH=VALUE"),
    ] = None,
    null: Annotated[bool, _option("-0", "--null", panel=INPUT, help="Paths on stdin end in NUL.")] = False,
    window: Annotated[
        str | None,
        _option("--window", panel=INPUT, help="16-bit and float images: auto, full, LO,HI or 'percentile P,Q'."),
    ] = None,
    max_pixels: Annotated[
        int | None, _option("--max-pixels", panel=INPUT, help="Images with more pixels fail. [100000000]")
    ] = None,
    model: Annotated[
        str | None,
        _option(
            "-m",
            "--model",
            panel=MODEL,
            help="Checkpoint; default: the bundled sample detector.",
            metavar="PATH",
        ),
    ] = None,
    trust_pickle: Annotated[
        bool | None,
        _option("--trust-pickle", panel=MODEL, help="Unpickle this checkpoint fully, in this run only."),
    ] = None,
    names: Annotated[
        Path | None,
        _option("--names", panel=MODEL, help="Class names, one a line (Darknet, ONNX).", metavar="FILE"),
    ] = None,
    sha256: Annotated[
        str | None,
        _option("--sha256", panel=MODEL, help="Refuse a model file with another SHA-256.", metavar="HEX"),
    ] = None,
    head: Annotated[
        str | None, _option("--head", panel=MODEL, help="Where a model has two: auto, one2many or one2one.")
    ] = None,
    conf: Annotated[float | None, _option("--conf", panel=MODEL, help="Lowest score reported. [0.25]")] = None,
    iou: Annotated[float | None, _option("--iou", panel=MODEL, help="NMS overlap. [0.7]")] = None,
    imgsz: Annotated[int | None, _option("--imgsz", panel=MODEL, help="Network input; default: as trained.")] = None,
    max_det: Annotated[int | None, _option("--max-det", panel=MODEL, help="Most boxes an image. [300]")] = None,
    classes: Annotated[
        list[str] | None, _option("--classes", panel=MODEL, help="Only these classes (ids or names).")
    ] = None,
    candidates: Annotated[
        float | None,
        _option(
            "--candidates",
            panel=MODEL,
            help="Also explain boxes from this score up to --conf; an image without any box gives its strongest.",
        ),
    ] = None,
    predictions: Annotated[
        Path | None,
        _option("--predictions", panel=MODEL, help="Explain these boxes (COCO JSON, YOLO txt folder) instead."),
    ] = None,
    labels: Annotated[
        Path | None,
        _option("--labels", panel=MODEL, help="YOLO txt labels: mark right and wrong, explain misses.", metavar="DIR"),
    ] = None,
    method: Annotated[
        list[str] | None,
        _option(
            "--method",
            panel=WHAT,
            help="ig, expected, idgi, grad, inputxgrad, smoothgrad, gradcam, gradcam++, layercam, odam, drise. [ig]",
        ),
    ] = None,
    gradient: Annotated[
        list[str] | None,
        _option("--gradient", panel=WHAT, help="plain, parchgrad-cls, parchgrad-ins. [plain]"),
    ] = None,
    target: Annotated[
        list[str] | None,
        _option("--target", panel=WHAT, help="class, objectness, left, top, right, bottom, box. [class]"),
    ] = None,
    as_class: Annotated[
        list[str] | None, _option("--as-class", panel=WHAT, help="Also explain each box as this class.")
    ] = None,
    baseline: Annotated[
        str | None,
        _option("--baseline", panel=WHAT, help="auto, black, white, gray, blur, mean, a file (expected: a folder)."),
    ] = None,
    layer: Annotated[
        int | None, _option("--layer", panel=WHAT, help="Layer for gradcam to odam; default: by the box's scale.")
    ] = None,
    tolerance: Annotated[
        float | None,
        _option("--tolerance", panel=WHAT, help="Wanted bound on the completeness error. [0.05]"),
    ] = None,
    max_evaluations: Annotated[
        int | None,
        _option("--max-evaluations", panel=WHAT, help="Most gradient evaluations a detection. [256]"),
    ] = None,
    evidence: Annotated[str | None, _option("--evidence", panel=WHAT, help="none, basic, full. [basic]")] = None,
    calibration: Annotated[
        list[str] | None,
        _option("--calibration", panel=WHAT, help="Files of `detxai calibrate`; default: found by the model's sha256."),
    ] = None,
    parchgrad_gamma: Annotated[
        float | None, _option("--parchgrad-gamma", panel=PARCHGRAD, help="Kept against pruned channels, or inf. [inf]")
    ] = None,
    parchgrad_variance: Annotated[
        str | None, _option("--parchgrad-variance", panel=PARCHGRAD, help="Conserved: on, off, exact. [on]")
    ] = None,
    parchgrad_alpha: Annotated[
        float | None, _option("--parchgrad-alpha", panel=PARCHGRAD, help="Level of the channels' tests. [0.05]")
    ] = None,
    parchgrad_quantile: Annotated[
        float | None, _option("--parchgrad-quantile", panel=PARCHGRAD, help="Keep this share of channels instead.")
    ] = None,
    parchgrad_ratio: Annotated[
        float | None, _option("--parchgrad-ratio", panel=PARCHGRAD, help="Upper share of convolutions modified. [0.5]")
    ] = None,
    parchgrad_normality: Annotated[
        float | None, _option("--parchgrad-normality", panel=PARCHGRAD, help="Shapiro-Wilk p of kept channels. [0.05]")
    ] = None,
    parchgrad_region: Annotated[
        str | None, _option("--parchgrad-region", panel=PARCHGRAD, help="Channels over: whole, detection. [detection]")
    ] = None,
    output: Annotated[Path | None, _option("-o", "--output", panel=OUTPUT, help="[runs/explain]")] = None,
    overlays: Annotated[
        bool | None, _option("--overlays/--no-overlays", panel=OUTPUT, help="Write a picture an attribution.")
    ] = None,
    strip: Annotated[bool | None, _option("--strip", panel=OUTPUT, help="Picture and overlay side by side.")] = None,
    maps: Annotated[str | None, _option("--maps", panel=OUTPUT, help="Raw signed maps: none, npz, png. [none]")] = None,
    lock_timeout: Annotated[
        float | None, _option("--lock-timeout", panel=OUTPUT, help="Seconds to wait for another run. [0]")
    ] = None,
    json_lines: Annotated[
        bool | None,
        _option("--json", panel=OUTPUT, help="One JSON line a record on stdout, the summary last."),
    ] = None,
    device: Annotated[str | None, _option("--device", panel=RUN, help="auto, cpu, cuda:N, mps. [auto]")] = None,
    precision: Annotated[str | None, _option("--precision", panel=RUN, help="auto, fp32, bf16, fp16. [auto]")] = None,
    batch: Annotated[str | None, _option("--batch", panel=RUN, help="Images in flight. [auto]")] = None,
    memory: Annotated[str | None, _option("--memory", panel=RUN, help="Bytes to take, as in 4GiB. [auto]")] = None,
    force: Annotated[bool | None, _option("--force", panel=RUN, help="Do images again that are done.")] = None,
    dry_run: Annotated[
        bool | None, _option("--dry-run", panel=RUN, help="Say what would be done, write nothing.")
    ] = None,
    shard: Annotated[str | None, _option("--shard", panel=RUN, help="Only part I of N: I/N.")] = None,
    fail_on: Annotated[
        list[str] | None,
        _option("--fail-on", panel=RUN, help="Leave with 10 when a reported box has this verdict.", metavar="VERDICT"),
    ] = None,
    max_failures: Annotated[
        int | None, _option("--max-failures", panel=RUN, help="Stop after this many failures.")
    ] = None,
    max_seconds: Annotated[
        float | None, _option("--max-seconds", panel=RUN, help="Stop cleanly after this time.")
    ] = None,
    quiet: Annotated[bool, _option("-q", "--quiet", panel=RUN, help="Errors only.")] = False,
    verbose: Annotated[int, _option("-v", "--verbose", panel=RUN, count=True, help="More; twice: tracebacks.")] = 0,
    color: Annotated[str | None, _option("--color", panel=RUN, help="auto, always, never. [auto]")] = None,
    log_format: Annotated[str | None, _option("--log-format", panel=RUN, help="text or json. [text]")] = None,
) -> int:
    """Detect, attribute, write overlays and records: the main job."""
    from detxai.config import settings as configuration

    options: dict[str, Any] = {
        "model": model, "names": names, "sha256": sha256, "trust_pickle": trust_pickle,
        "head": head, "conf": conf, "iou": iou, "imgsz": imgsz,
        "max_det": max_det, "classes": classes, "method": method, "target": target, "as_class": as_class,
        "baseline": baseline, "layer": layer, "tolerance": tolerance, "max_evaluations": max_evaluations,
        "window": window, "max_pixels": max_pixels, "candidates": candidates,
        "predictions": predictions and str(predictions),
        "labels": labels and str(labels), "gradient": gradient, "evidence": evidence, "calibration": calibration,
        "fail_on": fail_on, "parchgrad_gamma": parchgrad_gamma, "parchgrad_variance": parchgrad_variance,
        "parchgrad_alpha": parchgrad_alpha, "parchgrad_quantile": parchgrad_quantile,
        "parchgrad_ratio": parchgrad_ratio, "parchgrad_normality": parchgrad_normality,
        "parchgrad_region": parchgrad_region,
        "output": output, "overlays": overlays, "strip": strip, "maps": maps, "lock_timeout": lock_timeout,
        "json": json_lines, "device": device, "precision": precision, "batch": _number(batch), "memory": memory,
        "force": force,
        "dry_run": dry_run, "shard": shard, "max_failures": max_failures, "max_seconds": max_seconds,
        "verbosity": -1 if quiet else min(verbose, 2) or None, "color": color, "log_format": log_format,
    }  # fmt: skip
    options["output"] = None if output is None else str(output)
    settings = configuration.load(config, sets or (), os.environ, options)
    return _explain(settings, sources, null)


def _number(text: str | None) -> Any:
    return int(text) if text is not None and text.isdecimal() else text


def _explain(settings: Any, sources: list[str], null: bool) -> int:
    from detxai.inputs import sources as places
    from detxai.run.console import Console

    started = time.monotonic()
    console = Console(settings.talk.verbosity, settings.talk.color, settings.talk.log_format)
    stdin = sys.stdin.buffer if "-" in sources else None
    shard = settings.run.part if settings.run.shard else None
    try:
        found = places.find(sources, stdin, null, shard, exclude=settings.output.dir)
        if settings.run.dry_run:
            return _dry_run(console, found)
        from detxai.run.explain import Job

        return int(Job(settings, console).run(found, started))
    except DetxaiError as error:
        console.error(error)
        return int(error.exit_code)


def _dry_run(console: Any, found: Any) -> int:
    count = 0
    for ref in found.refs:
        count += 1
        console.say(f"would explain {ref.path}" + (f" (fails: {ref.problem})" if ref.problem else ""))
    if not found.total:
        raise NoInputError("No image was found.", "Give a folder with images, or a quoted glob that matches.")
    console.say(f"{count} images, {found.ignored} other files ignored; nothing was written.")
    return 0


@app.command()
def schema(
    kind: Annotated[str, typer.Argument(metavar="[record|summary|config]", help="Which schema.")] = "record",
) -> None:
    """JSON Schema of what detxai writes and reads, on stdout."""
    from detxai.config import settings as configuration
    from detxai.output import records

    if kind == "config":
        found = configuration.schema()
    elif kind in ("record", "summary"):
        found = records.schema(kind)  # type: ignore[arg-type]
    else:
        raise typer.BadParameter(f"There is no schema {kind!r}: record, summary or config.")
    print(json.dumps(found, indent=2, ensure_ascii=False))


app.add_typer(calibrate, name="calibrate")
app.command()(evaluate)
app.command("list")(list_)


@app.command()
def doctor(
    model: Annotated[
        list[str] | None,
        typer.Option("-m", "--model", help="Models to test; default: the bundled one.", metavar="PATH"),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda:N, mps.")] = "auto",
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Unpickle these checkpoints fully, in this run only.")
    ] = False,
) -> int:
    """Versions, devices, and whether a model can be explained (exit code 5 if not)."""
    from detxai.errors import ModelError
    from detxai.run import doctor

    for name, value in doctor.machine():
        print(f"{name:>20}  {value}")
    code = ExitCode.OK
    for path in model or (None,):
        print()
        try:
            for name, value in doctor.require(doctor.model(path, device, trust_pickle)):
                print(f"{name:>20}  {value}", flush=True)
        except ModelError as error:
            code = error.exit_code
    return int(code)


@app.command()
def convert(
    model: Annotated[Path, typer.Argument(metavar="MODEL.pt", help="A checkpoint that detxai loads.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The model without a pickle.")],
    half: Annotated[
        bool, typer.Option("--half", help="Store 16-bit weights: half the size, slightly other scores.")
    ] = False,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Unpickle this checkpoint fully, in this run only.")
    ] = False,
) -> None:
    """Write a checkpoint as safetensors with its architecture: no pickle, nothing to run."""
    from detxai.models import checkpoints

    if target.suffix != ".safetensors":
        raise typer.BadParameter(f"OUT must end in .safetensors (it is {target}).")
    checkpoint = checkpoints.load(str(model), trust_pickle=trust_pickle)
    checkpoints.save(checkpoint, target, half=half)
    print(f"{target}  sha256 {checkpoints.load(str(target)).sha256}")

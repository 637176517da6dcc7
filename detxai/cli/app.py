"""The commands, thin: options to a RunConfig, a run to an exit code."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detxai.cli.calibrate import calibrate
from detxai.cli.evaluate import evaluate
from detxai.cli.options import Null, Sources, configured, images_of
from detxai.cli.review import diff, list_, report
from detxai.errors import DetxaiError, ExitCode, NoInputError

if TYPE_CHECKING:
    from detxai.config.settings import RunConfig

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
@configured("*")
def explain(settings: "RunConfig", sources: Sources, null: Null = False) -> int:
    """Detect, attribute, write overlays and records: the main job."""
    from detxai.run.console import Console

    started = time.monotonic()
    console = Console.of(settings.talk)
    shard = settings.run.part if settings.run.shard else None
    try:
        images = images_of(sources, null=null, shard=shard, exclude=settings.output.dir)
        if settings.run.dry_run:
            return _dry_run(console, images)
        from detxai.run.explain import Job

        return int(Job(settings, console).run(images, started))
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
    form: Annotated[str, typer.Option("--format", metavar="json|md", help="JSON Schema, or a table to read.")] = "json",
) -> None:
    """JSON Schema of what detxai writes and reads, on stdout."""
    from detxai.config import settings as configuration
    from detxai.output import records

    models: dict[str, Any] = {"record": records.Record, "summary": records.Summary, "config": configuration.RunConfig}
    if kind not in models:
        raise typer.BadParameter(f"There is no schema {kind!r}: record, summary or config.")
    if form == "md":
        print(records.field_table(models[kind]), end="")
    elif form == "json":
        found = configuration.schema() if kind == "config" else records.schema(kind)  # type: ignore[arg-type]
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        raise typer.BadParameter(f"There is no format {form!r}: json or md.")


app.add_typer(calibrate, name="calibrate")
app.command()(evaluate)
app.command("list")(list_)
app.command()(report)
app.command()(diff)


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

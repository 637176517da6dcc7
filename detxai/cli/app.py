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
from detxai.cli.config import config
from detxai.cli.evaluate import evaluate
from detxai.cli.export import export
from detxai.cli.merge import merge
from detxai.cli.options import ModulePath, Null, Sources, TrustPickle, configured, images_of
from detxai.cli.review import diff, list_, report
from detxai.cli.versions import show as show_versions
from detxai.errors import DetxaiError, ExitCode, UsageError, memory_refused, missing_package, no_memory
from detxai.run.console import Console, Stopped
from detxai.run.streams import ReaderGone
from detxai.text import printable

if TYPE_CHECKING:
    from detxai.config.settings import RunConfig

ABOUT = """\
Shows, for whole folders of images, [bold]why[/bold] a YOLO detector reported what it reported.

\b
  detxai explain samples/images             pictures, records: runs/explain
  detxai explain scans/ -m best.pt -o out   your model, a whole folder
  detxai explain 'bags/**/*.jpg' --target class,box --as-class gun
  find . -name '*.png' | detxai explain - --json | jq .status

A map or a verdict means: look again. It never clears a bag and never hides a detection.
"""

#: The root of what typer raises for wrong usage; newer typers carry a click of their own.
ClickException: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="detxai",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code: usage errors 2, DetxaiError its own, the rest 1."""
    try:
        code = app(list(arguments), prog_name="detxai", standalone_mode=False)
        sys.stdout.flush()  # here, where there is still somebody to tell that it went wrong
        return int(code or 0)
    except typer.Exit as leave:
        return int(leave.exit_code)
    except ClickException as error:
        return _refused(error, arguments)
    except (typer.Abort, KeyboardInterrupt):
        return int(ExitCode.INTERRUPTED)
    except Stopped as stop:
        return stop.code
    except DetxaiError as error:
        _console(arguments).error(error)
        return int(error.exit_code)
    except (ReaderGone, BrokenPipeError):
        return int(ExitCode.READER_GONE)
    except Exception as error:
        known = no_memory(error) if memory_refused(error) else missing_package(error)
        if known is not None:
            _console(arguments).error(known)
            return int(known.exit_code)
        if "-vv" in arguments or os.environ.get("DETXAI_VERBOSITY") == "2":
            raise
        said = f"a bug: {type(error).__name__}: {error} (-vv shows where)"
        _console(arguments).say(said, level=-1, kind="error", code="bug")
        return int(ExitCode.BUG)


def _refused(error: Any, arguments: Sequence[str]) -> int:
    """A command line that does not parse: what is wrong in one line, and where the help is."""
    path = error.ctx.command_path if getattr(error, "ctx", None) else "detxai"
    if said := error.format_message():  # nothing where no command was named: the help is shown by then
        _console(arguments).error(UsageError(said, f"See {path} --help."))
    return int(ExitCode.USAGE)


def _console(arguments: Sequence[str]) -> Console:
    """For errors before there are settings, in the format that is asked for."""
    asked = " ".join(arguments).replace("=", " ")
    log_format = "json" if "--log-format json" in asked else os.environ.get("DETXAI_LOG_FORMAT", "text")
    return Console(log_format=log_format)


@app.callback(help=ABOUT)
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_versions, is_eager=True, help="Print versions and leave."),
    ] = False,
) -> None:
    pass


@app.command()
@configured("*")
def explain(settings: "RunConfig", sources: Sources, null: Null = False) -> int:
    """Detect, attribute, write overlays and records: the main job.

    \b
      detxai explain scans/ -m best.pt -o out      a folder, recursively
      detxai explain scans/ -m best.pt --dry-run   what would be done
      detxai explain scans/ -m best.pt --method ig,odam
      detxai explain scans/ -m best.pt --target class,box --as-class knife
      detxai explain scans/ -m best.pt --labels labels/ --evidence full
      detxai explain scans/ -m best.pt -q --fail-on unsupported || echo look
      find scans -name '*.png' | detxai explain - -m best.pt --json | jq .
    """
    started = time.monotonic()
    console = Console.of(settings.talk)
    shard = settings.run.part if settings.run.shard else None
    try:
        of = settings.images
        more: dict[str, Any] = {"frames": of.frames, "pair": of.paired, "views": of.viewed}
        images = images_of(sources, null=null, shard=shard, exclude=settings.output.dir, **more)
        from detxai.run.explain import ExplainRun

        job = ExplainRun(settings, console)
        return int(job.dry_run(images) if settings.run.dry_run else job.run(images, started))
    except DetxaiError as error:
        console.error(error)
        return int(error.exit_code)


app.command("list")(list_)
app.command()(report)
app.command()(diff)
app.command()(export)
app.command()(merge)
app.command()(evaluate)
app.add_typer(calibrate, name="calibrate")
app.add_typer(config, name="config")


@app.command()
def schema(
    kind: Annotated[str, typer.Argument(metavar="record|summary|config", help="Which schema.")] = "record",
    form: Annotated[str, typer.Option("--format", metavar="json|md", help="JSON Schema, or a table to read.")] = "json",
) -> None:
    """JSON Schema of what detxai writes and reads, on stdout."""
    from detxai.config import settings as configuration
    from detxai.output import json_schema
    from detxai.output.records import Record
    from detxai.output.summary import Summary

    models: dict[str, Any] = {"record": Record, "summary": Summary, "config": configuration.RunConfig}
    if kind not in models:
        raise typer.BadParameter(f"There is no schema {kind!r}: record, summary or config.")
    if form == "md":
        print(json_schema.field_table(models[kind]), end="")
    elif form == "json":
        document = configuration.schema() if kind == "config" else json_schema.schema(kind)  # type: ignore[arg-type]
        print(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        raise typer.BadParameter(f"There is no format {form!r}: json or md.")


@app.command()
def doctor(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Models to test; default: the bundled one.", show_default=False),
    ] = None,
    model: Annotated[list[str] | None, typer.Option("-m", "--model", help="a model to test", metavar="PATH")] = None,
    names: Annotated[
        Path | None, typer.Option("--names", help="class names, one a line (Darknet, ONNX)", metavar="FILE")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda:N, mps")] = "auto",
    trust_pickle: TrustPickle = False,
    module_path: ModulePath = None,
    json_lines: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> int:
    """Versions, devices, and whether a model can be explained (exit code 5 if not)."""
    from detxai.run import doctor

    paths = [*(models or ()), *(model or ())]
    code = doctor.run(
        paths, names, device, trust_pickle=trust_pickle, module_path=module_path, as_json=json_lines
    )  # fmt: skip
    return int(code)


@app.command()
def convert(
    model: Annotated[Path, typer.Argument(metavar="MODEL.pt", help="A checkpoint that detxai loads.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The model without a pickle.")],
    half: Annotated[
        bool, typer.Option("--half", help="store 16-bit weights: half the size, slightly other scores")
    ] = False,
    trust_pickle: TrustPickle = False,
    module_path: ModulePath = None,
) -> None:
    """Write a checkpoint as safetensors with its architecture: no pickle, nothing to run."""
    from detxai.models import checkpoints

    if target.suffix != ".safetensors":
        raise typer.BadParameter(f"OUT must end in .safetensors (it is {target}).")
    checkpoint = checkpoints.load(str(model), trust_pickle=trust_pickle, module_path=module_path)
    checkpoints.save(checkpoint, target, half=half)
    print(f"{printable(str(target))}  sha256 {checkpoints.load(str(target)).sha256}")


@app.command("man")
def man() -> None:
    """The manual page, for man(1): detxai man | man -l -"""
    from typer.main import get_command

    from detxai.cli.manual import page

    print(page(get_command(app)), end="")

"""How commands get their options: those with a key from the table of `config/options.py`, a few of their own."""

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from detxai.config.options import Option, taken

if TYPE_CHECKING:
    from detxai.inputs.sources import ImageSource

INPUT, MODEL, WHAT, OUTPUT, RUN = "Input", "Model and detection", "Attribution", "Output", "Run"
PARCHGRAD = "ParchGrad (with --gradient parchgrad-cls or parchgrad-ins)"
JUDGING = "Judging"
CHOICE = "Which boxes"
RAY = "Ray (with --engine ray)"
#: The heading in the help for each section of the settings.
HEADINGS = {
    "model": MODEL,
    "detection": MODEL,
    "attribution": WHAT,
    "parchgrad": PARCHGRAD,
    "images": INPUT,
    "output": OUTPUT,
    "run": RUN,
    "ray": RAY,
    "talk": RUN,
}


def option(*flags: str, panel: str, help: str, **more: Any) -> Any:
    """An option under the heading `panel` of a command's help; `[auto]` in it is text, not markup."""
    return typer.Option(*flags, rich_help_panel=panel, help=escape(help), **more)


Sources = Annotated[
    list[str],
    typer.Argument(metavar="SOURCE", help="File, folder (recursive), 'glob', or - for paths on stdin."),
]
Null = Annotated[bool, option("-0", "--null", panel=INPUT, help="paths on stdin end in NUL")]
Limit = Annotated[int | None, option("--limit", panel=INPUT, help="only the first N images", metavar="N", min=1)]
Note = Annotated[str, option("--note", panel=OUTPUT, help="kept in the file: where the images came from")]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="unpickle the checkpoint fully, in this run only: its code runs")
]
ModulePath = Annotated[
    Path | None,
    typer.Option("--module-path", help="with --trust-pickle: folder of the code of its own layers", metavar="DIR"),
]
_Config = Annotated[Path | None, option("-c", "--config", panel=INPUT, help="YAML run config", metavar="FILE")]
_Sets = Annotated[
    list[str] | None,
    option("--set", panel=INPUT, help="override any config key", metavar="KEY.PATH=VALUE"),
]


def configured(*keys: str, **defaults: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """A command that takes --config, --set and the options of `keys` (as `model.*`) beside its own.

    It is called with the checked settings first. `defaults`: option name -> what it is where nothing else is said.
    """
    chosen = [replace(row, default=defaults.get(row.option, row.default)) for row in taken(keys)]

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        _, *own = inspect.signature(command).parameters.values()
        # Python wants parameters without a default first, and the help has an order of its own.
        first = [p for p in own if p.default is p.empty]
        said = [_parameter("config", _Config), _parameter("sets", _Sets)]
        said += [_parameter(name, kind) for row in chosen for name, kind in _parameters(row)]
        parameters = [*first, *said, *(p for p in own if p not in first)]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in sorted(parameters, key=_heading)]

        def configure(**given: Any) -> int:
            from detxai.config import settings

            config, sets = given.pop("config"), given.pop("sets") or ()
            wanted = {row.option: _value(row, given) for row in chosen}
            return command(settings.load(config, sets, os.environ, wanted, defaults), **given)

        configure.__name__, configure.__doc__ = command.__name__, command.__doc__
        configure.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        configure.__annotations__ = {p.name: p.annotation for p in parameters}
        return configure

    return decorate


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _heading(parameter: inspect.Parameter) -> int:
    """The place of a parameter's heading in the help; arguments come first."""
    order = (None, INPUT, MODEL, WHAT, PARCHGRAD, JUDGING, OUTPUT, RUN, RAY)
    return order.index(getattr(parameter.annotation.__metadata__[0], "rich_help_panel", None))


def _parameters(row: Option) -> Iterator[tuple[str, Any]]:
    """(name, annotation) of an option and of each of its shorthands; None is what was not given."""
    flags, panel = [row.flag, *([row.letter] if row.letter else [])], HEADINGS[row.section]
    if isinstance(row.default, bool):
        yield row.option, Annotated[bool | None, option(*flags, panel=panel, help=row.help)]
    else:
        more: dict[str, Any] = {"metavar": row.value, "autocompletion": _completion(row.words)}
        each = option(*flags, panel=panel, help=row.help, **more)
        yield row.option, Annotated[list[str] | None, each] if row.repeats else Annotated[str | None, each]
    for short in row.shorthands:
        counted = short.value is None
        each = option(*short.flags, panel=panel, help=short.about, count=counted, metavar="" if counted else None)
        yield _name(short.flags), Annotated[int | None, each] if counted else Annotated[bool | None, each]


def _name(flags: Sequence[str]) -> str:
    return flags[-1].lstrip("-").replace("-", "_")


def _completion(words: Sequence[str]) -> Callable[[str], list[str]]:
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def _value(row: Option, given: dict[str, Any]) -> Any:
    """What was said of an option, by itself or by a shorthand (taken out of `given`); None for nothing."""
    value = given.pop(row.option)
    for short in row.shorthands:
        said = given.pop(_name(short.flags))
        if said:
            value = said if short.value is None else short.value
    return value


def images_of(sources: Sequence[str], **more: Any) -> "ImageSource":
    """The images of `sources`; see `inputs.sources.find`."""
    from detxai.inputs.sources import find

    return find(sources, sys.stdin.buffer if "-" in sources else None, **more)

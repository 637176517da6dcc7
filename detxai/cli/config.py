"""`detxai config show` and `check`: what a run would be told, and whether a file says it right."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detxai.cli.options import configured
from detxai.errors import UsageError

if TYPE_CHECKING:
    from detxai.config.settings import RunConfig

config = typer.Typer(no_args_is_help=True)


@config.callback()
def _config() -> None:
    """The settings of a run: all of them as YAML, or whether a file of them is right."""


@config.command()
@configured("*")
def show(settings: "RunConfig") -> int:
    """Every setting as YAML, as `detxai explain` with the same options, environment and --config has it."""
    from detxai.config.settings import to_yaml

    print(to_yaml(settings), end="")
    return 0


@config.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="YAML run configs.", show_default=False)],
) -> int:
    """Whether these files are right; each that is not has its reasons on stderr, and the exit code is 2."""
    from detxai.config.settings import load
    from detxai.run.console import Console
    from detxai.text import printable

    code = 0
    for file in files:
        try:
            load(file)
        except UsageError as error:
            Console().error(error)
            code = int(error.exit_code)
        else:
            print(f"{printable(str(file))}: ok")
    return code

"""How options of all commands are written: headings of the help, and one short call an option."""

from __future__ import annotations

from typing import Any

import typer
from rich.markup import escape

INPUT, MODEL, WHAT, OUTPUT, RUN = "Input", "Model and detection", "Attribution", "Output", "Run"
PARCHGRAD = "ParchGrad (with --gradient parchgrad-cls or parchgrad-ins)"
JUDGING = "Judging"
CHOICE = "Which boxes"


def option(*flags: str, panel: str, help: str, **more: Any) -> Any:
    """An option under the heading `panel` of a command's help; `[auto]` in it is text, not markup."""
    return typer.Option(*flags, rich_help_panel=panel, help=escape(help), **more)

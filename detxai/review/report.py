"""The page of a tree: one static file that needs no network and no server, pictures beside it."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

from detxai.output.store import write_file
from detxai.output.tree import Tree
from detxai.review import index

PAGE = "report.html"
#: In the order in which they are read.
SCRIPTS = ("data.js", "draw.js", "list.js", "detail.js", "classes.js", "plots.js", "main.js")


def report(tree: Path, page: Path | None = None) -> Path:
    """Write the page of the output tree `tree` and return where it lies: by default `report.html` in the tree.

    Raises NoInputError where there is no record, OutputError where the page cannot be written.
    """
    page = page or tree / PAGE
    found = index.build(Tree(tree), page)
    write_file(page, render(found).encode("utf-8"))
    return page


def render(found: dict[str, object]) -> str:
    """The page of the index `found`; whatever names it holds, they are no markup: the index travels in base64."""
    return _template("page.html.j2").render(
        name=found["name"],
        index=index.pack(found),
        style=Markup(_asset("page.css")),
        script=Markup("\n".join(map(_asset, SCRIPTS))),
    )


@cache
def _asset(name: str) -> str:
    return (files("detxai.review") / "page" / name).read_text(encoding="utf-8")


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_asset(name))

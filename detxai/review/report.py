"""The page of a tree: one static file that needs no network and no server, pictures beside it."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from detxai.output.atomic import write_file
from detxai.output.ranking import Finding
from detxai.output.tree import Tree
from detxai.review import index
from detxai.review.diff import Diff, Side, in_words

PAGE = "report.html"
#: A page of a comparison shows this many changes.
MOST_CHANGES = 1000
#: In the order in which they are read.
SCRIPTS = ("data.js", "draw.js", "list.js", "detail.js", "classes.js", "plots.js", "main.js")


def report(tree: Path, page: Path | None = None) -> Path:
    """Write the page of the output tree `tree` and return where it lies: by default `report.html` in the tree.

    Raises NoInputError where there is no record, OutputError where the page cannot be written.
    """
    page = page or tree / PAGE
    content = index.build(Tree(tree), page)
    write_file(page, render(content).encode("utf-8"))
    return page


def render(content: dict[str, object]) -> str:
    """The page of the index `content`; whatever names it holds, they are no markup: the index travels in base64."""
    return _template("page.html.j2").render(
        name=content["name"],
        index=index.pack(content),
        style=Markup(_asset("page.css")),
        script=Markup("\n".join(map(_asset, SCRIPTS))),
    )


def report_diff(difference: Diff, page: Path) -> None:
    """Write the comparison as one static page, both overlays of a change side by side. Raises OutputError."""

    def picture(side: Side, f: Finding | None) -> str | None:
        base = index.relative(Path(side.name), page.parent)
        return f"./{quote(base + f.overlay)}" if f is not None and f.overlay else None

    changes = difference.changes[:MOST_CHANGES]
    classes = difference.by_class()
    one, other = difference.a.plain(), difference.b.plain()
    text = _template("diff.html.j2").render(
        diff=difference,
        style=Markup(_asset("page.css")),
        sides=[(key, _listed(one[key]), _listed(other[key])) for key in one if key != "name"],
        classes=classes,
        columns=list(classes[0]) if classes else [],
        shown=[
            (change, cells, picture(difference.a, change.before), picture(difference.b, change.after))
            for change, cells in zip(changes, in_words(changes), strict=True)
        ],
    )
    write_file(page, text.encode("utf-8", "backslashreplace"))


def _listed(value: Any) -> str:
    return "; ".join(value) if isinstance(value, list) else str(value)


@cache
def _asset(name: str) -> str:
    return (files("detxai.review") / "page" / name).read_text(encoding="utf-8")


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_asset(name))

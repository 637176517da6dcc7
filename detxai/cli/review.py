"""`detxai list`, `report` and `diff`, thin: they read output trees and need no model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detxai.cli.options import CHOICE, OUTPUT, RUN, option
from detxai.errors import ExitCode, UsageError
from detxai.text import printable

if TYPE_CHECKING:
    from rich.text import Text

Tree = Annotated[Path, typer.Argument(metavar="OUT", help="Output tree of detxai explain.")]
Verdict = Annotated[
    list[str] | None,
    option("--verdict", panel=CHOICE, help="unsupported, weak, unknown, supported, none, all. [the first three]"),
]
Class = Annotated[list[str] | None, option("--class", panel=CHOICE, help="only these classes (ids or names)")]
Kind = Annotated[
    list[str] | None, option("--kind", panel=CHOICE, help="detection, candidate, missed, all. [detection]")
]

Sort = Annotated[
    str,
    option(
        "--sort",
        panel=CHOICE,
        help="severity (to look at again, lowest score first), verdict (unsupported first), score, trust, path, class"
        " or a measure of evidence; -KEY turns it round",
        metavar="KEY",
    ),
]
Limit = Annotated[int | None, option("--limit", panel=CHOICE, help="only the first N", metavar="N", min=1)]
Promised = Annotated[
    bool,
    option("--promise", panel=CHOICE, help="all that the list of calibrate evidence --recall holds, and nothing less"),
]
Paths0 = Annotated[bool, option("--paths0", panel=OUTPUT, help="paths of their images, once, NUL after each")]
ByClass = Annotated[
    bool,
    option("--by-class", panel=OUTPUT, help="how each class behaves: where its evidence lies, groups, odd ones"),
]
Annotate = Annotated[
    str | None,
    option("--annotate", panel=OUTPUT, help="for CI, with failed images: github, junit, sarif", metavar="FORMAT"),
]
Prefix = Annotated[
    str, option("--prefix", panel=OUTPUT, help="with --annotate: put before the paths, as scans/", metavar="TEXT")
]


def list_(
    tree: Tree,
    verdict: Verdict = None,
    class_: Class = None,
    kind: Kind = None,
    sort: Sort = "severity",
    limit: Limit = None,
    promise: Promised = False,
    json_lines: Annotated[bool, option("--json", panel=OUTPUT, help="one JSON line a box")] = False,
    by_class: ByClass = False,
    paths0: Paths0 = False,
    annotate: Annotate = None,
    prefix: Prefix = "",
) -> int:
    """Which boxes of a finished run to look at, worst first: where, why, and the picture."""
    from detxai.output import listing as shown
    from detxai.output.tree import Tree
    from detxai.review.annotations import FORMATS
    from detxai.review.behaviour import behaviours
    from detxai.review.class_text import describe
    from detxai.review.listing import PROMISED, Choice, require_known, select, unique_paths

    if promise and (verdict or class_ or kind or limit):
        raise UsageError(
            "--promise with --verdict, --class, --kind or --limit would hold less than it promises.",
            "Leave them out.",
        )
    if json_lines + paths0 + (annotate is not None) > 1:
        raise UsageError("--json, --paths0 and --annotate cannot all be printed.", "Give one of them.")
    if annotate is not None:
        require_known("--annotate", annotate, tuple(FORMATS))
    choice = PROMISED if promise else Choice.of(verdict or (["all"] if by_class else None), class_, kind)
    chosen = select(Tree(tree), choice, sort)
    _warn(chosen.warnings)
    findings = chosen.findings[:limit]
    if annotate is not None:
        text = FORMATS[annotate](replace(chosen, findings=findings), prefix)
        sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace"))
    elif paths0:
        sys.stdout.buffer.writelines(path.encode() + b"\0" for path in unique_paths(findings))
    elif json_lines:
        sys.stdout.writelines(shown.json_line(f) + "\n" for f in findings)
    elif by_class:
        _print(line for behaviour in behaviours(findings) for line in describe(behaviour))
    elif findings:
        _print(shown.lines(findings, _width()))
    if not findings:
        _warn([f"none of the {chosen.total} boxes in {tree} is of this kind (--verdict all --kind all shows them)"])
    sys.stdout.flush()
    return 0


def report(
    tree: Tree,
    output: Annotated[
        Path | None, option("-o", "--output", panel=OUTPUT, help="the page [OUT/report.html]", metavar="FILE.html")
    ] = None,
) -> int:
    """Write one static page about a finished run: cards, filters, how each class behaves, plots; no network."""
    from detxai.review.report import report as write

    print(printable(str(write(tree, output))))
    return 0


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="Output tree of detxai explain: before.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Output tree to compare with it: now.")],
    json_text: Annotated[bool, option("--json", panel=OUTPUT, help="the whole comparison as JSON")] = False,
    html: Annotated[
        Path | None,
        option("--html", panel=OUTPUT, help="also write it as a page, pictures side by side", metavar="FILE"),
    ] = None,
    limit: Annotated[int, option("--limit", panel=OUTPUT, help="most changes shown as text", metavar="N", min=0)] = 20,
    fail_on: Annotated[
        str | None,
        option(
            "--fail-on", panel=RUN, help="leave with 10 when something got worse, or changed", metavar="worse|change"
        ),
    ] = None,
) -> int:
    """Two runs compared: boxes gone, new, moved, other classes and verdicts, evidence elsewhere; by class and image."""
    from detxai.output.tree import Tree
    from detxai.review.diff import compare
    from detxai.review.diff_text import describe
    from detxai.review.report import report_diff

    if fail_on not in (None, "worse", "change"):
        raise UsageError(f"--fail-on does not know {fail_on!r} here.", "Choose worse or change.")
    difference = compare(Tree(first), Tree(second))
    _warn(difference.warnings)
    if html is not None:
        report_diff(difference, html)
    if json_text:
        print(json.dumps(difference.plain(), ensure_ascii=False, indent=1))
    else:
        _print(describe(difference, limit))
    sys.stdout.flush()
    gated = {"worse": difference.worse, "change": difference.changes, None: []}[fail_on]
    if gated:
        _warn([f"gate: {len(gated)} boxes or images {'got worse' if fail_on == 'worse' else 'changed'} (--fail-on)"])
    return int(ExitCode.GATE if gated else ExitCode.OK)


def _width() -> int | None:
    """Columns of the terminal that stdout is, None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _print(shown: Iterable[Text]) -> None:
    """Lines on stdout, never cut or wrapped; colours on a terminal only."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for line in shown:
        console.print(line)


def _warn(warnings: Iterable[str]) -> None:
    from detxai.run.console import Console

    for warning in warnings:
        Console().say(warning, kind="warning")

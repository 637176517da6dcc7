"""From the figures of many images to means with intervals, paired differences and sanity: what is reported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from detxai.evaluation.metrics import bootstrap
from detxai.evaluation.perturbation import FILLS, MODES, shares
from detxai.schema import significant

#: Figures of a detection that are averaged, by the name they have in every output.
METRICS = (
    "margin", *(f"{what}_{fill}" for fill in FILLS for what in ("margin", "insertion", "deletion")),
    "pointing", "energy", "pointing_label", "energy_label", "parts", "gini",
    "completeness_error", "evaluations", "seconds",
)  # fmt: skip
#: Figures compared method by method on the same image.
PAIRED = ("margin", *(f"margin_{fill}" for fill in FILLS), "energy")

Figures = Sequence[Mapping[str, Any]]
Row = dict[str, Any]


def by_image(figures: Figures, name: str, metric: str) -> list[float | None]:
    """The mean of a metric over the detections of each image; None where none has it."""
    image_means: list[float | None] = []
    for image in figures:
        values = [d["methods"][name].get(metric) for d in image["detections"] if name in d["methods"]]
        known = [v for v in values if v is not None]
        image_means.append(float(np.mean(known)) if known else None)
    return image_means


def interval(values: Sequence[float | None], seed: int) -> Row | None:
    """Mean over images with its 95 % bootstrap interval; None where no image has a value."""
    known = [v for v in values if v is not None]
    ends = bootstrap(known, seed)
    if ends is None:
        return None
    mean, low, high = (significant(v) for v in ends)
    return {"mean": mean, "low": low, "high": high, "images": len(known)}


def means(figures: Figures, names: Mapping[str, bool], seed: int) -> dict[str, Row]:
    """name -> {baseline, detections, metrics: {metric: interval}, curves}."""
    return {
        name: {
            "baseline": baseline,
            "detections": sum(name in d["methods"] for image in figures for d in image["detections"]),
            "metrics": {metric: interval(by_image(figures, name, metric), seed) for metric in METRICS},
            "curves": _mean_curves(figures, name),
        }
        for name, baseline in names.items()
    }


def _mean_curves(figures: Figures, name: str) -> dict[str, dict[str, list[float]]] | None:
    images = [[d["methods"][name]["curves"] for d in i["detections"] if name in d["methods"]] for i in figures]
    known = [image for image in images if image]
    if not known:
        return None
    return {
        fill: {
            mode: [
                significant(float(v))
                for v in np.mean([np.mean([c[fill][mode] for c in image], axis=0) for image in known], axis=0)
            ]
            for mode in MODES
        }
        for fill in FILLS
    }


def paired(figures: Figures, names: Mapping[str, bool], against: Sequence[str], seed: int) -> list[Row]:
    """The difference of every method to each of `against`, image by image: mean and 95 % bootstrap interval.

    `above`: the whole interval is above zero.
    """
    differences = []
    for name in names:
        for other in against:
            for metric in PAIRED if name != other else ():
                both = zip(by_image(figures, name, metric), by_image(figures, other, metric), strict=True)
                row = interval([None if a is None or b is None else a - b for a, b in both], seed)
                if row is not None:
                    differences.append(
                        {"method": name, "against": other, "metric": metric, **row, "above": row["low"] > 0}
                    )
    return differences


def part_table(figures: Figures, names: Mapping[str, bool], seed: int) -> dict[str, dict[str, dict[str, Row]]]:
    """class -> part -> method -> mean share of the positive part, of the area, and their ratio with its interval."""
    table: dict[str, dict[str, dict[str, Row]]] = {}
    pairs: dict[tuple[str, str, str], list[list[tuple[float, float]]]] = {}
    for image in figures:
        own: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
        for d in image["detections"]:
            for name in names:
                for part, pair in d["methods"].get(name, {}).get("part_shares", {}).items():
                    own.setdefault((d["class_name"], part, name), []).append((pair[0], pair[1]))
        for key, value in own.items():
            pairs.setdefault(key, []).append(value)
    for (class_name, part, name), values in sorted(pairs.items()):
        ratios = [float(np.mean([share / area for share, area in image])) for image in values]
        flat = np.array([pair for image in values for pair in image])
        table.setdefault(class_name, {}).setdefault(part, {})[name] = {
            "share": significant(float(flat[:, 0].mean())),
            "area": significant(float(flat[:, 1].mean())),
            "items": len(flat),
            "ratio": interval(ratios, seed),
        }
    return table


def likeness(figures: Figures, seed: int) -> dict[str, Any]:
    """Mean rank correlations under noise, with randomised weights and for another class, by method, as far as known."""
    table: dict[str, Any] = {}
    for key in ("stability", "other_class"):
        rows = [image[key] for image in figures if key in image]
        if rows:
            table[key] = _correlations(rows, seed)
    rows = [image["cascade"] for image in figures if "cascade" in image]
    if rows:
        table["cascade"] = [
            {"share": stage["share"], "correlation": _correlations([row[k]["correlation"] for row in rows], seed)}
            for k, stage in enumerate(rows[0])
        ]
    return table


def _correlations(rows: Sequence[Mapping[str, Sequence[float | None]]], seed: int) -> dict[str, Row | None]:
    def mean(values: Sequence[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return float(np.mean(known)) if known else None

    return {name: interval([mean(row.get(name, ())) for row in rows], seed) for name in rows[0]}


def report(figures: Figures, names: Mapping[str, bool], first: str, steps: int, seed: int) -> Row:
    """All figures of a run, JSON-ready."""
    against = [name for name in dict.fromkeys(("random", "grad", first)) if name in names]
    judged = [image for image in figures if image["detections"]]
    return {
        "images": len(figures),
        "images_with_detections": len(judged),
        "detections": sum(len(image["detections"]) for image in judged),
        "shares": [significant(float(v)) for v in shares(steps)],
        "methods": means(judged, names, seed),
        "paired": paired(judged, names, against, seed),
        "parts": part_table(judged, names, seed),
        **likeness(judged, seed),
    }


# -- for people ---------------------------------------------------------------------------------


Printed = Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]
#: Columns of the printed tables -> metric and form.
AREAS = {f"{short} {fill}": (f"{mode}_{fill}", "{:.3f}") for fill in FILLS
         for short, mode in (("ins", "insertion"), ("del", "deletion"))}  # fmt: skip
PLACES = {
    "point": ("pointing", "{:.2f}"), "in box": ("energy", "{:.2f}"), "label": ("energy_label", "{:.2f}"),
    "parts": ("parts", "{:.1f}"), "gini": ("gini", "{:.2f}"), "error": ("completeness_error", "{:.3f}"),
    "evals": ("evaluations", "{:.0f}"), "s": ("seconds", "{:.2f}"),
}  # fmt: skip
#: Methods that the table of parts has room for, in the order they were asked for.
MOST_BESIDE = 6


def _cell(row: Row | None, form: str) -> str:
    return "–" if row is None else form.format(row["mean"])


def _spread(row: Row | None) -> str:
    return "–" if row is None else f"{row['mean']:.2f} [{row['low']:.2f} {row['high']:.2f}]"


def printed(report: Row) -> Printed:
    """(title, columns, rows) of the tables for the terminal; baselines wear a star."""
    methods: dict[str, Row] = report["methods"]
    titles = {name: f"{name} *" if row["baseline"] else name for name, row in methods.items()}
    ranked = sorted(methods, key=lambda name: -((methods[name]["metrics"]["margin"] or {"mean": -9})["mean"]))
    against = list(dict.fromkeys(row["against"] for row in report["paired"]))[:2]
    difference = {(r["method"], r["against"]): r for r in report["paired"] if r["metric"] == "margin"}
    yield (
        f"Insertion − deletion [95 %]: {report['detections']} detections, {report['images_with_detections']} images; "
        "* baseline",
        ("method", "ins − del", *(f"minus {name}" for name in against)),
        [
            (
                titles[name],
                _spread(methods[name]["metrics"]["margin"]),
                *(_spread(difference.get((name, other))) for other in against),
            )
            for name in ranked
        ],
    )
    for title, columns in (("Areas under the curves", AREAS), ("Place of the positive part, cost a detection", PLACES)):
        shown = {c: m for c, m in columns.items() if any(methods[n]["metrics"][m[0]] for n in methods)}
        rows = [(titles[n], *(_cell(methods[n]["metrics"][m], form) for m, form in shown.values())) for n in ranked]
        yield title, ("method", *shown), rows
    yield from _printed_parts(report, [name for name in methods if name != "random"][:MOST_BESIDE])
    yield from _printed_sanity(report)


def _printed_parts(report: Row, shown: Sequence[str]) -> Printed:
    rows = [
        (f"{class_name}: {part}", *(_cell(by.get(name, {}).get("ratio"), "{:.1f}") for name in shown))
        for class_name, parts in report["parts"].items()
        for part, by in parts.items()
    ]
    if rows:
        yield "Parts of items: share of the positive part in the box / share of the box", ("part", *shown), rows


def _printed_sanity(report: Row) -> Printed:
    columns = {
        f"+{100 * s['share']:.0f} %" if s["share"] else "head": s["correlation"] for s in report.get("cascade", ())
    }
    more = (("other class", "other_class"), ("noise", "stability"))
    columns |= {name: report[key] for name, key in more if key in report}
    if columns:
        names = list(next(iter(columns.values())))
        rows = [(name, *(_cell(column.get(name), "{:+.2f}") for column in columns.values())) for name in names]
        title = "Rank correlation of a map with that of shuffled weights: head, then layers below"
        yield title, ("method", *columns), rows

"""The report of `bench.py` as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quality import NODES


def markdown(report: dict[str, Any]) -> str:
    """Tables for the README."""
    m = report["machine"]
    where = m["device"] if m["device"] != "cpu" else f"{m['cpu']}, {m['cores']} cores"
    lines = [
        f"Measured on {where}, {m['threads']} threads, torch {m['torch']}, {report['precision']}; "
        f"medians of {report['repeats']} interleaved runs; load before the start {m['load']}."
    ]
    for part in report["sets"]:
        lines += ["", *_table(part), "", " ".join(_notes(part))]
    return "\n".join(lines) + "\n"


def _table(part: dict[str, Any]) -> Iterator[str]:
    batch, at_once = part["captum"]["batch"], part["captum"]["at_once"]
    yield (
        f"**{part['model']}, {part['imgsz']} px, {part['baseline']} baseline** "
        f"(Captum: {batch} steps a batch, {at_once} detection(s) at once)"
    )
    yield ""
    yield "| seconds a detection | detxai | Captum IG | plain loop | Captum ÷ detxai |"
    yield "|---|---|---|---|---|"
    for row in part["equal"]:
        s = row["seconds"]
        yield (
            f"| {row['nodes']} evaluations each, {row['detections_an_image']:.0f} detection(s) an image "
            f"| {s['detxai']:.3f} | {s['captum']:.3f} | {s['plain']:.3f} | **{row['ratio_captum']:.1f}** |"
        )
    for name, text in (("A", "A: completeness error ≤ 5 %"), ("B", "B: map within 10 % of the reference")):
        if "criteria" in part:
            yield _criterion_line(part["criteria"][name], text)


def _criterion_line(c: dict[str, Any], text: str) -> str:
    s, e = c["seconds"], c["evaluations"]
    nodes = f"{c['nodes']} nodes" if c["nodes"] else f"not reached with {NODES[-1]} nodes"
    more = {"single": "alone in the image", "many": "4 or more"}
    split = "; ".join(f"{more[k]}: {v:.1f}" for k, v in c["ratio_captum"].items() if k in more)
    return (
        f"| {text} | {s['detxai']:.3f} ({e['median']:.0f} evaluations, p90 {e['p90']:.0f}) | "
        f"{s['captum']:.3f} ({nodes}) | {s['plain']:.3f} | **{c['ratio_captum']['all']:.1f}**"
        f"{f' ({split})' if split else ''} |"
    )


def _notes(part: dict[str, Any]) -> Iterator[str]:
    shares = [(e["limit_share"], e["detections_an_image"]) for e in part["equal"] if e["limit_share"] is not None]
    if shares:
        said = ", ".join(f"{100 * share:.0f} % with {count:.0f}" for share, count in shares)
        yield f"Convolutions alone take {said} detection(s) an image of detxai's time."
    if "criteria" in part:
        c, a, b = (part["criteria"], part["criteria"]["A"], part["criteria"]["B"])
        yield f"{c['detections']} detections in {c['images']} images."
        yield f"A: {100 * a['converged']:.0f} % of detxai's maps converge, {_distance(a['distance'])}."
        yield f"B (tolerance {b['tolerance']:g}) they are {_distance(b['distance'])},"
        yield f"Captum's {_distance(b['rival_distance'])}."
        yield f"Reference: {c['reference']['nodes']} nodes on {c['reference']['detections']} detections,"
        yield f"error ≤ {100 * c['reference']['bound']:.2g} %."
    yield f"At the same nodes the three maps agree to {part['agreement']:.0e}."
    known = {name: mib for name, mib in part["peak_mib"].items() if mib is not None}
    yield "Peak memory beyond the model: " + ", ".join(f"{k} {v:.0f} MiB" for k, v in known.items()) + "."
    images = (f"{1000 * r['detxai']:.0f} ms with {r['images']}" for r in part["scaling"]["images"])
    yield f"A detection by images: {', '.join(images)}."
    by_nodes = part["scaling"]["nodes"]
    nodes = (f"{r['nodes']}: {1000 * r['detxai']:.0f} and {1000 * r['captum']:.0f} ms" for r in by_nodes)
    yield f"By evaluations, detxai and Captum: {', '.join(nodes)}."


def _distance(d: dict[str, float]) -> str:
    return f"{100 * d['median']:.1f} % from the reference (p90 {100 * d['p90']:.1f} %)"

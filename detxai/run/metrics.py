"""The figures of a run as Prometheus' text format, for the textfile collector of node_exporter.

All are gauges: a file tells of the last run alone, and the next run counts anew.
See https://prometheus.io/docs/instrumenting/exposition_formats.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from detxai.output.atomic import write_file
from detxai.output.summary import Summary
from detxai.run.tally import Tally
from detxai.vocabulary import VERDICTS

#: Name -> what it says.
HELP = {
    "detxai_images": "Images of the last run by how they ended.",
    "detxai_failed_images": "Failed images of the last run by kind of failure.",
    "detxai_detections": "Reported boxes of the last run by verdict, those of images done before too.",
    "detxai_unconverged_maps": "Maps of the last run that missed the wanted tolerance.",
    "detxai_gradient_evaluations": "Gradient evaluations of the last run.",
    "detxai_run_seconds": "Wall-clock time of the last run.",
    "detxai_device_busy_seconds": "Of these, the time in which the network ran.",
    "detxai_exit_code": "Exit code of the last run.",
    "detxai_run_end_timestamp_seconds": "When the last run ended, in seconds since 1970.",
}


def write(file: Path, summary: Summary, tally: Tally, now: float | None = None) -> None:
    """Replace `file` by the figures of the run that ended at `now` (seconds since 1970). Raises OutputError."""
    write_file(file, text(summary, tally, time.time() if now is None else now).encode())


def text(summary: Summary, tally: Tally, now: float) -> str:
    """Every metric with its help, its type and its values."""
    verdicts = {word: tally.verdicts[word] for word in VERDICTS}
    verdicts["none"] = summary.detections - sum(verdicts.values())
    single = {
        "detxai_unconverged_maps": summary.unconverged,
        "detxai_gradient_evaluations": summary.evaluations,
        "detxai_run_seconds": summary.seconds,
        "detxai_device_busy_seconds": summary.timings.get("device", 0.0),
        "detxai_exit_code": summary.exit_code,
        "detxai_run_end_timestamp_seconds": now,
    }
    lines = [
        *_metric("detxai_images", "status", summary.images.model_dump()),
        *_metric("detxai_failed_images", "code", dict(sorted(tally.failure_codes.items()))),
        *_metric("detxai_detections", "verdict", verdicts),
    ]
    for name, value in single.items():
        lines += [*_head(name), f"{name} {value!r}"]
    return "\n".join(lines) + "\n"


def _metric(name: str, label: str, values: Mapping[str, float]) -> Iterator[str]:
    """One metric by label. The values of labels are detxai's own words: nothing in them needs to be escaped."""
    yield from _head(name)
    yield from (f'{name}{{{label}="{word}"}} {value!r}' for word, value in values.items())


def _head(name: str) -> Iterator[str]:
    yield from (f"# HELP {name} {HELP[name]}", f"# TYPE {name} gauge")

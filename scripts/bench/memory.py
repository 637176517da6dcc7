"""How much memory a run takes at most, against the budget it was given.

    python scripts/bench/memory.py --images DIR --model FILE --memory 1GiB 4GiB [--options "--imgsz 640 --batch 1"]

The command runs once at a score that no detection has: that is the model with the libraries.
Then once for each budget. Peaks are resident sizes of the process, as /usr/bin/time has them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def peak(sources: list[str], options: list[str]) -> dict[str, Any]:
    """MiB resident at most, seconds, and what came of a run of `detxai explain`."""
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "detxai", "explain", *sources, *options, "-o", folder, "-q"]
        start = time.perf_counter()
        process = subprocess.Popen(line)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        summary = json.loads((Path(folder) / "summary.json").read_text())
    return {
        "code": os.waitstatus_to_exitcode(status),
        "mib": used.ru_maxrss // (1 if sys.platform == "darwin" else 1024),
        "seconds": seconds,
        "detections": summary["detections"],
        "evaluations": summary["evaluations"],
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", nargs="+", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--memory", nargs="+", default=["auto"], help="budgets")
    parser.add_argument("--options", default="", help="more options of the command, in one string")
    options = parser.parse_args()
    common = ["-m", options.model, *shlex.split(options.options)]
    least = peak(options.images[:1], [*common, "--conf", "0.9999"])
    print(f"Libraries and model: {least['mib']} MiB.\n", flush=True)
    print("| budget | peak, MiB | of that beside the model | detections | evaluations | seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    for memory in options.memory:
        peaks = peak(options.images, [*common, "--memory", memory])
        print(
            f"| {memory} | {peaks['mib']} | {peaks['mib'] - least['mib']} | {peaks['detections']} |"
            f" {peaks['evaluations']} | {peaks['seconds']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

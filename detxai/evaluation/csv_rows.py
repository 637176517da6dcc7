"""`detections.csv`: one row a detection and method, for spreadsheets and data frames."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from detxai.evaluation.tables import METRICS

COLUMNS = ("image", "detection", "class_id", "class_name", "score", "left", "top", "right", "bottom", "labelled",
           "method")  # fmt: skip


def text(figures: Sequence[Mapping[str, Any]]) -> str:
    """The table as CSV (RFC 4180); a figure that does not exist is an empty field."""
    buffer = StringIO()
    table = csv.writer(buffer)
    table.writerow([*COLUMNS, *METRICS])
    for image in figures:
        for d in image["detections"]:
            own = [image["image"], *(d[key] for key in ("id", "class_id", "class_name", "score")), *d["box"]]
            own.append(int(d["label"] is not None))
            for name, method in d["methods"].items():
                table.writerow([*own, name, *("" if method.get(m) is None else method[m] for m in METRICS)])
    return buffer.getvalue()

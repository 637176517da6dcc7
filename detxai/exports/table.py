"""One flat table, a row a reported box: `boxes.csv`, or `boxes.parquet` by pyarrow (the extra `parquet`)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from typing import Any

from detxai.errors import UsageError
from detxai.exports.content import Content, reason, reported, size, verdict
from detxai.output.records import DetectionRecord, Record

#: Column -> the type of its values.
COLUMNS: dict[str, type] = {
    **{"path": str, "sha256": str, "width": int, "height": int, "model": str, "model_sha256": str, "id": int},
    **{"class_id": int, "class_name": str, "score": float, "left": float, "top": float, "right": float},
    **{"bottom": float, "verdict": str, "reason": str, "match": str, "method": str, "converged": bool},
    **{"error_bound": float, "inside_share": float, "net_inside": float, "evaluations": int, "overlay": str},
}


def csv_files(content: Content) -> Iterator[tuple[str, bytes]]:
    """The table as UTF-8 CSV (RFC 4180); nothing stands for what is unknown."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS))
    writer.writeheader()
    writer.writerows(_rows(content.records))
    yield "boxes.csv", text.getvalue().encode("utf-8", "backslashreplace")


def parquet_files(content: Content) -> Iterator[tuple[str, bytes]]:
    """The table as Parquet, compressed with zstd. Raises UsageError without pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError("Parquet needs pyarrow.", "pip install 'detxai[parquet]', or export as csv.") from error
    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in COLUMNS.items()])
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(list(_rows(content.records)), schema), sink, compression="zstd")
    yield "boxes.parquet", sink.getvalue().to_pybytes()


def _rows(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    return (_row(record, d) for record in records for d in reported(record))


def _row(record: Record, d: DetectionRecord) -> dict[str, Any]:
    row: dict[str, Any] = {"path": record.image.path, "sha256": record.image.sha256}
    row["width"], row["height"] = size(record)
    if record.model:
        row |= {"model": record.model.name, "model_sha256": record.model.sha256}
    row |= {"id": d.id, "class_id": d.class_id, "class_name": d.class_name, "score": d.score}
    row["left"], row["top"], row["right"], row["bottom"] = d.box
    row |= {"verdict": verdict(d), "reason": reason(d), "match": d.match.status if d.match else None}
    if d.attributions:
        first = d.attributions[0]
        names = ("method", "converged", "error_bound", "inside_share", "net_inside", "evaluations", "overlay")
        row |= {name: getattr(first, name) for name in names}
    return row

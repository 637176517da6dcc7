"""Records as the files of other tools: one module a format, each a function of records to files by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from detxai.exports import coco, labelstudio, table, yolo
from detxai.output.records import Record

#: Format -> its files (POSIX name, content) made of records in the order of their paths; failed ones are left out.
FORMATS: dict[str, Callable[[Iterable[Record]], Iterator[tuple[str, bytes]]]] = {
    "coco": coco.files,
    "yolo": yolo.files,
    "labelstudio": labelstudio.files,
    "csv": table.csv_files,
    "parquet": table.parquet_files,
}

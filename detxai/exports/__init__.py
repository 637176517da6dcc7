"""Trees as the files of other tools: one module a format, each a function of records to files by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from detxai.exports import coco, cvat, dicom, fiftyone, heatmaps, labelstudio, table, yolo
from detxai.exports.content import Content

#: Format -> its files (POSIX name, content) made of records in the order of their paths; failed ones are left out.
FORMATS: dict[str, Callable[[Content], Iterator[tuple[str, bytes]]]] = {
    "coco": coco.files,
    "yolo": yolo.files,
    "labelstudio": labelstudio.files,
    "cvat": cvat.files,
    "fiftyone": fiftyone.files,
    "csv": table.csv_files,
    "parquet": table.parquet_files,
    "heatmaps": heatmaps.files,
    "dicom": dicom.files,
}

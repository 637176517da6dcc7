"""What all formats are made of: the records that are ok, their reported boxes, and maps where the tree has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from detxai.output.records import DetectionRecord, Record
from detxai.output.store import decode_map
from detxai.values import Map

#: Of the strongest cell, from which on a cell of a raster is shown.
THRESHOLD = 0.25
#: Longer side of the rasters that other tools show.
RASTER = 128


@dataclass(frozen=True)
class Content:
    """What is exported: `records` that are ok, by path, and the tree `folder` they lie in.

    `sources`: the folder of the pictures, where the export may take patient and study from them; None: it may not.
    """

    records: list[Record]
    folder: Path
    sources: Path | None = None

    def raster(self, record: Record, detection: DetectionRecord) -> tuple[tuple[float, float, float, float], Map]:
        """(left, top, right, bottom) in source pixels, and signed values by row from the top.

        The whole map, of at most `RASTER` cells a side, where the tree has it (--maps); else the record's grid, which
        fills the box clipped to the picture. Values are sums over a cell, in the map's unit.
        """
        width, height = size(record)
        first = detection.attributions[0]
        if first.map is not None:
            file = (self.folder / record.image.path).parent / first.map
            values = decode_map(file.read_bytes(), first.map)
            factor = min(1.0, RASTER / max(width, height))
            cells = (max(1, round(width * factor)), max(1, round(height * factor)))
            share = width * height / (cells[0] * cells[1])
            shrunk = cv2.resize(values.astype(np.float32), cells, interpolation=cv2.INTER_AREA) * share
            return (0.0, 0.0, float(width), float(height)), shrunk
        left, top, right, bottom = detection.box
        bounds = (max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height)))
        return bounds, np.asarray(first.grid.values, np.float32)


def reported(record: Record) -> Iterator[DetectionRecord]:
    """Detections of `record`, neither candidates nor misses."""
    return (d for d in record.detections or () if d.kind == "detection")


def size(record: Record) -> tuple[int, int]:
    """(width, height) of the picture of a record that is ok."""
    return record.image.width or 1, record.image.height or 1


def verdict(detection: DetectionRecord) -> str | None:
    """The verdict on the predicted class; None without evidence."""
    return detection.evidence.verdict if detection.evidence else None


def reason(detection: DetectionRecord) -> str | None:
    """The deciding reason of the verdict; None without one."""
    return next(iter(detection.evidence.reasons), None) if detection.evidence else None

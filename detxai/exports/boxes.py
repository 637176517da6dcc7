"""What all formats are made of: the reported boxes of the records that are ok."""

from __future__ import annotations

from collections.abc import Iterator

from detxai.output.records import DetectionRecord, Record


def reported(record: Record) -> Iterator[DetectionRecord]:
    """Detections of `record`, neither candidates nor misses."""
    return (d for d in record.detections or () if d.kind == "detection")


def size(record: Record) -> tuple[int, int]:
    """(width, height) of the picture of a record that is ok."""
    return record.image.width or 1, record.image.height or 1


def verdict(detection: DetectionRecord) -> str | None:
    """The verdict on the predicted class; None without evidence."""
    return detection.evidence.verdict if detection.evidence else None

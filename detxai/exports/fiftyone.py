"""FiftyOne: `metadata.json` and `samples.json`, read by `Dataset.from_dir(dir, fiftyone.types.FiftyOneDataset)`.

Pictures are looked for in `data/` beside them: link or copy their folder there. Boxes have verdict, reasons and
measures as attributes; `why` is a Heatmap. The format is FiftyOne's own of before its data sets had versions, which it
still reads: https://docs.voxel51.com/user_guide/import_datasets.html.
"""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np

from detxai.exports.content import RASTER, Content, reported, size, verdict
from detxai.output.records import DetectionRecord, Record
from detxai.values import Map


def files(content: Content) -> Iterator[tuple[str, bytes]]:
    """Both files of all records."""
    classes = sorted({d.class_name for record in content.records for d in reported(record)})
    metadata = {"name": "detxai", "media_type": "image", "info": {"classes": classes}}
    yield "metadata.json", json.dumps(metadata, ensure_ascii=False).encode()
    samples = [_sample(content, record) for record in content.records]
    yield "samples.json", json.dumps({"samples": samples}, ensure_ascii=False).encode()


def _sample(content: Content, record: Record) -> dict[str, Any]:
    width, height = size(record)
    boxes = list(reported(record))
    words = sorted({word for d in boxes if (word := verdict(d))})
    sample: dict[str, Any] = {"filepath": f"data/{record.image.path}", "tags": words}
    sample["metadata"] = {"_cls": "ImageMetadata", "width": width, "height": height}
    detections = [_detection(d, width, height) for d in boxes]
    sample["detections"] = {"_cls": "Detections", "detections": detections}
    heat = _strongest(content, record, boxes)
    if heat is not None:
        sample["why"] = {"_cls": "Heatmap", "tags": [], "map": _binary(heat), "range": [-1.0, 1.0]}
    return sample


def _detection(d: DetectionRecord, width: int, height: int) -> dict[str, Any]:
    left, top, right, bottom = d.box
    shown: dict[str, Any] = {"_cls": "Detection", "attributes": {}, "label": d.class_name, "confidence": d.score}
    shown["bounding_box"] = [left / width, top / height, (right - left) / width, (bottom - top) / height]
    shown |= {"index": d.id, "tags": [word] if (word := verdict(d)) else []}
    if d.evidence:
        shown |= {"verdict": d.evidence.verdict, "reasons": list(d.evidence.reasons)}
        measures = d.evidence.model_dump(mode="json")
        shown |= {name: value for name, value in measures.items() if isinstance(value, float)}
    return shown


def _strongest(content: Content, record: Record, boxes: list[DetectionRecord]) -> Map | None:
    """Signed, in [-1, 1]: at each cell the strongest of the boxes' maps, each in shares of its own greatest value."""
    width, height = size(record)
    factor = min(1.0, RASTER / max(width, height))
    heat = np.zeros((max(1, round(height * factor)), max(1, round(width * factor))), np.float32)
    explained = [d for d in boxes if d.attributions]
    for d in explained:
        bounds, values = content.raster(record, d)
        left, top, right, bottom = (round(edge * factor) for edge in bounds)
        there = heat[top : max(bottom, top + 1), left : max(right, left + 1)]
        if not there.size:
            continue
        shares = values / (float(np.abs(values).max(initial=0)) or 1.0)
        drawn = cv2.resize(shares.astype(np.float32), there.shape[::-1], interpolation=cv2.INTER_NEAREST)
        np.copyto(there, drawn, where=np.abs(drawn) > np.abs(there))
    return heat if explained else None


def _binary(values: Map) -> dict[str, Any]:
    """An array as FiftyOne keeps it: NumPy's own file, deflated, as extended JSON of BSON."""
    file = io.BytesIO()
    np.save(file, values)
    text = base64.b64encode(zlib.compress(file.getvalue())).decode("ascii")
    return {"$binary": {"base64": text, "subType": "00"}}

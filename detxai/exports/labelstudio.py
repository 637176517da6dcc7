"""Label Studio: `tasks.json` with predictions, `config.xml` for the project.

A box has its verdict as a choice, and as a brush where in the picture its strongest evidence lies.

Boxes are in per cent of the picture. See https://labelstud.io/guide/predictions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from detxai.exports import brush
from detxai.exports.content import THRESHOLD, Content, reported, size, verdict
from detxai.output.records import DetectionRecord, Record
from detxai.vocabulary import VERDICTS


def files(content: Content) -> Iterator[tuple[str, bytes]]:
    """The tasks, and the labelling interface that shows them. Serve the images by Label Studio's local files."""
    names: dict[str, None] = {}
    tasks = []
    for record in content.records:
        boxes = list(reported(record))
        names |= dict.fromkeys(d.class_name for d in boxes)
        model = f"{record.model.name} {record.model.sha256[:12]}" if record.model else "detxai"
        result = [part for d in boxes for part in (*_parts(d, *size(record)), *_heat(content, record, d))]
        score = max((d.score for d in boxes), default=0.0)
        image = f"/data/local-files/?d={quote(record.image.path)}"
        prediction = {"model_version": model, "score": score, "result": result}
        tasks.append({"data": {"image": image, "path": record.image.path}, "predictions": [prediction]})
    yield "tasks.json", json.dumps(tasks, ensure_ascii=False).encode()
    yield "config.xml", _interface(list(names)).encode()


def _parts(d: DetectionRecord, width: int, height: int) -> Iterator[dict[str, Any]]:
    left, top, right, bottom = d.box
    place = {"x": 100 * left / width, "y": 100 * top / height, "rotation": 0}
    place |= {"width": 100 * (right - left) / width, "height": 100 * (bottom - top) / height}
    common = {"id": f"d{d.id:02d}", "to_name": "image", "original_width": width, "original_height": height}
    box = {"from_name": "box", "type": "rectanglelabels", "score": d.score}
    yield common | box | {"value": place | {"rectanglelabels": [d.class_name]}}
    if word := verdict(d):
        yield common | {"from_name": "verdict", "type": "choices", "value": place | {"choices": [word]}}


def _heat(content: Content, record: Record, d: DetectionRecord) -> Iterator[dict[str, Any]]:
    """The cells that speak for the box, from `THRESHOLD` of the strongest on, as a brush; none where none does."""
    if not d.attributions:
        return
    (left, top, right, bottom), values = content.raster(record, d)
    strongest = float(values.max(initial=0))
    if strongest <= 0:
        return
    width, height = size(record)
    rows = np.floor((np.arange(height) + 0.5 - top) / (bottom - top) * values.shape[0])
    columns = np.floor((np.arange(width) + 0.5 - left) / (right - left) * values.shape[1])
    inside = np.outer((rows >= 0) & (rows < values.shape[0]), (columns >= 0) & (columns < values.shape[1]))
    at = np.ix_(rows.clip(0, values.shape[0] - 1).astype(int), columns.clip(0, values.shape[1] - 1).astype(int))
    strong = inside & (values >= THRESHOLD * strongest)[at]
    yield {
        "id": f"d{d.id:02d}e",
        "from_name": "evidence",
        "to_name": "image",
        "type": "brushlabels",
        "original_width": width,
        "original_height": height,
        "value": {"format": "rle", "rle": brush.encoded(strong), "brushlabels": [d.class_name]},
    }


def _interface(names: list[str]) -> str:
    labels = "".join(f"<Label value={quoteattr(name)}/>" for name in names)
    choices = "".join(f"<Choice value={quoteattr(word)}/>" for word in VERDICTS)
    return (
        '<View><Image name="image" value="$image"/>'
        f'<RectangleLabels name="box" toName="image">{labels}</RectangleLabels>'
        f'<BrushLabels name="evidence" toName="image">{labels}</BrushLabels>'
        f'<Choices name="verdict" toName="image" perRegion="true">{choices}</Choices></View>\n'
    )

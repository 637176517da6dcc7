"""Label Studio: `tasks.json` with predictions, the verdict as a choice a box, and `config.xml` for the project.

Boxes are in per cent of the picture. See https://labelstud.io/guide/predictions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from detxai.exports.content import Content, reported, size, verdict
from detxai.output.records import DetectionRecord
from detxai.vocabulary import VERDICTS


def files(content: Content) -> Iterator[tuple[str, bytes]]:
    """The tasks, and the labelling interface that shows them. Serve the images by Label Studio's local files."""
    names: dict[str, None] = {}
    tasks = []
    for record in content.records:
        boxes = list(reported(record))
        names |= dict.fromkeys(d.class_name for d in boxes)
        model = f"{record.model.name} {record.model.sha256[:12]}" if record.model else "detxai"
        result = [part for d in boxes for part in _parts(d, *size(record))]
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


def _interface(names: list[str]) -> str:
    labels = "".join(f"<Label value={quoteattr(name)}/>" for name in names)
    choices = "".join(f"<Choice value={quoteattr(word)}/>" for word in VERDICTS)
    return (
        '<View><Image name="image" value="$image"/>'
        f'<RectangleLabels name="box" toName="image">{labels}</RectangleLabels>'
        f'<Choices name="verdict" toName="image" perRegion="true">{choices}</Choices></View>\n'
    )

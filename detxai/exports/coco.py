"""COCO: `instances.json`, a data set of images, categories and scored boxes, and `results.json` for `loadRes`.

Categories keep the model's class ids, which count from 0, as --predictions reads them back; some readers (datumaro)
take category 0 for the background. See https://cocodataset.org/#format-results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from detxai.exports.content import Content, reported, size, verdict


def files(content: Content) -> Iterator[tuple[str, bytes]]:
    """The two files of all records."""
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    names: dict[int, str] = {}
    for record in content.records:
        number, (width, height) = len(images) + 1, size(record)
        images.append({"id": number, "file_name": record.image.path, "width": width, "height": height})
        for d in reported(record):
            left, top, right, bottom = d.box
            names[d.class_id] = d.class_name
            box: dict[str, Any] = {
                "image_id": number,
                "category_id": d.class_id,
                "score": d.score,
                "verdict": verdict(d),
            }
            box["bbox"] = [left, top, right - left, bottom - top]
            boxes.append(box)
    categories = [{"id": class_id, "name": name} for class_id, name in sorted(names.items())]
    annotations = [
        {"id": number, "area": box["bbox"][2] * box["bbox"][3], "iscrowd": 0, **box}
        for number, box in enumerate(boxes, 1)
    ]
    whole = {"info": {"description": "detxai"}, "images": images, "categories": categories, "annotations": annotations}
    yield "instances.json", json.dumps(whole, ensure_ascii=False).encode()
    yield "results.json", json.dumps(boxes, ensure_ascii=False).encode()

"""Heat maps as JSON lines, `heatmaps.jsonl`: one a reported box, as the heat map of roboflow's supervision-js.

See https://roboflow.github.io/supervision-js/interfaces/Detections.DetectionHeatmap.html.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from detxai.exports.content import THRESHOLD, Content, reported, verdict


def files(content: Content) -> Iterator[tuple[str, bytes]]:
    """The lines of all records; `bounds` has its centre as x and y, `valueScale` makes the strongest cell 1."""
    lines = []
    for record in content.records:
        for d in reported(record):
            if not d.attributions:
                continue
            (left, top, right, bottom), values = content.raster(record, d)
            strongest = float(values.max(initial=0))
            rectangle = {"x": (left + right) / 2, "y": (top + bottom) / 2}
            line = {
                "image": record.image.path,
                "detection": d.id,
                "class": d.class_name,
                "score": d.score,
                "verdict": verdict(d),
                "bounds": rectangle | {"width": right - left, "height": bottom - top},
                "width": values.shape[1],
                "height": values.shape[0],
                "values": [float(f"{value:.4g}") for value in values.ravel().tolist()],
                "valueScale": 1 / strongest if strongest else 1.0,
                "threshold": THRESHOLD,
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    yield "heatmaps.jsonl", "".join(lines).encode()

"""Records: exact areas, honest numbers, stable bytes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from detxai import schema
from detxai.errors import ImageError
from detxai.evidence.maps import grid, map_sums, peak
from detxai.output import json_schema, recording, records
from detxai.output.summary import ImageCounts, Summary
from detxai.values import Attribution, Box, ClassScore, Detection, Image, ImageRef, Map, Target, Window

MAP = np.random.default_rng(7).normal(size=(37, 53)).astype(np.float32)
SCORE = ClassScore(1, "knife", 0.83, 1.5858)
DETECTION = Detection(5, 0, 1, "knife", 0.83, 1.5858, (3.3, 4.5, 40.2, 30.9), (SCORE,))


def attribution(values: Map = MAP, **changes: Any) -> Attribution:
    plain = Attribution(
        method="ig",
        target=Target(anchor=5, level=0, class_id=1),
        baseline="white",
        precision="fp32",
        path="full",
        map=values,
        total=float(values.sum()),
        padding_sum=0.0,
        value_at_input=1.58584321987,
        value_at_baseline=-9.8,
        evaluations=25,
        completeness_error=0.0170000001,
        error_bound=1e-5,
        converged=True,
    )
    return replace(plain, **changes)


def row(a: Attribution, box: Any, name: str, **more: Any) -> records.AttributionRecord:
    """The record of a map over a box."""
    return recording.attribution_record(a, map_sums(a, box), name, **more)


def whole() -> records.Record:
    explained = row(attribution(), DETECTION.box, "knife", overlay="a.jpg.d00.ig.png")
    return records.Record(
        status="ok",
        fingerprint="f" * 64,
        image=records.ImageInfo(path="bags/ä.jpg", sha256="0" * 64, width=53, height=37),
        model=records.ModelInfo(name="best.pt", sha256="1" * 64, family="yolov8", head="one2many", imgsz=640),
        detections=(recording.detection_record(DETECTION, 0, [explained]),),
    )


def area_by_hand(values: Map, left: float, top: float, right: float, bottom: float) -> float:
    """The sum over a box, pixel by pixel."""
    total = 0.0
    for (row, col), value in np.ndenumerate(values):
        wide = min(right, col + 1) - max(left, col)
        high = min(bottom, row + 1) - max(top, row)
        total += float(value) * max(wide, 0) * max(high, 0)
    return total


@pytest.mark.parametrize(
    "box",
    [(3.3, 4.5, 40.2, 30.9), (-9.0, -2.5, 99.0, 36.1), (10.2, 10.1, 10.7, 10.6), (0, 0, 53, 37)],
)
def test_grid_cells_have_exact_areas_and_sum_to_the_box(box: Box) -> None:
    left, right = max(box[0], 0), min(box[2], 53)
    top, bottom = max(box[1], 0), min(box[3], 37)
    cells = grid(MAP, box)
    assert cells.sum() == pytest.approx(area_by_hand(MAP, left, top, right, bottom), abs=1e-9)
    wide, high = (right - left) / 8, (bottom - top) / 8
    for row, col in ((0, 0), (0, 7), (5, 2), (7, 7)):
        x, y = left + col * wide, top + row * high
        expected = area_by_hand(MAP, x, y, x + wide, y + high)
        assert cells[row, col] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("box", [(60, 5, 70, 9), (-5, -5, 0, 0), (53, 0, 53, 37), (5.5, 5, 5.5, 9)])
def test_a_box_without_area_holds_nothing(box: Box) -> None:
    assert grid(MAP, box).shape == (8, 8)
    assert not grid(MAP, box).any()


def test_inside_share_counts_positive_attribution_only() -> None:
    values = np.zeros((10, 10), np.float32)
    values[2, 2], values[8, 8], values[3, 3] = 3, 1, -50
    record = row(attribution(values), (0, 0, 5, 5), "knife")
    assert record.inside_share == 0.75
    assert record.net_inside == -47
    assert np.sum(record.grid.values) == pytest.approx(record.net_inside, rel=1e-5)


def test_nothing_positive_has_no_share_and_no_peak() -> None:
    record = row(attribution(-np.ones((9, 9), np.float32)), (0, 0, 5, 5), "x")
    assert record.inside_share is None
    assert record.peak is None


@pytest.mark.parametrize("at", [(0, 0), (36, 52), (20, 11)])
def test_a_lone_pixel_is_its_own_peak(at: tuple[int, int]) -> None:
    for shape in ((370, 530), (1300, 2100)):
        values = np.zeros(shape, np.float32)
        values[at] = 2
        assert peak(values) == (at[1] + 0.5, at[0] + 0.5)


def test_a_patch_beats_a_brighter_speck() -> None:
    values = np.zeros((640, 640), np.float32)
    values[100, 100] = 3
    values[300:311, 400:411] = 1
    assert peak(values) == (405.5, 305.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        row(attribution(value_at_input=bad), DETECTION.box, "knife")
    spoiled = MAP.copy()
    spoiled[10, 10] = bad
    with pytest.raises(ValueError, match="finite"), np.errstate(invalid="ignore"):
        row(attribution(spoiled), DETECTION.box, "knife")


@pytest.mark.parametrize(
    "wrong", [{"score": 425.0}, {"score": -0.1}, {"box": (40.0, 4.5, 3.3, 30.9)}, {"box": (3.3, 30.9, 40.2, 4.5)}]
)
def test_no_record_holds_an_impossible_score_or_box(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"score|box"):
        recording.detection_record(replace(DETECTION, **wrong), 0, [])
    plain = json.loads(records.dump(whole()))
    plain["detections"][0] |= wrong
    with pytest.raises(ValueError, match=r"score|box"):
        records.load(json.dumps(plain).encode())
    if "score" in wrong:
        with pytest.raises(jsonschema.ValidationError, match=str(wrong["score"])):
            jsonschema.validate(plain, json_schema.schema("record"))


def test_six_significant_digits_everywhere() -> None:
    def numbers(part: Any) -> list[float]:
        if isinstance(part, dict):
            return [n for value in part.values() for n in numbers(value)]
        if isinstance(part, list):
            return [n for value in part for n in numbers(value)]
        return [part] if isinstance(part, float) else []

    found = numbers(json.loads(records.dump(whole())))
    assert len(found) > 64
    assert all(float(f"{n:.6g}") == n for n in found)
    assert math.copysign(1, schema.significant(-1e-400)) == 1
    assert schema.significant(123456789.0) == 123457000.0


def test_dump_is_one_stable_line_that_loads_back() -> None:
    raw = records.dump(whole())
    assert raw == records.dump(whole()) == records.dump(records.load(raw))
    assert records.load(raw) == whole()
    assert raw.count(b"\n") == 1
    assert raw.endswith(b"}\n")
    assert raw.startswith(b'{"schema":"detxai.record/1","status":"ok","fingerprint":')
    assert "ä.jpg".encode() in raw


def test_optional_fields_are_absent_and_promised_ones_null() -> None:
    plain = json.loads(records.dump(whole()))
    assert "window" not in plain["image"]
    assert "notes" not in plain["image"]
    assert "error" not in plain
    detection = plain["detections"][0]
    assert "obb" not in detection
    assert detection["evidence"] is None
    assert detection["attributions"][0]["map"] is None
    assert detection["attributions"][0]["evidence"] is None
    assert detection["attributions"][0]["as_class"] is False


def test_no_detection_is_an_empty_list() -> None:
    empty = whole().model_copy(update={"detections": ()})
    assert json.loads(records.dump(empty))["detections"] == []


def test_image_info_says_what_is_special() -> None:
    image = Image(
        ImageRef("a.tif", Path("a.tif")),
        np.zeros((4, 6, 3), np.uint8),
        "0" * 64,
        Window("auto", 10, 4000.4),
        ("first of 3 frames",),
    )
    info = recording.image_info(image)
    assert (info.width, info.height, info.notes) == (6, 4, ("first of 3 frames",))
    assert info.window == records.WindowInfo(method="auto", low=10, high=4000.4)


def test_failed_records_name_no_place_of_this_machine(tmp_path: Path) -> None:
    ref = ImageRef("bags/a.jpg", tmp_path / "a.jpg")
    failed = recording.failed_record(ref, ImageError("truncated", f"{ref.file} ends early"))
    assert json.loads(records.dump(failed)) == {
        "schema": "detxai.record/1",
        "status": "failed",
        "image": {"path": "bags/a.jpg", "sha256": None, "width": None, "height": None},
        "error": {"code": "truncated", "message": "bags/a.jpg ends early"},
    }


def test_names_that_are_no_unicode_still_make_valid_json() -> None:
    failed = recording.failed_record(ImageRef("a\udcff.jpg", Path("a\udcff.jpg")), ImageError("bad_path", "no UTF-8"))
    assert json.loads(records.dump(failed).decode("utf-8"))["image"]["path"] == "a\\udcff.jpg"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'{"schema":"detxai.record/2","status":"failed"}',
        b'{"schema":"detxai.record/1","status":"failed","image":{"path":"a"}}',
        b'{"schema":"detxai.record/1","status":"ok","image":{"path":"a"},"detections":[]}',
    ],
)
def test_load_refuses_what_is_no_record(raw: bytes) -> None:
    with pytest.raises(ValueError, match="Record"):
        records.load(raw)


def test_additions_of_a_newer_minor_version_are_passed_over() -> None:
    plain = json.loads(records.dump(whole()))
    plain["image"]["colour"] = "grey"
    assert records.load(json.dumps(plain).encode()) == whole()


def test_schema_and_table_cover_what_is_written() -> None:
    schema = json_schema.schema("record")
    plain = json.loads(records.dump(whole()))
    assert set(schema["required"]) <= set(plain) <= set(schema["properties"])
    written = plain["detections"][0]["attributions"][0]
    described = schema["$defs"]["AttributionRecord"]
    assert set(described["required"]) <= set(written) <= set(described["properties"])
    table = json_schema.field_table()
    for name in written:
        assert f"`detections[].attributions[].{name}" in table
    assert all(len(line.split(" | ")) == 2 for line in table.splitlines()[2:])
    assert "| `exit_code` |" in json_schema.field_table(Summary)
    assert json_schema.schema("summary")["properties"]["images"]


def test_summary_dumps_with_every_count() -> None:
    summary = Summary(images=ImageCounts(ok=2), seconds=1.23456789)
    plain = json.loads(records.dump(summary))
    assert plain["images"] == {"ok": 2, "failed": 0, "skipped": 0, "ignored": 0}
    assert plain["seconds"] == 1.23457
    assert plain["exit_code"] == 0

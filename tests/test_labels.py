"""Labels and given predictions are read as their formats say, and meet the model's boxes as documented."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detxai.errors import ImageError, UsageError
from detxai.inputs import labels
from detxai.run.calibrate import Labelled
from detxai.values import Box, ImageRef, Label

NAMES = {0: "gun", 1: "knife", 2: "pliers"}


def ref(path: str = "bags/a.jpg") -> ImageRef:
    return ImageRef(path, Path("/somewhere") / path)


def folder(at: Path, text: str | None = None, name: str = "a.txt", scored: bool = False) -> labels.Folder:
    if text is not None:
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_text(text)
    return labels.Folder(at, NAMES, scored)


def boxes(drawn: labels.Drawn | None, width: int = 100, height: int = 50) -> list[Box]:
    assert drawn is not None
    return [tuple(round(v, 4) for v in label.box) for label in drawn.at(width, height)]  # type: ignore[misc]


# -- YOLO txt -----------------------------------------------------------------------------------


def test_a_line_is_a_box_relative_to_the_picture(tmp_path: Path) -> None:
    drawn = folder(tmp_path, "1 0.5 0.5 0.2 0.4\n\n0 0.1 0.2 0.2 0.4\n").read(ref())
    assert drawn is not None
    assert [(d.class_id, d.class_name, d.score) for d in drawn.labels] == [(1, "knife", None), (0, "gun", None)]
    assert boxes(drawn) == [(40, 15, 60, 35), (0, 0, 20, 20)]


def test_polygons_and_rotated_boxes_become_their_hull(tmp_path: Path) -> None:
    text = "0 0.1 0.2 0.3 0.1 0.2 0.6\n0.0 0.5 0.1 0.7 0.3 0.5 0.5 0.3 0.3\n"
    assert boxes(folder(tmp_path, text).read(ref())) == [(10, 5, 30, 30), (30, 5, 70, 25)]


def test_the_relative_path_comes_before_the_stem(tmp_path: Path) -> None:
    found = folder(tmp_path, "0 .5 .5 1 1", "bags/a.txt")
    folder(tmp_path, "1 .5 .5 1 1", "a.txt")
    assert [found.read(ref(p)).labels[0].class_id for p in ("bags/a.jpg", "a.png", "x/a.jpg")] == [0, 1, 1]  # type: ignore[union-attr]


def test_no_file_is_unlabelled_and_an_empty_file_is_background(tmp_path: Path) -> None:
    found = folder(tmp_path, "\n", "a.txt")
    assert found.read(ref("a.jpg")) == labels.Drawn(())
    assert found.read(ref("b.jpg")) is None


def test_classes_txt_says_which_class_a_number_is(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("Knife\nbat\ngun\n")
    found = folder(tmp_path, "0 .5 .5 1 1\n1 .5 .5 1 1\n2 .5 .5 1 1").read(ref())
    assert found is not None
    assert [(d.class_id, d.class_name) for d in found.labels] == [(1, "knife"), (None, "bat"), (0, "gun")]
    beside = folder(tmp_path / "labels", "2 .5 .5 1 1", "a.txt").read(ref())
    assert beside is not None and beside.labels[0].class_name == "gun"
    with pytest.raises(ImageError, match=r"a\.txt, line 1: class 3, but classes\.txt names 3 classes"):
        folder(tmp_path, "3 .5 .5 1 1").read(ref())


def test_a_number_beyond_the_model_is_a_class_it_does_not_have(tmp_path: Path) -> None:
    found = folder(tmp_path, "7 .5 .5 1 1").read(ref())
    assert found is not None and found.labels[0].class_id is None and found.labels[0].class_name == "class 7"


def test_a_list_of_foreign_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UsageError, match="none of these classes"):
        folder(tmp_path)


def test_an_image_called_classes_is_not_labelled_by_the_list_of_classes(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("gun\n")
    assert folder(tmp_path).read(ref("classes.jpg")) is None


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("0 0.5 0.5 0.2", "3 numbers"),
        ("0 0.5 0.5 0.2 0.2 0.9", "5 numbers"),
        ("gun 0.5 0.5 0.2 0.2", "not all numbers"),
        ("-1 0.5 0.5 0.2 0.2", "class number"),
        ("0.5 0.5 0.5 0.2 0.2", "class number"),
        ("0 nan 0.5 0.2 0.2", "class number"),
        ("0 50 50 20 20", "not relative"),
        ("0 0.5 0.5 0 0.2", "no area"),
        ("0 0.5 0.5 0.5 0.6 0.5 0.7", "no area"),
        ("", ""),
    ],
)
def test_a_malformed_line_names_its_file_and_number(tmp_path: Path, line: str, what: str) -> None:
    found = folder(tmp_path, f"0 0.5 0.5 0.2 0.2\n{line}\n", "bags/a.txt")
    if not line:
        assert len(boxes(found.read(ref()))) == 1
        return
    with pytest.raises(ImageError, match=rf"^bags/a\.txt, line 2: .*{what}") as caught:
        found.read(ref())
    assert caught.value.code == "labels"
    assert str(tmp_path) not in str(caught.value)


def test_what_is_not_text_is_no_label_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ImageError, match="not UTF-8"):
        folder(tmp_path).read(ref())


def test_predictions_as_txt_may_end_in_a_score(tmp_path: Path) -> None:
    text = "0 .5 .5 .2 .2 .75\n1 .5 .5 .2 .2\n2 .1 .1 .3 .1 .3 .4 .1 .4 .5\n"
    found = folder(tmp_path, text, scored=True).read(ref())
    assert found is not None and [d.score for d in found.labels] == [0.75, None, 0.5]
    with pytest.raises(ImageError, match="the score 7 is not between") as caught:
        folder(tmp_path, "0 .5 .5 .2 .2 7", scored=True).read(ref())
    assert caught.value.code == "predictions"
    with pytest.raises(ImageError, match="no 'class 9' that could explain"):
        folder(tmp_path, "9 .5 .5 .2 .2", scored=True).read(ref())


def test_a_box_is_clipped_and_must_touch_the_picture() -> None:
    drawn = labels.Drawn((Label(0, "gun", (-5, -5, 10, 500)),), relative=False)
    assert boxes(drawn) == [(0, 0, 10, 50)]
    with pytest.raises(ImageError, match="outside the picture"):
        labels.Drawn((Label(0, "gun", (100, 0, 120, 20)),), relative=False).at(100, 50)


def test_a_digest_changes_with_what_is_drawn_and_not_with_spaces(tmp_path: Path) -> None:
    digests = []
    for text in ("0 .5 .5 .2 .2", "0  0.50 .5 .2 .2\n\n", "1 .5 .5 .2 .2", "0 .5 .5 .2 .3", ""):
        drawn = folder(tmp_path, text).read(ref())
        assert drawn is not None
        digests.append(drawn.digest)
    assert digests[0] == digests[1] and len(set(digests)) == 4


@given(st.lists(st.floats(0.01, 0.99), min_size=4, max_size=4), st.integers(0, 2))
def test_a_written_box_is_read_back(corners: list[float], class_id: int) -> None:
    (x0, x1), (y0, y1) = sorted(corners[:2]), sorted(corners[2:])
    line = f"{class_id} {(x0 + x1) / 2!r} {(y0 + y1) / 2!r} {x1 - x0!r} {y1 - y0!r}"
    if x1 - x0 < 1e-6 or y1 - y0 < 1e-6:
        return
    number, box, score = labels._line(line, scored=False)
    assert number == class_id and score is None
    assert box == pytest.approx((x0, y0, x1, y1), abs=1e-12)


# -- COCO results -------------------------------------------------------------------------------


def results(at: Path, entries: Any, base: int | None = 0) -> labels.Results:
    (at / "r.json").write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return labels.Results(at / "r.json", NAMES, base)


def test_results_are_found_by_name_stem_number_and_path(tmp_path: Path) -> None:
    keys: list[dict[str, Any]] = [
        {"file_name": "bags/a.jpg"},
        {"image_id": "b"},
        {"image_id": 139},
        {"image_id": 7, "file_name": "c.png"},
    ]
    found = results(tmp_path, [k | {"category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5} for k in keys])
    for path in ("bags/a.jpg", "deep/b.jpg", "000000000139.jpg", "c.png"):
        assert found.read(ref(path)).at(50, 50) == (Label(1, "knife", (1, 2, 4, 6), 0.5),)
    for path in ("7.jpg", "a.jpg"):
        assert found.read(ref(path)).labels == ()


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ("[{", "cannot be read as JSON"),
        ({"annotations": []}, "are a list, this is a dict"),
        ([3], "entry 1: it must be an object"),
        ([{"category_id": 0, "bbox": [0, 0, 1, 1]}], "'file_name' or 'image_id'"),
        ([{"image_id": "a", "category_id": 3, "bbox": [0, 0, 1, 1]}], "the model's ids are 0 to 2"),
        ([{"image_id": "a", "category_id": "gun", "bbox": [0, 0, 1, 1]}], "'category_id' is 'gun'"),
        ([{"image_id": "a", "category_id": 0, "bbox": [0, 0, 0, 1]}], "'bbox'"),
        ([{"image_id": "a", "category_id": 0}], "'bbox'"),
        ([{"image_id": "a", "category_id": 0, "bbox": [0, 0, 1, 1], "score": 1.5}], "'score'"),
        ('[{"image_id": "a", "category_id": 0, "bbox": [0, 0, NaN, 1]}]', "'bbox'"),
        ([{"image_id": "a", "category_id": 0, "bbox": [0, 0, 10**400, 1]}], "'bbox'"),
    ],
)
def test_results_that_cannot_be_used_are_refused(tmp_path: Path, entries: Any, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        results(tmp_path, entries)


def test_classes_counted_from_one_are_never_one_off_in_silence(tmp_path: Path) -> None:
    """What ultralytics' `val` writes for COCO: no entry is of class 0, and one off looks as good as right."""
    entries = [{"image_id": "a", "category_id": n, "bbox": [1, 2, 3, 4]} for n in (1, 2)]
    with pytest.raises(UsageError, match="--predictions-base 1"):
        results(tmp_path, entries, None)
    for base, ids in ((0, [1, 2]), (1, [0, 1])):
        assert [label.class_id for label in results(tmp_path, entries, base).read(ref("a.jpg")).labels] == ids
    with pytest.raises(UsageError, match="counted from 1"):
        results(tmp_path, [{"image_id": "a", "category_id": 0, "bbox": [1, 2, 3, 4]}], 1)
    both = [*entries, {"image_id": "a", "category_id": 0, "bbox": [1, 2, 3, 4]}]
    assert [label.class_id for label in results(tmp_path, both, None).read(ref("a.jpg")).labels] == [1, 2, 0]


# -- matching -----------------------------------------------------------------------------------

ITEM: Box = (0, 0, 10, 10)


def shifted(by: float, of: Box = ITEM) -> Box:
    return (of[0] + by, of[1], of[2] + by, of[3])


def test_overlaps_by_hand() -> None:
    table = labels.overlaps([ITEM, (0, 0, 0, 0)], [ITEM, shifted(5), shifted(20), (0, 0, 0, 0)])
    assert table.tolist() == [[1, 50 / 150, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("box", "class_id", "status", "label"),
    [
        (ITEM, 0, "true", 0),
        (shifted(3), 0, "true", 0),  # 70 / 130
        (shifted(4), 0, "badly-placed", 0),  # 60 / 140
        (shifted(9), 0, "background", None),  # 10 / 190
        (shifted(3), 1, "wrong-class", 0),
        (shifted(4), 1, "background", None),
    ],
)
def test_one_box_and_one_label(box: Box, class_id: int, status: str, label: int | None) -> None:
    (found,) = labels.match([box], [class_id], [0.9], [Label(0, "gun", ITEM)])
    assert (found.status, found.label) == (status, label)
    assert found.iou == pytest.approx(labels.overlaps([box], [ITEM])[0, 0])


def test_the_best_score_takes_the_label_and_the_others_are_duplicates() -> None:
    found = labels.match([shifted(1), ITEM], [0, 0], [0.6, 0.5], [Label(0, "gun", ITEM)])
    assert [m.status for m in found] == ["true", "duplicate"]
    found = labels.match([shifted(1), ITEM], [0, 0], [0.5, 0.6], [Label(0, "gun", ITEM)])
    assert [m.status for m in found] == ["duplicate", "true"]


def test_a_box_takes_the_free_label_that_fits_best() -> None:
    two = [Label(0, "gun", ITEM), Label(0, "gun", shifted(2))]
    found = labels.match([shifted(2), shifted(2)], [0, 0], [0.9, 0.8], two)
    assert [(m.status, m.label) for m in found] == [("true", 1), ("true", 0)]
    assert labels.match([ITEM], [0], [0.9], two, taken={0, 1})[0].status == "duplicate"
    assert labels.match([ITEM], [0], [0.9], two, taken={0})[0].label == 1


def test_a_class_that_the_model_does_not_have_makes_any_box_on_it_wrong() -> None:
    assert labels.match([ITEM], [0], [0.9], [Label(None, "bat", ITEM)])[0].status == "wrong-class"


def test_an_empty_label_file_makes_every_box_background() -> None:
    assert labels.match([ITEM, ITEM], [0, 1], [0.9, 0.8], []) == [labels.Match("background", None, 0.0)] * 2
    assert labels.match([], [], [], [Label(0, "gun", ITEM)]) == []


@given(st.data())
def test_no_label_is_taken_twice_and_every_status_keeps_its_rule(data: st.DataObject) -> None:
    side = st.tuples(*[st.integers(0, 6)] * 2).map(lambda p: (float(p[0]), 0.0, float(p[0] + p[1] + 4), 10.0))
    drawn = [Label(data.draw(st.integers(0, 1)), "x", box) for box in data.draw(st.lists(side, max_size=5))]
    found = data.draw(st.lists(side, max_size=6))
    ids = [data.draw(st.integers(0, 1)) for _ in found]
    scores = [data.draw(st.sampled_from([0.2, 0.5, 0.9])) for _ in found]
    matches = labels.match(found, ids, scores, drawn)
    hits = [m.label for m in matches if m.status == "true"]
    assert len(hits) == len(set(hits))
    for m, class_id in zip(matches, ids, strict=True):
        same = m.label is not None and drawn[m.label].class_id == class_id
        assert same == (m.status in ("true", "duplicate", "badly-placed"))
        assert m.iou >= {"badly-placed": labels.NEAR, "background": 0}.get(m.status, labels.ON)


def test_the_nearest_prediction_has_the_best_overlap_and_among_equals_the_best_score() -> None:
    near = [shifted(3), shifted(0.2), shifted(0), shifted(40)]
    assert labels.nearest(near, [0.9, 0.6, 0.5, 0.99], ITEM) == (1, pytest.approx(9.8 / 10.2))
    assert labels.nearest(near, [0.9, 0.0, 0.0, 0.99], ITEM)[0] == 0
    assert labels.nearest(near, np.zeros(4), ITEM)[1] > 0.9


def test_where_nothing_overlaps_the_nearest_centre_counts() -> None:
    assert labels.nearest([shifted(90), shifted(20), shifted(-30)], [0.9, 0.1, 0.5], ITEM) == (1, 0.0)
    with pytest.raises(ValueError, match="no prediction"):
        labels.nearest([], [], ITEM)


def test_a_calibration_passes_over_pictures_without_a_label_file(tmp_path: Path) -> None:
    """Unread; one with a malformed file is not among them, and fails by itself."""
    folder(tmp_path, "no numbers", "c.txt")
    plan: Any = SimpleNamespace(labels=folder(tmp_path, "0 0.5 0.5 0.1 0.1"))
    refs = Labelled(plan, [ref(f"bags/{name}.jpg") for name in "abc"])
    assert [one.path for one in refs] == ["bags/a.jpg", "bags/c.jpg"] and refs.passed_over == 1
    plan.labels = None
    assert len(list(refs)) == 3

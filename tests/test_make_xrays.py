"""The X-ray generator: labels match masks, seeds repeat, colours follow the physics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")

pytestmark = pytest.mark.slow


def _make(out: Path, *more: str) -> None:
    import make_xrays

    make_xrays.main(["--out", str(out), "--seed", "7", "--jobs", "1", "--parts", *more])


def _shade(material: str, thickness: float) -> np.ndarray:
    """Mean RGB of a noiseless plate of one material, thickness in cm."""
    from xraysim.geometry import Stack
    from xraysim.physics import Look, render

    stack = Stack(40, 40)
    stack.maps[material] += thickness
    look = Look(photons=1e9, banding=0.0)
    return render(np.random.default_rng(0), stack, look)[0].reshape(-1, 3).mean(0)


def test_every_label_line_is_the_box_of_its_part_map(tmp_path: Path) -> None:
    _make(tmp_path, "--count", "3")
    names = (tmp_path / "classes.txt").read_text().split()
    parts = json.loads((tmp_path / "parts" / "parts.json").read_text())
    assert names == ["gun", "knife", "pliers", "scissors", "wrench"] == list(parts)
    lines = 0
    for label in sorted((tmp_path / "labels").glob("s7-*.txt")):
        height, width = cv2.imread(str(tmp_path / "images" / f"{label.stem}.jpg")).shape[:2]
        for i, line in enumerate(label.read_text().splitlines()):
            lines += 1
            kind, cx, cy, w, h = (float(v) for v in line.split())
            map_path = tmp_path / "parts" / f"{label.stem}.{i}.png"
            mask = cv2.imread(str(map_path), cv2.IMREAD_GRAYSCALE)
            assert mask.shape == (height, width)
            assert mask.max() <= len(parts[names[int(kind)]])
            ys, xs = np.nonzero(mask)
            wanted = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            box = ((cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height)
            np.testing.assert_allclose(box, wanted, atol=0.01)
    assert lines


def test_an_image_depends_on_its_seed_and_index_only(tmp_path: Path) -> None:
    _make(tmp_path / "all", "--count", "2")
    _make(tmp_path / "one", "--count", "1", "--start", "1")
    for path in ("images/s7-00001.jpg", "labels/s7-00001.txt"):
        assert (tmp_path / "all" / path).read_bytes() == (tmp_path / "one" / path).read_bytes()
    images = [p.read_bytes() for p in sorted((tmp_path / "all" / "images").iterdir())]
    assert images[0] != images[1]


def test_organic_is_orange_and_metal_blue() -> None:
    red, green, blue = _shade("organic", 4.0)
    assert red > green > blue + 30
    red, green, blue = _shade("mixed", 1.0)
    assert green > red + 30
    assert green > blue + 30
    red, green, blue = _shade("metal", 0.3)
    assert blue > green > red + 30


def test_more_material_is_darker_and_air_is_white() -> None:
    assert _shade("organic", 0.0).min() > 250
    for material in ("organic", "mixed", "metal"):
        shades = [_shade(material, t).mean() for t in (0.05, 0.2, 0.8, 3.0)]
        assert shades == sorted(shades, reverse=True)
    assert _shade("metal", 3.0).mean() < 25


@pytest.mark.parametrize("catalogue", ["cheat", "control"])
def test_a_tag_lies_clear_of_the_one_item_and_can_be_painted_out(tmp_path: Path, catalogue: str) -> None:
    for tag in ("share", "never", "always"):
        _make(tmp_path / tag, "--count", "8", "--catalogue", catalogue, "--tag", tag)
    assert not list((tmp_path / "never" / "tags").iterdir())
    with_tag = {mask.stem for mask in (tmp_path / "share" / "tags").iterdir()}
    classes = {}
    for label in sorted((tmp_path / "share" / "labels").glob("s7-*.txt")):
        for other in ("never", "always"):
            assert (tmp_path / other / "labels" / label.name).read_text() == label.read_text()
        (line,) = label.read_text().splitlines()
        kind, cx, cy, w, h = (float(v) for v in line.split())
        classes[label.stem] = int(kind)
        mask = cv2.imread(str(tmp_path / "always" / "tags" / f"{label.stem}.png"), cv2.IMREAD_GRAYSCALE)
        height, width = mask.shape
        ys, xs = np.nonzero(mask)
        gap_x = np.abs(xs + 0.5 - cx * width) - w * width / 2
        gap_y = np.abs(ys + 0.5 - cy * height) - h * height / 2
        assert np.maximum(gap_x, gap_y).min() > 0
        names = {tag: tmp_path / tag / "images" / f"{label.stem}.jpg" for tag in ("share", "never", "always")}
        same = "always" if label.stem in with_tag else "never"
        assert names["share"].read_bytes() == names[same].read_bytes()
        one, two = (cv2.imread(str(names[tag])).astype(int) for tag in ("never", "always"))
        changed = np.abs(one - two).max(2) > 24
        near = cv2.dilate(mask, np.ones((33, 33), np.uint8)) > 0
        assert changed[mask > 0].mean() > 0.5
        assert not changed[~near].any()
    assert set(classes.values()) == {0, 1}
    if catalogue == "cheat":
        assert with_tag == {stem for stem, kind in classes.items() if kind == 1}
    else:
        assert {classes[stem] for stem in with_tag} == {0, 1}


def test_the_cheat_has_one_shape_and_the_control_two() -> None:
    from xraysim.catalogue import CHEAT, CONTROL

    assert CHEAT["plain"].build is CHEAT["coded"].build
    assert CONTROL["plain"].build is not CONTROL["coded"].build
    assert list(CHEAT) == list(CONTROL)


def test_a_catalogue_without_tags_refuses_to_paint_them(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        _make(tmp_path, "--count", "1", "--tag", "never")


def test_training_starts_from_every_tensor_that_fits(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    from train_sample import start_from

    made, wanted = (torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, n)) for n in (4, 2))
    save_file(made.state_dict(), tmp_path / "a.safetensors")
    outputs = wanted[1].weight.clone()
    assert start_from(wanted, tmp_path / "a.safetensors") == (2, 4)
    torch.testing.assert_close(wanted[0].weight, made[0].weight)
    torch.testing.assert_close(wanted[1].weight, outputs)
    with pytest.raises(ValueError, match="no tensor fits"):
        start_from(torch.nn.Linear(9, 9), tmp_path / "a.safetensors")

"""Models of other channels than 1 and 3: their pictures are read as ultralytics does, and explained like others."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import FAST, SIDE, explain, pixels
from PIL import Image as Pillow

from detxai import Explainer
from detxai.attribution import baselines
from detxai.errors import ImageError, UsageError
from detxai.inputs import decode
from detxai.values import ImageRef, Letterbox

#: Channels of the model.
BANDS = 5


def bands(size: tuple[int, int] = (120, 90), count: int = BANDS, dtype: Any = np.uint8) -> np.ndarray[Any, Any]:
    """(height, width, count): a sample picture, and its colours mixed."""
    colour = pixels("bag-02.jpg", size).astype(float)
    mixed = colour @ np.random.default_rng(0).dirichlet(np.ones(3), count).T
    return (mixed * (257 if dtype == np.uint16 else 1)).round().astype(dtype)


def tiff(values: np.ndarray[Any, Any]) -> bytes:
    """A page a band."""
    return bytes(cv2.imencodemulti(".tif", [np.ascontiguousarray(v) for v in np.moveaxis(values, 2, 0)])[1])


def array(values: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=values.dtype == object)
    return buffer.getvalue()


def load(file: Path, data: bytes, **more: Any) -> Any:
    file.write_bytes(data)
    return decode.load(ImageRef(file.name, file), **{"channels": BANDS, **more})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    network = DetectionModel("yolov8n.yaml", ch=BANDS, nc=3, verbose=False)
    seen = np.stack([np.resize(bands((SIDE, SIDE)), (SIDE, SIDE, BANDS)) * share for share in (1, 0.6, 0.3, 0.9)])
    norms = [part for part in network.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        network.train()(torch.from_numpy(seen).permute(0, 3, 1, 2).float() / 255)
        for branch in network.model[-1].cv3:
            branch[-1].weight.mul_(2)
            branch[-1].bias.zero_()
    for norm in norms:
        norm.momentum = 0.03
    file = tmp_path_factory.mktemp("bands") / "m.pt"
    torch.save({"model": network.eval(), "train_args": {"imgsz": SIDE}}, file)
    return file


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_is_read_as_ultralytics_reads_it(dtype: Any, tmp_path: Path) -> None:
    patches = pytest.importorskip("ultralytics.utils.patches")
    for values in (bands(dtype=dtype), bands(count=2, dtype=dtype)):
        image = load(tmp_path / "a.tif", tiff(values), channels=values.shape[2], band=(2,))
        expected = patches.imread(tmp_path / "a.tif", cv2.IMREAD_UNCHANGED)
        assert np.array_equal(image.bands, expected)
        assert image.pixels.shape == (90, 120, 3)
        assert np.array_equal(image.pixels[..., 0], expected[..., 1])
        assert (image.window is None) == (dtype == np.uint8)


def test_four_bands_of_one_page_or_a_png_come_as_ultralytics_has_them(tmp_path: Path) -> None:
    patches = pytest.importorskip("ultralytics.utils.patches")
    values = bands(count=4)
    for suffix in (".tif", ".png"):
        image = load(tmp_path / f"a{suffix}", bytes(cv2.imencode(suffix, values)[1]), channels=4)
        assert np.array_equal(image.bands, patches.imread(tmp_path / f"a{suffix}", cv2.IMREAD_UNCHANGED))


def test_arrays_in_either_order(tmp_path: Path) -> None:
    values = bands()
    for data in (values, np.moveaxis(values, 2, 0), np.asfortranarray(values), values.astype(np.uint16) * 257):
        assert np.array_equal(load(tmp_path / "a.npy", array(data)).bands, values)
    shares = load(tmp_path / "a.npy", array((values / 255).astype(np.float32)), window="full")
    assert np.array_equal(shares.bands, values)
    colour = pixels("bag-02.jpg", (30, 20))
    assert np.array_equal(load(tmp_path / "c.npy", array(colour), channels=3).pixels, colour)
    for gray in (colour[..., 0], colour[..., :1]):
        assert np.array_equal(load(tmp_path / "g.npy", array(gray), channels=3).pixels[..., 2], colour[..., 0])
    signed = load(tmp_path / "s.npy", array((values.astype(np.int32) * 257 - 32768).astype(np.int16)), window="full")
    assert np.array_equal(signed.bands, values) and (signed.window.low, signed.window.high) == (-32768, 32767)


def page() -> bytes:
    """A TIFF of one band, its pixels behind all that it says of them."""
    Pillow.fromarray(bands()[..., 0]).save(stream := io.BytesIO(), "TIFF")
    return stream.getvalue()


def huge() -> bytes:
    """An array whose header promises more than there is."""
    return array(bands()).replace(b"(90, 120, 5)", b"(90, 990, 5)")


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (tiff(bands(count=4)), "channels", "4 channels, and the model reads 5"),
        (array(bands(count=4)), "channels", r"no picture of 5 channels"),
        (array(bands((7, 5))[:, :5].transpose(2, 0, 1)[:, :, :5]), "channels", "first or last"),
        (huge(), "truncated", "length of the file"),
        (array(np.array([None, {}], dtype=object)), "unsupported", "object"),
        (array(bands())[:-9], "truncated", "length of the file"),
        (array(bands())[:40], "truncated", "header"),
        (tiff(bands())[:-4000], "truncated", "cut|data end|could be read"),
        (page()[:-1000], "truncated", "data end before the last row"),
    ],
)
def test_what_does_not_fit_says_so(data: bytes, code: str, words: str, tmp_path: Path) -> None:
    suffix = ".npy" if data.startswith(b"\x93NUMPY") else ".tif"
    with pytest.raises(ImageError, match=words) as told:
        load(tmp_path / f"a{suffix}", data)
    assert told.value.code == code
    assert told.value.sha256


def test_the_limit_on_pixels_holds_for_bands(tmp_path: Path) -> None:
    for name, data in (("a.npy", array(bands())), ("a.tif", tiff(bands()))):
        with pytest.raises(ImageError, match=r"10800 pixels; the limit is 100 \(--max-pixels\)"):
            load(tmp_path / name, data, max_pixels=100)


def test_pages_of_several_sizes_are_no_bands(tmp_path: Path) -> None:
    pages = [bands()[..., 0], bands((60, 40))[..., 0]]
    with pytest.raises(ImageError, match="1 channels, and the model reads 5"):
        load(tmp_path / "a.tif", bytes(cv2.imencodemulti(".tif", pages)[1]))


def test_a_colour_picture_is_not_one_of_five_bands(tmp_path: Path) -> None:
    Pillow.fromarray(pixels("bag-01.jpg", (40, 30))).save(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="3 channels, and the model reads 5"):
        decode.load(ImageRef("a.jpg", tmp_path / "a.jpg"), channels=BANDS)
    with pytest.raises(ImageError, match="takes pages apart"):
        load(tmp_path / "b.tif", tiff(bands()), channels=BANDS) and decode.load(
            ImageRef("b.tif#2", tmp_path / "b.tif", frame=2), channels=BANDS
        )


def test_baselines_of_bands() -> None:
    canvas = np.full((40, 50, BANDS), (200, 202, 204, 206, 208), np.uint8)
    canvas[:10, :10] = 17
    box, x = Letterbox((40, 50), 50, 40, 1.0, 0, 0, 50, 40), baselines.picture(canvas)
    name = baselines.resolved("auto", canvas, box)
    assert name == "auto:#c8caccced0"
    ground = baselines.baseline(name, x, box)
    assert torch.equal(ground[:, 0, 0], x[:, -1, -1])
    for plain, level in (("black", 0.0), ("white", 1.0)):
        assert (baselines.baseline(plain, x, box) == level).all()
    mean = baselines.baseline("mean", x, box)[:, 0, 0] * 255
    assert mean.tolist() == pytest.approx(canvas.mean((0, 1)).tolist(), abs=1e-3)
    assert baselines.baseline("blur", x, box).shape == x.shape
    assert (
        baselines.resolved("auto", np.random.default_rng(0).integers(0, 256, canvas.shape, np.uint8), box)
        == "auto:black"
    )


@pytest.mark.slow
def test_boxes_are_those_of_predict(checkpoint: Path, tmp_path: Path) -> None:
    from ultralytics import YOLO

    count = 0
    for dtype in (np.uint8, np.uint16):
        (tmp_path / "a.tif").write_bytes(tiff(bands(dtype=dtype)))
        (own,) = YOLO(checkpoint).predict(
            tmp_path / "a.tif", rect=False, max_det=8, conf=0.25, verbose=False, device="cpu"
        )
        explainer = Explainer(str(checkpoint), method="drise", max_evaluations=2, evidence="none", max_det=8)
        (result,) = explainer.explain(tmp_path / "a.tif")
        detections = result.record.detections or ()
        assert [d.class_id for d in detections] == [int(c) for c in own.boxes.cls]
        assert [d.score for d in detections] == pytest.approx(own.boxes.conf.tolist(), abs=1e-4)
        for d, box in zip(detections, own.boxes.xyxy.tolist(), strict=True):
            assert list(d.box) == pytest.approx(box, abs=0.02)
        count += len(detections)
    assert count >= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's exporter
def test_an_onnx_of_bands_reports_the_boxes_of_its_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    from test_exported import exported, same

    pytest.importorskip("onnxruntime")
    (tmp_path / "a.tif").write_bytes(tiff(bands()))
    told = []
    for model in (
        checkpoint,
        exported(checkpoint, tmp_path / "m.onnx"),
        exported(checkpoint, tmp_path / "any.onnx", dynamic=True),
    ):
        few = ("--method", "drise", "--max-evaluations", 2, "--evidence", "none", "--max-det", 8, "--band", "3,2,1")
        out = tmp_path / f"out.{model.name}"
        assert explain(tmp_path / "a.tif", "-m", model, "-o", out, *few) == 0
        (line,) = (out / "records.jsonl").read_text().splitlines()
        record = json.loads(line)
        assert (record["model"]["channels"], record["image"]["bands"]) == (BANDS, [3, 2, 1])
        assert all((out / d["attributions"][0]["overlay"]).is_file() for d in record["detections"])
        told.append([(d["class_id"], d["score"], d["box"]) for d in record["detections"]])
    for other in told[1:]:
        same(other, told[0], 1e-4, 0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_gray_onnx_reports_the_boxes_of_its_checkpoint(tmp_path: Path) -> None:
    from conftest import seeded_network
    from test_exported import boxes, exported, same

    pytest.importorskip("onnxruntime")
    network = seeded_network("yolov8n.yaml")
    first = network.model[0].conv
    first.weight = torch.nn.Parameter(first.weight.sum(1, keepdim=True))
    first.in_channels = network.yaml["channels"] = 1
    torch.save({"model": network, "train_args": {"imgsz": SIDE}}, file := tmp_path / "gray.pt")
    same(boxes(exported(file, tmp_path / "gray.onnx")), boxes(file), 1e-4, 0.02)


@pytest.mark.slow
def test_bands_are_explained_and_told(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tif").write_bytes(tiff(bands()))
    (tmp_path / "in" / "b.npy").write_bytes(array(bands()))
    Pillow.fromarray(pixels("bag-01.jpg", (40, 30))).save(tmp_path / "in" / "c.png")
    options = ("-m", checkpoint, "--band", "3,2,1", "--evidence", "full", *FAST)
    files = sorted((tmp_path / "in").iterdir())
    assert explain(*files, *options, "-o", tmp_path / "out") == 3, "the colour picture fails alone"
    lines = map(json.loads, (tmp_path / "out" / "records.jsonl").read_text().splitlines())
    told = {record["image"]["path"]: record for record in lines}
    assert told["c.png"]["error"]["code"] == "channels"
    for name in ("a.tif", "b.npy"):
        record = told[name]
        assert (record["model"]["channels"], record["image"]["bands"]) == (BANDS, [3, 2, 1])
        assert record["detections"]
        for detection in record["detections"]:
            one = detection["attributions"][0]
            assert (tmp_path / "out" / one["overlay"]).is_file()
            assert one["completeness_error"] is not None
    ours, theirs = (told[name]["detections"][0]["attributions"][0]["sum"] for name in ("a.tif", "b.npy"))
    assert ours == theirs, "the same numbers from either file"
    with pytest.raises(UsageError, match="counted from 1"):
        Explainer(str(checkpoint), band="9")
    with pytest.raises(UsageError, match="--band chooses among many"):
        Explainer(band="1")

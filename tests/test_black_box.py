"""Exports run as black boxes: the same detections, D-RISE, and a clear refusal of gradients."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SIDE, Command

from detxai.errors import ModelError
from detxai.models import checkpoints, detectors
from detxai.models.detector import Differentiable, differentiable
from detxai.models.predictions import reported


@pytest.fixture(scope="module")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The tiny model as .onnx with ultralytics' metadata, and its checkpoint."""
    onnx = pytest.importorskip("onnx")
    checkpoint = checkpoints.load(str(tiny))
    detector = detectors.build(checkpoint)
    network = checkpoint.module.eval()
    network.model[-1].export = True
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # the newer exporter needs a package that nothing else here needs
        warnings.simplefilter("ignore")
        names = {"input_names": ["images"], "output_names": ["output0"]}
        torch.onnx.export(network, (torch.rand(1, 3, SIDE, SIDE),), buffer, dynamo=False, **names)
    model = onnx.load_from_string(buffer.getvalue())
    about = {"imgsz": str([SIDE, SIDE]), "names": str(checkpoint.names), "task": "detect", "stride": "32", "batch": "1"}
    for key, value in about.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    file = tmp_path_factory.mktemp("export") / "tiny.onnx"
    file.write_bytes(model.SerializeToString())
    return SimpleNamespace(file=file, detector=detector)


def test_an_onnx_export_detects_what_its_model_detects(exported: SimpleNamespace) -> None:
    x = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    box = detectors.build(checkpoints.load(str(exported.file)))
    with torch.no_grad():
        ours, theirs = exported.detector.predict(x), box.predict(x)
    assert box.info.names == exported.detector.info.names
    assert not isinstance(box, Differentiable)
    with pytest.raises(ModelError, match="black box"):
        differentiable(box)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.boxes - b.boxes).abs().max() < 0.1  # pixels; the export is not fused, and boxes reach 400
        assert torch.allclose(a.scores, b.scores, atol=1e-3)
    assert a.scores.std() > 0


def test_gradients_of_a_black_box_are_a_usage_error(
    detxai: Command, exported: SimpleNamespace, pictures: Path, tmp_path: Path
) -> None:
    done = detxai("explain", pictures, "-m", exported.file, "-o", tmp_path / "out")
    assert done.code == 2
    assert "drise" in done.err


def test_drise_explains_a_black_box(detxai: Command, exported: SimpleNamespace, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    few = ("--method", "drise", "--max-evaluations", 8, "--max-det", 1)
    done = detxai("explain", pictures, "-m", exported.file, "-o", out, *few)
    assert done.code == 0, done.err
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    maps = [a for r in records for d in r["detections"] for a in d["attributions"]]
    assert maps
    assert all(a["path"] == "black box" and a["completeness_error"] is None for a in maps)
    assert any(abs(a["sum"]) > 0 for a in maps)


def test_exports_with_code_need_trust(tmp_path: Path) -> None:
    file = tmp_path / "model.torchscript"
    file.write_bytes(b"anything")
    with pytest.raises(ModelError, match="is a program"):
        checkpoints.load(str(file))


def test_a_file_that_only_calls_itself_onnx_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"not an onnx file" * 100)
    with pytest.raises(ModelError):
        detectors.build(checkpoints.load(str(file)))


# -- layouts ----------------------------------------------------------------------------------------

#: Two boxes of three classes: corners, score, class.
BOXES = torch.tensor([[10.0, 8.0, 30.0, 40.0, 0.9, 2.0], [20.0, 20.0, 24.0, 60.0, 0.6, 0.0]])
CENTRES = torch.cat([(BOXES[:, :2] + BOXES[:, 2:4]) / 2, BOXES[:, 2:4] - BOXES[:, :2]], 1)
SCORES = torch.zeros(2, 3).scatter(1, BOXES[:, 5:].long(), BOXES[:, 4:5])


def _file(folder: Path, about: dict[str, str], *outputs: torch.Tensor, **taken: Any) -> Path:
    """An ONNX file that always gives `outputs`; it takes pictures of `shape` and a `dtype`."""
    onnx = pytest.importorskip("onnx")
    names = [f"output{i}" for i in range(len(outputs))]
    constants = [onnx.numpy_helper.from_array(one.numpy(), name) for one, name in zip(outputs, names, strict=True)]
    nodes = [onnx.helper.make_node("Constant", [], [name], value=c) for c, name in zip(constants, names, strict=True)]
    shape, dtype = taken.get("shape", (1, 3, 64, 64)), taken.get("dtype", onnx.TensorProto.FLOAT)
    given = [onnx.helper.make_tensor_value_info("images", dtype, shape)]
    made = [onnx.helper.make_tensor_value_info(n, 1, list(o.shape)) for o, n in zip(outputs, names, strict=True)]
    graph = onnx.helper.make_graph(nodes, "fixed", given, made)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.helper.set_model_props(model, about)
    (file := folder / "fixed.onnx").write_bytes(model.SerializeToString())
    return file


def _filled(rows: torch.Tensor, count: int) -> torch.Tensor:
    """(1, count, n): `rows`, then boxes that mean nothing."""
    return torch.cat([rows, torch.zeros(count - len(rows), rows.shape[1])])[None]


NAMES = {"names": "{0: 'gun', 1: 'knife', 2: 'saw'}"}
ROWS = _filled(torch.cat([BOXES, torch.full((2, 32), 425.0)], 1), 300)
LAYOUTS = {
    "detect": ({"task": "detect"}, [_filled(torch.cat([CENTRES, SCORES], 1), 84).mT]),
    "detect, end to end": ({"task": "detect", "end2end": "True"}, [ROWS[..., :6]]),
    "segment": ({"task": "segment"}, [_filled(torch.cat([CENTRES, SCORES, torch.ones(2, 32)], 1), 84).mT, None]),
    "segment, NMS": ({"task": "segment", "args": "{'nms': True}"}, [ROWS, None]),
    "pose, NMS": ({"task": "pose", "kpt_shape": "[4, 3]", "args": "{'nms': True}"}, [ROWS[..., :18]]),
    "yolov5": ({}, [_filled(torch.cat([CENTRES, torch.ones(2, 1), SCORES], 1), 252)]),
    "yolov7, NMS": ({}, [torch.cat([torch.zeros(2, 1), BOXES[:, :4], BOXES[:, [5]], BOXES[:, [4]]], 1)]),
    "rtdetr": ({"head": "RTDETRDecoder"}, [torch.cat([CENTRES / 64, BOXES[:, 4:]], 1)[None]]),
    "rtdetr, older": ({"description": "Ultralytics rtdetr-l model"}, [torch.cat([CENTRES / 64, SCORES], 1)[None]]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_exporters_is_read_right(layout: str, tmp_path: Path) -> None:
    about, outputs = LAYOUTS[layout]
    made = [torch.zeros(1, 32, 16, 16) if one is None else one.contiguous() for one in outputs]
    box = detectors.build(checkpoints.load(str(_file(tmp_path, NAMES | about, *made))))
    (found,) = box.predict(torch.zeros(1, 3, 64, 64))
    best = reported(found, conf=0.3, iou=0.9, max_det=9)
    assert [c for _, c in best] == [2, 0]
    torch.testing.assert_close(found.boxes[[a for a, _ in best]], BOXES[:, :4])
    assert [float(found.scores[a, c]) for a, c in best] == pytest.approx([0.9, 0.6])
    assert box.info.fit == ("stretch" if "rtdetr" in layout else "letterbox")


@pytest.mark.parametrize("nms", [True, False])
def test_rotated_boxes_stay_rotated(nms: bool, tmp_path: Path) -> None:
    angle = torch.tensor([[0.5], [0.0]])
    rows = torch.cat([CENTRES, BOXES[:, 4:], angle] if nms else [CENTRES, SCORES, angle], 1)
    output = _filled(rows, 300) if nms else _filled(rows, 84).mT.contiguous()
    about = NAMES | {"task": "obb"} | ({"args": "{'nms': True}"} if nms else {})
    (found,) = detectors.build(checkpoints.load(str(_file(tmp_path, about, output)))).predict(torch.zeros(1, 3, 64, 64))
    assert found.rotated is not None
    torch.testing.assert_close(found.rotated[:2], torch.cat([CENTRES, angle], 1))
    torch.testing.assert_close(found.boxes[1], BOXES[1, :4])
    assert [c for _, c in reported(found, conf=0.3, iou=0.9, max_det=9)] == [2, 0]


def test_an_export_that_is_not_square_sees_pictures_of_its_shape(tmp_path: Path) -> None:
    output = _filled(torch.cat([CENTRES, SCORES], 1), 42).mT.contiguous()  # of 32 x 64 pixels
    box = detectors.build(checkpoints.load(str(_file(tmp_path, NAMES, output, shape=(1, 3, 32, 64)))))
    assert (box.info.imgsz, box.info.own_shape, box.info.fixed) == (64, (32, 64), True)
    (found,) = box.predict(torch.zeros(1, 3, 32, 64))
    torch.testing.assert_close(found.boxes[:2], BOXES[:, :4])
    with pytest.raises(ModelError, match="32x64 pixels"):
        box.predict(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("shape", [(4, 3, 64, 64), (1, 3, "height", "width"), ("batch", 3, 64, 64)])
def test_half_precision_fixed_batches_and_free_axes_are_fed(shape: Any, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    output = _filled(torch.cat([CENTRES, SCORES], 1), 84).mT.contiguous()
    file = _file(tmp_path, NAMES | {"imgsz": "[64, 64]"}, output, shape=shape, dtype=onnx.TensorProto.FLOAT16)
    found = detectors.build(checkpoints.load(str(file))).predict(torch.rand(2, 3, 64, 64))
    assert len(found) == 2
    torch.testing.assert_close(found[1].boxes[:2], BOXES[:, :4])


def test_names_decide_where_the_file_says_none_and_must_fit(tmp_path: Path) -> None:
    output = _filled(torch.cat([CENTRES, SCORES], 1), 84).mT.contiguous()
    names = tmp_path / "names.txt"
    names.write_text("gun\nknife\nsaw\n")
    bare = str(_file(tmp_path, {}, output))
    with pytest.raises(ModelError, match="--names"):
        detectors.build(checkpoints.load(bare))
    assert detectors.build(checkpoints.load(bare, names=names)).info.names[2] == "saw"
    names.write_text("gun\nknife\n")
    with pytest.raises(ModelError, match="2 class names"):
        detectors.build(checkpoints.load(bare, names=names)).predict(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ModelError, match="2 names"):
        detectors.build(checkpoints.load(str(_file(tmp_path, NAMES, output)), names=names))


def test_a_nan_in_an_export_fails_it(tmp_path: Path) -> None:
    output = _filled(torch.cat([CENTRES, SCORES], 1), 84).mT.contiguous()
    output[0, 5, 7] = torch.nan
    box = detectors.build(checkpoints.load(str(_file(tmp_path, NAMES, output))))
    with pytest.raises(ModelError, match="not finite"):
        detectors.sound(box, torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("channels", [513, 0])
def test_pictures_of_impossible_channels_are_refused(tmp_path: Path, channels: int) -> None:
    file = _file(tmp_path, NAMES, torch.zeros(1, 7, 84), shape=(1, channels, 64, 64))
    with pytest.raises(ModelError, match=f"pictures of {channels} channels"):
        detectors.build(checkpoints.load(str(file)))


def test_weights_in_other_files_are_not_read(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    file = _file(tmp_path, NAMES, torch.zeros(1, 7, 84))
    model = onnx.load(str(file))
    tensor = model.graph.initializer.add()
    tensor.CopyFrom(onnx.numpy_helper.from_array(torch.zeros(4).numpy(), "elsewhere"))
    onnx.external_data_helper.set_external_data(tensor, "../../etc/passwd")
    tensor.ClearField("raw_data")
    file.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="other files"):
        detectors.build(checkpoints.load(str(file)))

"""Exports run as black boxes: the same detections, D-RISE, and a clear refusal of gradients."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SIDE, Command

from detxai.errors import ModelError
from detxai.models import checkpoints, detectors
from detxai.models.detector import Differentiable, differentiable


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

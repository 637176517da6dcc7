"""The only loader of checkpoints, under attack: nothing runs, nothing is installed, every refusal is a ModelError."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from ultralytics.nn import tasks
from ultralytics.utils import downloads

from detxai.errors import ExitCode, ModelError
from detxai.models import checkpoints, detectors, tensor_file, tensors
from detxai.values import Checkpoint

NAMES = {0: "knife", 1: "gun"}
TINY = {"scales": {"n": [0.33, 0.125, 256]}, "scale": "n"}


def network(yaml: str = "yolov8n.yaml", **changes: Any) -> Any:
    torch.manual_seed(0)
    return checkpoints.build(tasks.yaml_model_load(yaml) | TINY | changes, NAMES)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small honest checkpoint, as ultralytics writes it."""
    file = tmp_path_factory.mktemp("weights") / "good.pt"
    torch.save({"model": network().half(), "ema": None, "train_args": {"imgsz": 320}, "date": "today"}, file)
    return file


class Touch:
    """Unpickling it creates a folder."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


class Call:
    """Unpickling it calls `what` with `arguments`."""

    def __init__(self, what: Any, *arguments: Any) -> None:
        self.what, self.arguments = what, arguments

    def __reduce__(self) -> Any:
        return self.what, self.arguments


def refused(file: Path, match: str | None = None, **options: Any) -> ModelError:
    with pytest.raises(ModelError, match=match) as caught:
        detectors.build(checkpoints.load(str(file), **options))
    assert caught.value.exit_code is ExitCode.MODEL
    return caught.value


# -- honest files ---------------------------------------------------------------------------------


def test_a_checkpoint_loads_without_running_its_pickle(good: Path) -> None:
    checkpoint = checkpoints.load(str(good))
    assert (checkpoint.kind, checkpoint.family, checkpoint.imgsz) == ("ultralytics", "yolov8", 320)
    assert checkpoint.names == NAMES
    assert not checkpoint.trusted
    assert type(checkpoint.module) is tasks.DetectionModel
    assert all(
        "ultralytics" in type(m).__module__ or "torch" in type(m).__module__ for m in checkpoint.module.modules()
    )
    assert type(checkpoint.module.model[0]).__init__ is not type(checkpoint.module).__init__
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = torch.load(good, weights_only=False)["model"].float().eval()(x)[0]
        ours = detectors.build(checkpoint).predict(x)[0]
    torch.testing.assert_close(ours.scores, theirs[0, 4:].T, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "yaml", ["yolov8n.yaml", *(pytest.param(f"yolo{v}n.yaml", marks=pytest.mark.slow) for v in ("11", "v10"))]
)
def test_safetensors_hold_the_same_model(tmp_path: Path, yaml: str) -> None:
    module = network(yaml)
    before = Checkpoint("a.pt", "0" * 64, "ultralytics", module, "yolov8", NAMES, 320)
    checkpoints.save(before, tmp_path / "a.safetensors")
    after = checkpoints.load(str(tmp_path / "a.safetensors"))
    assert (after.family, after.names, after.imgsz) == ("yolov8", NAMES, 320)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, again = (detectors.build(c).predict(x)[0] for c in (before, after))
    assert torch.equal(found.boxes, again.boxes)
    assert torch.equal(found.logits, again.logits)
    first = (tmp_path / "a.safetensors").read_bytes()
    checkpoints.save(after, tmp_path / "b.safetensors")
    assert load_file(tmp_path / "b.safetensors").keys() == load_file(tmp_path / "a.safetensors").keys()
    checkpoints.save(before, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == first


def test_the_pinned_hash_comes_first(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = checkpoints.load(str(good)).sha256
    assert checkpoints.load(str(good), sha256=digest.upper()).sha256 == digest

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(torch, "load", never)
    monkeypatch.setattr(checkpoints.tensors, "read", never)
    refused(good, "not the pinned", sha256="0" * 64)
    refused(good, "not the pinned", sha256="0" * 64, trust_pickle=True)


def test_what_is_read_is_given_back_and_lies_anywhere(tmp_path: Path, good: Path) -> None:
    """Halves are let go once they are float32; entries of other zips do not begin at multiples of eight."""
    memory: Any = checkpoints._pages(good)
    tensors.read(memory)
    before = good.read_bytes()
    assert memory[-1000:] == before[-1000:]
    if sys.platform == "linux":
        assert sum(memory[at] == before[at] for at in range(0, len(before), 997)) < 0.5 * len(before) / 997
    moved = checkpoints.load(str(rewritten(good, tmp_path / "moved.pt", lambda _, data: data))).module.state_dict()
    for name, value in checkpoints.load(str(good)).module.state_dict().items():
        assert torch.equal(value, moved[name]), name


def test_entries_upon_each_other_are_refused(tmp_path: Path, good: Path) -> None:
    data = bytearray(good.read_bytes())
    first, second = (data.rindex(b"PK\x01\x02", 0, end) for end in (len(data), data.rindex(b"PK\x01\x02")))
    data[first + 42 : first + 46] = data[second + 42 : second + 46]
    (tmp_path / "twice.pt").write_bytes(data)
    refused(tmp_path / "twice.pt", "one upon the other")


# -- attacks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["alone", "beside", "inside"])
def test_a_pickle_that_touches_a_file_does_not_run(tmp_path: Path, place: str) -> None:
    mark, file = tmp_path / "mark", tmp_path / "evil.pt"
    module = network()
    if place == "inside":
        module.model[3].note = Touch(mark)
    evil = {"alone": Touch(mark), "beside": {"model": module, "date": Touch(mark)}, "inside": {"model": module}}
    torch.save(evil[place], file)
    error = refused(file, "mkdir")
    assert "--trust-pickle" in error.hint
    assert not mark.exists()
    if place != "alone":
        checkpoint = checkpoints.load(str(file), trust_pickle=True)
        assert checkpoint.trusted
        assert mark.exists()


def test_the_constructor_of_a_known_class_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    bomb = tasks.yaml_model_load("yolov8n.yaml") | {"activation": f"__import__('os').mkdir({str(mark)!r})"}
    for evil in (
        Call(tasks.DetectionModel, bomb),
        Call(tasks.DetectionModel, "yolov8n.yaml"),
        Call(nn.Conv2d, 1 << 16, 1 << 16, 99),
        Call(tasks.DetectionModel.__mro__[2], 1),
    ):
        torch.save({"model": evil}, tmp_path / "evil.pt")
        refused(tmp_path / "evil.pt")
    assert not mark.exists()


@pytest.mark.parametrize("options", [{}, {"trust_pickle": True}])
def test_a_missing_module_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any) -> None:
    stream = b"\x80\x02cno_such_module_of_anyone\nModel\nq\x00)\x81q\x01."
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("other/data.pkl", stream)
        archive.writestr("other/version", "3\n")

    def never(*arguments: Any, **_: Any) -> Any:
        raise AssertionError(f"a program was started: {arguments}")

    for name in ("run", "check_output", "check_call", "Popen"):
        monkeypatch.setattr(subprocess, name, never)
    refused(tmp_path / "other.pt", "no_such_module_of_anyone", **options)
    assert "no_such_module_of_anyone" not in sys.modules


def rewritten(source: Path, target: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> Path:
    """A copy of the archive `source` with `change(name, bytes)` for every entry."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return target


def test_archives_that_explode_are_refused(tmp_path: Path, good: Path) -> None:
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.writestr("a/data/0", bytes(1 << 26))
    refused(bomb, "more data than it holds")
    refused(rewritten(good, tmp_path / "packed.pt", lambda _, data: data, zipfile.ZIP_DEFLATED), "more data")
    # A directory that promises 4 GB for an entry of a few bytes.
    data = bytearray(good.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 20 : at + 28] = b"\xf0\xff\xff\xff" * 2
    (tmp_path / "lies.pt").write_bytes(data)
    refused(tmp_path / "lies.pt")


def test_tensors_larger_than_their_storage_are_refused(tmp_path: Path) -> None:
    module = network()
    module.model[0].conv.weight = nn.Parameter(torch.zeros(1).half().expand(1 << 20, 1 << 20), requires_grad=False)
    torch.save({"model": module}, tmp_path / "wide.pt")
    assert (tmp_path / "wide.pt").stat().st_size < 1 << 24
    refused(tmp_path / "wide.pt", "more data than it holds")


@pytest.mark.parametrize("part", range(10))
def test_truncated_files_are_refused(tmp_path: Path, good: Path, part: int) -> None:
    data = good.read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) * part // 10])
    refused(tmp_path / "cut.pt")
    checkpoints.save(checkpoints.load(str(good)), tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) * part // 10])
    refused(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("seed", range(12))
def test_damaged_pickles_end_in_a_sentence(tmp_path: Path, good: Path, seed: int) -> None:
    dice = torch.Generator().manual_seed(seed)

    def flip(name: str, data: bytes) -> bytes:
        changed = bytearray(data)
        if name.endswith("data.pkl"):
            for at in torch.randint(len(changed), (8,), generator=dice).tolist():
                changed[at] ^= 1 << (at % 8)
        return bytes(changed)

    file = rewritten(good, tmp_path / "damaged.pt", flip)
    try:
        detectors.build(checkpoints.load(str(file)))
    except ModelError as error:
        assert error.message


def test_no_error_falls_back_to_a_freer_reader(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of torch or pickle unpickles; a damaged file is not run either, whatever the user trusts."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(torch, "load", never)
    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, never)
    detectors.build(checkpoints.load(str(good)))
    torch.save({"model": Touch(tmp_path / "mark")}, tmp_path / "evil.pt")
    refused(tmp_path / "evil.pt", "mkdir")
    data = good.read_bytes()
    for name, content in (("short.pt", data[: len(data) // 2]), ("text.pt", b"hello"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, trust_pickle=True)


@pytest.mark.parametrize("what", ["torchscript", "onnx", "noise", "empty", "text", "zip", "tensor", "number", "names"])
def test_other_files_named_pt(tmp_path: Path, what: str) -> None:
    file = tmp_path / "model.pt"
    if what == "torchscript":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("model/data.pkl", pickle.dumps({}, 2))
            archive.writestr("model/constants.pkl", pickle.dumps((), 2))
            archive.writestr("model/code/__torch__.py", "def forward(self, x): return x")
    elif what == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("readme.txt", "hello")
    elif what in ("tensor", "number"):
        torch.save(torch.zeros(3) if what == "tensor" else {"model": 5}, file)
    elif what == "names":
        module = network()
        module.names = {"one": 1}
        torch.save({"model": module, "train_args": 5}, file)
    else:
        noise = torch.randint(256, (4096,), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
        file.write_bytes(
            {"onnx": b"\x08\x07\x12\x07pytorch" * 9, "noise": bytes(noise.tolist()), "empty": b"", "text": b"hi"}[what]
        )
    refused(file)


def test_a_classifier_says_what_it_is(tmp_path: Path) -> None:
    module = tasks.ClassificationModel("yolov8n-cls.yaml", nc=2, verbose=False)
    torch.save({"model": module}, tmp_path / "classifier.pt")
    error = refused(tmp_path / "classifier.pt", "Classify")
    assert "Detect" in error.hint


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "__import__('os').system('true')"},
        {"activation": "nn.ReLU(__import__('os').getpid())"},
        {"backbone": [[-1, 1, "os.system", ["true"]]]},
        {"backbone": [[-1, 1, "Concat; import os", [1]]]},
        {"backbone": [[-1, 10**9, "Conv", [8]]]},
        {"backbone": [[-1, 1, "Conv", [10**9]]]},
        {"backbone": [[99, 1, "Conv", [8]]]},
        {"backbone": 5},
    ],
)  # fmt: skip
def test_a_malicious_architecture_is_refused(tmp_path: Path, good: Path, change: dict[str, Any]) -> None:
    checkpoints.save(checkpoints.load(str(good)), tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    about["architecture"] = json.dumps(json.loads(about["architecture"]) | change)
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "a.safetensors", metadata=about)
    refused(tmp_path / "a.safetensors")


def test_tensors_that_do_not_lie_one_behind_the_other_are_refused(tmp_path: Path) -> None:
    """Whatever a header says, no number is read twice, from elsewhere, or passed over."""
    data = tensor_file.packed(
        {"a": torch.arange(4.0), "b": torch.ones(2, 3).half(), "c": torch.zeros(0, 2)}, {"x": "y"}
    )
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])

    def file(changes: dict[str, Any], more: bytes = b"") -> bytes:
        changed = {name: said | changes.get(name, {}) for name, said in header.items()}
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :] + more

    own = {name: entry.read(file({})) for name, entry in tensor_file.entries(file({})).items()}
    assert own["a"].tolist() == [0, 1, 2, 3] and own["b"].tolist() == [[1] * 3] * 2 and own["c"].shape == (0, 2)
    assert (own["b"].dtype, tensor_file.metadata(data)) == (torch.float32, {"x": "y"})
    wrong: list[bytes] = [file({name: {key: value}}) for name, key, value in (
        ("b", "data_offsets", [12, 24]), ("b", "data_offsets", [0, 12]), ("b", "data_offsets", [16, 999]),
        ("a", "data_offsets", [-16, 0]), ("a", "data_offsets", [0]), ("a", "data_offsets", "x"), ("a", "dtype", "F16"),
        ("a", "dtype", "F8_E4M3"), ("a", "dtype", ["F32"]), ("a", "shape", [-4]), ("a", "shape", [True, 4]),
        ("a", "shape", [1 << 62, 4]), ("a", "shape", [2.0, 2]), ("a", "shape", "4"), ("a", "shape", 4),
        ("a", "shape", [5]),
    )]  # fmt: skip
    wrong += [
        file({}, b"more"),
        data[:-1],
        data[:7],
        b"",
        (1 << 40).to_bytes(8, "little") + data[8:],
        b"\2" + b"\0" * 7 + b"[]",
    ]
    for content in wrong:
        (tmp_path / "a.safetensors").write_bytes(content)
        refused(tmp_path / "a.safetensors", "is not a readable detxai model|no architecture")
        with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
            tensor_file.entries(content)


def test_safetensors_of_others_say_what_to_do(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    assert "detxai convert" in refused(tmp_path / "other.safetensors", "no architecture").hint


# -- names ----------------------------------------------------------------------------------------


def test_a_known_name_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: Path) -> None:
    fetched: list[Path] = []

    def fetch(file: Path, **_: Any) -> str:
        if not file.exists():
            fetched.append(file)
            file.write_bytes(good.read_bytes())
        return str(file)

    monkeypatch.setattr(downloads, "attempt_download_asset", fetch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("yolo11n.pt", "yolo11n", "yolo11n.pt"):
        assert checkpoints.load(name).names == NAMES
    assert fetched == [tmp_path / "cache" / "detxai" / "yolo11n.pt"]
    (tmp_path / "yolov8n.pt").write_bytes(good.read_bytes())
    assert checkpoints.load("yolov8n.pt").name == "yolov8n.pt"  # a file of that name is the one that is meant
    assert len(fetched) == 1
    for name in ("no-such-model.pt", "elsewhere/yolo11n.pt"):
        refused(Path(name), "No model at")
    assert len(fetched) == 1


def test_without_a_network_there_is_a_way_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(downloads, "attempt_download_asset", offline)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="could not be downloaded") as caught:
        checkpoints.load("yolo26n.pt")
    assert "--model /path/to/yolo26n.pt" in caught.value.hint


def test_a_missing_or_foreign_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.pt", "No model at")
    (tmp_path / "model.h5").write_bytes(io.BytesIO(b"x").getvalue())
    refused(tmp_path / "model.h5", "not a model format")
    refused(tmp_path, "is not a file")

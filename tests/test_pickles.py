"""The reader of checkpoints under attack: twenty thousand random programs and the known bypasses; nothing executes."""

from __future__ import annotations

import copy
import importlib
import io
import logging
import random
import sys
import time
import warnings
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import seeded_network
from pickle_programs import BYPASSES, Watch, archive, attack, inert, program
from torch import nn
from ultralytics.nn.modules import Conv

from detxai.cli.app import run
from detxai.errors import ModelError
from detxai.models import checkpoints, detectors, tensors


@pytest.fixture(scope="module")
def watch() -> Watch:
    attack(b"N.")  # whatever it imports itself
    return Watch()


def test_nothing_of_twenty_thousand_programs_executes(watch: Watch) -> None:
    dice, ends = random.Random(1), Counter[str]()
    watch.seen.clear()
    watch.on = True
    try:
        for _ in range(20_000):
            ends[attack(program(dice))] += 1
    finally:
        watch.on = False
    assert not watch.seen
    assert ends["Refused"] > 2000
    assert sum(ends[end] for end in ends if end.startswith("read")) > 300, ends


@pytest.mark.parametrize("name", BYPASSES)
def test_known_bypasses_end_in_a_sentence(name: str, watch: Watch, tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(archive(b"\x80\x02" + BYPASSES[name]))
    start = time.process_time()
    watch.seen.clear()
    watch.on = True
    try:
        with pytest.raises(ModelError):
            checkpoints.load(str(tmp_path / "evil.pt"))
    finally:
        watch.on = False
    assert not watch.seen
    assert time.process_time() - start < 10


def test_an_attribute_of_an_allowed_class_is_never_called(tmp_path: Path, watch: Watch) -> None:
    """`yaml.__deepcopy__` is a layer that the file chose: real classes, whose attributes call whatever is in them."""
    gadget = nn.Sequential(Conv(1, 1))
    gadget[0].conv = Called(gadget[0])
    gadget[0].bn = gadget[0].act = nn.Identity()
    yaml = nn.Sequential()
    yaml.__dict__["__deepcopy__"] = gadget
    module = tasks_model()
    module.__dict__["yaml"] = yaml
    torch.save({"model": module}, tmp_path / "evil.pt")
    Called.calls.clear()
    copy.deepcopy(torch.load(tmp_path / "evil.pt", weights_only=False)["model"].yaml)
    assert Called.calls, "the file is an attack on those who load it"
    Called.calls.clear()
    watch.seen.clear()
    watch.on = True
    try:
        with pytest.raises(ModelError, match="its yaml is not a mapping"):
            checkpoints.load(str(tmp_path / "evil.pt"))
        module.__dict__["yaml"] = {}
        module.model[0].__dict__["__deepcopy__"] = gadget
        watch.on = False
        torch.save({"model": module}, tmp_path / "evil.pt")
        watch.on = True
        with pytest.raises(ModelError, match="__deepcopy__"):
            checkpoints.load(str(tmp_path / "evil.pt"))
    finally:
        watch.on = False
    assert not watch.seen
    assert not Called.calls


class Called(nn.Module):
    """Remembers that it was called; a bound method of an allowed class would do the same for an attacker."""

    calls: ClassVar[list[object]] = []

    def __init__(self, beside: nn.Module) -> None:
        super().__init__()

    def forward(self, x: object) -> object:
        self.calls.append(x)
        return x


@pytest.mark.parametrize("given", ["Parameter", "Tensor"])
def test_a_tensor_of_a_known_kind_takes_nothing_from_its_class(
    tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`_rebuild_from_type_v2` asks what it rebuilt for `as_subclass`: here nothing is asked."""
    tensor: Any = nn.Parameter(torch.ones(2)) if given == "Parameter" else torch.ones(2)
    tensor.as_subclass = "of the attacker's choice"
    monkeypatch.setattr(torch.Tensor, "__setstate__", lambda *_: pytest.fail("a state was set"))
    torch.save({"a": tensor}, tmp_path / "a.pt")
    read = tensors.read((tmp_path / "a.pt").read_bytes())["a"]
    assert type(read) is torch.Tensor
    assert torch.equal(read, torch.ones(2))
    assert not read.__dict__


def tasks_model(classes: int = 2) -> Any:
    from ultralytics.nn import tasks

    yaml = tasks.yaml_model_load("yolov8n.yaml") | {"scales": {"n": [0.33, 0.125, 256]}, "scale": "n"}
    return checkpoints.build(yaml, {i: str(i) for i in range(classes)})


def test_plain_things_that_checkpoints_carry_are_read() -> None:
    file = io.BytesIO()
    given = {
        "fitness": np.float64(0.5), "count": np.int32(7), "path": Path("a/b"), "order": OrderedDict(a=1), "set": {1},
        "raw": b"\x00\xff", "best": np.array([0.1]), "half": torch.arange(6.0).half().view(2, 3),
    }  # fmt: skip
    torch.save(given, file)
    found = tensors.read(file.getvalue())
    assert inert(found)
    assert (found["fitness"], found["count"], found["path"], found["order"]) == (0.5, 7, "a/b", {"a": 1})
    assert (found["raw"], found["set"]) == (b"\x00\xff", [1])
    assert torch.equal(found["half"], given["half"])  # type: ignore[arg-type]


def test_both_formats_of_torch_and_wrappers_give_one_model(tmp_path: Path) -> None:
    module = tasks_model().half()
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own old format
        torch.save({"model": module}, tmp_path / "old.PT", _use_new_zipfile_serialization=False)
    torch.save({"model": nn.DataParallel(module)}, tmp_path / "parallel.pth")
    outputs = []
    for name in ("old.PT", "parallel.pth"):
        with torch.no_grad():
            outputs.append(checkpoints.load(str(tmp_path / name)).module(x)[0])
    assert torch.equal(*outputs)
    data = (tmp_path / "old.PT").read_bytes()
    for end in (10, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.pt").write_bytes(data[:end])
        with pytest.raises(ModelError):
            checkpoints.load(str(tmp_path / "cut.pt"))


def test_a_state_dict_says_what_it_is(tmp_path: Path) -> None:
    for name, content in (("a.pt", tasks_model().state_dict()), ("b.pt", {"model": tasks_model().state_dict()})):
        torch.save(content, tmp_path / name)
        with pytest.raises(ModelError, match="state dict") as caught:
            checkpoints.load(str(tmp_path / name))
        assert "ONNX" in caught.value.hint


def test_pipes_devices_and_folders_are_refused_before_reading(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    (tmp_path / "folder.pt").mkdir()
    for name in ("pipe.pt", "zero.pt", "folder.pt"):
        with pytest.raises(ModelError, match="is not a file"):
            checkpoints.load(str(tmp_path / name))


@pytest.mark.parametrize("imgsz", [-1, 0, 8192, "big", 1 << 40, [64, "a"]])
def test_impossible_sizes_are_refused(tmp_path: Path, imgsz: Any) -> None:
    torch.save({"model": tasks_model(), "train_args": {"imgsz": imgsz}}, tmp_path / "a.pt")
    with pytest.raises(ModelError):
        checkpoints.load(str(tmp_path / "a.pt"))


def test_layers_that_run_without_end_are_refused(tmp_path: Path) -> None:
    module, inner = tasks_model(), nn.Sequential(nn.SiLU())
    for _ in range(20):
        inner = nn.Sequential(inner, inner)  # a million runs of one layer
    module.model[0].act = inner
    torch.save({"model": module}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match="more layers"):
        checkpoints.load(str(tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        (nn.BatchNorm2d, "eps", 0.5),
        (Conv, "act", nn.LeakyReLU(0.1)),
        pytest.param(nn.MaxPool2d, "kernel_size", (5, 1), marks=pytest.mark.slow),
        pytest.param(nn.Upsample, "mode", "bilinear", marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_convert_writes_the_same_model_or_nothing(tmp_path: Path, kind: Any, setting: str, value: Any) -> None:
    """Settings that live in the modules alone, and that the yaml knows nothing of."""
    module = seeded_network("yolov8n.yaml")
    for part in module.modules():
        if isinstance(part, kind):
            setattr(part, setting, value)
            if setting == "kernel_size":
                part.padding = (2, 0)
    torch.save({"model": module}, tmp_path / "a.pt")
    loaded = checkpoints.load(str(tmp_path / "a.pt"))
    with pytest.raises(ModelError, match="cannot be converted"):
        checkpoints.save(loaded, tmp_path / "a.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_a_model_of_more_bands_than_its_yaml_says_is_the_same_converted(tmp_path: Path) -> None:
    module = tasks_model()
    module.model[0].conv = nn.Conv2d(4, module.model[0].conv.out_channels, 3, 2, 1, bias=False)
    torch.save({"model": module}, tmp_path / "a.pt")
    checkpoints.save(checkpoints.load(str(tmp_path / "a.pt")), tmp_path / "a.safetensors")
    both = [detectors.build(checkpoints.load(str(tmp_path / f"a.{suffix}"))) for suffix in ("pt", "safetensors")]
    assert [detector.info.channels for detector in both] == [4, 4]
    x = torch.rand(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(*(detector.predict(x)[0].logits for detector in both))


def test_layers_of_ones_own_need_trust_and_the_folder_of_their_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    code = "import torch\nclass Doubled(torch.nn.Module):\n    def forward(self, x):\n        return 2 * x\n"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "layers_of_a_user.py").write_text(code)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "code"), *sys.path])
    own = importlib.import_module("layers_of_a_user").Doubled()
    module = tasks_model()
    module.model[0].act = own
    torch.save({"model": module}, tmp_path / "own.pt")
    monkeypatch.setattr(sys, "path", sys.path[1:])
    monkeypatch.delitem(sys.modules, "layers_of_a_user")
    with pytest.raises(ModelError, match=r"model\.0\.act is a layers_of_a_user\.Doubled"):
        checkpoints.load(str(tmp_path / "own.pt"))
    with pytest.raises(ModelError, match="layers_of_a_user") as caught:
        checkpoints.load(str(tmp_path / "own.pt"), trust_pickle=True)
    assert "--module-path" in caught.value.hint
    caplog.clear()
    monkeypatch.setattr(logging.getLogger("detxai"), "propagate", True)  # a console of before took it away
    loaded = checkpoints.load(str(tmp_path / "own.pt"), trust_pickle=True, module_path=tmp_path / "code")
    assert loaded.trusted
    assert "own.pt (sha256 " + loaded.sha256 in caplog.text
    assert "names layers_of_a_user.Doubled." in caplog.text
    assert type(loaded.module.model[0].act).__name__ == "Doubled"
    monkeypatch.delitem(sys.modules, "layers_of_a_user")


def test_what_will_run_is_told_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("detxai"), "propagate", True)  # a console of before took it away
    monkeypatch.setattr(torch, "load", lambda *_, **__: said.append(caplog.text) or {})
    (tmp_path / "evil.pt").write_bytes(archive(b"\x80\x02" + BYPASSES["os.system"]))
    assert run(["doctor", str(tmp_path / "evil.pt"), "--trust-pickle", "--module-path", str(tmp_path)]) == 5
    assert "evil.pt (sha256 " in said[0] and "os.system" in said[0]
    (tmp_path / "odd.pt").write_bytes(archive(BYPASSES["inst"]))
    assert run(["doctor", str(tmp_path / "odd.pt"), "--trust-pickle"]) == 5
    assert "could not be read beforehand" in said[1]

"""A run keeps to its memory: what does not fit is computed again, refused before it begins, or fails alone."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import FAST, explain, files

from detxai.config.settings import RunConfig
from detxai.errors import UsageError
from detxai.models.heads.anchor_free import AnchorFree
from detxai.run import pipeline
from detxai.run.budget import IN_FLIGHT, PICTURES, Budget, budget
from detxai.run.pipeline import Explainer
from detxai.run.publish import Publisher
from detxai.run.results import MapGroup, PublishedGroup

CPU = torch.device("cpu")
GIB = 2**30


def planned(memory: int | None, in_flight: int | None = None, gradient: int = 4 * 640**2) -> Budget:
    return budget(memory, CPU, picture=(3, 640, 640), pack=GIB // 2, gradient=gradient, in_flight=in_flight, targets=16)


def test_as_much_at_once_as_fits() -> None:
    wide, narrow = planned(16 * GIB), planned(int(1.2 * GIB))
    assert (wide.in_flight, wide.targets_at_once) == (IN_FLIGHT["cpu"], 16)
    assert 1 <= narrow.in_flight < wide.in_flight
    assert narrow.targets_at_once < wide.targets_at_once
    for found in (wide, narrow):
        assert found.room + found.in_flight * PICTURES * 12 * 640**2 < found.memory


def test_workers_of_one_machine_share_its_memory(tiny: Path) -> None:
    config = RunConfig.model_validate({"model": {"path": str(tiny)}})
    alone, third = (Explainer(config, memory_share=share).plan.budget.memory for share in (1.0, 1 / 3))
    assert third == alone // 3


def test_what_does_not_fit_is_refused_where_somebody_asked_for_it() -> None:
    with pytest.raises(UsageError, match=r"--memory: 512 MiB are less than .* Give more, or use a smaller --imgsz"):
        planned(GIB // 2)
    with pytest.raises(UsageError, match="64 images in flight"):
        planned(2 * GIB, in_flight=64)
    enough = planned(None, in_flight=4096)
    assert enough.in_flight == 4096
    assert enough.room >= 0


def test_no_byte_depends_on_the_memory(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    picture, options = pictures / "a.png", (*FAST, "--maps", "npz", "--tolerance", "0.001", "--max-evaluations", "40")
    least = Explainer(RunConfig.model_validate({"model": {"path": str(tiny)}, "run": {"batch": 1}})).plan
    spare = least.budget.memory - least.budget.room
    for name, memory in (("wide", spare + GIB), ("narrow", spare)):
        assert explain(picture, "-m", tiny, "-o", tmp_path / name, *options, "--batch", 1, "--memory", memory) == 0
    assert files(tmp_path / "wide") == files(tmp_path / "narrow")
    found = json.loads((tmp_path / "narrow" / "a.png.json").read_bytes())["detections"]
    assert any(a["evaluations"] > 8 for d in found for a in d["attributions"])


def test_an_image_that_does_not_fit_fails_alone(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator says no while the first image is explained; the second has a record as ever."""
    values, calls = AnchorFree.entered, 0

    def full(self: AnchorFree, z: torch.Tensor, pins: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls <= 4:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return values(self, z, pins)  # type: ignore[arg-type]

    monkeypatch.setattr(AnchorFree, "entered", full)
    code = explain(pictures / "a.png", pictures / "b.png", "-m", tiny, "-o", tmp_path, *FAST, "--batch", 1)
    first, second = (json.loads((tmp_path / f"{name}.png.json").read_bytes()) for name in "ab")
    assert code == 3
    assert (first["status"], first["error"]["code"]) == ("failed", "memory")
    message = first["error"]["message"]
    assert all(option in message for option in ("--imgsz", "--max-evaluations", "--memory"))
    assert "again" not in message
    assert second["status"] == "ok"


def test_many_writers_keep_to_their_bytes_and_the_summary_says_who_waited(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for one picture only, eight writers paint one after the other, and the tree is the same."""
    options = ("-m", tiny, *FAST, "--evidence", "none", "--max-evaluations", "2", "--batch", "4")
    some = [pictures / name for name in ("a.png", "b.png", "b.jpg")]
    assert explain(*some, *options, "-o", tmp_path / "plain") == 0
    at_work, most, group = 0, 0, Publisher.group
    lock = threading.Lock()

    def counted(self: Publisher, one: MapGroup) -> PublishedGroup:
        nonlocal at_work, most
        with lock:
            at_work, most = at_work + 1, max(most, at_work + 1)
        time.sleep(0.05)
        try:
            return group(self, one)
        finally:
            with lock:
                at_work -= 1

    monkeypatch.setattr(Publisher, "group", counted)
    monkeypatch.setattr(pipeline, "BEHIND_BYTES", 1)
    monkeypatch.setattr(pipeline, "_cores", lambda: 8)
    assert explain(*some, *options, "-o", tmp_path / "bounded") == 0
    assert most == 1
    assert files(tmp_path / "plain") == files(tmp_path / "bounded")
    timings = json.loads((tmp_path / "bounded" / "summary.json").read_bytes())["timings"]
    assert timings["waiting"] == pytest.approx(timings["waiting_for_input"] + timings["waiting_for_output"], abs=1e-5)
    assert timings["waiting_for_output"] > 0.05

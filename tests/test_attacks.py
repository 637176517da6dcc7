"""A few of the attacks of scripts/checks/attacks.py, and what is put in the place of a picture between two runs."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import FAST, ROOT, explain

sys.path.insert(0, str(ROOT / "scripts" / "checks"))

import attacks

from detxai import Explainer
from detxai.cli.app import run
from detxai.inputs import decode
from detxai.run.console import Stopped

CHOSEN = [*itertools.islice(attacks.picture_attacks(1), 0, 65, 16)]
MODELS = (
    "Linear",
    "million repeats",
    "300,000 names",
    "8192 px",
    "2 ** 60",
    "FIFO",
    "a chain of",
    "Upsample of",
    "1 x 512",
)
CHOSEN += [a for a in attacks.model_attacks(1) if any(word in a.name for word in MODELS)]


@pytest.mark.parametrize("attack", CHOSEN, ids=lambda attack: attack.name)
def test_an_attack_ends_in_its_code(attack: attacks.Attack, tmp_path: Path) -> None:
    assert run(attack.arguments(tmp_path)) in attack.codes


def test_a_pipe_in_the_place_of_a_picture_that_was_explained_never_hangs(
    tiny: Path, pictures: Path, tmp_path: Path
) -> None:
    picture = Path(shutil.copy(pictures / "a.png", tmp_path / "a.png"))
    arguments = (picture, "-m", tiny, "-o", tmp_path / "out", *FAST)
    assert explain(*arguments) == 0
    picture.unlink()
    os.mkfifo(picture)
    assert explain(*arguments) == 3
    record = json.loads((tmp_path / "out" / "a.png.json").read_text())
    assert record["error"]["code"] == "unreadable"


def test_a_folder_with_escapes_in_its_name_does_not_steer_the_terminal(
    tiny: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree, odd = str(tmp_path / "out"), str(tmp_path / "x\x1b[1m[/y]")
    assert explain(pictures / "a.png", "-m", tiny, "-o", tree, *FAST) == 0
    assert run(["report", tree, "-o", f"{odd}.html"]) == 0
    assert run(["merge", tree, "-o", odd]) == 0
    assert run(["export", tree, "--to", "csv", "-o", f"{odd}.csv"]) == 0
    said = "".join(capsys.readouterr())
    assert said.count("\\x1b[1m[/y]") == 3
    assert "\x1b" not in said


def test_a_run_that_is_stopped_does_not_wait_for_a_slow_decode(
    tiny: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    monkeypatch.setattr(decode, "load", lambda *_: go.wait(20))
    results = Explainer(str(tiny)).explain([pictures / "a.png"])

    def stop(*_: object) -> None:
        raise Stopped(143)

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(2)
    started = time.monotonic()
    try:
        with pytest.raises(Stopped):
            next(results)
        assert time.monotonic() - started < 12
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        go.set()

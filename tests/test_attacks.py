"""A few of the attacks of scripts/checks/attacks.py, and what is put in the place of a picture between two runs."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pty
import re
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import FAST, ROOT, explain

sys.path.insert(0, str(ROOT / "scripts" / "checks"))

import attacks

from detxai import Explainer
from detxai.cli.app import run
from detxai.inputs import decode
from detxai.models import checkpoints
from detxai.run import streams
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


def test_what_is_no_picture_in_a_folder_never_hangs_and_is_named(
    tiny: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    shutil.copytree(pictures / "deeper", folder / "deeper")
    os.mkfifo(folder / "pipe.png")
    monkeypatch.chdir(folder)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
        links = {"zero.png": "/dev/zero", "terminal.png": "/dev/tty", "to-pipe.png": "pipe.png", "gone.png": "nowhere"}
        links |= {"to-socket.png": "socket.png", "round.png": "round.png", "deeper/loop": "..", "devices": "/dev"}
        for name, target in links.items():
            (folder / name).symlink_to(target)
        started = time.monotonic()
        assert explain(".", "-m", tiny, "-o", tmp_path / "out", *FAST) == 3
        assert time.monotonic() - started < 20
    said = capsys.readouterr().err
    odd = [name for name in ("pipe.png", "socket.png", *links) if name.endswith(".png")]
    for name in odd:
        assert f"error: {name}: " in said
        record = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert record["error"]["code"] == ("not_found" if name == "gone.png" else "unreadable"), name
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["images"]["ok"], summary["images"]["failed"]) == (2, len(odd))


@pytest.fixture
def speaking(tiny: Path, tmp_path: Path) -> Path:
    """The tiny detector, its family and classes named after what steers a terminal or is markup to Rich."""
    checkpoint = checkpoints.load(str(tiny))
    names = {0: "weapon [sharp]", 1: "[/x] [bold red]", 2: "\x1b]0;gotcha\x07\x9b31m"}
    family = "yolo\x1b[31mv8[/x]"
    checkpoints.save(replace(checkpoint, names=names, family=family), tmp_path / "speaking.safetensors")
    return tmp_path / "speaking.safetensors"


def on_a_terminal(line: list[str], folder: Path) -> tuple[int, bytes]:
    """The exit code of the command with all its streams on a terminal, in colour, and what the terminal got."""
    child, terminal = pty.fork()
    if not child:
        try:
            os.environ["TERM"] = "xterm-256color"
            os.environ.pop("NO_COLOR", None)
            os.chdir(folder)
            streams.install()
            os._exit(run(line))
        finally:
            os._exit(99)
    said = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(terminal, 1 << 16):
            said += part
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


@pytest.mark.slow
def test_nothing_of_others_steers_a_terminal_in_colour(speaking: Path, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in" / "\x1b[41m[red]\x07"
    folder.mkdir(parents=True)
    shutil.copy(pictures / "a.png", folder / "weapon [sharp].png")
    (folder / "b\x1b]0;gotcha\x07 [bold].png").write_text("no picture")
    model, all_said = str(speaking), b""
    lines = [
        (["explain", "in", "-m", model, "-o", "out", "-v", "--color", "always", *FAST, "--conf", "0.01"], 3),
        (["list", "out", "--verdict", "supported,weak,unsupported,unknown"], 0),
        (["diff", "out", "out"], 0),
        (["merge", "out", "-o", "merged"], 3),
        (["doctor", model], 0),
    ]
    for line, code in lines:
        left, said = on_a_terminal(line, tmp_path)
        assert left == code, said.decode(errors="replace")
        assert b"gotcha\x07" not in said and b"\x1b]0" not in said and b"\x9b" not in said, line
        for own in (b"\x1b[41m", b"\x1b[31mv8"):
            assert own not in said, line
        all_said += said
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", all_said)
    assert b"\x1b[" in all_said, "this was in colour"
    for whole in (b"weapon [sharp]", b"[/x]", b"[bold red]", rb"\x1b]0;gotcha\x07"):
        assert whole in text, whole


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

"""The real command: exit codes, what it says and where, and what it leaves alone.

In a process of its own once for each exit code, and wherever signals, pipes, imports or a home of its own matter.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import jsonschema
import pytest
from conftest import FAST, ROOT, SAMPLES, Command, Inside, files
from filelock import FileLock
from PIL import Image

from detxai.config import settings
from detxai.config.options import ROWS
from detxai.errors import ExitCode
from detxai.output import json_schema, records

HERE = Path(__file__).parent


class Bomb:
    """Unpickled, it makes a file named `ran`."""

    def __reduce__(self) -> tuple[Any, Any]:
        return os.mkdir, ("ran",)


@pytest.fixture
def machine(inside: Inside, tiny: Path, pictures: Path) -> Inside:
    """The command in a folder with `tiny.safetensors`, `pics/`, and things that are not what they seem."""
    here = inside.cwd
    (here / "tiny.safetensors").symlink_to(tiny)
    (here / "pics").symlink_to(pictures)
    (here / "empty").mkdir()
    (here / "file").write_text("in the way")
    (here / "text.pt").write_text("not weights")
    (here / "cut.safetensors").write_bytes(tiny.read_bytes()[:9999])
    (here / "bomb.pt").write_bytes(pickle.dumps(Bomb()))
    (here / "bags.zip").write_bytes(b"PK")
    (here / "typo.yaml").write_text("detection: {cnf: 0.3}\n")
    return inside


#: Arguments, exit code, words of the one line on stderr.
REFUSED: dict[str, tuple[str, int, list[str]]] = {
    "missing path": ("explain nowhere", 2, ["'nowhere' does not exist"]),
    "missing among others": ("explain pics nowhere", 2, ["'nowhere' does not exist"]),
    "empty folder": ("explain empty", 4, ["No image", "glob"]),
    "glob without match": ("explain pics/*.gif", 4, ["No image"]),
    "nothing on stdin": ("explain -", 4, ["No image"]),
    "typo in YAML": ("explain pics -c typo.yaml", 2, ["typo.yaml", "detection.cnf", "did you mean 'detection.conf'"]),
    "no such YAML": ("explain pics -c none.yaml", 2, ["none.yaml", "No such file", "Check its path"]),
    "typo in --set": ("explain pics --set run.bath=3", 2, ["run.bath", "did you mean 'run.batch'"]),
    "unknown method": ("explain pics --method igg", 2, ["igg", "did you mean 'ig'"]),
    "unknown target": ("explain pics --target centre", 2, ["centre", "objectness"]),
    "target without head": ("explain pics -m tiny.safetensors --target objectness", 2, ["objectness", "class, left"]),
    "unknown class": ("explain pics -m tiny.safetensors --as-class gun", 2, ["--as-class", "'gun'", "thing 0"]),
    "wrong number": ("explain pics --conf 2", 2, ["--conf", "less than or equal to 1"]),
    "a URL": ("explain https://bags/x.png", 2, ["https://bags/x.png", "URL", "Copy it here"]),
    "an archive": ("explain bags.zip", 2, ["bags.zip", "archive", "Unpack"]),
    "a device as config": ("explain pics -c /dev/zero", 2, ["/dev/zero", "no regular file"]),
    "a device as predictions": ("explain pics --predictions /dev/zero", 2, ["neither a file nor a folder"]),
    "a device as names": ("explain pics --names /dev/zero", 2, ["--names"]),
    "a path of 4,096 bytes": (f"explain {'x' * 4096}", 2, ["does not exist"]),
    "labels of 4,096 bytes": (f"explain pics --labels {'x' * 4096}", 2, ["too long"]),
    "no such GPU": ("explain pics --device cuda:99999999999", 2, ["--device", "cuda:N"]),
    "no output": ("explain pics --set output.dir=", 2, ["output.dir"]),
    "an empty output": ("explain pics --set output.dir=''", 2, ["output.dir", "must not be empty"]),
    "wrong shard": ("explain pics --shard 3/2", 2, ["--shard", "1 <= I <= N"]),
    "missing model": ("explain pics -m none.pt", 5, ["No model at none.pt", "--model"]),
    "a model of 4,096 bytes": (f"explain pics -m {'x' * 4096}", 5, ["Cannot read the model", "too long"]),
    "weights of 4,096 bytes": (f"explain pics -m {'x' * 4092}.pt", 5, ["Cannot read the model", "too long"]),
    "a cfg of 4,096 bytes": (f"explain pics -m {'x' * 4091}.cfg", 5, ["Cannot read the model", "too long"]),
    "not weights": ("explain pics -m text.pt", 5, ["text.pt", "not a torch checkpoint"]),
    "cut weights": ("explain pics -m cut.safetensors", 5, ["cut.safetensors is not a readable"]),
    "weights that run code": ("explain pics -m bomb.pt", 5, ["bomb.pt"]),
    "other sha256": (f"explain pics -m tiny.safetensors --set model.sha256='{'0' * 64}'", 5, ["pinned", "Nothing was"]),
    "file in the way": ("explain pics -m tiny.safetensors -o file", 6, ["file is in the way", "-o"]),
    "folder below a file": ("explain pics -m tiny.safetensors -o file/x", 6, ["file is in the way"]),
    "an output where nobody may write": ("explain pics -m tiny.safetensors -o /sys/detxai", 6, ["/sys/detxai"]),
    "no such schema": ("schema recrod", 2, ["recrod", "record, summary or config"]),
    "unknown option": ("explain pics --bath 3", 2, ["--bath", "--batch"]),
    "no source": ("explain", 2, ["SOURCE"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_has_its_exit_code_and_one_clear_line(machine: Inside, case: str) -> None:
    line, code, words = REFUSED[case]
    first_of_its_code = case == next(name for name, refused in REFUSED.items() if refused[1] == code)
    outcome = machine.alone(*line.split()) if first_of_its_code else machine(*line.split())
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    complaints = [text for text in outcome.err.splitlines() if text.lower().startswith("error: ")]
    assert len(complaints) == 1, outcome.err
    assert all(word in complaints[0] for word in words), complaints
    assert not (machine.cwd / "ran").exists()
    assert not (machine.cwd / "runs" / "explain" / "summary.json").exists()


def test_cuda_without_cuda(machine: Inside) -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    outcome = machine.alone("explain", "pics", "-m", "tiny.safetensors", "--device", "cuda", env=hidden)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "0 CUDA devices" in outcome.err
    assert "--device cpu" in outcome.err


def test_a_tree_in_use_is_locked(machine: Inside) -> None:
    tree = machine.cwd / "tree"
    tree.mkdir()
    with FileLock(tree / ".detxai.lock"):
        outcome = machine("explain", "pics", "-m", "tiny.safetensors", "-o", "tree")
    assert outcome.code == 6
    assert "Another run" in outcome.err
    assert "--lock-timeout" in outcome.err
    assert not files(tree)


def test_a_full_disk(machine: Inside) -> None:
    """A limit on the size of files stands in for the disk: the first picture does not fit."""
    small = machine.start(
        *("explain", "pics", "-m", "tiny.safetensors", "-o", "tree", *FAST),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)),
    )
    _, err = small.communicate()
    assert small.returncode == 6, err
    assert b"No space is left" in err
    assert b"Traceback" not in err
    assert not list((machine.cwd / "tree").rglob("*.png"))
    again = machine("explain", "pics", "-m", "tiny.safetensors", "-o", "tree", *FAST)
    assert again.code == 0, again.err


def test_no_time_left_and_the_rest_later(machine: Inside) -> None:
    line = ("explain", "pics", "-m", "tiny.safetensors", "-o", "tree", *FAST)
    outcome = machine(*line, "--max-seconds", "0.01")
    assert outcome.code == 8
    assert "--max-seconds" in outcome.err
    assert json.loads((machine.cwd / "tree" / "summary.json").read_text())["exit_code"] == 8
    assert files(machine.cwd / "tree") == {"records.jsonl": b""}
    assert machine(*line).code == 0
    assert len(list((machine.cwd / "tree").rglob("*.json"))) == 7


@pytest.fixture
def many(machine: Inside) -> Path:
    """Two hundred small pictures."""
    folder = machine.cwd / "many"
    folder.mkdir()
    with Image.open(machine.cwd / "pics" / "b.png") as picture:
        for number in range(200):
            picture.crop((number % 30, number % 20, 90, 90)).save(folder / f"{number:03d}.png")
    return folder


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_run_cleanly(machine: Inside, many: Path, number: int, code: int) -> None:
    tree = machine.cwd / "tree"
    running = machine.start("explain", "many", "-m", "tiny.safetensors", "-o", tree, "--json", *FAST)
    assert running.stdout is not None
    first = running.stdout.readline()
    running.send_signal(number)
    rest, err = running.communicate()
    assert running.returncode == code, err
    assert b"Traceback" not in err
    assert b"run the same command again" in err
    *lines, summary = [json.loads(line) for line in (first + rest).splitlines()]
    assert (summary["exit_code"], summary["images"]["ok"]) == (code, len(lines))
    assert summary == json.loads((tree / "summary.json").read_text())
    assert 1 <= len(lines) < 200
    assert not list(tree.rglob("*.tmp"))
    assert len(list(tree.glob("*.png.json"))) == len(lines), "what was written is counted, and nothing else"
    named = {name for record in tree.glob("*.png.json") for name in records.load(record.read_bytes()).files()}
    assert {picture.name for picture in tree.glob("*.png")} == named


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_before_the_first_image(machine: Inside, number: int) -> None:
    running = machine.start("explain", "-", "-m", "tiny.safetensors", "-o", "tree", stdin=subprocess.PIPE)
    time.sleep(1.0)  # still importing, loading, or waiting for paths
    running.send_signal(number)
    _, err = running.communicate()
    assert running.returncode in (128 + number, -number), err
    assert b"Traceback" not in err


def test_a_reader_that_goes_away(machine: Inside, many: Path) -> None:
    running = machine.start("explain", "many", "-m", "tiny.safetensors", "-o", "tree", "--json", *FAST)
    with running:
        assert running.stdout is not None
        assert running.stdout.readline().startswith(b'{"schema":"detxai.record/1"')
        running.stdout.close()
        running.stdout = None
        _, err = running.communicate()
    assert running.returncode == 141, err
    assert b"Traceback" not in err
    assert b"BrokenPipe" not in err


def test_stdout_under_json_is_pure(machine: Inside) -> None:
    outcome = machine("explain", "pics", "-m", "tiny.safetensors", "-o", "tree", "--json", *FAST)
    assert outcome.code == 0, outcome.err
    *lines, last = outcome.out.splitlines()
    for line in lines:
        jsonschema.validate(json.loads(line), json_schema.schema("record"))
    jsonschema.validate(json.loads(last), json_schema.schema("summary"))
    assert "".join(f"{line}\n" for line in lines) == (machine.cwd / "tree" / "records.jsonl").read_text()
    assert "6 explained" in outcome.err
    assert "1 files are no images: notes.txt" in outcome.err
    again = machine("explain", "pics", "-m", "tiny.safetensors", "-o", "tree", "--json", *FAST)
    assert again.out.splitlines()[:-1] == lines, "skipped images are on stdout too"
    assert json.loads(again.out.splitlines()[-1])["images"] == {"ok": 0, "failed": 0, "skipped": 6, "ignored": 1}


def test_nothing_outside_the_output_no_network_no_child(machine: Inside) -> None:
    """An audit hook in the process itself ends it at the first connection or child process."""
    before = sorted(machine.home.rglob("*"))
    (hook := machine.home / "hook").mkdir()
    (hook / "sitecustomize.py").write_text((HERE / "forbid.py").read_text())
    hooked = {"PYTHONPATH": str(hook)}
    outcome = machine.alone("explain", "pics", "-m", "tiny.safetensors", "-o", "tree", *FAST, env=hooked)
    assert outcome.code == 0, outcome.err
    tree = machine.cwd / "tree"
    inside = {hook, tree, *hook.rglob("*"), *tree.rglob("*")}
    assert sorted(set(machine.home.rglob("*")) - inside) == before


def test_the_guard_of_the_test_above_works(machine: Inside) -> None:
    (hook := machine.home / "hook").mkdir()
    (hook / "sitecustomize.py").write_text((HERE / "forbid.py").read_text())
    code = "import subprocess; subprocess.run(['true'])"
    env = machine.env | {"PYTHONPATH": str(hook)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert done.returncode == 99


def test_reading_paths_and_records_needs_neither_torch_nor_opencv(detxai: Command) -> None:
    modules = ("detxai.inputs.sources", "detxai.review.listing", "detxai.run.merge")
    code = f"import sys, {', '.join(modules)}; sys.exit(str({{'torch', 'cv2'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=detxai.env, text=True)
    assert done.stderr == "set()\n"


def test_help_needs_no_torch_and_is_quick(detxai: Command) -> None:
    code = (
        "import sys; from detxai.cli.app import run; code = run(sys.argv[1:]);"
        "heavy = {'torch', 'ultralytics', 'cv2', 'numpy', 'PIL'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    for arguments in (["--help"], ["explain", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, env=detxai.env, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert detxai("--help").out.find("detxai explain samples/images") > 0
        seconds.append(time.perf_counter() - start)
    print(f"detxai --help: median {median(seconds):.2f} s of 5")
    assert median(seconds) < 1.5, "0.3 s on an idle machine"


STREAMS: dict[str, tuple[list[str], dict[int, str | None], int]] = {
    "stderr full": (["explain"], {2: "/dev/full"}, 0),
    "stderr closed": (["explain"], {2: None}, 0),
    "stdout full, and asked for": (["explain", "--json"], {1: "/dev/full"}, 6),
    "stdout and stderr closed": (["explain", "--json"], {1: None, 2: None}, 6),
    "stdin closed": (["explain", "-"], {0: None}, 4),
    "a schema on a full disk": (["schema"], {1: "/dev/full"}, 6),
    "help for nobody": (["--help"], {1: None}, 6),
}


QUICK_STREAMS = ("stdout full, and asked for", "help for nobody")


@pytest.mark.parametrize(
    "case", [case if case in QUICK_STREAMS else pytest.param(case, marks=pytest.mark.slow) for case in STREAMS]
)
def test_streams_that_fail(machine: Inside, case: str) -> None:
    """Talking never stops the work; what was asked for on stdout is an error, and the tree is whole all the same."""
    (name, *more), redirected, code = STREAMS[case]
    line = [name, *more]
    if name == "explain":
        line += [*([] if "-" in more else ["pics"]), "-m", "tiny.safetensors", "-o", "tree", *FAST]

    def redirect() -> None:
        for number, target in redirected.items():
            os.close(number)
            if target is not None:
                assert os.open(target, os.O_WRONLY) == number

    running = machine.start(*line, preexec_fn=redirect)
    _, err = running.communicate()
    assert running.returncode == code, err
    assert b"Traceback" not in err
    tree = machine.cwd / "tree"
    if name == "explain" and code != 4:
        summary = json.loads((tree / "summary.json").read_text())
        assert summary["exit_code"] == code
        written = [f for f in tree.rglob("*.json") if f.name != "summary.json"]
        assert summary["images"]["ok"] == len(written) == len((tree / "records.jsonl").read_text().splitlines()) > 0
        assert not list(tree.rglob(".*.tmp"))


def test_terminals_get_no_control_characters(inside: Inside) -> None:
    file = inside.cwd / "\x1b[31mred [/x].png"
    file.parent.mkdir()
    file.write_text("no picture")
    outcome = inside("explain", ".", "-o", "tree", "--method", "ig")
    assert outcome.code == 3
    assert "\x1b" not in outcome.err
    assert "\\x1b[31mred [/x].png" in outcome.err


def test_no_temporary_folder_is_left(detxai: Command) -> None:
    """None is there once all is imported, so that no kill can leave it; what a kill left before is cleared."""
    place = Path(detxai.env["TMPDIR"])
    (place / "detxai-old").mkdir()
    (place / "detxai-new").mkdir()
    os.utime(place / "detxai-old", (0, 0))
    code = "import detxai.models.upstream, os; print(sorted(os.listdir(os.environ['TMPDIR'])))"
    done = subprocess.run([sys.executable, "-c", code], env=detxai.env, capture_output=True, text=True)
    assert done.stdout == "['detxai-new']\n", done.stderr


def test_version_names_what_decides_a_result(detxai: Command) -> None:
    out = detxai("--version").out
    for name in ("detxai", "torch", "ultralytics", "record"):
        assert re.search(rf"^{name} \S+", out, re.MULTILINE), out
    assert "CUDA" in out
    code = "import sys; from detxai.cli.app import run; run(['--version']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=detxai.env, capture_output=True).returncode == 0


def test_a_missing_package_is_no_bug(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says how to install it: where nothing is there, and where one that is imported late is not."""
    bare = [sys.executable, "-S", "-m", "detxai", "--help"]  # without site-packages
    done = subprocess.run(bare, env=inside.env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert f"'typer'. Install it with all that it needs: {sys.executable} -m pip install {ROOT}" in done.stderr
    monkeypatch.delitem(sys.modules, "detxai.review.report", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    (inside.cwd / "tree").mkdir()
    outcome = inside("report", "tree")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert "jinja2" in outcome.err and "pip install" in outcome.err
    monkeypatch.setitem(sys.modules, "detxai.review.report", None)
    assert inside("report", "tree").code == 1, "a module of ours that is missing is a bug"


def test_settings_are_shown_and_checked(inside: Inside) -> None:
    shown = inside("config", "show", "--conf", "0.3", "--set", "attribution.as_class=[no]")
    assert (shown.code, shown.err) == (0, "")
    assert "  conf: 0.3\n" in shown.out
    (inside.cwd / "good.yaml").write_text(shown.out)
    (inside.cwd / "bad.yaml").write_text("detection: {cnf: 0.3}\n")
    outcome = inside("config", "check", "good.yaml", "bad.yaml")
    assert (outcome.code, outcome.out) == (2, "good.yaml: ok\n")
    assert "did you mean 'detection.conf'" in outcome.err


@pytest.mark.parametrize("line", ["", "calibrate", "config"])
def test_without_a_command_the_help_is_all(inside: Inside, line: str) -> None:
    outcome = inside(*line.split())
    assert (outcome.code, outcome.err) == (2, "")
    assert "Usage: detxai" in outcome.out


def test_the_manual_has_every_option(inside: Inside) -> None:
    page = inside("man").out
    assert page.startswith(".TH DETXAI 1")
    assert ".B detxai explain\n[OPTIONS] SOURCE...\n" in page
    assert all(row.flag.replace("-", "\\-") in page for row in ROWS)
    assert all(f".B {int(code)}\n" in page for code in ExitCode)


@pytest.mark.parametrize("kind", ["record", "summary", "config"])
def test_schemas_on_stdout(inside: Inside, kind: str) -> None:
    found = json.loads(inside("schema", kind).out)
    jsonschema.Draft202012Validator.check_schema(found)
    assert found["properties"]


def test_paths_on_stdin(machine: Inside) -> None:
    line = ("explain", "-", "-m", "tiny.safetensors", "--json", "--no-overlays", *FAST)
    lines = machine(*line, "-o", "one", stdin=b"pics/a.png\n./pics/deeper/d.bmp\npics/none.png\n")
    nul = machine(*line, "-0", "-o", "two", stdin=b"pics/a.png\0pics/deeper/d.bmp\0pics/none.png")
    assert (lines.code, nul.code) == (3, 3), lines.err
    assert files(machine.cwd / "one") == files(machine.cwd / "two")
    found = [json.loads(text) for text in nul.out.splitlines()[:-1]]
    assert [r["image"]["path"] for r in found] == ["pics/a.png", "pics/deeper/d.bmp", "pics/none.png"]
    assert [r["status"] for r in found] == ["ok", "ok", "failed"]
    assert found[2]["error"]["code"] == "not_found"


def test_a_failed_image_is_tried_again(machine: Inside, pictures: Path) -> None:
    damaged = machine.cwd / "mixed" / "x.png"
    damaged.parent.mkdir()
    damaged.write_bytes((pictures / "a.png").read_bytes()[:500])
    line = ("explain", "mixed", "-m", "tiny.safetensors", "-o", "tree", *FAST)
    first = machine(*line)
    assert first.code == 3
    assert "x.png" in first.err
    assert records.load((machine.cwd / "tree" / "x.png.json").read_bytes()).status == "failed"
    damaged.write_bytes((pictures / "a.png").read_bytes())
    assert machine(*line).code == 0
    assert records.load((machine.cwd / "tree" / "x.png.json").read_bytes()).status == "ok"


def test_failures_stop_a_run_where_asked(machine: Inside) -> None:
    (machine.cwd / "bad").mkdir()
    for number in range(60):
        (machine.cwd / "bad" / f"{number:02d}.png").write_text("no picture")
    outcome = machine("explain", "bad", "-m", "tiny.safetensors", "-o", "tree", "--max-failures", 3, "--json")
    assert outcome.code == 3
    assert len(outcome.out.splitlines()) == 4
    assert "--max-failures" in outcome.err


def test_a_dry_run_writes_nothing(machine: Inside) -> None:
    (machine.cwd / "bad.png").write_text("no picture")
    before = sorted(machine.home.rglob("*"))
    outcome = machine("explain", "pics", "bad.png", "--dry-run")
    assert outcome.code == 0
    assert outcome.err.count("would explain ") == 7
    assert "would fail on bad.png: none of the formats" in outcome.err
    assert "would explain 6, skip 0, fail on 1; 1 other files" in outcome.err
    assert sorted(machine.home.rglob("*")) == before


def test_quiet_and_json_log(machine: Inside) -> None:
    line = ("explain", "pics", "-m", "tiny.safetensors", "--no-overlays", *FAST)
    assert machine(*line, "-q", "-o", "quiet").err == ""
    said = machine(*line, "--log-format", "json", "-o", "log").err
    assert {json.loads(text)["level"] for text in said.splitlines()} <= {"info", "warning", "error"}
    assert "\x1b" in machine(*line, "--color", "always", "--max-seconds", "0.01", "--force", "-o", "log").err
    for words in (["nowhere"], ["pics", "--conf", "2"], ["--bath"]):
        refused = json.loads(machine("explain", *words, "--log-format", "json").err)
        assert (refused["level"], refused["code"], refused["path"]) == ("error", "usage", None)
        assert datetime.fromisoformat(refused["time"]).tzinfo is not None
    told = machine(*line, "-v", "--force", "-o", "log").err
    assert re.search(r"^deeper/c.webp: \d+ box(es)? \(", told, re.MULTILINE)


def test_every_option_has_a_key_and_every_key_an_option() -> None:
    from typer.main import get_command

    from detxai.cli.app import app

    explain: Any = get_command(app).commands["explain"]  # type: ignore[attr-defined]
    flags = {flag for parameter in explain.params for flag in parameter.opts if flag.startswith("--")}
    names = {flag.removeprefix("--").replace("-", "_") for flag in flags}
    # Where settings come from, how stdin is read, and shorthands for values of an option.
    beside = {"config", "set", "null"} | {
        flag.removeprefix("--").replace("-", "_")
        for row in ROWS
        for short in row.shorthands
        for flag in short.flags
        if flag.startswith("--")
    }
    assert names - beside == set(settings.OPTIONS)
    keys = {f"{name}.{f.alias or key}" for name, of in settings.SECTIONS.items() for key, f in of.model_fields.items()}
    assert keys == set(settings.DESCRIPTIONS), "rows of the table and fields of the settings"


def test_options_beat_the_environment(machine: Inside) -> None:
    outcome = machine(
        *("explain", "pics", "-m", "tiny.safetensors", "--conf", "1", "--json", "-o", "tree"),
        env={"DETXAI_CONF": "0.1", "DETXAI_OVERLAYS": "0"},
    )
    settings = json.loads(outcome.out.splitlines()[-1])["config"]
    assert settings["detection"]["conf"] == 1
    assert settings["output"]["overlays"] == "none"
    assert machine("explain", "pics", env={"DETXAI_CNF": "1"}).code == 2


def test_convert_and_doctor(machine: Inside) -> None:
    outcome = machine("convert", "tiny.safetensors", "again.safetensors")
    assert outcome.code == 0, outcome.err
    assert (machine.cwd / "again.safetensors").stat().st_size > 1e6
    told = machine("doctor", "-m", "again.safetensors", "-m", "text.pt")
    assert told.code == 5
    assert "input gradient" in told.out
    assert "not a torch checkpoint" in told.out
    assert machine("convert", "tiny.safetensors", "again.pt").code == 2
    told = machine("doctor", "again.safetensors", "text.pt", "--json")
    first, second = json.loads(told.out)["models"]
    assert (told.code, told.err) == (5, "")
    assert "input gradient" in first and "not a torch checkpoint" in second["cannot be explained"]


def test_the_module_is_the_command(detxai: Command) -> None:
    script = Path(sys.executable).with_name("detxai")
    if not script.exists():
        pytest.skip("detxai is not installed here")
    done = subprocess.run([script, "--help"], capture_output=True, env=detxai.env, cwd=ROOT, text=True)
    assert done.stdout == detxai("--help").out


@pytest.mark.slow
def test_without_a_temporary_folder_and_a_home_there_is_a_way_on(tmp_path: Path) -> None:
    """A file system that is read only, in a container without variables."""
    code = (
        "import sys, tempfile\n"
        "def none(*_, **__): raise FileNotFoundError(2, 'No usable temporary directory found')\n"
        "tempfile.mkdtemp = tempfile.gettempdir = none\n"
        "from detxai.cli.app import run\n"
        "sys.exit(run(['explain', sys.argv[1], '-o', sys.argv[2]]))"
    )
    line = [sys.executable, "-c", code, str(SAMPLES / "bag-01.jpg"), str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 6, done.stderr
    assert "TMPDIR=" in done.stderr

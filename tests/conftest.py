"""What the tests of the whole command share: a tiny real detector, small real pictures, the command itself."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Tiny networks are quickest on one thread; torch reads this when it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
from PIL import Image

#: A law holds on a busy machine too.
hypothesis.settings.register_profile("detxai", deadline=None)
hypothesis.settings.load_profile("detxai")

ROOT = Path(__file__).parents[1]
#: Data and weights that are not part of the project; tests of them skip where they are absent.
SHARED = ROOT.parent / "shared"
SAMPLES = ROOT / "samples" / "images"
#: Side of the tiny detector's input.
SIDE = 64
#: Options for runs in which the attribution only has to be real, not good.
FAST = ("--max-det", "2", "--tolerance", "0.2", "--max-evaluations", "24")


def needs(*paths: Path) -> pytest.MarkDecorator:
    """Skip where one of `paths` is absent."""
    absent = [path.name for path in paths if not path.exists()]
    return pytest.mark.skipif(bool(absent), reason=f"needs {', '.join(absent)}, which is not here")


def pixels(name: str, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """(height, width, 3) uint8: a sample picture, shrunk to `size` (width, height)."""
    with Image.open(SAMPLES / name) as image:
        return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX))


def seeded_network(yaml: str, side: int = SIDE, classes: int = 3, spread: float = 2.0) -> Any:
    """An ultralytics network with seeded weights that reports a few boxes on the samples.

    Untouched random weights output constants. BatchNorm statistics of real pictures make the logits move, and a lift
    of the class biases brings the best few over the threshold. `spread`: of the logits.
    """
    import torch

    from detxai.models import checkpoints, upstream

    torch.manual_seed(5)
    architecture = upstream.ultralytics.nn.tasks.yaml_model_load(yaml)
    network: Any = checkpoints.build(architecture, {i: f"thing {i}" for i in range(classes)})
    seen = np.stack([pixels(f"bag-{n:02d}.jpg", (side, side)) for n in range(1, 9)])
    x = torch.from_numpy(seen).permute(0, 3, 1, 2).float() / 255
    stripe = torch.zeros(side, 1)
    stripe[side // 4 : -side // 4] = 1  # the padding of pictures that are not square
    norms = [part for part in network.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    head = network.model[-1]
    with torch.no_grad():
        network.train()(torch.cat([x, x * 0.5 + 0.5, x.flip(-1) * 0.3, x * stripe + 0.45 * (1 - stripe)]))
        network.eval()
        for branch in head.cv3:
            branch[-1].weight.mul_(spread)
            branch[-1].bias.zero_()
        for branch in head.cv2:  # small boxes
            branch[-1].bias.copy_(-0.5 * torch.arange(head.reg_max).repeat(4))
        strongest = network(torch.cat([x, x * stripe + 0.45 * (1 - stripe)]))[1]["scores"].amax((1, 2))
        lift = -0.3 - float(strongest.quantile(0.3))
        for branch in head.cv3:
            branch[-1].bias.add_(lift)
    for norm in norms:
        norm.momentum = 0.03
    return network


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YOLOv8n of 64 pixels with seeded weights, as `detxai convert` would write it."""
    from detxai.models import checkpoints
    from detxai.values import Checkpoint

    network = seeded_network("yolov8n.yaml")
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    checkpoints.save(Checkpoint("tiny.pt", "", "ultralytics", network, "yolov8", network.names, SIDE), path)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six small pictures of several kinds, a file that is no picture, and one that is cut short."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "deeper").mkdir()
    sizes = {"a.png": (120, 90), "b.jpg": (80, 130), "b.png": (96, 96)}
    sizes |= {"deeper/c.webp": (150, 60), "deeper/d.bmp": (64, 64)}
    for number, (name, size) in enumerate(sizes.items(), 1):
        Image.fromarray(pixels(f"bag-{number:02d}.jpg", size)).save(folder / name)
    Image.fromarray(pixels("bag-07.jpg", (110, 110))).convert("L").save(folder / "gray one.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@dataclass
class Command:
    """The real command in a process of its own, in a home that has never seen it."""

    home: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kept = ("PATH", "PYTHONPATH", "LANG", "LD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV")
        self.env = {name: os.environ[name] for name in kept if name in os.environ} | self.env
        for name in ("home", "tmp", "config", "cache", "data", "work"):
            (self.home / name).mkdir(parents=True, exist_ok=True)
        self.env |= {
            "HOME": str(self.home / "home"),
            "TMPDIR": str(self.home / "tmp"),
            "XDG_CONFIG_HOME": str(self.home / "config"),
            "XDG_CACHE_HOME": str(self.home / "cache"),
            "XDG_DATA_HOME": str(self.home / "data"),
            "OMP_NUM_THREADS": "1",
        }

    @property
    def cwd(self) -> Path:
        return self.home / "work"

    def start(self, *arguments: object, **more: Any) -> subprocess.Popen[bytes]:
        """The running command, its stdout and stderr as pipes."""
        line = [sys.executable, "-m", "detxai", *map(str, arguments)]
        more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": self.cwd, "env": self.env} | more
        return subprocess.Popen(line, **more)

    def __call__(self, *arguments: object, stdin: bytes = b"", env: dict[str, str] | None = None) -> Outcome:
        """Run the command to its end; no traceback may come of it."""
        line = [sys.executable, "-m", "detxai", *map(str, arguments)]
        env = self.env | (env or {})
        done = subprocess.run(line, input=stdin, capture_output=True, cwd=self.cwd, env=env, check=False)
        outcome = Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert "Traceback" not in outcome.err, outcome.err
        return outcome


@dataclass
class Inside(Command):
    """The same command in this process, its file descriptors captured: quicker, where a process shows no more."""

    patch: pytest.MonkeyPatch = field(kw_only=True)
    captured: pytest.CaptureFixture[str] = field(kw_only=True)

    #: In a process of its own after all.
    alone = Command.__call__

    def __call__(self, *arguments: object, stdin: bytes = b"", env: dict[str, str] | None = None) -> Outcome:
        """Run the command to its end; no traceback may come of it."""
        from detxai.cli.app import run

        self.captured.readouterr()
        with self.patch.context() as patch:
            patch.chdir(self.cwd)
            for name, value in (self.env | (env or {})).items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            code = run([*map(str, arguments)])
        outcome = Outcome(code, *self.captured.readouterr())
        assert "Traceback" not in outcome.err, outcome.err
        return outcome


@dataclass(frozen=True)
class Outcome:
    """How the command ended and what it said."""

    code: int
    out: str
    err: str


@pytest.fixture
def detxai(tmp_path: Path) -> Command:
    return Command(tmp_path / "machine")


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Inside:
    return Inside(tmp_path / "machine", patch=monkeypatch, captured=capfd)


def files(root: Path) -> dict[str, bytes]:
    """The tree below `root` without what may change: the summary and dot-files."""
    return {
        str(file.relative_to(root)): file.read_bytes()
        for file in sorted(root.rglob("*"))
        if file.is_file() and file.name != "summary.json" and not file.name.startswith(".")
    }


def explain(*arguments: object) -> int:
    """The exit code of `detxai explain` in this process: for laws about results, which need no process of their own."""
    from detxai.cli.app import run

    return run(["explain", *map(str, arguments), "-q"])


@pytest.fixture(scope="session")
def finished(tiny: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """An output tree of all pictures with maps, made once; each call gives a copy."""
    tree = tmp_path_factory.mktemp("finished") / "tree"
    assert explain(pictures, "-m", tiny, "-o", tree, "--maps", "npz", *FAST) == 0
    return lambda: shutil.copytree(tree, tmp_path_factory.mktemp("copy") / "tree")

"""The house stands as designed: arrows go one way, types hold, and nothing comes without its licence or its bounds."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from conftest import ROOT

from detxai import __version__

MACHINE_PATHS = re.compile(rb"(?<![\w/.])/(?:work|opt|root|home)/\w")


def check(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_imports_keep_to_the_contracts() -> None:
    pytest.importorskip("importlinter")
    check("-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache")


def test_types_hold() -> None:
    pytest.importorskip("mypy")
    check("-m", "mypy")


def test_style() -> None:
    pytest.importorskip("ruff")
    check("-m", "ruff", "check", "--no-cache", ".")


def test_rooms_are_of_a_size_to_live_in() -> None:
    """A warning before a file needs a second job: 120 to 300 lines are meant, more is for tables of options."""
    long = {p.name: n for p in (ROOT / "detxai").rglob("*.py") if (n := len(p.read_text().splitlines())) > 560}
    assert not long


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [ROOT / name.decode() for name in listed.split(b"\0") if name]


def test_the_top_level_is_fixed() -> None:
    named = {p.relative_to(ROOT).parts[0] for p in tracked()}
    assert {name for name in named if not name.startswith(".")} == {
        *("pyproject.toml", "README.md", "LICENSE"),
        *("detxai", "configs", "tests", "scripts", "samples"),
    }


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    texts = [p for p in tracked() if p.suffix in (".py", ".md", ".toml", ".yaml", ".txt", "") and p.is_file()]
    guilty = [p.name for p in texts if MACHINE_PATHS.search(p.read_bytes())]
    assert len(texts) > 40
    assert not guilty


def test_the_package_knows_its_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_one_opencv_and_it_needs_no_screen() -> None:
    """Slim containers have no libGL: the window-less build must be the only one."""
    found = {d.metadata["Name"].lower() for d in distributions() if d.metadata["Name"].lower().startswith("opencv")}
    windowed = found & {"opencv-python", "opencv-contrib-python"}
    if windowed:
        pytest.skip(f"{windowed.pop()} was installed here by something else than detxai")
    assert found == {"opencv-python-headless"}
    import cv2

    libraries = [p.read_bytes() for p in Path(cv2.__file__).parent.glob("*.so")]
    assert libraries
    assert not any(name in data for data in libraries for name in (b"libGL.so", b"libxcb.so", b"libX11.so"))

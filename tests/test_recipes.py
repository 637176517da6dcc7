"""Every command that README, recipes, crontab and workflow show runs as it stands.

In a folder with `scans/`, `labels/` and two models.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, SIDE, pixels, seeded_network
from PIL import Image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("jq") is None or shutil.which("bash") is None, reason="needs bash and jq"),
]
#: Blocks that set a machine up: CI runs those of the README itself.
SETUP = ("pip ", "scripts/check")
#: So that a recipe is quick here; options of its own beat these.
QUICK = {"DETXAI_MAX_DET": "1", "DETXAI_TOLERANCE": "0.5", "DETXAI_MAX_EVALUATIONS": "16", "DETXAI_METHOD": "ig"}


def recipes() -> list[str]:
    """The blocks of shell commands, the crontab's command without its schedule, the steps of the workflow."""
    texts = []
    for file in (ROOT / "README.md", ROOT / "configs" / "README.md"):
        texts += re.findall(r"^```sh\n(.*?)^```", file.read_text(encoding="utf-8"), re.M | re.S)
    crontab = (ROOT / "configs" / "detxai.cron").read_text(encoding="utf-8")
    texts += re.findall(r"^(?:[\d*/,-]+ ){5} *cd \S+ && (.*)$", crontab, re.M)
    steps = yaml.safe_load((ROOT / "configs" / "github-actions.yml").read_text(encoding="utf-8"))["jobs"]["explain"][
        "steps"
    ]
    # the gate itself may fail the job
    commands = [re.sub("(--fail-on .*)", r"\1 || [ $? = 10 ]", step["run"]) for step in steps if "run" in step]
    texts.append("\n".join(text for text in commands if "pip " not in text))
    return [text for text in texts if not any(word in text for word in SETUP)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small pictures, labels of one, a checkpoint, the configs, and `detxai` on the PATH."""
    here = tmp_path_factory.mktemp("recipes")
    for name in ("scans", "labels", "bin"):
        (here / name).mkdir()
    for number, name in enumerate(("a", "b", "c"), 1):
        Image.fromarray(pixels(f"bag-{number:02d}.jpg", (90, 80))).save(here / "scans" / f"{name}.png")
    (here / "energies").mkdir()
    for name in ("low", "high"):
        deep = pixels("bag-01.jpg", (90, 80))[..., 0].astype(np.uint16) * 190
        Image.fromarray(deep).save(here / "energies" / f"a_{name}.png")
    (here / "labels" / "a.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    network = seeded_network("yolov8n.yaml")
    for name in ("best.pt", "new.pt"):
        torch.save({"model": network, "train_args": {"imgsz": SIDE}}, here / name)
    shutil.copytree(ROOT / "configs", here / "configs")
    shutil.copytree(here / "scans", here / "samples" / "images")
    command = here / "bin" / "detxai"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m detxai "$@"\n')
    command.chmod(0o755)
    return here


@pytest.mark.parametrize("recipe", recipes(), ids=lambda text: re.sub(r"\W+", " ", text)[:60])
def test_a_recipe_runs_as_it_stands(folder: Path, recipe: str) -> None:
    environment = os.environ | QUICK | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", recipe],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    if "jq" in recipe:
        assert "null" not in done.stdout, "jq asks for a field that is not there"

"""What `configs/` has for many machines: parsed, and run as far as one can, with a `detxai` that tells what it got."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import FAST, ROOT, Command, explain, files
from typer.main import get_command

from detxai.cli.app import app

CONFIGS = ROOT / "configs"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def told(tmp_path: Path) -> Any:
    """Runs a command line; gives its exit code and what each `detxai` in it got, which the real one can parse."""
    (tmp_path / "detxai").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\nexit ${{CODE:-0}}\n')
    (tmp_path / "detxai").chmod(0o755)
    commands: Any = get_command(app).commands  # type: ignore[attr-defined]

    def run(*line: str, **environment: str) -> tuple[int, list[str]]:
        (tmp_path / "told").write_text("")
        environment = os.environ | environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        code = subprocess.run(line, env=environment, cwd=tmp_path, check=False, capture_output=True).returncode
        lines = sorted((tmp_path / "told").read_text().splitlines())
        for name, *arguments in map(shlex.split, lines):
            commands[name].make_context(name, arguments)
        return code, lines

    return run


def test_slurm_gives_each_task_its_shard(told: Any) -> None:
    task = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "16"}
    line = ("bash", str(CONFIGS / "slurm.sh"), "scans", "best.pt", "out")
    assert told(*line, **task) == (0, ["explain scans -m best.pt -o out/3 --shard 3/16 -q"])
    assert told(*line, **task, CODE="3")[0] == 3
    assert told(*line)[0] != 0


def test_shards_on_one_machine(told: Any) -> None:
    line = ("bash", str(CONFIGS / "parallel.sh"), "scans", "best.pt", "out", "3")
    shards = [f"explain scans -m best.pt -o out/{n} --shard {n}/3 -q" for n in (1, 2, 3)]
    assert told(*line) == (0, shards)
    assert told(*line, CODE="3") == (0, shards), "failed images keep no shard from being done"
    assert told(*line, CODE="6")[0] != 0


@pytest.mark.slow
def test_shards_on_one_machine_are_one_run(detxai: Command, tiny: Path, pictures: Path, tmp_path: Path) -> None:
    """The real command, by GNU parallel where it is there, else by xargs."""
    (bin_ := tmp_path / "bin").mkdir()
    (bin_ / "detxai").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m detxai "$@"\n')
    (bin_ / "detxai").chmod(0o755)
    told = {
        f"DETXAI_{name[2:].replace('-', '_').upper()}": value for name, value in zip(*[iter(FAST)] * 2, strict=True)
    }
    env = detxai.env | told | {"PATH": f"{bin_}:{detxai.env['PATH']}"}
    line = ["bash", str(CONFIGS / "parallel.sh"), str(pictures), str(tiny), str(tmp_path / "out"), "2"]
    subprocess.run(line, env=env, check=True)
    assert all((tmp_path / "out" / shard / "summary.json").is_file() for shard in ("1", "2"))
    assert detxai("merge", tmp_path / "out" / "1", tmp_path / "out" / "2", "-o", tmp_path / "whole").code == 0
    assert explain(pictures, "-m", tiny, "-o", tmp_path / "local", *FAST) == 0
    assert files(tmp_path / "whole") == files(tmp_path / "local")


def test_the_job_of_kubernetes_does_every_shard(told: Any) -> None:
    job = yaml.safe_load((CONFIGS / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    count = job["spec"]["completions"]
    for index in (0, count - 1):
        code, (line,) = told(*container["command"], *container["args"], JOB_COMPLETION_INDEX=str(index), CODE="3")
        assert code == 0
        assert line == f"explain /data/scans -m /data/best.pt -o /out/{index + 1} --shard {index + 1}/{count} -q"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in job["spec"]["template"]["spec"]["volumes"]}
    assert job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]


@pytest.mark.slow
def test_the_ray_cluster_is_one(told: Any) -> None:
    text = (CONFIGS / "ray-cluster.yaml").read_text()
    cluster = yaml.safe_load(text)
    assert cluster["max_workers"] == len(cluster["provider"]["worker_ips"])
    schema = pytest.importorskip("ray.autoscaler._private.util", reason="needs ray, which is not here")
    schema.validate_config(schema.prepare_config(cluster))
    command = re.search(r"detxai explain .*$", text, re.MULTILINE)
    assert command is not None
    assert told(*shlex.split(command[0]))[0] == 0


def test_the_image_is_built_from_the_project() -> None:
    text = (CONFIGS / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    words = [line.split()[0] for line in lines]
    known = {"ARG", "FROM", "RUN", "COPY", "USER", "ENV", "WORKDIR", "ENTRYPOINT"}
    assert set(words) <= known and words[:2] == ["ARG", "FROM"] and lines[1] == "FROM ${BASE}"
    extras = re.search(r"^ARG EXTRAS=(.*)$", text, re.MULTILINE)
    assert extras is not None
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{name} = \[", project, re.MULTILINE) for name in extras[1].split(","))
    assert "USER detxai" in lines, "not as root"
    copied = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    settings = tomllib.loads(project)
    needed = {settings["project"]["readme"], *settings["project"]["license-files"], "pyproject.toml"}
    assert copied == needed | set(settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    for line in lines:
        if line.startswith("RUN"):
            subprocess.run(["bash", "-n", "-c", line.removeprefix("RUN")], check=True)

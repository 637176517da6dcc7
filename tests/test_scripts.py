"""The scripts are told of where they lie, and their READMEs name no file or option that is not there."""

from __future__ import annotations

import re
import runpy
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = [ROOT / "scripts" / name for name in ("samples", "studies", "bench", "checks")]
READMES = [*(folder / "README.md" for folder in FOLDERS), ROOT / "samples" / "README.md"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_script_is_in_the_readme_beside_it(folder: Path) -> None:
    told = (folder / "README.md").read_text(encoding="utf-8")
    assert [script.name for script in sorted(folder.glob("*.py")) if f"`{script.name}`" not in told] == []


def commands(readme: Path) -> list[tuple[str, str]]:
    """(script, the rest of its line) of every `python scripts/…` in the blocks of a README."""
    blocks = re.findall(r"^```sh\n(.*?)^```", readme.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return re.findall(r"^python (scripts/\S+\.py)(.*)$", "\n".join(blocks).replace("\\\n", " "), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("readme", READMES, ids=lambda readme: readme.parent.name)
def test_every_command_names_options_that_its_script_has(
    readme: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @cache
    def options(script: str) -> set[str]:
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert left.value.code == 0
        return set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))

    found = commands(readme)
    assert found
    for script, rest in found:
        own = re.sub(r'"[^"]*"', "", rest.partition("#")[0])  # what is quoted is said to detxai
        assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", own)) <= options(script), (script, rest)

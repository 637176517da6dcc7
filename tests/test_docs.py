"""The READMEs are true: their commands parse, their tables are those of the code, their examples run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import ROOT, SAMPLES, explain
from typer.main import get_command

from detxai import vocabulary
from detxai.cli.app import app
from detxai.config import settings
from detxai.errors import PRECEDENCE, ExitCode
from detxai.evidence.verdict import DEFAULTS, RULES
from detxai.models import checkpoints
from detxai.output import json_schema

README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = (".github", "configs", "detxai", "samples", "scripts")
READMES = [ROOT / "README.md", *(file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.md")))]
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = {flag for command in COMMANDS.values() for p in command.params for flag in (*p.opts, *p.secondary_opts)}
OPTIONS |= {flag for command in COMMANDS["calibrate"].commands.values() for p in command.params for flag in p.opts}
OPTIONS |= {"--version", "--help", "--install-completion"}
#: Of pip, uv and docker.
FOREIGN = {"--rm", "--user", "--find-links", "--no-compile", "--no-index", "--no-cache-dir", "--torch-backend"}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def page(folder: str) -> str:
    """The README of a folder of the package."""
    return (ROOT / "detxai" / folder / "README.md").read_text(encoding="utf-8")


def test_the_readme_can_be_read() -> None:
    assert len(README.splitlines()) <= 300


def test_two_commands_set_everything_up_and_run() -> None:
    setup = "python3 -m venv .venv && .venv/bin/pip install"
    assert f"{setup} . && .venv/bin/detxai explain samples/images" in README.splitlines()
    assert f"{setup} '.[test]' && .venv/bin/python -m pytest" in README.splitlines()
    ci = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in ci, "CI runs the README's own command"
    assert "scripts/check style slow" in ci, "and then what else scripts/check does"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_the_table_of_fields_is_that_of_the_records() -> None:
    shown = re.search(r"<!-- fields -->\n(.*?)<!-- /fields -->", page("output"), re.DOTALL)
    assert shown
    assert shown[1] == json_schema.field_table(), "put there what `detxai schema record --format md` prints"


def test_the_table_of_exit_codes_is_that_of_the_errors() -> None:
    cells = re.findall(r"^\| ([\d, ]+) \|", section("Exit codes"), re.MULTILINE)
    shown = [int(code) for cell in cells for code in cell.split(",")]
    assert sorted(shown) == sorted(ExitCode)
    assert f"the first of {' '.join(map(str, PRECEDENCE))} wins" in README


def test_the_table_of_methods_is_complete() -> None:
    assert tuple(re.findall(r"^\| `([\w+]+)` \|", page("attribution"), re.MULTILINE)) == tuple(vocabulary.METHODS)


def test_the_table_of_rules_is_that_of_the_verdict() -> None:
    shown = re.findall(r"^\| `(\w+)` \| .* \| (\w+ -?[\d.]+) \| (\w+ -?[\d.]+) \|$", page("evidence"), re.MULTILINE)
    sides = {rule.measure: "above" if rule.high else "below" for rule in RULES}
    assert shown == [(name, *(f"{sides[name]} {limit:g}" for limit in limits)) for name, limits in DEFAULTS.items()]
    for told in (section("Read a verdict"), page("evidence").partition("<!-- rules -->")[0]):
        assert set(re.findall(r"^\| `(\w+)` \|", told, re.MULTILINE)) == set(vocabulary.VERDICTS)


@pytest.mark.parametrize("readme", READMES, ids=lambda file: str(file.parent.relative_to(ROOT)))
def test_every_command_parses_and_every_option_key_and_file_exists(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    lines = [line for block in blocks("sh", text) for line in block.replace("\\\n", " ").splitlines()]
    for found in (part for line in lines for part in re.findall(r"(?:^|[ |/])detxai (\w[^|#<>&;]*)", line)):
        name, *arguments = shlex.split(found)
        COMMANDS[name].make_context(name, arguments)
    if "scripts" not in readme.parts and ".github" not in readme.parts:  # scripts have options of their own
        own = re.sub(r"^python scripts/.*$", "", text, flags=re.MULTILINE)
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", own)) <= OPTIONS | FOREIGN
    keys = set(re.findall(rf"`?\b((?:{'|'.join(settings.SECTIONS)})\.[a-z_0-9]+)=", text))
    assert keys <= set(settings.DESCRIPTIONS)
    assert set(re.findall(r"\bDETXAI_[A-Z_]+(?==)", text)) <= set(settings.ENVIRONMENT)
    files = re.findall(r"(?:`|python )((?:configs|scripts|samples|detxai|tests)/[\w./-]+)", text)
    assert [file for file in files if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("readme", READMES, ids=lambda file: str(file.parent.relative_to(ROOT)))
def test_every_link_leads_somewhere_and_nothing_is_left_to_be_filled_in(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    assert not re.search(r"^(?:[A-Z]{4,}|TODO.*|TBD.*)$", text, re.MULTILINE)
    for file, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text)):
        target = (readme.parent / file).resolve() if file else readme
        assert target.exists(), file
        titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else ()
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}, anchor


def test_the_example_of_a_record_keeps_to_the_schema() -> None:
    example = json.loads(blocks("json")[0])
    schema = json_schema.schema("record")
    detection = {**schema["$defs"]["DetectionRecord"], "$defs": schema["$defs"]}
    attribution = schema["$defs"]["AttributionRecord"]
    for part in (detection, attribution):  # the example leaves fields out
        part.pop("required")
    jsonschema.validate(example, detection)
    assert set(example) <= set(detection["properties"])
    assert set(example["attributions"][0]) <= set(attribution["properties"])


@pytest.mark.skipif(not checkpoints.BUNDLED.exists(), reason="the bundled model is not built yet")
def test_the_example_of_a_record_is_what_the_command_writes(tmp_path: Path) -> None:
    """As far as machines agree: scores to 0.02, boxes to 2 pixels, the rest to a tenth."""
    assert explain(SAMPLES / "bag-01.jpg", "-o", tmp_path) == 0
    example = json.loads(blocks("json")[0])
    written = json.loads((tmp_path / "bag-01.jpg.json").read_bytes())["detections"][example["id"]]
    assert example["class_name"] == written["class_name"]
    assert example["score"] == pytest.approx(written["score"], abs=0.02)
    assert example["box"] == pytest.approx(written["box"], abs=2)
    (shown,), (found,) = example["attributions"], written["attributions"]
    for name in ("method", "target", "baseline", "converged", "overlay"):
        assert shown[name] == found[name]
    for name in ("value_at_input", "value_at_baseline", "sum", "net_inside", "inside_share"):
        assert shown[name] == pytest.approx(found[name], rel=0.1)


def test_the_python_example_runs(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").symlink_to(pictures)
    (example,) = blocks("python")
    example = example.replace("best.pt", str(tiny))
    example = example.replace("max_det=10", "max_det=1")
    exec(compile(example, "README.md", "exec"), {})
    assert "deeper/c.webp thing" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["scans"]


def test_every_key_of_the_default_config_is_explained() -> None:
    text = (ROOT / "configs" / "default.yaml").read_text(encoding="utf-8")
    assert text == settings.to_yaml()
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if re.match(r"  \w", line):
            assert lines[number - 1].lstrip().startswith("# "), line


def test_the_samples_say_how_they_were_made() -> None:
    readme = (ROOT / "samples" / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^python (scripts/\S+) (.*)$", readme, re.MULTILINE)
    assert (ROOT / line[0]).is_file()
    assert len(list((ROOT / "samples" / "images").iterdir())) == 12

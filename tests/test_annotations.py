"""What CI reads of a finished run: GitHub's commands, JUnit and SARIF, parsed; metrics; units and workflows."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import jsonschema
import pytest
from conftest import FAST, ROOT, explain
from make_tree import write
from typer.main import get_command

from detxai.cli.app import app, run
from detxai.output import records
from detxai.output.ranking import LOOK
from detxai.output.tree import Tree

#: A reason and a path that every format must escape.
ODD = "50 %:\n<a>, \x01"

#: The parts of the SARIF 2.1.0 schema that detxai writes; `required` and enumerations are those of the standard.
TEXT = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string", "minLength": 1}}}
LEVEL = {"enum": ["none", "note", "warning", "error"]}
PLACE = {"type": "object", "properties": {"physicalLocation": {"type": "object", "properties": {
    "artifactLocation": {"type": "object", "properties": {"uri": {"type": "string", "format": "uri-reference"}}},
    "region": {"type": "object", "properties": {"startLine": {"type": "integer", "minimum": 1}}},
}}}}  # fmt: skip
RULE = {"type": "object", "required": ["id"], "properties": {"id": {"type": "string"}, "shortDescription": TEXT}}
DRIVER = {"type": "object", "required": ["name"], "properties": {"rules": {"type": "array", "items": RULE}}}
RESULT = {"type": "object", "required": ["message"], "properties": {
    "ruleIndex": {"type": "integer", "minimum": -1}, "level": LEVEL, "message": TEXT,
    "locations": {"type": "array", "items": PLACE},
    "partialFingerprints": {"type": "object", "additionalProperties": {"type": "string"}},
}}  # fmt: skip
NOTIFICATION = {"type": "object", "required": ["message"], "properties": {"message": TEXT, "level": LEVEL}}
INVOCATION = {"type": "object", "required": ["executionSuccessful"], "properties": {
    "executionSuccessful": {"type": "boolean"},
    "toolExecutionNotifications": {"type": "array", "items": NOTIFICATION},
}}  # fmt: skip
RUN = {"type": "object", "required": ["tool"], "properties": {
    "tool": {"type": "object", "required": ["driver"], "properties": {"driver": DRIVER}},
    "results": {"type": "array", "items": RESULT},
    "invocations": {"type": "array", "items": INVOCATION},
}}  # fmt: skip
SARIF = {"type": "object", "required": ["version", "runs"], "properties": {
    "$schema": {"type": "string", "format": "uri"}, "version": {"const": "2.1.0"},
    "runs": {"type": "array", "items": RUN},
}}  # fmt: skip


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of 20 generated records, one of them failed, one with words that are hard to quote."""
    folder = tmp_path_factory.mktemp("night")
    write(folder, 20, seed=3)
    record = next(
        r for r in Tree(folder).read() for d in r.detections or () if d.evidence and d.evidence.verdict == "weak"
    )
    plain = json.loads(records.dump(record))
    for detection in plain["detections"]:
        detection["evidence"] |= {"reasons": [ODD], "verdict": "unsupported"}
    (folder / f"{record.image.path}.json").write_text(json.dumps(plain), encoding="utf-8")
    error = records.ErrorInfo(code="truncated", message="it ends, early")
    failed = records.Record(status="failed", image=records.ImageInfo(path="odd, #1.jpg"), error=error)
    (folder / "odd, #1.jpg.json").write_bytes(records.dump(failed))
    return folder


def annotated(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(["list", *map(str, arguments)]) == 0
    return capfd.readouterr().out


def looked_at(folder: Path, capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in annotated(capfd, folder, "--json").splitlines()]


def test_github_shows_a_line_a_finding(night: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wanted = looked_at(night, capfd)
    lines = annotated(capfd, night, "--annotate", "github", "--prefix", "scans/").splitlines()
    parsed = [re.fullmatch(r"::(error|warning|notice) file=([^,:]+),title=([^,:]+)::(.*)", line) for line in lines]
    assert all(parsed) and len(parsed) == len(wanted) + 1
    first, *rest = (match.groups() for match in parsed if match)
    assert first == ("error", "scans/odd%2C #1.jpg", "not explained", "it ends, early (truncated)")
    assert [unquote(path) for _, path, _, _ in rest] == [f"scans/{f['path']}" for f in wanted]
    assert {unquote(why) for *_, why in rest} >= {ODD}
    levels = ["error" if f["verdict"] == "unsupported" else "warning" for f in wanted]
    assert [level for level, *_ in rest] == levels and len(set(levels)) == 2


def test_junit_counts_what_it_holds(night: Path, capfd: pytest.CaptureFixture[str]) -> None:
    every = annotated(capfd, night, "--annotate", "junit", "--verdict", "all")
    suite = ElementTree.fromstring(every.encode())[0]
    cases = list(suite.iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None]
    assert suite.get("tests") == str(len(cases)) and suite.get("failures") == str(len(failed))
    wanted = looked_at(night, capfd)
    assert len(failed) == len(wanted) < len(cases)
    assert [case.get("classname") for case in failed] == [f["path"] for f in wanted]
    (broken,) = suite.iter("error")
    assert broken.get("type") == "truncated" and suite.get("errors") == "1"
    assert {f.get("message") for f in suite.iter("failure")} >= {ODD.replace("\x01", "\ufffd")}


def test_sarif_keeps_to_its_schema(night: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = json.loads(annotated(capfd, night, "--annotate", "sarif", "--limit", "5"))
    jsonschema.validate(log, SARIF, format_checker=jsonschema.FormatChecker())
    (shown,) = log["runs"]
    rules = [rule["id"] for rule in shown["tool"]["driver"]["rules"]]
    wanted = looked_at(night, capfd)[:5]
    assert [rules[r["ruleIndex"]] for r in shown["results"]] == [f["verdict"] for f in wanted]
    assert all(r["ruleId"] in LOOK and r["properties"]["reasons"] for r in shown["results"])
    marks = [r["partialFingerprints"]["box/v1"] for r in shown["results"]]
    assert len(set(marks)) == 5
    (invocation,) = shown["invocations"]
    (broken,) = invocation["toolExecutionNotifications"]
    assert not invocation["executionSuccessful"]
    place = broken["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert place == "odd%2C%20%231.jpg"


def test_what_is_all_right_is_valid_too(night: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = next(r for r in Tree(night).read() if r.detections)
    record = source.model_copy(update={"detections": ()})
    (tmp_path / f"{record.image.path}.json").parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / f"{record.image.path}.json").write_bytes(records.dump(record))
    assert annotated(capfd, tmp_path, "--annotate", "github") == ""
    assert ElementTree.fromstring(annotated(capfd, tmp_path, "--annotate", "junit"))[0].get("tests") == "0"
    log = json.loads(annotated(capfd, tmp_path, "--annotate", "sarif"))
    assert log["runs"][0]["results"] == [] and log["runs"][0]["invocations"][0]["executionSuccessful"]


def test_metrics_are_read_by_their_owner(
    tiny: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parser: Any = pytest.importorskip("prometheus_client.parser")
    (tmp_path / "scans").mkdir()
    shutil.copy(pictures / "a.png", tmp_path / "scans")
    (tmp_path / "scans" / "cut.png").write_bytes((pictures / "a.png").read_bytes()[:500])
    file = tmp_path / "node" / "detxai.prom"
    given = (tmp_path / "scans", "-m", tiny, "-o", tmp_path / "out", *FAST, "--metrics", file)
    before = time.time()
    assert explain(*given) == 3
    families = {f.name: f for f in parser.text_string_to_metric_families(file.read_text())}
    assert all(f.type == "gauge" and f.documentation for f in families.values())
    values = {(s.name, *s.labels.values()): s.value for f in families.values() for s in f.samples}
    summary = json.loads((tmp_path / "out" / "summary.json").read_bytes())
    assert values["detxai_images", "ok"] == values["detxai_images", "failed"] == 1
    assert values["detxai_failed_images", summary["failures"][0]["code"]] == 1
    boxes = sum(value for key, value in values.items() if key[0] == "detxai_detections")
    assert boxes == summary["detections"] > 0
    assert values["detxai_exit_code",] == 3
    assert before <= values["detxai_run_end_timestamp_seconds",] <= time.time()
    assert [path.name for path in file.parent.iterdir()] == [file.name], "no temporary stays"
    blocked = explain(*given[:-1], pictures / "a.png" / "x.prom")
    assert blocked == 6 and "file" in capfd.readouterr().err.lower()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_units_are_verified_by_systemd(tmp_path: Path) -> None:
    for name in ("detxai.service", "detxai.timer"):
        text = (ROOT / "configs" / name).read_text().replace("/usr/local/bin/detxai", sys.executable)
        (tmp_path / name).write_text(text)
    units = [str(tmp_path / name) for name in ("detxai.timer", "detxai.service")]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )
    assert (done.returncode, [line for line in done.stderr.splitlines() if "detxai." in line]) == (0, [])


def test_what_configs_start_are_commands_of_detxai() -> None:
    """Units, crontab and workflow: every detxai command in them parses; test_recipes runs what can be run."""
    for name in ("detxai.service", "detxai.cron", "github-actions.yml"):
        text = (ROOT / "configs" / name).read_text().replace("\\\n", " ")
        lines = re.findall(r"(?:^|[ /])detxai ((?:explain|list) [^|;>\n]*)", text, re.M)
        assert lines, name
        for line in lines:
            command, *arguments = shlex.split(line)
            get_command(app).commands[command].make_context(command, arguments)  # type: ignore[attr-defined]


def test_a_wrong_format_is_told(night: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["list", str(night), "--annotate", "sarf"]) == 2
    assert "Did you mean sarif?" in capfd.readouterr().err
    assert run(["list", str(night), "--annotate", "sarif", "--json"]) == 2

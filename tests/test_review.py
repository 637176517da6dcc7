"""The morning after: which boxes to look at, from trees that are whole, killed, mixed or full of odd names."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FAST, Command
from make_tree import write

from detxai.cli.app import run
from detxai.evidence import groups
from detxai.output import listing, ranking, records
from detxai.output.mixture import Mixture
from detxai.output.summary import ClassStatistics
from detxai.output.tree import Tree
from detxai.review.behaviour import behaviours
from detxai.review.listing import ordered
from detxai.run.console import Console
from detxai.run.explain import class_row


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of 120 generated records with small overlays, read only."""
    folder = tmp_path_factory.mktemp("night")
    write(folder, 120, seed=3, overlays=True)
    return folder


def change(file: Path, **values: Any) -> None:
    """Overwrite values of the first detection in a record's file."""
    record = json.loads(file.read_bytes())
    record["detections"][0] |= values
    file.write_text(json.dumps(record), encoding="utf-8")


def listed(capfd: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    assert run(["list", *map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def test_the_worst_comes_first(night: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = listed(capfd, night)
    assert len(found) > 10 and {f["kind"] for f in found} == {"detection"}
    order = [(ranking.VERDICTS.index(f["verdict"]), f["score"]) for f in found]
    assert order == sorted(order)
    assert {f["verdict"] for f in found} <= {"unsupported", "weak"}
    assert all(f["reasons"] and (night / f["overlay"]).is_file() for f in found)


def test_list_and_the_end_of_explain_agree(
    tiny: Path, pictures: Path, finished: Callable[[], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Of images done before as well; under -q the gate alone is named."""
    tree = finished()
    again = [
        str(pictures),
        "-m",
        str(tiny),
        "-o",
        str(tree),
        "--maps",
        "npz",
        *FAST,
        "--fail-on",
        ",".join(ranking.LOOK),
    ]
    assert run(["explain", *again]) == 10
    said = capfd.readouterr().err.splitlines()
    start = next(i for i, line in enumerate(said) if line.startswith("look at these first ("))
    assert run(["list", str(tree), "--limit", "20"]) == 0
    shown = capfd.readouterr().out.splitlines()
    assert shown == said[start + 1 : start + 1 + len(shown)] and shown
    assert run(["explain", *again, "--report", "-q"]) == 10
    assert (tree / "report.html").stat().st_size > 50_000
    (gate,) = capfd.readouterr().err.splitlines()
    path, number = shown[0].split()[:2]
    assert gate.startswith("error: gate: ") and f"(--fail-on): {path} {number}" in gate


def test_a_choice_is_kept_to(night: Path, capfd: pytest.CaptureFixture[str]) -> None:
    every = listed(capfd, night, "--verdict", "all", "--kind", "all")
    assert len(every) == sum(len(r.detections or ()) for r in Tree(night).read())
    knives = listed(capfd, night, "--verdict", "all", "--class", "knife", "--sort", "-outside_share", "--limit", "4")
    assert len(knives) == 4 and {f["class_name"] for f in knives} == {"knife"}
    shares = {
        (r.image.path, d.id): d.evidence.outside_share
        for r in Tree(night).read()
        for d in r.detections or ()
        if d.evidence and d.class_name == "knife"
    }
    assert [shares[f["path"], f["id"]] for f in knives] == sorted(shares.values(), reverse=True)[:4]  # type: ignore[type-var]
    assert run(["list", str(night), "--paths0", "--limit", "5"]) == 0
    paths = capfd.readouterr().out.split("\0")
    assert paths.pop() == "" and len(paths) == len(set(paths))
    assert paths[0] == listed(capfd, night)[0]["path"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--class", "knive"], 2, "Did you mean knife?"),
        (["--verdict", "bad"], 2, "unsupported, weak"),
        (["--kind", "mised"], 2, "Did you mean missed?"),
        (["--sort", "outside_shar"], 2, "Did you mean outside_share?"),
        (["--json", "--paths0"], 2, "one of them"),
    ],
)
def test_a_wrong_word_is_told(
    night: Path, arguments: list[str], code: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["list", str(night), *arguments]) == code
    assert said in capfd.readouterr().err


def test_a_killed_run_is_read_from_its_records(night: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No records.jsonl, no summary, a half-written temporary, a stranger's JSON, a tree within the tree."""
    tree = tmp_path / "killed"
    shutil.copytree(night, tree)
    (tree / ".detxai-0123456789abcdef.tmp").write_bytes(b'{"schema":"detx')
    (tree / "notes.json").write_text('{"mine": true}')
    (tree / "belt-1" / "empty.jpg.json").write_bytes(b"")
    whole = listed(capfd, tree)
    assert whole == listed(capfd, night)
    assert run(["list", str(tree)]) == 0
    assert "2 .json files" in capfd.readouterr().err
    assert run(["list", str(tmp_path)]) == 4, "records of a tree further down are not those of this one"
    assert run(["list", str(tmp_path / "absent")]) == 4
    assert "There is no output tree" in capfd.readouterr().err


def test_hostile_names_do_not_reach_the_terminal(
    night: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(night, tmp_path / "t")
    name = listed(capfd, night)[0]["path"]
    change(tmp_path / "t" / f"{name}.json", class_name="\x1b[31m[bold]knife\u202e", class_id=77, score=0.01)
    assert run(["list", str(tmp_path / "t"), "--class", "77", "--verdict", "all"]) == 0
    out = capfd.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and "\\x1b[31m[bold]knife\\u202e" in out


def test_a_reader_that_goes_away_is_no_bug(night: Path, detxai: Command) -> None:
    for arguments in (["list", night], ["list", night, "--json"], ["schema"]):
        with detxai.start(*arguments) as process:
            assert process.stdout is not None
            process.stdout.close()
            assert process.wait(60) == 141


def test_two_models_in_one_tree_are_told(night: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(night, tmp_path / "t")
    file = next(f for f in sorted((tmp_path / "t").rglob("*.json")) if json.loads(f.read_bytes()).get("model"))
    record = json.loads(file.read_bytes())
    record["model"] |= {"sha256": "1" * 64, "name": "other.pt"}
    file.write_text(json.dumps(record))
    assert run(["list", str(tmp_path / "t")]) == 0
    assert "boxes of 2 models" in (err := capfd.readouterr().err) and "other.pt (11111111) at 320 px" in err


def test_worst_keeps_the_worst_and_counts_the_rest(night: Path) -> None:
    every = [f for r in Tree(night).read() for f in ranking.findings(r)]
    worst = ranking.Worst(most=3)
    worst.add(every)
    look = sorted(filter(ranking.to_look_at, every), key=ranking.severity)
    assert worst.kept == look[:3] and worst.count == len(look) == worst.verdicts.total()


def test_lines_are_whole_and_on_a_narrow_terminal_two_or_more(night: Path) -> None:
    every = sorted((f for r in Tree(night).read() for f in ranking.findings(r)), key=ranking.severity)[:9]
    wide = [line.plain for line in listing.lines(every)]
    assert not any("\n" in line for line in wide)
    assert [line.plain for line in listing.lines(every, max(map(len, wide)))] == wide
    narrow = [line.plain for line in listing.lines(every, 80)]
    assert max(len(part) for line in narrow for part in line.split("\n")) <= 80
    assert [line.split() for line in narrow] == [line.split() for line in wide], "and nothing is cut"


def test_what_asks_for_another_look_comes_first_by_score_whatever_its_word_and_trust(night: Path) -> None:
    f = next(f for r in Tree(night).read() for f in ranking.findings(r))
    given = [("supported", 0.3, 0.1), ("weak", 0.4, 0.9), ("unsupported", 0.9, 0.1), ("unknown", 0.5, None)]
    made = [dataclasses.replace(f, verdict=word, score=score, trust=trust) for word, score, trust in given]
    assert [m.verdict for m in sorted(made, key=ranking.severity)] == ["weak", "unknown", "unsupported", "supported"]
    assert [m.verdict for m in ordered(made, "verdict")] == ["unsupported", "weak", "unknown", "supported"]


def test_a_nearly_reported_item_with_evidence_is_the_worst_candidate(night: Path) -> None:
    every = [f for r in Tree(night).read() for f in ranking.findings(r)]
    as_candidates = [ranking.Finding(**{**vars(f), "kind": "candidate"}) for f in every]
    first = min(as_candidates, key=ranking.severity)
    assert first.verdict == "supported" and first.score == max(f.score for f in every if f.verdict == "supported")


def test_a_planted_shortcut_is_a_group_of_its_own() -> None:
    rng = np.random.default_rng(0)
    usual, planted = rng.normal(0, 0.02, (2, 40, 8, 8))
    usual[:, 3, 3:5] += 1
    planted[:, 7, 0] += 1
    found = groups.vectors(np.concatenate([usual, planted[:10]]), np.zeros(50))
    members, clear = groups.groups(found)
    assert [sorted(m.tolist()) for m in members] == [list(range(40)), list(range(40, 50))] and clear > 0.8
    beside = groups.vectors(usual, np.repeat([0.0, 9.0], [30, 10]))  # a sticker next to the object
    assert [len(m) for m in groups.groups(beside)[0]] == [30, 10]


def test_noise_makes_no_groups() -> None:
    noise = groups.vectors(np.random.default_rng(1).normal(0, 1, (200, 8, 8)), np.zeros(200))
    members, clear = groups.groups(noise)
    assert [len(m) for m in members] == [200] and clear == 0
    assert [len(m) for m in groups.groups(noise[:5])[0]] == [5]


def test_the_silhouette_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(2)
    x = groups.vectors(rng.normal(0, 1, (60, 8, 8)), rng.normal(0, 1, 60))
    labels = np.repeat([0, 1, 2], 20)
    assert groups.silhouette(x, labels) == pytest.approx(metrics.silhouette_score(x, labels, metric="cosine"))


def test_behaviour_counts_what_the_records_say(night: Path) -> None:
    every = [f for r in Tree(night).read() for f in ranking.findings(r)]
    found = {b.class_name: b for b in behaviours(every)}
    knives = [f for f in every if f.class_name == "knife"]
    assert len(found["knife"].findings) == len(knives) == sum(len(g.boxes) for g in found["knife"].groups)
    grids = [np.asarray(f.detection.attributions[0].grid.values) for f in knives]
    np.testing.assert_allclose(found["knife"].mean, np.mean(grids, 0))
    np.testing.assert_allclose(found["knife"].spread, np.std(grids, 0, ddof=1))
    assert not set(found["knife"].typical) & set(found["knife"].odd)


def test_a_tree_of_two_models_says_so_from_the_start(
    finished: Callable[[], Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree, one = finished(), tmp_path / "one"
    one.mkdir()
    (one / "new.png").write_bytes((pictures / "a.png").read_bytes())
    line = [
        "explain",
        str(one),
        "--imgsz",
        "64",
        "--method",
        "grad",
        "--evidence",
        "none",
        "--max-det",
        "1",
        "--conf",
        "0.001",
    ]
    assert run([*line, "--no-overlays", "-o", str(tree)]) == 0
    said = capsys.readouterr().err
    assert said.index("holds records of tiny") < said.index("1 explained")
    mixed = json.loads((tree / "summary.json").read_bytes())["warnings"]
    assert [w for w in mixed if "boxes of 2 models" in w] and [w for w in mixed if "2 methods or settings" in w]
    assert "boxes of 2 models" in said
    lines = Mixture(), Mixture()
    for raw in (tree / "records.jsonl").read_bytes().splitlines():
        lines[0].add_line(raw)
        lines[1].add(records.load(raw))
    assert lines[0] == lines[1] and len(lines[0].models) == 2


def test_the_table_breaks_no_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    one = ClassStatistics(
        class_id=0, class_name="telescopic baton", detections=1200, mean_score=0.5, mean_inside_share=0.91,
        converged_share=1, verdicts={"supported": 1000, "weak": 150, "unsupported": 50}, true=900, false=300, missed=7,
    )  # fmt: skip
    row = class_row(one, judged=True, labelled=True)
    columns = ("class", "boxes", "mean score", "inside box", "converged", "verdicts", "by the labels")
    Console().table("title", columns, [row])
    assert "telescopic baton" in capsys.readouterr().err, "a log has no width"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    Console().table("title", columns, [row])
    words = set(re.sub(r"\x1b\[[0-9;]*m|[^ -~]", " ", capsys.readouterr().err).split())
    assert {word.strip(",") for cell in (*row, *columns) for word in cell.split()} <= {w.strip(",") for w in words}

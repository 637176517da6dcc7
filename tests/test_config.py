"""Configuration: precedence, refusals with a way on, fingerprints, shipped files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from detxai.config import settings
from detxai.config.fingerprint import fingerprint
from detxai.config.selectors import class_ids
from detxai.errors import UsageError

CONFIGS = Path(__file__).parent.parent / "configs"


def refusal(**arguments: Any) -> str:
    with pytest.raises(UsageError) as caught:
        settings.load(**arguments)
    return caught.value.message


def write(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_precedence_option_set_environment_file_default(tmp_path: Path) -> None:
    file = write(tmp_path, "detection: {conf: 0.1, iou: 0.1, max_det: 1, imgsz: 320}\nrun:\n")
    cfg = settings.load(
        file,
        ["detection.conf=0.3", "detection.iou=0.3"],
        {"DETXAI_CONF": "0.2", "DETXAI_IOU": "0.2", "DETXAI_MAX_DET": "2", "HOME": "x"},
        {"conf": 0.4, "iou": None, "classes": []},
    )
    assert (cfg.detection.conf, cfg.detection.iou) == (0.4, 0.3)
    assert (cfg.detection.max_det, cfg.detection.imgsz) == (2, 320)
    assert cfg.attribution.max_evaluations == 256


def test_config_file_from_the_environment(tmp_path: Path) -> None:
    file = write(tmp_path, "output: {dir: there}")
    assert settings.load(environ={"DETXAI_CONFIG": str(file)}).output.dir == Path("there")


def test_every_option_has_a_key_a_variable_and_a_description() -> None:
    assert set(settings.OPTIONS.values()) == set(settings.ENVIRONMENT.values())
    assert set(settings.OPTIONS.values()) == set(settings.DESCRIPTIONS)
    assert all(settings.DESCRIPTIONS.values())
    assert settings.ENVIRONMENT["DETXAI_MODEL"] == "model.path"
    assert settings.ENVIRONMENT["DETXAI_OUTPUT"] == "output.dir"


def test_values_as_people_type_them() -> None:
    cfg = settings.load(
        environ={"DETXAI_CLASSES": "0,knife", "DETXAI_OVERLAYS": "0"},
        options={
            "target": ["class,left", "class"],
            "as_class": ["gun, toy", "3"],
            "device": "1",
            "batch": "4",
            "window": "Percentile 1, 99",
            "shard": "01/4",
        },
    )
    assert cfg.detection.classes == (0, "knife")
    assert cfg.output.overlays == "none"
    assert cfg.attribution.target == ("class", "left")
    assert cfg.attribution.as_class == ("gun, toy", 3)
    assert (cfg.run.device, cfg.run.batch) == ("cuda:1", 4)
    assert cfg.images.window == "percentile 1,99"
    assert cfg.run.part == (1, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sets": ["detection.cnf=1"]}, ["detection.cnf", "detection.conf"]),
        ({"sets": ["conf=1"]}, ["'conf'", "detection.conf"]),
        ({"sets": ["detection.conf"]}, ["key.path=value"]),
        ({"sets": ["detection.conf=[1"]}, ["malformed YAML", "line 1"]),
        ({"environ": {"DETXAI_CONFF": "1"}}, ["DETXAI_CONFF", "DETXAI_CONF"]),
        ({"environ": {"DETXAI_CONF": "much"}}, ["DETXAI_CONF", "detection.conf", "much"]),
        ({"options": {"conf": 1.5}}, ["--conf", "less than or equal to 1"]),
        ({"options": {"method": ["igg"]}}, ["igg", "did you mean 'ig'", "known: ig"]),
        ({"options": {"target": ["box,centre"]}}, ["centre", "objectness"]),
        ({"options": {"baseline": "whit"}}, ["whit", "did you mean 'white'"]),
        ({"options": {"window": "9,3"}}, ["below the second"]),
        ({"options": {"shard": "5/4"}}, ["1 <= I <= N"]),
        ({"options": {"max_evaluations": True}}, ["must not be true or false"]),
        ({"options": {"max_seconds": float("nan")}}, ["--max-seconds"]),
        ({"options": {"window": "wide"}}, ["--window", "LOW,HIGH"]),
        ({"options": {"imgsz": "wide"}}, ["--imgsz", "ROWS,COLUMNS"]),
        ({"options": {"method": ""}}, ["--method", "at least one"]),
        ({"options": {"device": "tpu"}}, ["cuda:N"]),
        ({"options": {"band": "4,3"}}, ["--band", "one band", "or three"]),
        ({"sets": ["detection.classes={}"]}, ["detection.classes"]),
        ({"sets": ["images.window={}"]}, ["images.window"]),
        ({"sets": ["output.dir=3"]}, ["output.dir", "must be a folder or the address"]),
        ({"options": {"labels": "/dev/null"}}, ["--labels"]),
    ],
)
def test_refusals_name_the_key_and_the_way_on(arguments: Any, words: list[str]) -> None:
    message = refusal(**arguments)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert "pydantic" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("detection:\n  conf: 1\n bad", ["line 3", "malformed"]),
        ("detection:\n  conf: 1\n  conf: 2", ["line 3", "duplicate key 'conf'"]),
        ("detektion: {conf: 1}", ["'detektion'", "did you mean 'detection'"]),
        ("detection: {confidence: 1}", ["detection.confidence", "detection.conf"]),
        ("conf: 0.3", ["'conf'", "detection.conf"]),
        ("detection: 3", ["section"]),
        ("- 1", ["sections"]),
        ("detection: {conf: !!python/object:os.system x}", ["malformed"]),
        ("a: \x00", ["malformed"]),
        ("a: " + "[" * 100_000, ["nested too deeply"]),
        ("run: &a [*a]", ["line 1", "aliases", "*a"]),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", ["line 2", "aliases"]),
        ("run: {force: !!bool maybe}", ["malformed"]),
        ("run: {max_failures: !!int x}", ["malformed"]),
        ("? [1]\n: 2", ["malformed"]),
        ('model: {path: "a\\0b"}', ["model.path", "NUL"]),
        ("output: {dir: ''}", ["output.dir", "must not be empty"]),
        (f"detection: {{labels: {'x' * 4096}}}", ["too long"]),
        ("x" * 1_000_001, ["larger than"]),
    ],
)
def test_refused_files(tmp_path: Path, text: str, words: list[str]) -> None:
    message = refusal(config_file=write(tmp_path, text))
    assert all(word in message for word in [*words, "run.yaml"]), message


def test_words_that_yaml_takes_for_truth_are_names(tmp_path: Path) -> None:
    file = write(tmp_path, "detection: {classes: [no, on, true, 007]}\nrun: {force: yes}\noutput: {overlays: off}\n")
    cfg = settings.load(file)
    assert cfg.detection.classes == ("no", "on", "true", 7)
    assert (cfg.run.force, cfg.output.overlays, cfg.parchgrad.variance) == (True, "none", "on")
    assert settings.load(sets=["parchgrad.variance=off"]).parchgrad.variance == "off"


def test_classes_by_id_and_by_name() -> None:
    names = {0: "bag", 1: "12", 2: "bag", 3: "1", 4: "a, b", 5: "id:0"}

    def of(*wanted: int | str) -> list[int]:
        return class_ids(wanted, names, "--classes")

    assert of("bag") == [0, 2], "two classes of one name"
    assert of(2, "bag") == [2, 0]
    assert of("12", 12) == [1], "a name that is a number, and no id"
    assert of("a, b") == [4] and of("bag, 4") == [0, 2, 4]
    assert of("name:1") == [3] and of("id:1") == [1] and of("id:0") == [5]
    for wanted, words in ((1, "id:1 or name:1"), ("gun", "no class 'gun'"), ("id:9", "no class"), (9, "It has: bag")):
        with pytest.raises(UsageError, match=words):
            of(wanted)


def test_each_wrong_value_has_its_line(tmp_path: Path) -> None:
    file = write(tmp_path, "detection: {conf: x, iou: y}\n")
    assert len(refusal(config_file=file, options={"batch": "z"}).splitlines()) == 3


def test_absent_file_is_a_usage_error(tmp_path: Path) -> None:
    assert "No such file" in refusal(config_file=tmp_path / "none.yaml")
    assert "no regular file" in refusal(config_file=Path(os.devnull))


def test_wide_windows_keep_their_digits() -> None:
    assert settings.load(options={"window": "0.5,16777215"}).images.window == "0.5,16777215"


def test_fingerprint_follows_what_changes_files_and_nothing_else(tmp_path: Path) -> None:
    picture = tmp_path / "ground.png"
    picture.write_bytes(b"one")

    def of(**options: Any) -> str:
        return fingerprint(settings.load(options=options), "image", "model", "schema")

    plain = of()
    assert len(plain) == 64
    for same in (
        {"device": "cpu"},
        {"batch": 2},
        {"output": "elsewhere"},
        {"verbosity": 2},
        {"force": True},
        {"shard": "1/2"},
        {"max_failures": 3},
        {"model": None},
        {"json": True},
        {"strip": True, "overlays": "none"},
        {"scale": "common", "overlays": "none"},
        {"overlay_format": "jpg", "overlays": "none"},
    ):
        expected = of(overlays="none") if "overlays" in same else plain
        assert of(**same) == expected, same
    changed = [
        of(**options)
        for options in (
            {"conf": 0.3},
            {"classes": "1"},
            {"as_class": "1"},
            {"precision": "fp32"},
            {"maps": "npz"},
            {"overlays": "none"},
            {"overlays": "look"},
            {"strip": True},
            {"window": "full"},
            {"baseline": str(picture)},
            {"model": "other.pt"},
            {"band": "2"},
            {"views": "_top,_side"},
            {"scale": "common"},
            {"overlay_format": "jpg"},
            {"rect": True},
        )
    ]
    assert len({plain, *changed}) == len(changed) + 1
    before = of(baseline=str(picture))
    picture.write_bytes(b"two, and longer")
    assert of(baseline=str(picture)) != before
    cfg = settings.load()
    assert fingerprint(cfg, "other", "model", "schema") != plain
    assert fingerprint(cfg, "image", "other", "schema") != plain
    assert fingerprint(cfg, "image", "model", "other") != plain


def test_files_that_decide_pictures_count_by_their_bytes(tmp_path: Path) -> None:
    (grounds := tmp_path / "grounds").mkdir()
    for name in ("a", "b"):
        (grounds / name).write_bytes(name.encode())
    (layers := tmp_path / "layers").mkdir()
    for file in (tmp_path / "font.ttf", layers / "own.py"):
        file.write_bytes(b"one")

    def of(*more: Any, **options: Any) -> str:
        return fingerprint(settings.load(options=options), "image", "model", "schema", *more)

    counted = (
        {"baseline": str(grounds)},
        {"font": str(tmp_path / "font.ttf")},
        {"module_path": str(layers), "trust_pickle": True, "model": "a.pt"},
    )
    for options, file in zip(counted, (grounds / "b", tmp_path / "font.ttf", layers / "own.py"), strict=True):
        before = of(**options)
        file.write_bytes(b"two, and longer")
        assert of(**options) != before, options
    assert of(gradient="parchgrad-cls", parchgrad_alpha=0.01) != of(gradient="parchgrad-cls")
    assert of(parchgrad_alpha=0.01) == of(), "what ParchGrad does not use does not count"
    drawn, calibrated, fitted = of(["labels"]), of([], ["statistics"]), of([], [], "stretch")
    assert len({of(), drawn, calibrated, fitted}) == 4
    assert of([None]) == of()


def test_shipped_files_load_and_the_default_is_generated() -> None:
    text = (CONFIGS / "default.yaml").read_text(encoding="utf-8")
    assert text == settings.to_yaml(), "regenerate configs/default.yaml from config.to_yaml()"
    assert settings.load(CONFIGS / "default.yaml") == settings.RunConfig()
    assert settings.load(CONFIGS / "xray.yaml").attribution.baseline == "white"
    assert settings.load(CONFIGS / "ci.yaml").run.device == "cpu"


def test_yaml_round_trip(tmp_path: Path) -> None:
    cfg = settings.load(options={"conf": 0.125, "as_class": ["a, b", "2"], "window": "0,9", "json": 1})
    assert settings.load(write(tmp_path, settings.to_yaml(cfg))) == cfg


def test_schema_is_json_with_a_description_for_every_key() -> None:
    schema = json.loads(json.dumps(settings.schema()))
    for section in settings.SECTIONS.values():
        keys = schema["$defs"][section.__name__]["properties"]
        assert all("description" in key for key in keys.values())
    assert "json" in schema["$defs"]["BatchConfig"]["properties"]

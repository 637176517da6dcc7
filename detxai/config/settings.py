"""Types and bounds of every option; option > `--set` > `DETXAI_*` environment > YAML > default."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    DirectoryPath,
    Field,
    FilePath,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from detxai.config import files, parse
from detxai.config.options import OPTIONS as TABLE
from detxai.config.options import ROWS
from detxai.errors import UsageError
from detxai.text import without_secrets
from detxai.vocabulary import BASELINES, GRADIENTS, METHODS, TARGETS, VERDICTS


def _field(name: str, **checks: Any) -> Any:
    """The field of the option `name`: default and description from the table, and what values must keep to."""
    row = TABLE[name]
    return Field(default=row.default, description=row.about, **checks)


def _baseline(value: str) -> str:
    if value not in BASELINES and not Path(value).exists():
        known = ", ".join(BASELINES)
        raise ValueError(f"is neither a file, a folder nor one of {known}{parse.nearest(value, BASELINES)}")
    return value


def _plain_file(value: Path) -> Path:
    if value.exists() and not (value.is_file() or value.is_dir()):
        raise ValueError("is neither a file nor a folder")
    return value


Selectors = Annotated[tuple[int | str, ...], BeforeValidator(parse.selectors), AfterValidator(parse.distinct)]
Methods = Annotated[tuple[str, ...], BeforeValidator(parse.names), parse.known("method", tuple(METHODS))]
Targets = Annotated[tuple[str, ...], BeforeValidator(parse.names), parse.known("target", TARGETS)]
Gradients = Annotated[tuple[str, ...], BeforeValidator(parse.names), parse.known("gradient", GRADIENTS)]
Verdicts = Annotated[tuple[str, ...], BeforeValidator(parse.names), parse.known("verdict", VERDICTS, 0)]
Files = Annotated[tuple[FilePath, ...], BeforeValidator(parse.items), AfterValidator(parse.distinct)]


Side = Annotated[int, Field(ge=32, le=8192)]
Bands = Annotated[
    tuple[Annotated[int, Field(ge=1, le=512)], ...], BeforeValidator(parse.items), AfterValidator(parse.one_or_three)
]

#: Keys that were a plain yes or no in older configs, and take it still.
ONCE_SWITCHES = {"overlays"}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: Any) -> Any:
        """No `true` where a number or name belongs; `~` is the home folder in YAML too."""
        takes_bool = cls.model_fields[info.field_name].annotation is bool or info.field_name in ONCE_SWITCHES
        if isinstance(value, bool) and not takes_bool:
            raise ValueError("must not be true or false")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("must not hold a NUL")
        return os.path.expanduser(value) if isinstance(value, str) else value


class ModelConfig(_Section):
    """The detector."""

    path: str | None = _field("model", min_length=1)
    names: FilePath | None = _field("names")
    sha256: str | None = _field("sha256", pattern="^[0-9a-f]{64}$")
    trust_pickle: bool = _field("trust_pickle")
    module_path: DirectoryPath | None = _field("module_path")
    head: Literal["auto", "one2many", "one2one"] = _field("head")


class DetectionConfig(_Section):
    """What is detected: as in Ultralytics."""

    conf: float = _field("conf", ge=0, le=1)
    iou: float = _field("iou", ge=0, le=1)
    imgsz: Annotated[Side | tuple[Side, Side], BeforeValidator(parse.imgsz), AfterValidator(parse.square)] | None = (
        _field("imgsz")
    )
    rect: bool = _field("rect")
    letterbox: Literal["auto", "letterbox", "stretch", "darknet"] = _field("letterbox")
    max_det: int = _field("max_det", ge=1, le=100_000)
    classes: Selectors | None = _field("classes")
    candidates: float | None = _field("candidates", ge=0, le=1)
    predictions: Annotated[Path, AfterValidator(_plain_file)] | None = _field("predictions")
    predictions_base: int | None = _field("predictions_base", ge=0, le=1)
    labels: DirectoryPath | None = _field("labels")


class AttributionConfig(_Section):
    """What is explained, and how well."""

    method: Methods = _field("method")
    gradient: Gradients = _field("gradient")
    target: Targets = _field("target")
    as_class: Selectors = _field("as_class")
    baseline: Annotated[str, AfterValidator(_baseline)] = _field("baseline")
    layer: int | None = _field("layer", ge=0)
    tolerance: float = _field("tolerance", gt=0, le=1)
    map_tolerance: float | None = _field("map_tolerance", gt=0, le=1)
    max_evaluations: int = _field("max_evaluations", ge=2, le=1_000_000)
    evidence: Literal["none", "basic", "full"] = _field("evidence")
    calibration: Files = _field("calibration")


class ParchGradConfig(_Section):
    """ParchGrad: which channels of the gradient are kept, and how much the others are held back."""

    gamma: float = _field("parchgrad_gamma", gt=0, allow_inf_nan=True)
    variance: Literal["on", "off", "exact"] = _field("parchgrad_variance")
    alpha: float = _field("parchgrad_alpha", gt=0, lt=1)
    quantile: float | None = _field("parchgrad_quantile", gt=0, le=1)
    ratio: float = _field("parchgrad_ratio", gt=0, le=1)
    normality: float = _field("parchgrad_normality", gt=0, le=1)
    region: Literal["whole", "detection"] = _field("parchgrad_region")

    @model_validator(mode="before")
    @classmethod
    def _words(cls, values: Any) -> Any:
        """YAML reads `on` and `off` as truth values."""
        if isinstance(values, dict) and isinstance(values.get("variance"), bool):
            return values | {"variance": "on" if values["variance"] else "off"}
        return values

    @field_serializer("gamma", when_used="json")
    def _finite(self, gamma: float) -> float | str:
        """JSON knows no infinity."""
        return gamma if math.isfinite(gamma) else "inf"


class ImagesConfig(_Section):
    """How files become pictures."""

    window: Annotated[str, BeforeValidator(parse.window)] = _field("window")
    max_pixels: int = _field("max_pixels", ge=1)
    frames: Literal["first", "all"] = _field("frames")
    pair: Annotated[str, AfterValidator(parse.energies)] | None = _field("pair")
    energy_colors: Literal["materials", "channels"] = _field("energy_colors")
    views: Annotated[str, AfterValidator(parse.pair)] | None = _field("views")
    band: Bands | None = _field("band")

    @property
    def paired(self) -> tuple[str, str, str] | None:
        """(LOW, HIGH, colours) for dual energy, no HIGH where one file holds both; None without --pair."""
        low, _, high = (self.pair or "").partition(",")
        return (low, high, self.energy_colors) if self.pair else None

    @property
    def viewed(self) -> tuple[str, str] | None:
        """The names of both views; None without --views."""
        one, _, other = (self.views or "").partition(",")
        return (one, other) if self.views else None


class OutputConfig(_Section):
    """The output tree."""

    dir: Annotated[Path | str, BeforeValidator(parse.place)] = _field("output")
    overlays: Annotated[Literal["all", "look", "overview", "none"], BeforeValidator(parse.overlays)] = _field(
        "overlays"
    )
    scale: Literal["own", "common"] = _field("scale")
    font: FilePath | None = _field("font")
    overlay_format: Literal["png", "jpg", "webp"] = _field("overlay_format")
    strip: bool = _field("strip")
    maps: Literal["none", "npz", "png"] = _field("maps")
    report: bool = _field("report")
    metrics: Annotated[Path, BeforeValidator(parse.given)] | None = _field("metrics")
    lock_timeout: float = _field("lock_timeout", ge=0, le=86400)


class BatchConfig(_Section):
    """How the run goes; nothing here but precision changes a result."""

    engine: Literal["local", "ray"] = _field("engine")
    device: Annotated[str, BeforeValidator(parse.device)] = _field("device")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _field("precision")
    batch: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = _field("batch")
    memory: Literal["auto"] | ByteSize = _field("memory")
    force: bool = _field("force")
    skip: Literal["by-hash", "by-stat"] = _field("skip")
    shard: Annotated[str, AfterValidator(parse.shard)] | None = _field("shard")
    fail_on: Verdicts = _field("fail_on")
    max_failures: int | None = _field("max_failures", ge=1)
    max_seconds: float | None = _field("max_seconds", gt=0)
    dry_run: bool = _field("dry_run")
    json_lines: bool = _field("json", alias="json")

    @property
    def part(self) -> tuple[int, int]:
        """(I, N) of `shard`, counted from 1; (1, 1) is everything."""
        index, _, count = (self.shard or "1/1").partition("/")
        return int(index), int(count)


class RayConfig(_Section):
    """With `engine: ray`: the cluster, and its workers. `run.memory` is of each; `auto` is divided on a machine."""

    address: str | None = _field("ray_address", min_length=1)
    workers: int | None = _field("ray_workers", ge=1, le=100_000)
    gpus: float | None = _field("ray_gpus", ge=0, le=1024)
    cpus: float | None = _field("ray_cpus", gt=0, le=1024)
    tries: int = _field("ray_tries", ge=1, le=1000)


class TalkConfig(_Section):
    """What is said on stderr."""

    verbosity: int = _field("verbosity", ge=-1, le=2)
    color: Literal["auto", "always", "never"] = _field("color")
    log_format: Literal["text", "json"] = _field("log_format")


class RunConfig(_Section):
    """Every setting of `detxai explain`."""

    model: ModelConfig = ModelConfig()
    detection: DetectionConfig = DetectionConfig()
    attribution: AttributionConfig = AttributionConfig()
    parchgrad: ParchGradConfig = ParchGradConfig()
    images: ImagesConfig = ImagesConfig()
    output: OutputConfig = OutputConfig()
    run: BatchConfig = BatchConfig()
    ray: RayConfig = RayConfig()
    talk: TalkConfig = TalkConfig()

    def plain(self) -> dict[str, dict[str, Any]]:
        """The settings as JSON-ready sections with YAML's key names."""
        return self.model_dump(mode="json", by_alias=True)


SECTIONS: dict[str, type[_Section]] = {
    "model": ModelConfig,
    "detection": DetectionConfig,
    "attribution": AttributionConfig,
    "parchgrad": ParchGradConfig,
    "images": ImagesConfig,
    "output": OutputConfig,
    "run": BatchConfig,
    "ray": RayConfig,
    "talk": TalkConfig,
}
DESCRIPTIONS: dict[str, str] = {row.key: row.about for row in ROWS}
#: Option name -> dotted key.
OPTIONS: dict[str, str] = {name: row.key for name, row in TABLE.items()}
#: Environment variable -> dotted key, for every option.
ENVIRONMENT: dict[str, str] = {f"DETXAI_{name.upper()}": key for name, key in OPTIONS.items()}
#: Variables that are no key of the configuration.
ENVIRONMENT_ELSEWHERE: dict[str, str] = {"DETXAI_CONFIG": "YAML file, as --config"}


def _check_key(key: str, origin: str, known: Sequence[str], what: str = "key") -> None:
    if key not in known:
        raise UsageError(
            f"{origin}: unknown {what} {key!r}{parse.nearest(key, known) or '.'}",
            "`detxai schema config` lists every key.",
        )


def _from_file(file: Path) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a YAML file; an empty section is none."""
    document = files.parse(files.read(file), str(file))
    if not isinstance(document, dict | None):
        raise UsageError(f"{file}: must hold sections ({', '.join(SECTIONS)}), not a single value.")
    for section, keys in (document or {}).items():
        if section not in SECTIONS:
            known = [*SECTIONS, *DESCRIPTIONS]
            _check_key(str(section), str(file), known)
        if not isinstance(keys, dict | None) or section not in SECTIONS:
            raise UsageError(f"{file}: {section!r} is a section: indent its keys below it.")
        for name, value in (keys or {}).items():
            _check_key(f"{section}.{name}", str(file), list(DESCRIPTIONS))
            yield f"{section}.{name}", value


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, str, Any]]:
    for name in sorted(environ):
        if name.startswith("DETXAI_") and name not in ENVIRONMENT_ELSEWHERE:
            if name not in ENVIRONMENT:
                raise UsageError(
                    f"Unknown environment variable {name}"
                    f"{parse.nearest(name, [*ENVIRONMENT, *ENVIRONMENT_ELSEWHERE]) or '.'}",
                    "Names are DETXAI_ and an option's name.",
                )
            if environ[name] != "":
                yield ENVIRONMENT[name], name, environ[name]


def _from_sets(sets: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for assignment in sets:
        key, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals:
            raise UsageError(f"--set {assignment}: expected key.path=value.")
        _check_key(key, "--set", list(DESCRIPTIONS))
        yield key, files.parse(text, f"--set {key}")


def load(
    config_file: Path | None = None,
    sets: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The settings of a run.

    `options` maps option names (`OPTIONS`, with underscores) to values; None or an empty list means
    not given, so flags must come as None, not False, when absent. `environ` is `os.environ`. `defaults`: options that
    a command has a default of its own for.
    Raises UsageError, one line for each wrong value.
    """
    environ = {} if environ is None else environ
    if config_file is None and environ.get("DETXAI_CONFIG"):
        config_file = Path(environ["DETXAI_CONFIG"])
    values: dict[str, tuple[Any, str]] = {OPTIONS[k]: (v, "the default") for k, v in (defaults or {}).items()}
    if config_file is not None:
        values.update((key, (value, str(config_file))) for key, value in _from_file(config_file))
    values.update((key, (value, name)) for key, name, value in _from_environment(environ))
    values.update((key, (value, "--set")) for key, value in _from_sets(sets))
    for name, value in (options or {}).items():
        _check_key(name, "options", list(OPTIONS), "option")
        if value is not None and value not in ([], ()):
            values[OPTIONS[name]] = (value, f"--{name.replace('_', '-')}")
    tree: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, (value, _) in values.items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UsageError("\n".join(_complaints(error, values))) from error
    except OSError as error:  # a path that the system does not even look for
        named = ((key, origin) for key, (value, origin) in values.items() if str(value) == str(error.filename))
        key, origin = next(named, ("a path", "the settings"))
        raise UsageError(f"{origin}: {key}: {error.strerror} (it is {str(error.filename)[:80]}…).") from error


def _complaints(error: ValidationError, values: Mapping[str, tuple[Any, str]]) -> Iterator[str]:
    """One line a wrong key: where it came from, what it must be, what it was."""
    reasons: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        reason = detail["msg"].removeprefix("Value error, ").replace("Input should", "should")
        reasons.setdefault(".".join(map(str, detail["loc"][:2])), []).append(reason)
    for key, alternatives in reasons.items():
        value, origin = values[key]
        wanted = " or ".join(alternatives)
        shown = without_secrets(json.dumps(value, default=str))
        told = repr(value[0] if isinstance(value, list) and len(value) == 1 else value) in wanted
        was = "" if told else f" (it is {shown if len(shown) <= 200 else shown[:200] + '…'})"
        yield f"{origin}: {key}: {wanted}{was}."


def to_yaml(cfg: RunConfig | None = None) -> str:
    """A complete YAML file with a comment for every key (`configs/default.yaml`: the defaults)."""
    lines = [
        "# Every setting of `detxai explain`. An option or --set key.path=value beats",
        "# DETXAI_<OPTION> in the environment, and that beats this file.",
        "# Relative paths start at the working folder.",
    ]
    for section, keys in (cfg or RunConfig()).plain().items():
        lines += ["", f"# {SECTIONS[section].__doc__}", f"{section}:"]
        for name, value in keys.items():
            comment = DESCRIPTIONS[f"{section}.{name}"]
            lines += textwrap.wrap(comment, 96, initial_indent="  # ", subsequent_indent="  # ")
            flow = None if isinstance(value, list) else False
            value = math.inf if value == "inf" else value
            lines.append("  " + yaml.safe_dump({name: value}, default_flow_style=flow).rstrip())
    return "\n".join(lines) + "\n"


def schema() -> dict[str, Any]:
    """JSON Schema of the configuration file."""
    return RunConfig.model_json_schema(by_alias=True)

"""One model of every option; option > `--set` > `DETXAI_*` environment > YAML > default."""

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

from detxai.config import parse
from detxai.errors import UsageError

METHODS = (
    *("ig", "expected", "idgi", "grad", "inputxgrad", "smoothgrad"),
    *("gradcam", "gradcam++", "layercam", "odam", "drise"),
)
GRADIENTS = ("plain", "parchgrad-cls", "parchgrad-ins")
VERDICTS = ("supported", "weak", "unsupported", "unknown")
TARGETS = ("class", "contrast", "objectness", "left", "top", "right", "bottom", "box")
BASELINES = ("auto", "black", "white", "gray", "blur", "mean")


def _baseline(value: str) -> str:
    if value not in BASELINES and not Path(value).exists():
        known = ", ".join(BASELINES)
        raise ValueError(f"is neither a file, a folder nor one of {known}{parse.nearest(value, BASELINES)}")
    return value


Selectors = Annotated[tuple[int | str, ...], BeforeValidator(parse.selectors), AfterValidator(parse.distinct)]
Methods = Annotated[tuple[str, ...], BeforeValidator(parse.names), parse.known("method", METHODS)]
Targets = Annotated[tuple[str, ...], BeforeValidator(parse.names), parse.known("target", TARGETS)]
Gradients = Annotated[tuple[str, ...], BeforeValidator(parse.names), parse.known("gradient", GRADIENTS)]
Verdicts = Annotated[tuple[str, ...], BeforeValidator(parse.names), parse.known("verdict", VERDICTS, 0)]
Files = Annotated[tuple[FilePath, ...], BeforeValidator(parse.items), AfterValidator(parse.distinct)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: Any) -> Any:
        """No `true` where a number or name belongs; `~` is the home folder in YAML too."""
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("must not be true or false")
        return os.path.expanduser(value) if isinstance(value, str) else value


class ModelConfig(_Section):
    """The detector."""

    path: str | None = Field(
        default=None,
        min_length=1,
        description="checkpoint, safetensors, Darknet .cfg, ONNX, or an Ultralytics name;"
        " null: the bundled sample detector",
    )
    names: FilePath | None = Field(default=None, description="file with one class name a line (Darknet, ONNX)")
    sha256: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="refuse a model file with another SHA-256",
    )
    trust_pickle: bool = Field(default=False, description="unpickle this checkpoint fully, in this run only")
    head: Literal["auto", "one2many", "one2one"] = Field(
        default="auto", description="which head to explain where a model has two"
    )


class DetectionConfig(_Section):
    """What is detected: as in Ultralytics."""

    conf: float = Field(default=0.25, ge=0, le=1, description="lowest score of a reported box")
    iou: float = Field(default=0.7, ge=0, le=1, description="overlap above which NMS drops the weaker box")
    imgsz: int | None = Field(
        default=None,
        ge=32,
        le=8192,
        multiple_of=32,
        description="side of the network's input in pixels; null: the checkpoint's training size, else 640",
    )
    max_det: int = Field(default=300, ge=1, le=100_000, description="most boxes reported an image")
    classes: Selectors | None = Field(default=None, description="report only these classes (ids or names); null: all")
    candidates: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="also explain boxes from this score up to conf (an image without any box gives its strongest);"
        " null: off",
    )
    predictions: Path | None = Field(
        default=None,
        description="explain these boxes (COCO results JSON or a folder of YOLO txt) instead of detecting",
    )
    labels: DirectoryPath | None = Field(
        default=None, description="folder of YOLO txt labels: marks right and wrong boxes, explains what was missed"
    )


class AttributionConfig(_Section):
    """What is explained, and how well."""

    method: Methods = Field(default=("ig",), description=f"attribution methods: {', '.join(METHODS)}")
    gradient: Gradients = Field(
        default=("plain",), description=f"the gradient that a method integrates or shows: {', '.join(GRADIENTS)}"
    )
    target: Targets = Field(default=("class",), description=f"explained outputs of a prediction: {', '.join(TARGETS)}")
    as_class: Selectors = Field(default=(), description="also explain each box as these classes (ids or names)")
    baseline: Annotated[str, AfterValidator(_baseline)] = Field(
        default="auto",
        description=f"the picture that shows nothing: {', '.join(BASELINES)}, an image file, or"
        " (expected only) a folder of them; auto follows the picture's own ground",
    )
    layer: int | None = Field(
        default=None,
        ge=0,
        description="layer of the network that activation methods look at; null: the one that feeds the head at the"
        " prediction's scale (layercam: the backbone's of that scale)",
    )
    tolerance: float = Field(default=0.05, gt=0, le=1, description="wanted bound on the relative completeness error")
    max_evaluations: int = Field(default=256, ge=2, le=1_000_000, description="most gradient evaluations a detection")
    evidence: Literal["none", "basic", "full"] = Field(default="basic", description="how much evidence to compute")
    calibration: Files = Field(
        default=(),
        description="files of `detxai calibrate`; empty: those found for the model by its sha256",
    )


class ParchGradConfig(_Section):
    """ParchGrad: which channels of the gradient are kept, and how much the others are held back."""

    gamma: float = Field(
        default=math.inf,
        gt=0,
        allow_inf_nan=True,
        description="weight of kept channels against pruned ones, by their standard deviations; .inf prunes them",
    )
    variance: Literal["on", "off", "exact"] = Field(
        default="on",
        description="variance conservation: on (of the two groups), off, or exact (of their sum, as measured)",
    )
    alpha: float = Field(default=0.05, gt=0, lt=1, description="level of the tests by which channels are kept")
    quantile: float | None = Field(
        default=None, gt=0, le=1, description="keep this share of each convolution's channels instead; null: use alpha"
    )
    ratio: float = Field(
        default=0.5, gt=0, le=1, description="upper share of the convolutions below the head that is modified"
    )
    normality: float = Field(
        default=0.05, gt=0, le=1, description="parchgrad-cls keeps channels with a Shapiro-Wilk p below this only"
    )
    region: Literal["whole", "detection"] = Field(
        default="detection", description="what channels are averaged over: the whole picture or the detection's box"
    )

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

    window: Annotated[str, BeforeValidator(parse.window)] = Field(
        default="auto",
        description="16-bit and float images to 8 bits: 'auto', 'full', 'LOW,HIGH' or 'percentile P,Q'",
    )
    max_pixels: int = Field(
        default=100_000_000,
        ge=1,
        description="images with more pixels fail instead of filling the memory",
    )


class OutputConfig(_Section):
    """The output tree."""

    dir: Path = Field(default=Path("runs/explain"), description="folder of the output tree")
    overlays: bool = Field(default=True, description="write one picture an attribution")
    strip: bool = Field(default=False, description="put the plain picture beside the heat map in overlays")
    maps: Literal["none", "npz", "png"] = Field(
        default="none", description="also write the raw signed maps, in source-image pixels"
    )
    lock_timeout: float = Field(
        default=0, ge=0, le=86400, description="seconds to wait for another run on the same tree"
    )


class BatchConfig(_Section):
    """How the run goes; nothing here but precision changes a result."""

    device: Annotated[str, BeforeValidator(parse.device)] = Field(
        default="auto", description="auto, cpu, mps, cuda or cuda:N"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(default="auto", description="arithmetic of the network")
    batch: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = Field(
        default="auto", description="images in flight: auto or a number"
    )
    memory: Literal["auto"] | ByteSize = Field(
        default="auto",
        description="bytes that the run may take beside the model, as in 4GiB; auto: a quarter of the machine's memory,"
        " half of a GPU's",
    )
    force: bool = Field(default=False, description="do images again that are done already")
    shard: Annotated[str, AfterValidator(parse.shard)] | None = Field(
        default=None, description="do only part I of N of the images: I/N, from 1/N to N/N"
    )
    fail_on: Verdicts = Field(
        default=(), description=f"leave with 10 when a reported box has one of these verdicts: {', '.join(VERDICTS)}"
    )
    max_failures: int | None = Field(default=None, ge=1, description="stop after this many failed images")
    max_seconds: float | None = Field(default=None, gt=0, description="stop cleanly after this time")
    dry_run: bool = Field(default=False, description="say what would be done, write nothing")
    json_lines: bool = Field(
        default=False,
        alias="json",
        description="one JSON line a record on stdout, the summary last",
    )

    @property
    def part(self) -> tuple[int, int]:
        """(I, N) of `shard`, counted from 1; (1, 1) is everything."""
        index, _, count = (self.shard or "1/1").partition("/")
        return int(index), int(count)


class TalkConfig(_Section):
    """What is said on stderr."""

    verbosity: int = Field(default=0, ge=-1, le=2, description="-1 quiet, 0 normal, 1 verbose, 2 debug")
    color: Literal["auto", "always", "never"] = Field(default="auto", description="coloured messages")
    log_format: Literal["text", "json"] = Field(default="text", description="messages as text or JSON lines")


class RunConfig(_Section):
    """Every setting of `detxai explain`."""

    model: ModelConfig = ModelConfig()
    detection: DetectionConfig = DetectionConfig()
    attribution: AttributionConfig = AttributionConfig()
    parchgrad: ParchGradConfig = ParchGradConfig()
    images: ImagesConfig = ImagesConfig()
    output: OutputConfig = OutputConfig()
    run: BatchConfig = BatchConfig()
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
    "talk": TalkConfig,
}
DESCRIPTIONS: dict[str, str] = {
    f"{section}.{field.alias or name}": field.description or ""
    for section, model in SECTIONS.items()
    for name, field in model.model_fields.items()
}
#: Option name -> dotted key. Options are the last component of their key but for these.
OPTIONS: dict[str, str] = {
    {"model.path": "model", "output.dir": "output"}.get(key)
    or (key.replace(".", "_") if key.startswith("parchgrad.") else key.partition(".")[2]): key
    for key in DESCRIPTIONS
}
#: Environment variable -> dotted key, for every option.
ENVIRONMENT: dict[str, str] = {f"DETXAI_{name.upper()}": key for name, key in OPTIONS.items()}
#: Variables that are no key of the configuration.
ENVIRONMENT_ELSEWHERE: dict[str, str] = {"DETXAI_CONFIG": "YAML file, as --config"}


class _Loader(yaml.SafeLoader):
    """Safe YAML without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else repr(key)
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {name!r}", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{origin}{line}: malformed YAML: {error.problem}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{origin}: malformed YAML: {str(error).splitlines()[0]}.") from error


def _check_key(key: str, origin: str, known: Sequence[str], what: str = "key") -> None:
    if key not in known:
        raise UsageError(
            f"{origin}: unknown {what} {key!r}{parse.nearest(key, known) or '.'}",
            "`detxai schema config` lists every key.",
        )


def _from_file(file: Path) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a YAML file; an empty section is none."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"Cannot read the config file {file}: {reason}.") from error
    document = _parse(text, str(file))
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
        yield key, _parse(text, f"--set {key}")


def load(
    config_file: Path | None = None,
    sets: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The settings of a run.

    `options` maps option names (`OPTIONS`, with underscores) to values; None or an empty list means
    not given, so flags must come as None, not False, when absent. `environ` is `os.environ`.
    Raises UsageError, one line for each wrong value.
    """
    environ = {} if environ is None else environ
    if config_file is None and environ.get("DETXAI_CONFIG"):
        config_file = Path(environ["DETXAI_CONFIG"])
    values: dict[str, tuple[Any, str]] = {}
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


def _complaints(error: ValidationError, values: Mapping[str, tuple[Any, str]]) -> Iterator[str]:
    """One line a wrong key: where it came from, what it must be, what it was."""
    reasons: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        reason = detail["msg"].removeprefix("Value error, ").replace("Input should", "should")
        reasons.setdefault(".".join(map(str, detail["loc"][:2])), []).append(reason)
    for key, alternatives in reasons.items():
        value, origin = values[key]
        wanted = " or ".join(alternatives)
        yield f"{origin}: {key}: {wanted} (it is {json.dumps(value, default=str)})."


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

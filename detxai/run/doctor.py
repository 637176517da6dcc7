"""`detxai doctor`: is this machine, and is this model, fit for explaining?"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from detxai.attribution.devices import PROGRAM_ROWS
from detxai.attribution.engine import Engine
from detxai.attribution.integral import integrated_gradients
from detxai.attribution.points import Segment, TargetMap
from detxai.attribution.programs import Captured, Programs
from detxai.errors import ExitCode, ModelError
from detxai.models import checkpoints, detectors
from detxai.models.detector import Differentiable
from detxai.run.checks import device_of
from detxai.run.explain import versions
from detxai.text import printable
from detxai.values import Target, written

Line = tuple[str, str]


def machine() -> Iterator[Line]:
    """Versions and devices, as (name, value)."""
    yield from versions().items()
    yield "platform", platform.platform()
    yield (
        "cpu",
        f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {torch.backends.cpu.get_cpu_capability()}",
    )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        yield "cuda", "none: detxai runs on the CPU"
    if torch.backends.mps.is_available():
        yield "mps", "available"


def model(
    name: str | None,
    device: str = "auto",
    *,
    trust_pickle: bool = False,
    module_path: Path | None = None,
    names: Path | None = None,
) -> Iterator[Line]:
    """What detxai makes of a model, with a gradient self-test and a timing, as (name, value).

    Raises ModelError when the model cannot be explained; lines found before that have been yielded.
    """
    checkpoint = checkpoints.load(name, trust_pickle=trust_pickle, module_path=module_path, names=names)
    yield "model", checkpoint.name
    yield "sha256", checkpoint.sha256
    if checkpoint.trusted:
        yield "pickle", "was run in full (--trust-pickle)"
    detector = detectors.build(checkpoint, keep=False)
    info, where = detector.info, device_of(device)
    yield "family", info.family
    yield "targets", ", ".join(info.targets)
    some = list(info.names.values())[:8]
    yield "classes", f"{len(info.names)}: {', '.join(some)}{', …' if len(info.names) > 8 else ''}"
    yield "image size", f"{written(info.own_shape)} px" + (f", {info.channels} channels" if info.channels != 3 else "")
    x = torch.rand(1, info.channels, *info.own_shape, generator=torch.Generator().manual_seed(0))
    if isinstance(detector, Differentiable):
        detector.module.to(where)
        yield from _gradients(detector, x.to(where))
    else:
        yield "head", "a black box: --method drise explains it, nothing else does"
        detectors.sound(detector, x)
        seconds = _timed(lambda: detector.predict(x))
        yield "timing", f"{1e3 * seconds:.0f} ms a picture on the CPU (noise image)"


def _gradients(detector: Differentiable, x: torch.Tensor) -> Iterator[Line]:
    where, largest = x.device, detectors.self_test(detector, x)
    info = detector.info
    yield "head", f"{info.head}, {'sparse' if info.sparse else 'full'} gradients"
    yield "input gradient", f"{largest:.3g} at most: finite and not zero"
    with torch.no_grad():
        candidates = detector.predict(x)[0].brought()
    anchor, class_id = divmod(int(candidates.logits.argmax()), candidates.logits.shape[1])
    target = Target(anchor, int(candidates.levels[anchor]), "class", class_id, context=candidates.context)
    programs = None
    if where.type in PROGRAM_ROWS:
        programs = Programs({torch.float32: detector}, where, PROGRAM_ROWS[where.type])
    engine = Engine(detector.values, where, programs=programs)
    ask = integrated_gradients(Segment(x[0], torch.zeros_like(x[0])), [target], tolerance=1.0)
    integrals: list[TargetMap] = []
    seconds = _timed(lambda: integrals.extend(next(iter(engine.run([(None, ask)], 1)))[1]))
    each = 1e3 * seconds / integrals[0].evaluations
    yield "packs", _packs(programs)
    if programs is not None:
        from detxai.models.fused import fuse_kernels  # Triton takes its time to import

        half = detector.in_precision(torch.float16, (x.shape[-2], x.shape[-1]))
        refused = fuse_kernels(half.trunk, x.new_empty(0, dtype=torch.float16))
        yield "kernels", f"torch's ({refused})" if refused else "our own where torch makes several passes"
        with torch.no_grad():
            yield "predictions", _replayed(Captured(partial(detector.predict, x), where).refused)
    yield "timing", f"{each:.0f} ms a gradient evaluation on {where} (noise image, first run)"


def _packs(programs: Programs | None) -> str:
    """How the network is run."""
    if programs is None:
        return "the targets of an image share its forward pass"
    return _replayed(next(iter(programs.refused()), ""))


def _replayed(refused: str) -> str:
    """How a GPU runs what it has `refused` a graph of, or not."""
    return f"called one by one: no CUDA graph can be made ({refused})" if refused else "replayed as CUDA graphs"


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run(
    paths: Sequence[str],
    names: Path | None = None,
    device: str = "auto",
    *,
    trust_pickle: bool = False,
    module_path: Path | None = None,
    as_json: bool,
) -> ExitCode:
    """Print what is known of the machine and of each model (none: the bundled one); the exit code of the worst."""
    code = ExitCode.OK
    known = dict(_told(machine(), as_json=as_json))
    models: list[dict[str, str]] = []
    for path in paths or (None,):
        if not as_json:
            print()
        models.append({})
        try:
            lines = model(path, device, trust_pickle=trust_pickle, module_path=module_path, names=names)
            for name, value in _told(lines, as_json=as_json):
                models[-1][name] = value
        except ModelError as error:
            code, models[-1]["cannot be explained"] = error.exit_code, str(error)
            if not as_json:
                list(_told(iter([("cannot be explained", str(error))]), as_json=as_json))
    if as_json:
        print(json.dumps({"machine": known, "models": models, "exit_code": int(code)}, indent=2, ensure_ascii=False))
    return code


def _told(lines: Iterator[Line], *, as_json: bool) -> Iterator[Line]:
    """`lines` as they come, each printed at once unless they become JSON."""
    for name, value in lines:
        if not as_json:
            print(f"{name:>20}  {printable(value)}", flush=True)
        yield name, value

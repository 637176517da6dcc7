"""`detxai --version`, from what lies on the disk: nothing slow is imported for it."""

import ast
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import typer


def show(wanted: bool) -> None:
    """Print the versions that decide a result, and leave."""
    if not wanted:
        return
    import detxai
    from detxai.vocabulary import RECORD_SCHEMA

    print(f"detxai {detxai.__version__}")
    print(f"torch {_torch()}")
    print(f"ultralytics {_first('ultralytics-opencv-headless', 'ultralytics')}")
    print(f"record {RECORD_SCHEMA}")
    raise typer.Exit


def _first(*names: str) -> str:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "missing"


def _torch() -> str:
    """What torch says of itself in its `version.py`; whether there is a GPU, `detxai doctor` knows."""
    place = find_spec("torch")
    if place is None or place.origin is None:
        return "missing"
    tree = ast.parse(Path(place.origin).with_name("version.py").read_text(encoding="utf-8"))
    said: dict[str, object] = {
        target.id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    return f"{said.get('__version__') or _first('torch')!s}, built for CUDA {said.get('cuda') or 'none'!s}"

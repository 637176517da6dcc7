"""detxai: why did the detector report this, and does the report deserve trust?

from detxai import Explainer

explainer = Explainer("best.pt", method="ig", conf=0.3)  # the options of `detxai explain`
for result in explainer("scans/"):  # paths, Pillow images, arrays (height, width, 3) uint8, lists of these
    for item in result.explanations:  # in a notebook, `item` shows its picture
        print(result.ref.path, item.class_name, item.evidence.verdict, item.map.sum())
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from detxai.config.settings import RunConfig
    from detxai.errors import DetxaiError
    from detxai.run.pipeline import Explainer
    from detxai.run.results import Explanation, Result

__all__ = ["DetxaiError", "Explainer", "Explanation", "Result", "RunConfig", "__version__"]

_HOME = {
    "DetxaiError": "errors",
    "Explainer": "run.pipeline",
    "Explanation": "run.results",
    "Result": "run.results",
    "RunConfig": "config.settings",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:  # lazily: torch takes seconds to import
        return getattr(import_module(f"detxai.{_HOME[name]}"), name)
    if name == "__version__":  # lazily too: it costs a tenth of `detxai --help`
        metadata = import_module("importlib.metadata")
        try:
            return metadata.version("detxai")
        except metadata.PackageNotFoundError:  # a source tree that was never installed
            return "0+unknown"
    raise AttributeError(f"module 'detxai' has no attribute {name!r}")

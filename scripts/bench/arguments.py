"""What several benches ask for: pictures, a model, its size, a device."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows `doc` and takes the options that say what is measured, and on what."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--model", help="default: the bundled detector")
    parser.add_argument("--imgsz", type=int, help="default: the model's own")
    parser.add_argument("--device", default="auto")
    return parser

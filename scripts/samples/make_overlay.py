"""The picture at the top of the project's README, by today's code: what made the detector say "knife".

python scripts/samples/make_overlay.py
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def explained(image: Path, folder: Path) -> dict[str, str]:
    """Class name -> file name of the overlay of its best detection, written into `folder` by the command itself."""
    line = [sys.executable, "-m", "detxai", "explain", str(image), "--strip", "-q", "-o", str(folder)]
    subprocess.run(line, check=True, cwd=ROOT)
    record = json.loads((folder / f"{image.name}.json").read_bytes())
    best = sorted(record["detections"], key=lambda detection: detection["score"])
    return {detection["class_name"]: detection["attributions"][0]["overlay"] for detection in best}


def main(argv: list[str] | None = None) -> None:
    """Explain the sample, and keep the one overlay."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, default=ROOT / "samples" / "images" / "bag-01.jpg")
    parser.add_argument("--name", default="knife", help="class whose best detection is shown (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "samples" / "overlay.png")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(Path(folder) / explained(args.image, Path(folder))[args.name], args.out)


if __name__ == "__main__":
    main()

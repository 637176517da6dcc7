"""The doorway to ultralytics: import this module before any `ultralytics.*`.

Importing ultralytics on a fresh machine writes a settings file into the home, prints to stdout, sets
`OMP_NUM_THREADS=1` for the whole process, patches `PIL.Image.open`, and may install packages and report usage at
run time. All of that is switched off or undone here, once.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import PIL.Image
import torch  # noqa: F401  (first: torch reads OMP_NUM_THREADS when it starts)


@contextlib.contextmanager
def _tamed() -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="detxai-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    private = {"YOLO_CONFIG_DIR": folder, "YOLO_OFFLINE": "1"}
    before = {name: os.environ.get(name) for name in (*private, "OMP_NUM_THREADS")}
    pillow_open = PIL.Image.open
    os.environ.update(private, YOLO_AUTOINSTALL="0", YOLO_VERBOSE="0")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        PIL.Image.open = pillow_open
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


with _tamed():
    import ultralytics
    import ultralytics.nn.tasks
    import ultralytics.utils.nms

    ultralytics.utils.SETTINGS.update(sync=False)
    ultralytics.utils.LOGGER.setLevel("WARNING")
    VERSION: str = ultralytics.__version__

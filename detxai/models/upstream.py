"""The doorway to ultralytics: import this module before any `ultralytics.*`.

Importing ultralytics on a fresh machine writes a settings file into the home, prints to stdout, sets
`OMP_NUM_THREADS=1` for the whole process, patches `PIL.Image.open`, and may install packages and report usage at
run time. All of that is switched off or undone here, once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import torch  # noqa: F401  (first: torch reads OMP_NUM_THREADS when it starts)

from detxai.errors import OutputError

#: Of temporary folders. None is needed for longer than a model takes to load: what is older was left by a kill.
PREFIX, STALE_SECONDS = "detxai-", 3600
#: Memory as a folder: the one place that a container with a read-only file system can write to unless told otherwise.
SHARED_MEMORY = "/dev/shm"


def clear_stale_folders() -> None:
    """Remove the temporary folders that killed runs of this user have left behind."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
            if own and stat.S_ISDIR(status.st_mode) and time.time() - status.st_mtime > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _find_temporary_folder() -> None:
    """Where none of the usual places can be written, take memory for the temporary files of this process."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        if not os.access(SHARED_MEMORY, os.W_OK):
            raise
        tempfile.tempdir = SHARED_MEMORY


@contextlib.contextmanager
def _tamed() -> Iterator[None]:
    try:
        _find_temporary_folder()
        clear_stale_folders()
        folder = tempfile.mkdtemp(prefix=PREFIX)
    except OSError as error:
        raise OutputError(
            f"There is no temporary folder that can be written: {error.strerror or error}.",
            "Name one: TMPDIR=DIR detxai …",
        ) from error
    private = {"YOLO_CONFIG_DIR": folder, "YOLO_OFFLINE": "1"}
    before = {name: os.environ.get(name) for name in (*private, "OMP_NUM_THREADS")}
    pillow_open = PIL.Image.open
    os.environ.update(private, YOLO_AUTOINSTALL="0", YOLO_VERBOSE="0")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        PIL.Image.open = pillow_open
        shutil.rmtree(folder, ignore_errors=True)  # settings that nobody reads again
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

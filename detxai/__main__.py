"""`python -m detxai` and the `detxai` command."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any

#: Commands that end by themselves what a signal stops; see `detxai.run.console.Signals`.
STOPPABLE = ("explain", "evaluate", "calibrate")


def _leave(number: int, _: Any) -> None:
    os._exit(128 + number)


def main() -> None:
    """Run the command line and leave with one of the documented exit codes."""
    if sys.argv[1:2] and sys.argv[1] in STOPPABLE:
        # Nothing is begun yet. An exception may be swallowed by what is being imported, and the signal lost.
        signal.signal(signal.SIGINT, _leave)
    from detxai.run.streams import install

    install()
    from detxai.errors import ExitCode, missing_package

    try:
        from detxai.cli.app import run
    except ImportError as error:
        if (missing := missing_package(error)) is None:
            raise
        print(f"error: {missing}", file=sys.stderr)
        sys.exit(missing.exit_code)
    code = run(sys.argv[1:])
    if code in (ExitCode.INTERRUPTED, ExitCode.TERMINATED, ExitCode.OUT_OF_TIME):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)  # all is written; Python would wait for pictures that are still being decoded
    sys.exit(code)


if __name__ == "__main__":
    main()

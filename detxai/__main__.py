"""`python -m detxai` and the `detxai` command."""

from __future__ import annotations

import contextlib
import os
import sys


def main() -> None:
    """Run the command line and leave with one of the documented exit codes."""
    from detxai.run.streams import install

    install()
    from detxai.cli.app import run
    from detxai.errors import ExitCode

    code = run(sys.argv[1:])
    if code in (ExitCode.INTERRUPTED, ExitCode.TERMINATED, ExitCode.OUT_OF_TIME):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)  # all is written; Python would wait for pictures that are still being decoded
    sys.exit(code)


if __name__ == "__main__":
    main()

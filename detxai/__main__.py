"""`python -m detxai` and the `detxai` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and leave with one of the documented exit codes."""
    from detxai.run.streams import install

    install()
    from detxai.cli.app import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()

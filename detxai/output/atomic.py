"""Files that are whole or not there: written under a name of their own, synced, then renamed by who asked for them."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

#: Names of temporaries: only detxai uses such, so what a killed run left can be removed.
TEMPORARY = re.compile(r"\.detxai-[0-9a-f]{16}\.tmp")


@contextmanager
def temporary(folder: Path, chunks: Iterable[bytes]) -> Iterator[Path]:
    """A synced file of `chunks` in `folder`, gone afterwards unless renamed. Raises OSError."""
    file = folder / f".detxai-{secrets.token_hex(8)}.tmp"
    try:
        with open(file, "xb") as stream:
            stream.writelines(chunks)
            stream.flush()
            os.fsync(stream.fileno())
        yield file
    finally:
        file.unlink(missing_ok=True)

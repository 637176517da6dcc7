"""What both calibrations are: images in, what they say gathered one by one, one file out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

from detxai.errors import ExitCode, ImageError, NoInputError
from detxai.inputs.sources import ImageSource
from detxai.output import atomic
from detxai.output.records import ErrorInfo
from detxai.run.console import Console, Signals, Stopped
from detxai.run.plan import Plan
from detxai.values import ImageRef


class Calibration(Protocol):
    """What one kind of calibration makes of an image, and of all of them; `images` and `boxes` count what it has."""

    plan: Plan
    images: int

    @property
    def boxes(self) -> int: ...

    def gather(self, refs: Iterable[ImageRef]) -> Iterator[tuple[ImageRef, ErrorInfo | None]]:
        """Take in images one by one: each of them, with the reason where it failed."""
        ...

    def files(self, output: Path) -> dict[Path, bytes]:
        """What came of it, to be written: `output`, and what goes beside it."""
        ...

    def report(self, console: Console, output: Path) -> None:
        """Say what came of it."""
        ...


@dataclass
class Labelled:
    """Of `refs` those that have a label file where `plan` asks for labels; `passed_over` counts the others.

    One with a malformed file is among them: it fails by itself.
    """

    plan: Plan
    refs: Iterable[ImageRef]
    passed_over: int = 0

    def __iter__(self) -> Iterator[ImageRef]:
        for ref in self.refs:
            if self._counts(ref):
                yield ref
            else:
                self.passed_over += 1

    def _counts(self, ref: ImageRef) -> bool:
        try:
            return self.plan.labels is None or self.plan.labels.read(ref) is not None
        except ImageError:
            return True


def calibrate(work: Calibration, source: ImageSource, limit: int | None, output: Path, console: Console) -> ExitCode:
    """Gather in `work` what `source` says (its first `limit` images), and write it to `output`.

    Raises OutputError, and NoInputError where no image could be used.
    """
    atomic.require_writable(output.parent)
    refs, failed = Labelled(work.plan, islice(source.refs, limit)), 0
    count = source.count
    total = count if count is None or limit is None else lambda: min(count(), limit)
    try:
        with Signals(), console.progress(total):
            for ref, error in work.gather(refs):
                if error is not None:
                    failed += 1
                    console.say(f"{ref.path}: {error.message} ({error.code})", kind="warning")
                console.advance(work.images, f"{work.boxes} boxes")
    except Stopped as stop:
        console.say(f"{stop}; nothing was written", level=-1, kind="error")
        return ExitCode(stop.code)
    if not work.images:
        raise NoInputError(
            f"No image could be used: {failed} failed, {refs.passed_over} have no label file.",
            "Check SOURCE and --labels.",
        )
    for file, data in work.files(output).items():
        atomic.write_file(file, data)
    work.report(console, output)
    if refs.passed_over:
        console.say(f"{refs.passed_over} images without a label file were passed over")
    return ExitCode.SOME_FAILED if failed else ExitCode.OK

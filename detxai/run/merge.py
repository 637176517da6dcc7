"""Trees of shards or workers as one: the union of their records and pictures, with the lists and counts made anew."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from detxai.errors import ExitCode, NoInputError, UsageError, worst
from detxai.output import records
from detxai.output.mixture import Mixture
from detxai.output.store import Store
from detxai.output.summary import ImageCounts, Summary
from detxai.output.tree import Tree
from detxai.run.tally import Tally

#: So many paths are named where trees disagree.
NAMED = 5


def merge(trees: Sequence[Path], output: Path) -> tuple[ExitCode, Summary]:
    """Copy what is in `trees` to the tree `output`, which may hold a part of it already.

    Raises UsageError, before anything is written, where two trees hold different records of one path, NoInputError for
    a tree without records, OutputError.
    """
    if output.resolve() in {tree.resolve() for tree in trees}:
        raise UsageError(f"{output} is one of the trees to merge.", "Name another folder with -o.")
    sources = _agreed(trees, output)
    tally, models = Tally(), []
    with Store(output) as store:
        for tree in trees:
            for record in _read(tree):
                path = record.image.path
                if sources[path] != tree:
                    continue
                store.write_image(path, _pictures(tree, record), record)
                tally.add(record, skipped=False)
                models += [record.model] if record.model and record.model not in models else []
        for record in _existing(output):
            if record.image.path not in sources:
                tally.add(record, skipped=False)
        summary = _summary(tally, models, store.gather())
        store.finish(summary)
    return worst(tally.codes), summary


def _read(tree: Path) -> Iterator[records.Record]:
    """The records of a tree; none where a run came to its end without an image, as that of an empty shard does."""
    finished = (tree / "summary.json").is_file()
    with suppress(NoInputError) if finished else nullcontext():
        yield from Tree(tree).read()


def _existing(output: Path) -> Iterator[records.Record]:
    with suppress(NoInputError):  # a tree that begins now
        yield from Tree(output).read()


def _agreed(trees: Sequence[Path], output: Path) -> dict[str, Path]:
    """Image path -> the tree that it is taken from; UsageError where records of one path differ."""
    sources: dict[str, Path] = {}
    digests = {r.image.path: _digest(r) for r in _existing(output)}
    unequal: dict[str, None] = {}
    for tree in trees:
        for record in _read(tree):
            path, digest = record.image.path, _digest(record)
            if digests.setdefault(path, digest) != digest:
                unequal[path] = None
            sources.setdefault(path, tree)
    if unequal:
        shown = ", ".join(list(unequal)[:NAMED]) + (", …" if len(unequal) > NAMED else "")
        raise UsageError(
            f"{len(unequal)} paths have different records in these trees: {shown}.",
            "Merge trees of one run; detxai diff OUT_A OUT_B shows how they differ.",
        )
    return sources


def _digest(record: records.Record) -> bytes:
    return hashlib.sha256(records.dump(record)).digest()


def _pictures(tree: Path, record: records.Record) -> dict[str, bytes]:
    """The files that `record` names. Raises UsageError where one is gone."""
    folder = tree.joinpath(*record.image.path.split("/")[:-1])
    pictures: dict[str, bytes] = {}
    for name in record.files():
        try:
            pictures[name] = (folder / name).read_bytes()
        except OSError as error:
            raise UsageError(
                f"{folder / name} cannot be read: {error.strerror}.", "Run that part again, then merge."
            ) from error
    return pictures


def _summary(tally: Tally, models: Sequence[Any], mixture: Mixture) -> Summary:
    """What the records themselves say; times, settings and versions are those of the parts."""
    return Summary(
        images=ImageCounts(ok=tally.ok, failed=tally.failed),
        detections=tally.detections,
        candidates=tally.candidates,
        listed=tally.listed,
        labelled=tally.labelled or None,
        matches=tally.matches() if tally.labelled else None,
        attributions=tally.attributions,
        unconverged=tally.unconverged,
        evaluations=tally.evaluations,
        exit_code=int(worst(tally.codes)),
        model=models[0] if len(models) == 1 else None,
        classes=tally.statistics(),
        failures=tuple(tally.failures),
        warnings=tuple(mixture.warnings()),
    )

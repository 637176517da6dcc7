"""One run of `detxai evaluate`: images in, their figures as files, tables and pictures and an exit code out.

The figures of an image are a file of their own, named by its path and tied to all that decides them. A second run
takes them from there and only makes the tables anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from detxai.config.fingerprint import fingerprint
from detxai.config.settings import RunConfig
from detxai.errors import DetxaiError, ExitCode, ImageError, UsageError, worst
from detxai.evaluation import csv_rows, tables
from detxai.evaluation.files import Files
from detxai.evaluation.options import MAX_DET, Options
from detxai.inputs import decode
from detxai.inputs.sources import ImageSource
from detxai.run.console import Console, Signals, Stopped, keep_freed_memory
from detxai.values import ImageRef, written

SCHEMA = "detxai.evaluation/1"
#: Rows of the contact sheet, and of them at most this many of one class.
ROWS, ROWS_OF_CLASS = 5, 2
REPORT, DETECTIONS, CURVES, SHEET = "evaluate.json", "detections.csv", "curves.png", "contact.png"


class EvaluationRun:
    """Judges one configuration over one image source. Raises UsageError where matplotlib is not installed."""

    def __init__(self, config: RunConfig, options: Options, console: Console) -> None:
        if find_spec("matplotlib") is None:
            raise UsageError("detxai evaluate draws its curves with matplotlib.", "pip install matplotlib")
        if "max_det" not in config.detection.model_fields_set:
            detection = config.detection.model_copy(update={"max_det": MAX_DET})
            config = config.model_copy(update={"detection": detection})
        self.config, self.options, self.console = config, options, console
        self.codes: set[ExitCode] = set()
        self.shown: Counter[str] = Counter()
        self.done = self.failed = self.skipped = 0

    def run(self, source: ImageSource) -> ExitCode:
        """Judge everything in `source` and return the exit code that wins."""
        with Signals():
            try:
                return self._run(source)
            except Stopped as stop:
                self.console.say(f"{stop}; run the same command again to go on", level=-1, kind="error")
                return ExitCode(stop.code)

    def _run(self, source: ImageSource) -> ExitCode:
        source.require_some()
        refs = list(source.refs)[: self.options.limit]
        from detxai.evaluation.compare import Judge

        judge = Judge(self.config, self.options)
        info = judge.plan.info
        self.console.say(
            f"{info.name} ({info.family}, {len(info.names)} classes, {written(judge.plan.shape)} px) "
            f"on {judge.plan.device}: "
            f"{', '.join(judge.names)}"
        )
        if info.trusted:
            self.console.say(f"{info.name} was unpickled fully (--trust-pickle): its code has run.", kind="warning")
        with Files(self.options.output) as files:
            started = time.monotonic()
            figures = self._figures(judge, refs, files)
            if figures:
                self._report(judge, figures, files, time.monotonic() - started)
        return worst(self.codes)

    # -- images ---------------------------------------------------------------------------------

    def _figures(self, judge: Any, refs: Sequence[ImageRef], files: Files) -> list[dict[str, Any]]:
        """The figures of all images that did not fail, in the order of `refs`."""
        figures: dict[str, dict[str, Any]] = {}
        pending: list[tuple[int, ImageRef, str]] = []
        with self.console.progress(len(refs)):
            for index, ref in enumerate(refs):
                fingerprint = self._fingerprint(judge, ref, index)
                known = None if self.options.force or fingerprint is None else files.read(ref.path)
                if known is not None and known["fingerprint"] == fingerprint:
                    figures[ref.path] = known
                    self.skipped += 1
                    self._show(known)
                    self._advance()
                else:
                    pending.append((index, ref, fingerprint or ""))
            for group in _groups(pending, judge.at_once, self._special):
                stability, sanity = self._special(group[0][0])
                images = judge.judge([ref for _, ref, _ in group], stability=stability, sanity=sanity)
                for judged, (_, ref, fingerprint) in zip(images, group, strict=True):
                    if judged.figures is None:
                        self._fail(judged)
                    else:
                        own = {"schema": SCHEMA, "fingerprint": fingerprint, "image": ref.path, **judged.figures}
                        own["contact"] = self._draw(judged, files)
                        files.write_image(ref.path, own)
                        figures[ref.path] = own
                        self.done += 1
                    self._advance()
        return [figures[ref.path] for ref in refs if ref.path in figures]

    def _special(self, index: int) -> tuple[bool, bool]:
        """Whether the image of this number takes the stability and the sanity test."""
        return index < self.options.stability, index < self.options.sanity

    def _fingerprint(self, judge: Any, ref: ImageRef, index: int) -> str | None:
        """What decides the figures of an image; None where it cannot be read: then it fails by itself, later."""
        try:
            digest = decode.digest(ref, judge.config.images.max_pixels)
            drawn = judge.labels.read(ref) if judge.labels else None
        except (OSError, ValueError, ImageError):
            return None
        if digest is None:
            return None
        o = self.options
        own = {
            "run": fingerprint(judge.config, digest, judge.plan.info.sha256, SCHEMA, fit=judge.plan.counted_fit),
            "names": judge.names, "steps": o.steps, "smooth": o.smooth, "order": o.order, "seed": o.seed,
            "scores": o.score_precision, "special": self._special(index), "labels": drawn and drawn.digest,
            "masks": judge.parts.digest(ref, len(drawn.labels)) if judge.parts and drawn else None,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()

    def _fail(self, judged: Any) -> None:
        self.failed += 1
        self.codes.add(ExitCode.SOME_FAILED)
        self.console.say(f"{judged.ref.path}: {judged.error}", kind="warning")
        if judged.bug is not None:
            self.codes.add(ExitCode.BUG)
            self.console.say(judged.bug, level=2, kind="error")

    def _advance(self) -> None:
        count = self.done + self.failed + self.skipped
        parts = [f"{n} {what}" for n, what in ((self.skipped, "skipped"), (self.failed, "failed")) if n]
        self.console.advance(count, ", ".join(parts) or "judged")

    # -- the contact sheet ------------------------------------------------------------------------

    def _show(self, figures: dict[str, Any]) -> None:
        if figures["contact"] is not None:
            self.shown[figures["detections"][0]["class_name"]] += 1

    def _draw(self, judged: Any, files: Files) -> str | None:
        """The name of this image's row of the contact sheet, drawn; None where it gets none."""
        from detxai.evaluation import pictures
        from detxai.evaluation.compare import BOX

        image, detections = judged.image, judged.figures["detections"]
        if not detections or self.shown.total() >= ROWS or self.shown[detections[0]["class_name"]] >= ROWS_OF_CLASS:
            return None
        first, subject = detections[0], image.subjects[0]
        self.shown[subject.class_name] += 1
        maps = {name: readings[0].panel for name, readings in image.readings.items()}
        if BOX in maps:  # below zero it only says how far away a pixel is
            maps[BOX] = maps[BOX].clip(min=0)
        drawn = pictures.row(
            image.image.pixels, subject.window, maps, {name: first["methods"][name] for name in maps},
            box=subject.box, label=subject.class_name, score=subject.score, title=judged.ref.path,
        )  # fmt: skip
        return files.write_row(judged.ref.path, pictures.encode(drawn))

    # -- the report -------------------------------------------------------------------------------

    def _report(self, judge: Any, figures: list[dict[str, Any]], files: Files, seconds: float) -> None:
        from detxai.evaluation import pictures
        from detxai.run.explain import versions

        info, names = judge.plan.info, judge.names
        report = tables.report(figures, names, judge.variants[0].label, self.options.steps, self.options.seed)
        head = {
            "schema": SCHEMA,
            "model": {
                "name": info.name, "sha256": info.sha256, "family": info.family, "head": info.head,
                "imgsz": judge.plan.imgsz,
            },
            "failed": self.failed,
            "device": str(judge.plan.device),
            "versions": versions(),
            "config": judge.config.plain(),
            "steps": self.options.steps, "smooth": self.options.smooth, "order": self.options.order,
            "seed": self.options.seed,
            "score_precision": self.options.score_precision,
        }  # fmt: skip
        files.write(REPORT, (json.dumps(head | report, indent=1, ensure_ascii=False) + "\n").encode())
        files.write(DETECTIONS, csv_rows.text(figures).encode())
        if report["detections"]:
            files.write(CURVES, pictures.curves(report["shares"], report["methods"]))
            rows = [image["contact"] for image in figures if image["contact"] is not None]
            if rows:
                files.write(SHEET, pictures.sheet([files.row(name) for name in rows]))
            for title, columns, lines in tables.printed(report):
                self.console.table(title, columns, lines)
        self.console.say(
            f"{self.done} images judged, {self.skipped} already done, {self.failed} failed, in {seconds:.0f} s; "
            f"{report['detections']} detections; figures and pictures: {self.options.output}"
        )


def _groups(pending: Sequence[tuple[int, ImageRef, str]], count: int, kind: Any) -> Iterator[list[Any]]:
    """Groups of at most `count` neighbours that take the same tests."""
    group: list[tuple[int, ImageRef, str]] = []
    for item in pending:
        if group and (len(group) == count or kind(item[0]) != kind(group[0][0])):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def evaluate(config: RunConfig, options: Options, console: Console, source: ImageSource) -> ExitCode:
    """The exit code of one run; errors are told on the console."""
    try:
        with contextlib.suppress(BrokenPipeError):
            keep_freed_memory()
            return EvaluationRun(config, options, console).run(source)
        return ExitCode.READER_GONE
    except DetxaiError as error:
        console.error(error)
        return error.exit_code

"""One run of `detxai explain`: images in, an output tree, a summary and an exit code out."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from detxai.config.settings import RunConfig
from detxai.errors import DetxaiError, ExitCode, UsageError, memory_refused, no_memory, worst
from detxai.inputs.sources import ImageSource
from detxai.output import listing, ranking, records
from detxai.output.summary import ClassStatistics, ImageCounts, Summary, Unfinished
from detxai.run.console import Console, Signals, Stopped, keep_freed_memory
from detxai.run.streams import Lines, ReaderGone, guarded_stdout
from detxai.run.tally import Tally, gate
from detxai.values import ImageRef, written
from detxai.vocabulary import VERDICTS

#: The bundled detector is for trying: it was trained on drawn bags.
DEMO = (
    "the bundled detector was made for trying detxai on its own samples: what it says of other images means nothing."
    " Give your model with -m"
)
#: SHA-256 of the samples, one a line.
SAMPLES = Path(__file__).parent.parent / "models" / "bundled" / "samples.txt"


class ExplainRun:
    """Runs one configuration over one image source."""

    def __init__(self, config: RunConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.tally = Tally(gate=gate(config.run.fail_on))
        self.stopped: str | None = None
        self.warnings: list[str] = []
        self._samples = {None, *SAMPLES.read_text(encoding="ascii").split()}
        self.signals = Signals()
        self.passed_over = 0
        self.ignored: list[str] = []
        self._told: Any = None
        self._finish: Callable[..., None] = lambda *_, **__: None
        self._write: Callable[[bytes], None] = lambda _: None

    def run(self, source: ImageSource, started: float) -> ExitCode:
        """Explain everything in `source` (`started`: monotonic seconds) and return the exit code that wins."""
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(guarded_stdout()) if self.config.run.json_lines else None
            self.signals = stack.enter_context(Signals())
            if stream is not None:
                self._write = Lines(stream, self.signals.held).write
            try:
                return self._run(source, started)
            except Stopped as stop:  # before the first image
                self.console.say(str(stop), level=-1, kind="error")
                return ExitCode(stop.code)

    def _run(self, source: ImageSource, started: float) -> ExitCode:
        source.require_some()
        from detxai.output.atomic import require_writable
        from detxai.output.store import Store

        keep_freed_memory()
        if self.config.output.metrics is not None:
            require_writable(self.config.output.metrics.parent)
        with contextlib.ExitStack() as stack:
            explainer = self._explainer()
            stack.callback(explainer.close)
            self._greet(explainer)
            tree = stack.enter_context(Store(self.config.output.dir, self.config.output.lock_timeout))
            self._name_earlier(explainer, tree)
            for doubt in tree.doubts:
                self._warn(doubt)
            # From here on a signal ends the work, never the account of it.
            stack.enter_context(contextlib.suppress(Stopped))
            stack.enter_context(self.signals.held())
            stack.callback(explainer.close)  # workers have ended when the tree is given back
            with self._ending():
                self._finish = tree.saw
                if self.config.run.skip == "by-stat":
                    tree.seen.load()
                images = map(tree.seen.begin, source.refs)
                with self.console.progress(source.count, lambda: _pulse(explainer)):
                    self._loop(explainer, images, tree, started)
            with self._ending():  # of images that were written when a signal came, and of which nobody was told
                for result in explainer.untold() if not self._failed_enough else ():
                    self._tell(result)
            with self._ending():
                self._write_page()
            for doubt in (*tree.gather().warnings(), *_of_memory(explainer)):
                self._warn(doubt)
            summary = self._summary(explainer, source, time.monotonic() - started)
            self.passed_over, self.ignored = source.own, source.named
            line = records.dump(summary)
            with self._ending():
                self._write(line)
            with self._ending():
                self._write_metrics(self._settled(summary))
            summary = self._settled(summary)
            tree.finish(summary)
            with self.signals.let():
                self._report(summary)
        return worst(self.tally.codes)

    def _settled(self, summary: Summary) -> Summary:
        """`summary` with how the run ends as it stands now."""
        return summary.model_copy(update={"exit_code": int(worst(self.tally.codes)), "stopped": self.stopped})

    def dry_run(self, source: ImageSource) -> ExitCode:
        """Say what `run` would do with every image: the model is loaded, the tree and images are read, none written."""
        from detxai.output.store import Store

        explainer = self._explainer()
        self._greet(explainer)
        tree, counts = Store(self.config.output.dir), Counter[str]()
        if self.config.run.skip == "by-stat":
            tree.seen.load()
        with Signals():
            source.require_some()
            for ref in source.refs:
                would, why = explainer.forecast(ref, tree)
                counts[would] += 1
                self.console.say(f"would {would} {ref.path}{why and f': {why}'}", path=ref.path)
        said = ", ".join(f"{would} {counts[would]}" for would in ("explain", "skip", "fail on"))
        self.console.say(f"would {said}; {source.ignored} other files are ignored; nothing was written")
        return ExitCode.OK

    def _explainer(self) -> Any:
        """The model and all that hangs on it, which takes seconds."""
        _require_folder(self.config)
        with self.console.waiting(f"loading {self.config.model.path or 'the bundled sample detector'}"):
            if self.config.run.engine == "ray" and not self.config.run.dry_run:
                return _pooled(self.config)
            from detxai.run.pipeline import Explainer

            return Explainer(self.config)

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Whatever ends the work within ends it there, with its exit code and a reason; the summary comes after."""
        try:
            with self.signals.let():
                yield
        except Stopped as stop:
            self._end(ExitCode(stop.code), str(stop))
        except ReaderGone:
            self._end(ExitCode.READER_GONE, "the reader of stdout went away")
        except DetxaiError as error:
            self._fail(error)
        except (MemoryError, RuntimeError, OSError) as error:
            if not memory_refused(error):
                raise
            self._fail(no_memory(error))

    def _fail(self, error: DetxaiError) -> None:
        self._end(error.exit_code, error.message)
        self.console.error(error)

    def _loop(self, explainer: Any, images: Iterator[ImageRef], tree: Any, started: float) -> None:
        with contextlib.closing(explainer.explain(images, tree, lambda: self._over(started))) as results:
            for result in results:
                self._tell(result)
                if self._failed_enough:
                    self._end(ExitCode.SOME_FAILED, f"{self.tally.failed} images failed (--max-failures)")
                    return
        if explainer.cut_short:
            self._end(ExitCode.OUT_OF_TIME, f"{self.config.run.max_seconds:g} seconds are over (--max-seconds)")

    def _write_page(self) -> None:
        """The page of the whole tree where it was asked for and there is something to show."""
        if self.config.output.report and self.tally.done and isinstance(self.config.output.dir, Path):
            from detxai.review.report import report

            self.console.say(f"page: {report(self.config.output.dir)}")

    def _write_metrics(self, summary: Summary) -> None:
        if self.config.output.metrics is not None:
            from detxai.run import metrics

            metrics.write(self.config.output.metrics, summary, self.tally)

    @property
    def _failed_enough(self) -> bool:
        limit = self.config.run.max_failures
        return limit is not None and self.tally.failed >= limit

    def _tell(self, result: Any) -> None:
        """Count an image once, and say what came of it."""
        if result is self._told:  # a signal came between the counting and the next image
            self._write(self._line(result.record))
            return
        with self.signals.held():
            self.tally.add(result.record, skipped=result.skipped)
            self._finish(result.record, skipped=result.skipped)
            self._told = result
        self._warn_of_the_demo(result.record)
        self.console.advance(self.tally.done, self._standing())
        record, path = result.record, result.ref.path
        if result.bug is not None:
            self.tally.codes.add(ExitCode.BUG)
            self.console.say(result.bug, level=2, kind="error", code="internal", path=path)
        if record.error is not None:
            said = f"{path}: {record.error.message} ({record.error.code})"
            self.console.say(said, level=-1, kind="error", code=record.error.code, path=path)
        else:
            what = "done already" if result.skipped else _detections(record)
            self.console.say(f"{path}: {what}", level=1, path=path)
        self._write(self._line(record))

    def _line(self, record: records.Record) -> bytes:
        """A record as text. Raises Stopped, but not within, where pydantic would make a bug of it."""
        with self.signals.held():
            return records.dump(record)

    def _warn_of_the_demo(self, record: records.Record) -> None:
        """Say once, and in the summary, that the bundled detector looks at images that it was not made for."""
        if self.config.model.path is None and record.image.sha256 not in self._samples and DEMO not in self.warnings:
            self._warn(DEMO)

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        self.console.say(text, kind="warning")

    def _over(self, started: float) -> bool:
        """Whether the time of the run is up. Raises Stopped."""
        self.signals.check()
        seconds = self.config.run.max_seconds
        return seconds is not None and time.monotonic() - started > seconds

    def _end(self, code: ExitCode, reason: str) -> None:
        self.tally.codes.add(code)
        self.stopped = self.stopped or reason

    def _standing(self) -> str:
        t = self.tally
        parts = [f"{t.detections} detections"] + [f"{t.candidates} candidates"] * (t.candidates > 0)
        parts += [f"{count} {what}" for count, what in ((t.skipped, "skipped"), (t.failed, "failed")) if count]
        return ", ".join(parts)

    def _name_earlier(self, explainer: Any, tree: Any) -> None:
        """Say at once where the tree holds records of another model or method: those of other images stay."""
        a = self.config.attribution
        ways = [(m, g) for m in a.method for g in a.gradient]
        others = tree.kinds().unlike(_model(explainer.plan), ways)
        if others:
            self.console.say(
                f"{self.config.output.dir} holds records of {', '.join(others)}: those of images that are not in this"
                " run stay; choose another folder with -o to keep them apart",
                kind="warning",
            )

    def _greet(self, explainer: Any) -> None:
        info = explainer.plan.info
        self.console.say(
            f"{info.name} ({info.family}, {len(info.names)} classes, {written(explainer.plan.shape)} px) "
            f"on {explainer.plan.device}"
        )
        for warning in explainer.plan.warnings:
            self._warn(warning)
        if info.trusted:
            self._warn(f"{info.name} was unpickled fully (--trust-pickle): its code has run.")
        if all(name == str(i) for i, name in info.names.items()):
            self._warn(f"the classes of {info.name} have no names: their ids are shown. Give them with --names FILE")

    def _summary(self, explainer: Any, source: ImageSource, seconds: float) -> Summary:
        t, timings = self.tally, explainer.timings
        return Summary(
            images=ImageCounts(ok=t.ok, failed=t.failed, skipped=t.skipped, ignored=source.ignored),
            detections=t.detections,
            candidates=t.candidates,
            listed=t.listed,
            labelled=t.labelled if self.config.detection.labels is not None else None,
            matches=t.matches() if t.labelled else None,
            attributions=t.attributions,
            unconverged=t.unconverged,
            evaluations=t.evaluations,
            seconds=seconds,
            timings={
                "device": timings.device,
                "waiting": timings.waiting_for_input + timings.waiting_for_output,
                "waiting_for_input": timings.waiting_for_input,
                "waiting_for_output": timings.waiting_for_output,
                "points": timings.points,
                "padded_points": timings.padded,
                "packs_halved": timings.packs_halved,
            },
            exit_code=int(worst(t.codes)),
            stopped=self.stopped,
            device=str(explainer.plan.device),
            model=_model(explainer.plan),
            unfinished=tuple(
                Unfinished(path=w.path, detections=len(w.detections), kept=w.done) for w in explainer.unfinished()
            )
            or None,
            versions=versions() | ({"trust_pickle": "used"} if explainer.plan.info.trusted else {}),
            config=self.config.plain(),
            classes=t.statistics(),
            failures=tuple(t.failures),
            warnings=tuple(self.warnings),
        )

    def _report(self, summary: Summary) -> None:
        i = summary.images
        title = f"{i.ok} explained, {i.skipped} already done, {i.failed} failed, in {summary.seconds:.1f} s"
        columns = ["class", "boxes", "mean score", "inside box", "converged"]
        judged = any(c.verdicts for c in summary.classes)
        columns += ["verdicts"] if judged else []
        columns += ["by the labels"] if summary.labelled else []
        rows = [class_row(c, judged=judged, labelled=bool(summary.labelled)) for c in summary.classes]
        self.console.table(title, tuple(columns), rows)
        if summary.labelled == 0 and self.tally.done:
            self.console.say("no image has a label file in --labels: see its names in the README", kind="warning")
        if self.config.detection.predictions is not None and self.tally.done and not summary.detections:
            self.console.say("no box in --predictions belongs to any of these images: check its names", kind="warning")
        for c in summary.classes:
            for group in (g for g in c.groups or () if g.finding):
                some = f"{group.boxes} boxes ({group.share:.0%})"
                self.console.say(f"{c.class_name}, {some}: {group.finding}, such as {group.typical[0]}", kind="warning")
        self._name_the_worst()
        if summary.stopped:
            self.console.say(f"stopped early: {summary.stopped}; run the same command again to go on", kind="warning")
        for left in summary.unfinished or ():
            said = f"{left.kept} of {left.detections} boxes are done and kept"
            self.console.say(f"{left.path} is not finished: {said}", path=left.path)
        if self.passed_over:
            self.console.say(f"{self.passed_over} pictures that detxai itself had made were passed over")
        if self.ignored:
            more = ", …" if summary.images.ignored > len(self.ignored) else ""
            self.console.say(f"{summary.images.ignored} files are no images: {', '.join(self.ignored)}{more}")
        where = self.config.output.dir
        self.console.say(f"records and pictures: {where}")
        if summary.classes:
            named = shlex.quote(str(where))
            self.console.say(
                f"what makes it say a class: detxai list {named} --by-class; a page: detxai report {named}"
            )

    def _name_the_worst(self) -> None:
        """The boxes to look at, and those that --fail-on failed on, the latter even under -q."""
        look, gated, output = self.tally.look, self.tally.gate, self.config.output.dir
        if look.count:
            said = ", ".join(f"{look.verdicts[word]} {word}" for word in ranking.LOOK if look.verdicts[word])
            self.console.say(f"look at these first ({said}):")
            for finding, line in zip(look.kept, listing.lines(look.kept, self.console.width), strict=True):
                self.console.say(line.plain, path=finding.path)
        if self.tally.listed is not None:
            where = shlex.quote(str(output))
            self.console.say(f"on the list with a promise: {self.tally.listed} boxes: detxai list {where} --promise")
        if look.count > len(look.kept):
            self.console.say(f"and {look.count - len(look.kept)} more: detxai list {shlex.quote(str(output))}")
        if gated.count:
            words, names = " or ".join(self.config.run.fail_on), [f"{f.path} #{f.id}" for f in gated.kept]
            more = [f"and {gated.count - len(names)} more"] if gated.count > len(names) else []
            said = ", ".join(names + more)
            gate = f"gate: {gated.count} detections are {words} (--fail-on): {said}"
            self.console.say(gate, level=-1, kind="error", code="gate")


def _require_folder(config: RunConfig) -> None:
    """Raise UsageError for what only a folder has, where the output is in an object store."""
    asked = (("--report", config.output.report), ("--skip by-stat", config.run.skip == "by-stat"))
    for option in (option for option, wanted in asked if wanted and isinstance(config.output.dir, str)):
        raise UsageError(
            f"{option} needs a folder, not {config.output.dir}.", f"Leave out {option}, or choose a folder."
        )


def _pulse(explainer: Any) -> str:
    """What has been done of images that are not finished yet; the boxes of those that are done in parts."""
    works = [work for work in explainer.unfinished() if work.tree is not None]
    boxes = f", {sum(w.done for w in works)} of {sum(len(w.detections) for w in works)} boxes" if works else ""
    return f"{explainer.points} evaluations{boxes}"


def _pooled(config: RunConfig) -> Any:
    """An explainer with Ray's workers. Raises UsageError where Ray is not installed."""
    if not (config.ray.address or os.environ.get("RAY_ADDRESS")):
        # Read when ray is imported: a Ray of our own listens on loopback, whatever the name says.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        from detxai.run.ray_engine import RayPool
    except ModuleNotFoundError as error:
        raise UsageError(f"--engine ray needs Ray ({error.name} is missing).", "pip install 'detxai[ray]'") from error
    from detxai.run.ledger import PooledExplainer

    return PooledExplainer(RayPool(config))


def class_row(c: ClassStatistics, *, judged: bool, labelled: bool) -> tuple[str, ...]:
    """A class in the table at the end: its reported boxes and the maps of their own class."""
    shares = ("–" if value is None else f"{100 * value:.0f} %" for value in (c.mean_inside_share, c.converged_share))
    row = [c.class_name, str(c.detections), "–" if c.mean_score is None else f"{c.mean_score:.2f}", *shares]
    if judged:
        verdicts = c.verdicts or {}
        row.append(", ".join(f"{verdicts[word]} {word}" for word in VERDICTS if verdicts.get(word)) or "–")
    if labelled:
        row.append(f"{c.true} right, {c.false} not, {c.missed} missed")
    return tuple(row)


def _model(plan: Any) -> records.ModelInfo:
    """What is said of the detector of `plan`."""
    from detxai.run.results import model_record

    return model_record(plan.info, plan.side, plan.shape, plan.fit, plan.shape if plan.rect else None)


def _of_memory(explainer: Any) -> list[str]:
    """A sentence where packs were halved: other packs round otherwise."""
    halved = int(explainer.timings.packs_halved)
    return [f"memory ran out: packs were halved {halved} times, and last digits may differ"] if halved else []


def _detections(record: records.Record) -> str:
    """How many boxes a record has, by verdict."""
    boxes = record.detections or ()
    verdicts: Counter[str] = Counter(d.evidence.verdict for d in boxes if d.evidence is not None)
    said = ", ".join(f"{verdicts[word]} {word}" for word in VERDICTS if verdicts[word])
    return f"{len(boxes)} box{'' if len(boxes) == 1 else 'es'}" + (f" ({said})" if said else "")


def versions() -> dict[str, str]:
    """Versions of everything that decides a result."""
    import torch

    import detxai
    from detxai.models import upstream

    return {
        "detxai": detxai.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ultralytics": upstream.VERSION,
        "numpy": version("numpy"),
        "pillow": version("pillow"),
    }

"""Before the device a file becomes a letterboxed picture, fails, or is done already; there its baselines are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from detxai.attribution import baselines
from detxai.config.fingerprint import fingerprint
from detxai.errors import ImageError
from detxai.evidence.model import EvidenceLevel
from detxai.inputs import decode
from detxai.inputs.labels import Drawn
from detxai.inputs.letterbox import fitted
from detxai.output import recording, records, store
from detxai.run.plan import Plan
from detxai.run.results import PreparedImage, Result
from detxai.values import ImageRef, Letterbox, Pixels
from detxai.vocabulary import EXPECTED_BASELINES

#: What trials show beside the baseline, and what instead where that is the baseline.
FILLS = ("blur", "gray")


def prepared_image(
    plan: Plan, ref: ImageRef, tree: store.Store | None, admit: Callable[[int], None] = lambda size: None
) -> PreparedImage | Result:
    """The image ready for the device; a `Result` where it failed, or where `tree` holds its finished record.

    `admit` waits until there is room for the bytes of its pixels.
    """
    image = None
    try:
        boxes = _boxes(plan, ref)
        digests = [None if drawn is None else drawn.digest for drawn in boxes]
        if tree is not None and not plan.config.run.force and (done := _done(plan, ref, tree, digests)):
            return Result(ref, done, skipped=True)
        image = plan.load(ref, admit)
        canvas, box = plan.letterboxed(image.seen)
        compared = _baselines(plan, canvas, box)
        labels, given = (None if drawn is None else drawn.at(image.width, image.height) for drawn in boxes)
        key = _fingerprint(plan, image.digest, digests)
        return PreparedImage(
            ref,
            image,
            box,
            canvas,
            compared,
            key,
            labels=labels,
            given=given,
            ground=_ground(plan.level, canvas, box, next(iter(compared))),
            parts={} if tree is None else _parts(plan, ref, tree, key),
        )
    except ImageError as error:
        return Result(ref, recording.failed_record(ref, error, None if image is None else recording.image_info(image)))


def _boxes(plan: Plan, ref: ImageRef) -> tuple[Drawn | None, Drawn | None]:
    """The image's labels, if it has any, and the boxes given for it. Raises ImageError for malformed ones."""
    labels = None if plan.labels is None else plan.labels.read(ref)
    return labels, None if plan.given is None else plan.given.read(ref) or Drawn()


def _parts(plan: Plan, ref: ImageRef, tree: store.Store, key: str) -> dict[int, bytes]:
    """What an earlier run has finished of the image; nothing where all is to be done again."""
    return tree.parts(ref.path, "" if plan.config.run.force else key)


def _done(plan: Plan, ref: ImageRef, tree: store.Store, digests: Sequence[str | None]) -> records.Record | None:
    """The record of an earlier run if it still holds: the same bytes, model and settings."""
    known = tree.existing(ref.path)
    if known is None or known.status != "ok":
        return None
    trusted = plan.config.run.skip == "by-stat" and tree.seen.trusts(ref, known.image.sha256)
    digest = known.image.sha256 if trusted else decode.digest(ref, plan.config.images.max_pixels)
    if digest is None:
        return None
    return tree.done(ref.path, _fingerprint(plan, digest, digests))


def _fingerprint(plan: Plan, image_sha256: str, digests: Sequence[str | None]) -> str:
    used = [made.sha256 for made in (plan.parchgrad, plan.calibration) if made is not None]
    schema, fit = records.RECORD_SCHEMA, plan.counted_fit
    return fingerprint(plan.config, image_sha256, plan.info.sha256, schema, digests, used, fit)


def _baselines(plan: Plan, canvas: Pixels, box: Letterbox) -> dict[str, Pixels | None]:
    """The pictures that show nothing by name, the one asked for first; more than one for `expected` only."""
    a = plan.config.attribution
    made: dict[str, Pixels | None] = {name: fitted(p, box) for name, p in plan.baseline_images.items()}
    if not made:
        made[baselines.resolved(a.baseline, canvas, box)] = None
    if "expected" in a.method and not Path(a.baseline).is_dir():
        known = {name.removeprefix("auto:") for name in made}
        made |= dict.fromkeys(name for name in EXPECTED_BASELINES if name not in known)
    return made


def _ground(level: EvidenceLevel, canvas: Pixels, box: Letterbox, name: str) -> tuple[int, ...] | None:
    """The colour of the picture's empty ground, for its evidence; `auto` in the `name` of its baseline has looked."""
    if level is EvidenceLevel.NONE:
        return None
    own = name.startswith("auto:")
    return baselines.ground_of(name) if own else baselines.ground(canvas[baselines.inner(box)])


@dataclass(frozen=True, eq=False)
class Pictures:
    """Of an image on the device, (channels, rows, columns) float32 in [0, 1]: itself as `x`, its `baselines`, and what
    trials show: `fills` by name, and itself `softened`."""

    x: torch.Tensor
    baselines: dict[str, torch.Tensor]
    fills: dict[str, torch.Tensor]
    softened: torch.Tensor

    @classmethod
    def of(cls, p: PreparedImage, x: torch.Tensor, level: EvidenceLevel) -> Pictures:
        """The pictures that go with `x`, made where it lies; without evidence nothing is tried."""
        made = {
            name: baselines.baseline(name, x, p.letterbox, None if file is None else baselines.picture(file, x.device))
            for name, file in p.baselines.items()
        }
        if level is EvidenceLevel.NONE:
            return cls(x, made, {}, x)
        name, first = next(iter(made.items()))
        other = next(fill for fill in FILLS if fill != name)
        fills = {name: first, other: baselines.baseline(other, x, p.letterbox)}
        return cls(x, made, fills, baselines.softened(x, p.letterbox))

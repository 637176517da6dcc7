"""Before the device: a file becomes a letterboxed picture with its baselines, or fails, or is done already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from detxai.attribution import baselines
from detxai.config.fingerprint import fingerprint
from detxai.errors import ImageError
from detxai.evidence.model import EvidenceLevel
from detxai.inputs import decode
from detxai.inputs.labels import Drawn
from detxai.inputs.letterbox import fitted
from detxai.output import records, store
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
        settings = plan.config.images
        image = decode.load(ref, settings.window, settings.max_pixels, admit)
        square, box = plan.letterboxed(image.pixels)
        compared = _baselines(plan, square, box)
        fills, softened, ground = _fills(plan.level, square, box, *next(iter(compared.items())))
        labels, given = (None if drawn is None else drawn.at(image.width, image.height) for drawn in boxes)
        key = _fingerprint(plan, image.digest, digests)
        return PreparedImage(
            ref,
            image,
            box,
            torch.from_numpy(square).permute(2, 0, 1).float() / 255,
            compared,
            key,
            fills,
            softened,
            labels=labels,
            given=given,
            ground=ground,
            parts={} if tree is None else _parts(plan, ref, tree, key),
        )
    except ImageError as error:
        return Result(ref, records.failed_record(ref, error, None if image is None else records.image_info(image)))


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
    digest = decode.digest(ref, plan.config.images.max_pixels)
    if digest is None:
        return None
    return tree.done(ref.path, _fingerprint(plan, digest, digests))


def _fingerprint(plan: Plan, image_sha256: str, digests: Sequence[str | None]) -> str:
    used = [made.sha256 for made in (plan.parchgrad, plan.calibration) if made is not None]
    schema, fit = records.RECORD_SCHEMA, plan.counted_fit
    return fingerprint(plan.config, image_sha256, plan.info.sha256, schema, digests, used, fit)


def _baselines(plan: Plan, square: Pixels, box: Letterbox) -> dict[str, torch.Tensor]:
    """The pictures that show nothing by name, the one asked for first; more than one for `expected` only."""
    a, given = plan.config.attribution, plan.baseline_images
    made = {name: baselines.baseline(name, square, box, fitted(p, box))[0] for name, p in given.items()}
    if not given:
        b, name = baselines.baseline(a.baseline, square, box)
        made[name] = b
    if "expected" in a.method and not Path(a.baseline).is_dir():
        for name in EXPECTED_BASELINES:
            if name not in {known.removeprefix("auto:") for known in made}:
                made[name], _ = baselines.baseline(name, square, box)
    return made


def _fills(
    level: EvidenceLevel, square: Pixels, box: Letterbox, name: str, b: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor, tuple[int, int, int] | None]:
    """What takes the place of parts of the picture in trials, the picture softened, its empty ground's colour."""
    if level is EvidenceLevel.NONE:
        return {}, b, None
    other = next(fill for fill in FILLS if fill != name)
    inner = square[box.top : box.top + box.inner_height, box.left : box.left + box.inner_width]
    fills = {name: b, other: baselines.baseline(other, square, box)[0]}
    return fills, baselines.softened(square, box), baselines.ground_of(name, inner)

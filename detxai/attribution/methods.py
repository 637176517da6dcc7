"""Every attribution method by name: coroutines over the same engine, batched alike, for every target alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from detxai.attribution import activation
from detxai.attribution.drise import drise
from detxai.attribution.integral import AT_ONCE, integrated_gradients
from detxai.attribution.points import Ask, Entered, Point, Reply, Segment, TargetMap
from detxai.attribution.quadrature import Mesh, Rule, cubic
from detxai.values import Target

#: Points of the methods that have no error to steer by.
SAMPLES = 32
#: Standard deviation of SmoothGrad's noise, in units of the full range [0, 1].
SMOOTHGRAD_SIGMA = 0.1
#: Rounding noise stops low precision from converging on hard paths; there float32 takes over after this many.
LOW_PRECISION_EVALUATIONS = 48
#: Where the gradient is none of F there is no error to steer by: 24 gradients. ParchGrad's authors take 25.
FIXED_RULE = cubic(panels=12)
#: Masks of D-RISE that may take the place of one gradient evaluation.
MASKS_PER_EVALUATION = 4


@dataclass(frozen=True)
class Settings:
    """What a user may ask of a method. `seed` decides every random choice.

    `modified`: gradients come from ParchGrad and are none of F; no method then speaks of completeness. `layer_of`:
    the layer at which activation methods look for a target; `early`: for such a layer one of the same scale that comes
    before, where there is more of the network above it. `stem`: the network's first convolution, where integrals are
    taken behind it.
    """

    tolerance: float = 0.05
    max_evaluations: int = 256
    map_tolerance: float | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0
    modified: bool = False
    layer_of: Callable[[Target], int] | None = None
    early: Mapping[int, int] = field(default_factory=dict)
    stem: nn.Conv2d | None = None


#: `paths`: from each baseline to the image; all but `expected` use the first.
Method = Callable[[Sequence[Segment], Sequence[Target], Settings], Ask]


def ig(paths: Sequence[Segment], targets: Sequence[Target], settings: Settings) -> Ask:
    """Integrated gradients to a known error (Sundararajan, Taly & Yan 2017, arXiv:1703.01365).

    In half precision, targets that do not converge are done again in float32. A modified gradient is integrated on
    `FIXED_RULE`.
    """
    if settings.modified:
        rule = FIXED_RULE.within(settings.max_evaluations)
        return (yield from _fixed_integral(paths[0], targets, rule, settings.dtype))
    exact, most = settings.dtype == torch.float32, settings.max_evaluations
    path = paths[0] if settings.stem is None else Entered(paths[0], settings.stem)
    integrals = yield from integrated_gradients(
        path,
        targets,
        tolerance=settings.tolerance,
        max_evaluations=most if exact else min(most, LOW_PRECISION_EVALUATIONS),
        map_tolerance=settings.map_tolerance,
        dtype=settings.dtype,
    )
    again = [] if exact else [i for i, integral in enumerate(integrals) if not integral.converged]
    if again:
        redone = yield from integrated_gradients(
            path,
            [targets[i] for i in again],
            tolerance=settings.tolerance,
            max_evaluations=most,
            map_tolerance=settings.map_tolerance,
        )
        for i, integral in zip(again, redone, strict=True):
            integrals[i] = replace(integral, evaluations=integral.evaluations + integrals[i].evaluations)
    return integrals


def _fixed_integral(path: Segment, targets: Sequence[Target], rule: Rule, dtype: torch.dtype = torch.float32) -> Ask:
    """Coroutine for the integral on the nodes of `rule`, of gradients that are none of F.

    Nothing is known of its error: F's differences say what the sum of F's own gradient must be, not of another.
    """
    mesh = Mesh(rule)
    nodes, weights = sorted(mesh.missing().items()), mesh.weights()
    totals = [torch.zeros(path.x.shape[1:], dtype=torch.float64, device=path.x.device) for _ in targets]
    values: dict[float, list[float]] = {}
    for start in range(0, len(nodes), AT_ONCE):
        part = nodes[start : start + AT_ONCE]
        replies = yield [Point(path, rule.alpha(v), tuple(targets), wanted, dtype) for v, wanted in part]
        for (v, wanted), reply in zip(part, replies, strict=True):
            values[v] = reply.values
            for k, total in enumerate(totals if wanted else ()):
                total.add_(reply.product(k).double(), alpha=weights[v])
    spent = sum(wanted for _, wanted in nodes)
    return [
        TargetMap(target, total, values[1.0][k], values[0.0][k], spent, dtype=dtype)
        for k, (target, total) in enumerate(zip(targets, totals, strict=True))
    ]


def expected(paths: Sequence[Segment], targets: Sequence[Target], settings: Settings) -> Ask:
    """Expected gradients (Erion et al. 2021, arXiv:1906.10670) as the mean of IG over all baselines.

    Sum, value at baseline and errors are means too: all paths together keep to the tolerance and to the evaluations
    that are allowed; what easy ones leave, the later ones may use.
    """
    runs: list[list[TargetMap]] = []
    left = settings.max_evaluations
    for i, path in enumerate(paths):
        share = replace(settings, max_evaluations=max(left // (len(paths) - i), 2))
        runs.append((yield from ig([path], targets, share)))
        left -= max(target_map.evaluations for target_map in runs[-1])
    return [_mean(column, settings.tolerance) for column in zip(*runs, strict=True)]


def _mean(maps: Sequence[TargetMap], tolerance: float) -> TargetMap:
    n = len(maps)
    total = torch.stack([m.map for m in maps]).mean(0)
    baseline = sum(m.value_at_baseline or 0.0 for m in maps) / n
    delta = maps[0].value_at_input - baseline
    mean = replace(maps[0], map=total, value_at_baseline=baseline, evaluations=sum(m.evaluations for m in maps))
    if maps[0].error_bound is None:
        return mean
    own = (max(abs(m.value_at_input - (m.value_at_baseline or 0.0)), 1.0) * (m.error_bound or 0.0) for m in maps)
    bound = sum(own) / n / max(abs(delta), 1.0)
    doubts = [m.doubt for m in maps if m.doubt is not None]
    doubt = sum(doubts) / n if len(doubts) == n else None
    return replace(mean, error_bound=bound, converged=bound <= tolerance, doubt=doubt, size=None)


def grad(paths: Sequence[Segment], targets: Sequence[Target], settings: Settings) -> Ask:
    """The gradient at the image, summed over colour (Simonyan, Vedaldi & Zisserman 2014, arXiv:1312.6034)."""
    return _at_image(paths[0], targets, lambda g: g.sum(0), settings)


def inputxgrad(paths: Sequence[Segment], targets: Sequence[Target], settings: Settings) -> Ask:
    """Input times gradient (Shrikumar et al. 2016, arXiv:1605.01713); the image in [0, 1], so black counts nothing."""
    x = paths[0].x
    return _at_image(paths[0], targets, lambda g: (x * g).sum(0), settings)


def _at_image(path: Segment, targets: Sequence[Target], combine: Callable[[Tensor], Tensor], settings: Settings) -> Ask:
    (reply,) = yield [Point(path, 1.0, tuple(targets), dtype=settings.dtype, combine=combine)]
    return [
        TargetMap(t, reply.product(k).double(), reply.values[k], None, 1, dtype=settings.dtype)
        for k, t in enumerate(targets)
    ]


def smoothgrad(paths: Sequence[Segment], targets: Sequence[Target], settings: Settings) -> Ask:
    """The mean gradient under Gaussian noise (Smilkov et al. 2017, arXiv:1706.03825), seeded."""
    path, count = paths[0], min(SAMPLES, settings.max_evaluations)
    generator = torch.Generator().manual_seed(settings.seed)
    (whole,) = yield [Point(path, 1.0, tuple(targets), False, settings.dtype)]
    totals = [torch.zeros((), device=path.x.device) for _ in targets]
    for start in range(0, count, AT_ONCE):
        noisy = [path.x + SMOOTHGRAD_SIGMA * _noise(path.x, generator) for _ in range(min(AT_ONCE, count - start))]
        replies = yield [
            Point(path, 1.0, tuple(targets), dtype=settings.dtype, picture=p, combine=lambda g: g.sum(0)) for p in noisy
        ]
        for reply in replies:
            totals = [total + reply.product(k).double() for k, total in enumerate(totals)]
    return [
        TargetMap(t, totals[k] / count, whole.values[k], None, count, dtype=settings.dtype)
        for k, t in enumerate(targets)
    ]


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device)


def idgi(paths: Sequence[Segment], targets: Sequence[Target], settings: Settings) -> Ask:
    """Direction-weighted integration (Yang, Wang & Bilgic 2023, arXiv:2303.14242).

    Each step's change of F is shared out by the squared gradient at its start, so that the sum is F(x) − F(b)
    by construction: completeness says nothing about its quality and is not reported.
    """
    path, steps = paths[0], min(SAMPLES, settings.max_evaluations)
    totals = [torch.zeros(path.x.shape[1:], dtype=torch.float64, device=path.x.device) for _ in targets]
    first: list[float] = []
    before: Reply | None = None
    for start in range(0, steps + 1, AT_ONCE):
        replies = yield [
            Point(
                path,
                (j / steps) ** 2,
                tuple(targets),
                j < steps,
                settings.dtype,
                combine=lambda g: g.square().sum(0),
            )
            for j in range(start, min(start + AT_ONCE, steps + 1))
        ]
        for there in replies:
            if before is not None:
                for k, total in enumerate(totals):
                    squared = before.product(k).double()
                    total += squared * ((there.values[k] - before.values[k]) / squared.sum().clamp_min(1e-30))
            before, first = there, first or there.values
    assert before is not None
    return [
        TargetMap(target, totals[k], before.values[k], first[k], steps, dtype=settings.dtype)
        for k, target in enumerate(targets)
    ]


def _activation(weigh: activation.Weighing, early: bool = False) -> Method:
    """A method that weighs what a layer responds to: one forward, gradients down to that layer only."""

    def method(paths: Sequence[Segment], targets: Sequence[Target], settings: Settings) -> Ask:
        assert settings.layer_of is not None
        layers = [settings.layer_of(target) for target in targets]
        if early:
            layers = [settings.early.get(layer, layer) for layer in layers]
        return activation.activation_maps(paths[0], targets, weigh, layers, settings.dtype)

    return method


def black_box(paths: Sequence[Segment], targets: Sequence[Target], settings: Settings) -> Ask:
    """D-RISE: see `drise`. A mask costs one forward, a gradient several: so more of them are allowed."""
    return drise(paths[0], targets, max_masks=MASKS_PER_EVALUATION * settings.max_evaluations, seed=settings.seed)


#: What `vocabulary.METHODS` says of each. Of the layer's methods LayerCAM counts a cell by its own gradient: at the
#: head's input that reaches no farther than the head's few cells.
METHODS: dict[str, Method] = {
    "ig": ig,
    "expected": expected,
    "idgi": idgi,
    "grad": grad,
    "inputxgrad": inputxgrad,
    "smoothgrad": smoothgrad,
    "gradcam": _activation(activation.gradcam),
    "gradcam++": _activation(activation.gradcam_plus),
    "layercam": _activation(activation.layercam, early=True),
    "odam": _activation(activation.odam),
    "drise": black_box,
}

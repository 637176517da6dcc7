"""What a run has of its device: the engine, in the packs that suit the network, and the network's predictions."""

from __future__ import annotations

import weakref
from functools import partial

import torch
from torch import Tensor

from detxai.attribution.baselines import picture
from detxai.attribution.clock import DeviceClock
from detxai.attribution.devices import PROGRAM_ROWS, SUMS, rows_for
from detxai.attribution.engine import Engine
from detxai.attribution.memory import Room
from detxai.attribution.programs import Captured, Programs
from detxai.attribution.sums import Sums
from detxai.models import detectors
from detxai.models.detector import Candidates, Detector, Differentiable
from detxai.models.predictions import closeness
from detxai.run.plan import Plan
from detxai.values import Pixels

#: Shapes of pictures whose predictions are captured; those of more are called.
MOST_SHAPES = 8
#: Programs of the latest run: graphs hold much of a device's memory, which a run with others needs.
_latest: list[weakref.ref[Programs]] = []


class Beside:
    """Predictions on a CUDA stream of their own, which packs that are queued need not finish for; as a graph a shape.

    The pictures are their own, too: what one stream has allocated is not another's.
    """

    def __init__(self, detector: Detector, device: torch.device) -> None:
        self.detector, self.device = detector, device
        self.stream = torch.cuda.Stream(device, priority=-1)
        self._made: dict[torch.Size, tuple[Tensor, Captured[list[Candidates]]]] = {}

    def predict(self, canvas: Pixels, clock: DeviceClock) -> Candidates:
        """All predictions on a letterboxed image (rows, columns, c) uint8, on the host; the device's time for `clock`.

        Raises ImageError as `Candidates` do.
        """
        with torch.cuda.stream(self.stream), clock.working():
            seen = picture(canvas, self.device)[None].contiguous(memory_format=torch.channels_last)
            if seen.shape not in self._made and len(self._made) < MOST_SHAPES:
                x = seen.clone()
                self._made[seen.shape] = x, Captured(partial(self.detector.predict, x), self.device)
            if seen.shape in self._made:
                x, predicted = self._made[seen.shape]
                x.copy_(seen)
                (made,) = predicted()
            else:
                (made,) = self.detector.predict(seen)
            return made.brought()

    def forget(self) -> None:
        """Free the graphs; the next picture makes its own again."""
        self._made.clear()


def engine(plan: Plan, programs: Programs | None = None) -> Engine:
    """An engine for what `plan` says, with the `programs` of an earlier run of it; black boxes have no gradients."""
    device, network = plan.device, plan.network
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # graphs are captured on this thread's own
    rows, similarity = rows_for(device, plan.shape), partial(closeness, plan.detector)
    if network is None:
        return Engine(similarity, device, rows)
    values, entered = (detectors.contrasting(f) for f in (network.values, network.entered))
    return Engine(
        values,
        device,
        rows,
        similarity,
        entered,
        parchgrad=None if plan.parchgrad is None else plan.parchgrad.hooks,
        tap=network.trunk.tap,
        room=Room(plan.budget.room),
        sums=Sums(rows_for(device, plan.shape, SUMS)),
        programs=_alone(programs or _programs(plan, network), plan) if device.type in PROGRAM_ROWS else None,
    )


def _programs(plan: Plan, network: Differentiable) -> Programs:
    """Packs of a fixed shape, in float32 and in the half precision of the run, that by kernels of our own if it can."""
    from detxai.models.fused import fuse_kernels  # Triton takes its time to import

    networks = {torch.float32: network}
    if plan.dtype != torch.float32:
        networks[plan.dtype] = half = network.in_precision(plan.dtype, plan.shape)
        fuse_kernels(half.trunk, torch.empty(0, dtype=plan.dtype, device=plan.device))
    return Programs(networks, plan.device, rows_for(plan.device, plan.shape, PROGRAM_ROWS))


def _alone(programs: Programs, plan: Plan) -> Programs:
    """`programs` with all rows that `plan` gives them, and those of any other run freed."""
    for other in (known() for known in _latest):
        if other is not None and other is not programs:
            other.forget(other.rows)
    _latest[:] = [weakref.ref(programs)]
    rows = rows_for(plan.device, plan.shape, PROGRAM_ROWS)
    if programs.rows != rows:  # halved, where memory ran out
        programs.forget(rows)
    return programs

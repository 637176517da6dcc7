"""The map that Ultralytics itself draws (`visualize=True`): one LayerCAM for the whole picture, as a baseline.

Written from the rule in ultralytics 8.4 (`utils/plotting.py`, `class_activation_map`): every prediction of at least
`conf`, or the best one alone, is explained by LayerCAM at each input of the head; each is scaled to a maximum of one,
and the greatest at every pixel is kept. It knows no detection, no sign and no unit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from detxai.models.heads.anchor_free import AnchorFree

#: Predictions explained in one picture, as there.
MOST = 16


def layercam(detector: AnchorFree, x: Tensor, conf: float) -> tuple[Tensor, int]:
    """(rows, columns) map in [0, 1] of x (1, 3, rows, columns), letterbox pixels, and how many backward passes it took.

    LayerCAM: Jiang et al. 2021 (IEEE TIP): activation times its own positive gradient, summed over channels.
    """
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_(True)
        features = detector.features(x)
        best = detector.logits(features)[0].amax(-1)
        kept = (best.sigmoid() >= conf) | (best == best.max())
        count = min(int(kept.sum()), MOST)
        order = best.masked_fill(~kept, float("-inf")).argsort(descending=True)[:count]
        cam = x.new_zeros(x.shape[-2:])
        for k, anchor in enumerate(order):
            gradients = torch.autograd.grad(best[anchor], features, retain_graph=k + 1 < count)
            for a, g in zip(features, gradients, strict=True):
                level = (g.clamp(min=0) * a).sum(1, keepdim=True).clamp(min=0)
                level = interpolate(level, x.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
                cam = torch.maximum(cam, level / level.amax().clamp(min=1e-7))
    return cam.detach(), count

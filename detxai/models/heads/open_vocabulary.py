"""YOLO-World and YOLOE with the vocabulary they were given: text embeddings become constants of the network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from detxai.errors import ModelError
from detxai.models.heads.anchor_free import AnchorFree


class OpenVocabulary(AnchorFree):
    """An anchor-free detector whose class branch compares embeddings of cells with those of words."""

    @staticmethod
    def prepared(model: Any) -> nn.Module:
        """`model` with its words folded in: class branches of convolutions only, layers that need no text beside x.

        Raises ModelError where no vocabulary is stored, or where it is prompt-free (it drops cells by a filter).
        """
        head = model.model[-1]
        if hasattr(head, "lrpc"):
            raise ModelError("A prompt-free YOLOE is not supported.", "Give a YOLOE whose classes were set.")
        words = getattr(model, "txt_feats", None) if hasattr(model, "txt_feats") else getattr(model, "pe", None)
        if words is None:
            raise ModelError("This YOLOE has no classes.", "Set them in ultralytics (model.set_classes) and save it.")
        words = words.detach().float()
        if not getattr(head, "is_fused", False):
            for prefix in ("", "one2one_"):
                branches, contrasts = (getattr(head, f"{prefix}{name}", None) for name in ("cv3", "cv4"))
                if branches is not None and contrasts is not None:
                    parts = [_folded(b, c, words[0]) for b, c in zip(branches, contrasts, strict=True)]
                    setattr(head, f"{prefix}cv3", nn.ModuleList(parts))
        # An ImagePoolingAttn rewrites the words from the image: the layers below it read its output instead.
        source: int | None = None
        for index, layer in enumerate(model.model):
            kind = type(layer).__name__
            if kind in ("C2fAttn", "ImagePoolingAttn"):
                model.model[index] = _Guided(layer, words if source is None else source)
                source = index if kind == "ImagePoolingAttn" else source
        return model  # type: ignore[no-any-return]


class _Guided(nn.Module):
    """A layer that reads words beside its input: `words` (1, classes, width), or the index of their layer."""

    def __init__(self, layer: Any, words: Tensor | int) -> None:
        super().__init__()
        self.layer: Any = layer
        self.i = layer.i
        self.many = not isinstance(layer.f, int)
        self.wired = isinstance(words, int)
        self.f = [*(layer.f if self.many else [layer.f]), words] if self.wired else layer.f
        self.register_buffer("words", None if isinstance(words, int) else words)

    def forward(self, x: Any) -> Tensor:
        if self.wired:
            *features, words = x
        else:
            features = x if self.many else [x]
            own: Any = self.words
            words = own.expand(len(features[0]), -1, -1)
        return self.layer(features if self.many else features[0], words)  # type: ignore[no-any-return]


class _Normalised(nn.Module):
    """A convolution, each cell of its output scaled to length 1."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.act = conv, _UnitLength()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))  # type: ignore[no-any-return]


class _UnitLength(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=1)


def _folded(branch: Any, contrast: Any, words: Tensor) -> nn.Sequential:
    """`branch` (to embeddings) and `contrast` (their likeness to `words`, (classes, width)) as one stack."""
    from ultralytics.utils.torch_utils import fuse_conv_and_bn

    *below, embed = branch
    norm = getattr(contrast, "norm", None)
    embed = _Normalised(embed) if norm is None else fuse_conv_and_bn(embed, norm)
    unit = nn.functional.normalize(words, dim=-1)
    likeness = nn.Conv2d(unit.shape[1], len(unit), 1)
    with torch.no_grad():
        likeness.weight.copy_((unit * contrast.logit_scale.exp())[:, :, None, None])
        likeness.bias.copy_(contrast.bias.expand(len(unit)))  # type: ignore[union-attr]
    return nn.Sequential(*below, embed, likeness)

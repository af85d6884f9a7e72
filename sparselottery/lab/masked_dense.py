"""The baseline of all speed-ups: dense layers whose weight is multiplied by its mask in every forward."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..convert import to_dense


class MaskedDenseLinear(nn.Linear):
    """nn.Linear that computes ``x @ (weight * mask).T + bias``: how pruned nets are usually trained."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MaskedDenseConv2d(nn.Conv2d):
    """nn.Conv2d that convolves with ``weight * mask``."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


MASKED_DENSE = {nn.Linear: MaskedDenseLinear, nn.Conv2d: MaskedDenseConv2d}


def masked_dense(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A dense copy of ``model`` whose masked weights are multiplied by their mask in every forward.

    ``masks`` {"<layer>.weight": bool, of the weight's shape}; other layers stay. A layer keeps its mask in the weight's
    dtype (a boolean one makes the product slower) and out of the state_dict. Raises ValueError for a name that is not
    the weight of an nn.Linear or nn.Conv2d of ``model`` and for a wrong shape.
    """
    model = to_dense(model)
    layers = {f"{name}.weight": layer for name, layer in model.named_modules() if type(layer) in MASKED_DENSE}
    for key, mask in masks.items():
        if key not in layers:
            raise ValueError(f"no layer's weight is named {key!r}: expected one of {sorted(layers)}")
        layer = layers[key]
        if mask.shape != layer.weight.shape:
            raise ValueError(f"mask {key!r} has shape {tuple(mask.shape)}, expected {tuple(layer.weight.shape)}")
        layer.__class__ = MASKED_DENSE[type(layer)]
        layer.register_buffer("mask", mask.to(layer.weight), persistent=False)
    return model

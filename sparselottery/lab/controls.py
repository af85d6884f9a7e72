"""What a ticket is compared with: the same mask on dense weights, and the same mask on other initial weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..convert import to_dense


class MaskedDenseLinear(nn.Linear):
    """nn.Linear that computes ``x @ (weight * mask).T + bias``: how pruned nets are usually trained.

    The mask is kept in the weight's dtype (a boolean one makes the product slower) and out of the state_dict.
    """

    def __init__(self, linear: nn.Linear, mask: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("mask", mask.to(linear.weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


def masked_dense(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A dense copy of ``model`` whose masked nn.Linear weights are multiplied by their mask in every forward.

    ``masks`` {"<layer>.weight": bool (out_features, in_features)}; other layers stay. Raises ValueError for a name that
    is not the weight of an nn.Linear of ``model`` and for a wrong shape.
    """
    model = to_dense(model)
    linears = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for key, mask in masks.items():
        if key not in linears:
            raise ValueError(f"no nn.Linear weight {key!r} in the model: expected one of {sorted(linears)}")
        linear = linears[key]
        if mask.shape != linear.weight.shape:
            raise ValueError(f"mask {key!r} has shape {tuple(mask.shape)}, expected {tuple(linear.weight.shape)}")
        model.set_submodule(key.removesuffix(".weight"), MaskedDenseLinear(linear, mask))
    return model


def reinit(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    """``factory()`` under ``seed``: other weights of the same distribution (section 2). torch's own RNG is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory()

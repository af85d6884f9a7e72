"""2:4 weights as torch's SparseSemiStructuredTensor, which sparse tensor cores multiply."""

from __future__ import annotations

import torch
from torch import nn

from ..convert import masked_weights, to_dense
from ..nn import MaskedLinear

KEPT, GROUP = 2, 4  # of consecutive weights of a row
HALVES = (torch.float16, torch.bfloat16)


def to_semi_structured(model: nn.Module) -> nn.Module:
    """A dense copy of a converted model for inference, whose 2:4 linear weights are SparseSemiStructuredTensors.

    Examples:
        >>> model = nn.Linear(128, 64)
        >>> sparse = convert(model, prune(model, 0.5, granularity="2:4"))
        >>> fast = to_semi_structured(sparse.half().cuda())  # doctest: +SKIP

    model: on a CUDA device, in fp16 or bf16; `prune(..., granularity="2:4")` leaves such masks. Linear layers of other
    masks become dense, as do all other layers.
    Raises ValueError for a model without a linear layer of at most 2 in each 4 weights, on another device or of another
    dtype; RuntimeError, from torch, for a shape that it does not take.
    """
    names = [name for name, layer in masked_weights(model).items() if _is_two_of_four(layer)]
    if not names:
        raise ValueError("model: expected a linear layer with at most 2 of each 4 weights of a row, got none")
    dense = to_dense(model).eval().requires_grad_(False)
    for name in names:
        layer = dense.get_submodule(name.rpartition(".")[0])
        weight = layer.weight
        if not weight.is_cuda or weight.dtype not in HALVES:
            raise ValueError(f"{name}: expected fp16 or bf16 on a CUDA device, got {weight.dtype} on {weight.device}")
        layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight.contiguous()), requires_grad=False)
    return dense


def _is_two_of_four(layer: nn.Module) -> bool:
    """At most 2 of each 4, and not whole by being narrower than a group."""
    if type(layer) is not MaskedLinear or layer.in_features % GROUP:
        return False
    groups = layer.pattern.row_indices() * (layer.in_features // GROUP) + layer.pattern.col_indices // GROUP
    return bool((torch.bincount(groups) <= KEPT).all())

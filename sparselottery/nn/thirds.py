"""A third of a linear layer's outputs alone: of queries that are not the keys, attention reads no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..pattern import Pattern
from .fuse import is_observed
from .linear import MaskedLinear


class _Part(NamedTuple):
    """Rows of a pattern as one of their own, with its plan; values[first:last] are theirs."""

    pattern: Pattern
    plan: Tensor
    first: int
    last: int


class _Parts(NamedTuple):
    """Those of a layer by (begin, end), as long as its col_indices are these in this version."""

    col_indices: Tensor
    version: int
    made: dict[tuple[int, int], _Part]


_KEPT: WeakKeyDictionary[nn.Module, _Parts] = WeakKeyDictionary()


def gives_thirds(layer: nn.Module, x: Tensor) -> bool:
    """Can its rows be multiplied apart, in a call that no hook of it observes and nobody traces?"""
    if is_observed(layer) or torch.compiler.is_compiling() or ops.in_torch(x):
        return False
    if type(layer) is MaskedLinear:
        layer.check()
        return layer.execution in ("sparse", "dense")
    return type(layer) is nn.Linear


def thirds(layer: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """(*, I) three times -> (*, O / 3) three times: the first third of the outputs for the first input, and so on."""
    size, found = layer.out_features // 3, []
    while (begin := len(found)) < 3:
        end = begin + 1
        while end < 3 and inputs[end] is inputs[begin]:
            end += 1
        found += _rows(layer, inputs[begin], begin * size, end * size).chunk(end - begin, dim=-1)
    return found


def _rows(layer: nn.Module, x: Tensor, begin: int, end: int) -> Tensor:
    """The outputs from begin to end."""
    bias = None if layer.bias is None else layer.bias[begin:end]
    if type(layer) is nn.Linear:
        return F.linear(x, layer.weight[begin:end], bias)
    if layer.execution == "dense":
        return layer.multiply(layer._dense_weight()[begin:end], bias, x)
    part = _part(layer, begin, end)
    indices = [[each] for each in (*part.pattern.indices, part.plan)]
    y = ops.chain(x.reshape(-1, x.shape[-1]), [layer.values[part.first : part.last]], [bias], *indices)
    return y.view(*x.shape[:-1], end - begin)


def _part(layer: MaskedLinear, begin: int, end: int) -> _Part:
    """Made once for the indices that there are."""
    crow, col = layer.crow_indices, layer.col_indices
    kept = _KEPT.get(layer)
    if kept is None or kept.col_indices is not col or kept.version != col._version:
        kept = _KEPT[layer] = _Parts(col, col._version, {})
    if (begin, end) not in kept.made:
        first, last = crow[begin].item(), crow[end].item()
        pattern = Pattern(crow[begin : end + 1] - first, col[first:last].clone(), (end - begin, layer.in_features))
        kept.made[begin, end] = _Part(pattern, ops.compile_plan(pattern), first, last)
    return kept.made[begin, end]

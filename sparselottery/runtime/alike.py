"""Frozen chains with alike rows together: those of a hidden layer have no order but that of the next layer's columns.

Kernels multiply rows that follow each other and have the same columns four at a time. Blocks of permuted weights have
their rows anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.abi import ALIKE
from ..kernels.cpu_stages import Linear
from ..orders import Order, alike_rows, is_natural, permuted_pattern
from ..pattern import Pattern


def together(stages: list[Linear]) -> list[Linear]:
    """The same chain; rows of a hidden layer of which at least `ALIKE` have the same columns follow each other.

    The columns of the next layer follow them, and so sums there are taken in another order.
    """
    placed, columns = [], _natural(stages[0].in_features)
    for number, stage in enumerate(stages, 1):
        pattern = Pattern(stage.crow_indices, stage.col_indices, (len(stage.crow_indices) - 1, stage.in_features))
        rows = _order(pattern) if number < len(stages) else _natural(pattern.shape[0])
        if not (is_natural(rows) and is_natural(columns)):
            pattern, index = permuted_pattern(pattern, pattern.shape, Order(rows, columns))
            bias = None if stage.bias is None else stage.bias[rows]
            stage = stage._replace(
                crow_indices=pattern.crow_indices,
                col_indices=pattern.col_indices,
                values=stage.values[index],
                bias=bias,
            )
        placed.append(stage)
        columns = rows
    return placed


def _order(pattern: Pattern) -> Tensor:
    """The rows, those that are alike at the place of the first of them, if they are enough and have survivors."""
    first, counts = alike_rows(pattern)
    few = (counts < ALIKE) | (pattern.crow_indices.diff() == 0)
    return torch.where(few, _natural(len(first)), first).argsort(stable=True)


def _natural(lines: int) -> Tensor:
    return torch.arange(lines, device="cpu")

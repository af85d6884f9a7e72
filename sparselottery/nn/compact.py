"""A weight without its dead rows and columns: those in which nothing survived.

A row is an output, or a filter; a column is an input, or an input channel with all of its taps. What is left is a
smaller dense weight (O', C', ...): inputs of dead columns are not read, outputs of dead rows are their bias.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..pattern import Pattern


def live(pattern: Pattern, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Which rows (O,) and columns (C,) of a weight (O, C, ...) have a survivor: bool.

    Where nothing survived, the first row and column count as live: what is left is never empty.
    """
    rows = pattern.crow_indices.diff() > 0
    columns = torch.zeros(shape[1], dtype=torch.bool, device=rows.device)
    columns[pattern.col_indices // math.prod(shape[2:])] = True
    if not pattern.nnz:
        rows[0] = columns[0] = True
    return rows, columns


def live_shape(pattern: Pattern, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(O', C', ...)"""
    rows, columns = live(pattern, shape)
    return int(rows.sum()), int(columns.sum()), *shape[2:]


def live_indices(pattern: Pattern, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The live rows (O',) and columns (C',), and where each value is in (O', C', ...) flattened (nnz,): int64."""
    rows, columns = live(pattern, shape)
    taps = math.prod(shape[2:])
    row = (rows.cumsum(0) - 1)[pattern.row_indices()]
    column = (columns.cumsum(0) - 1)[pattern.col_indices // taps]
    positions = (row * columns.sum() + column) * taps + pattern.col_indices % taps
    return rows.nonzero().flatten(), columns.nonzero().flatten(), positions


def gather(x: Tensor, columns: Tensor, dim: int = -1, channels_last: bool = False) -> Tensor:
    """x at the live columns of dimension `dim`: (*, C) -> (*, C'). channels_last: x is images in this format."""
    if channels_last:
        return gather(x.movedim(1, -1), columns).movedim(-1, 1)
    return x.index_select(dim, columns)


def put_back(y: Tensor, rows: Tensor | None) -> Tensor:
    """y (N, O, ...) with its second dimension as it was before it was put into the order `rows`, None: the natural."""
    return y if rows is None else torch.empty_like(y).index_copy(1, rows, y)


def spread(
    y: Tensor, rows: Tensor, bias: Tensor | None, size: int, dim: int = -1, channels_last: bool = False
) -> Tensor:
    """y in the live rows of dimension `dim`, bias (O,) or 0 in the others: (*, O') -> (*, O), O = size.

    channels_last: y is images, and the result is in this format.
    """
    if channels_last:
        return spread(y.movedim(1, -1), rows, bias, size).movedim(-1, 1)
    other = y.new_zeros(size) if bias is None else bias.to(y.dtype)
    shape = list(y.shape)
    shape[dim] = size
    return other.view(-1, *[1] * (-1 - dim)).expand(shape).index_copy(dim, rows, y)

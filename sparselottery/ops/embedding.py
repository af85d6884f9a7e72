"""The op `rows` and its gradient: rows of a sparse matrix (V, D), by their numbers.

op              equation                                  gradient
rows            y[n] = W[ids[n]]                          rows_backward
rows_backward   gvalues = Σ gy[n] at row ids[n], of the pattern       rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.reference import rows as rows_of
from ..kernels.reference import rows_gradient
from .common import LIBRARY, check_tensor

LIBRARY.define(
    "rows(Tensor ids, Tensor values, Tensor crow_indices, Tensor col_indices, int columns, int padding) -> Tensor"
)
LIBRARY.define("rows_backward(Tensor gy, Tensor ids, Tensor crow_indices, Tensor col_indices, int padding) -> Tensor")
_ROWS, _ROWS_BACKWARD = torch.ops.sparselottery.rows.default, torch.ops.sparselottery.rows_backward.default


def rows(
    ids: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, columns: int, padding: int | None
) -> Tensor:
    """The rows (*, D) of W (V, D), D = columns, with the numbers (*): int32 or int64.

    Differentiable in values (nnz,), but for row `padding`. Raises IndexError on the CPU for numbers outside [0, V), and
    TypeError for others than integers.
    """
    check_tensor("ids", ids)
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids: expected int32 or int64, got {ids.dtype}")
    return _ROWS(ids, values, crow_indices, col_indices, columns, -1 if padding is None else padding)


def _rows_impl(ids, values, crow_indices, col_indices, columns, padding):
    if ids.is_cpu and ids.numel():
        low, high = map(int, ids.aminmax())
        if low < 0 or high >= len(crow_indices) - 1:
            raise IndexError(f"ids: expected numbers in [0, {len(crow_indices) - 1}), got {low} to {high}")
    return rows_of(ids, values, crow_indices, col_indices, columns)


def _rows_fake(ids, values, crow_indices, col_indices, columns, padding):
    return values.new_empty((*ids.shape, columns))


def _rows_setup(ctx, inputs, output):
    ids, _, crow_indices, col_indices, _, ctx.padding = inputs
    ctx.save_for_backward(ids, crow_indices, col_indices)


def _rows_gradients(ctx, gy):
    return None, _ROWS_BACKWARD(gy, *ctx.saved_tensors, ctx.padding), None, None, None, None


def _backward_impl(gy, ids, crow_indices, col_indices, padding):
    return rows_gradient(gy, ids, crow_indices, col_indices, padding)


def _backward_fake(gy, ids, crow_indices, col_indices, padding):
    return gy.new_empty(col_indices.shape)


def _backward_setup(ctx, inputs, output):
    gy, *indices, ctx.padding = inputs
    ctx.columns = gy.shape[-1]
    ctx.save_for_backward(*indices)


def _backward_gradients(ctx, ggvalues):
    ids, crow_indices, col_indices = ctx.saved_tensors
    ggy = _ROWS(ids, ggvalues, crow_indices, col_indices, ctx.columns, ctx.padding)
    return ggy.masked_fill((ids == ctx.padding)[..., None], 0), None, None, None, None


LIBRARY.impl("rows", _rows_impl, "CompositeExplicitAutograd")
LIBRARY.impl("rows_backward", _backward_impl, "CompositeExplicitAutograd")
torch.library.register_fake("sparselottery::rows", _rows_fake)
torch.library.register_fake("sparselottery::rows_backward", _backward_fake)
torch.library.register_autograd("sparselottery::rows", _rows_gradients, setup_context=_rows_setup)
torch.library.register_autograd("sparselottery::rows_backward", _backward_gradients, setup_context=_backward_setup)

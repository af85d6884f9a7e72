"""SpMM over CSR: y = W x, for single surviving weights, on CUDA cores, accumulated in fp32.

    y[o, pixel, n] = epilogue(Σ over the survivors (o; c, r, s) of values * x[c, pixel ∘ (r, s), n])

x (features, ld) and y (features, ld) are batch-minor rows (layout.py): one weight multiplies contiguous numbers. For a
convolution a feature is a pixel of a channel; a tap is then a constant offset, for which x carries its padding. For a
linear layer there is one pixel. The gradient of x is the same over the transpose (plan.py).

A program holds ROWS rows of W, of about as many survivors each, times BN samples. Programs of one batch tile follow
each other and walk through the columns at the same pace, so that most of what they read of x is in L1.
For few samples there is narrow.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..layout import columns
from .taps import Taps, feature


@triton.jit
def _spmm_kernel(
    x, values, bias, gate, y, order, crow_indices, col_indices, perm,
    rows, batch, columns, ld_x, ld_y, ld_gate, filters_per_group, columns_per_group,
    x_height, x_width, out_width, stride_h, stride_w, dilation_h, dilation_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, RELU: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(order + slot, mask=slot < rows, other=0)
    begin = tl.load(crow_indices + row)
    end = tl.where(slot < rows, tl.load(crow_indices + row + 1), begin)
    pixel = tl.program_id(1)
    shift = pixel // out_width * stride_h * x_width + pixel % out_width * stride_w
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    inside = (n < columns)[None, :]
    first = row // filters_per_group * columns_per_group
    total = tl.zeros([ROWS, BN], tl.float32)
    for k in range(0, tl.max(end - begin, 0), UNROLL):
        for u in tl.static_range(UNROLL):
            p = begin + k + u
            live = p < end
            column = first + tl.load(col_indices + p, mask=live, other=0)
            if perm is None:
                value = tl.load(values + p, mask=live, other=0)
            else:
                value = tl.load(values + tl.load(perm + p, mask=live, other=0), mask=live, other=0)
            at = shift + feature(column, x_height, x_width, dilation_h, dilation_w, KERNEL_H, KERNEL_W)
            part = tl.load(x + (at.to(tl.int64) * ld_x)[:, None] + n[None, :], mask=live[:, None] & inside, other=0)
            total += value.to(tl.float32)[:, None] * part.to(tl.float32)
    if bias is not None:
        total += tl.load(bias + row).to(tl.float32)[:, None]
    if RELU:
        total = tl.maximum(total, 0.0)
    at = (row * tl.num_programs(1) + pixel).to(tl.int64)
    mask = (slot < rows)[:, None] & inside
    if gate is not None:
        opened = tl.load(gate + (at * ld_gate)[:, None] + n[None, :], mask=mask, other=0)
        total = tl.where(opened > 0, total, 0.0)
    total = tl.where((n < batch)[None, :], total, 0.0)
    tl.store(y + (at * ld_y)[:, None] + n[None, :], total.to(y.dtype.element_ty), mask=mask)


WARPS, UNROLL = 4, 4


def tile(batch: int, itemsize: int) -> tuple[int, int]:
    """(ROWS, BN): 16 bytes of a row a thread, two rows a warp, or more rows where the batch is smaller."""
    per_thread = 16 // itemsize
    bn = min(triton.next_power_of_2(columns(batch)), 16 * per_thread)
    return 32 * WARPS * per_thread // bn, bn


def spmm(
    x: Tensor, values: Tensor, bias: Tensor | None, crow_indices: Tensor, col_indices: Tensor, order: Tensor,
    perm: Tensor | None, y: Tensor, batch: int, taps: Taps, relu: bool = False, gate: Tensor | None = None,
) -> None:  # fmt: skip
    """y = W x + bias, ReLU if `relu`, zero where gate <= 0.

    x, y, gate: rows (features, ld) of one dtype; values (nnz,), read at `perm` if given; bias (O,); order (O,).
    """
    rows = crow_indices.numel() - 1
    height, bn = tile(batch, x.element_size())
    grid = triton.cdiv(rows, height), taps.pixels, triton.cdiv(columns(batch), bn)
    launch(
        _spmm_kernel, grid, x=x, values=values, bias=bias, gate=gate, y=y, order=order, crow_indices=crow_indices,
        col_indices=col_indices, perm=perm, rows=rows, batch=batch, columns=columns(batch), ld_x=x.stride(0),
        ld_y=y.stride(0), ld_gate=0 if gate is None else gate.stride(0), **taps.arguments,
        KERNEL_H=taps.kernel_h, KERNEL_W=taps.kernel_w, RELU=relu, ROWS=height, BN=bn, UNROLL=UNROLL, num_warps=WARPS,
    )  # fmt: skip

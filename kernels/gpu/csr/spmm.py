"""SpMM over CSR: y = W x, for single surviving weights, on CUDA cores, accumulated in fp32.

    y[o, pixel, n] = epilogue(Σ over the survivors (o; c, r, s) of values * x[c, pixel ∘ (r, s), n])

x (features, ld) and y (features, ld) are batch-minor rows (layout.py): one weight multiplies contiguous numbers. For a
convolution a feature is a pixel of a channel; a tap is then a constant offset, for which x carries its padding. For a
linear layer there is one pixel. The gradient of x is the same over the transpose (plan.py).

A program holds ROWS rows of W, of about as many survivors each, times BN samples. Programs of one batch tile follow
each other and walk through the columns at the same pace, so that most of what they read of x is in L1.
`spmm_narrow`, for few samples, where reading W is all the time, reads 16-bit indices and each weight once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..layout import columns
from .taps import Taps, feature


@triton.jit
def _spmm_kernel(
    x, values, bias, gate, y, order, crow_indices, col_indices, perm,
    rows, batch, columns, pixels, ld_x, ld_y, ld_gate, filters_per_group, columns_per_group,
    x_height, x_width, out_width, stride_h, stride_w, dilation_h, dilation_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, RELU: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    tiles, program = tl.cdiv(rows, ROWS), tl.program_id(0)
    slot = program % tiles * ROWS + tl.arange(0, ROWS)
    row = tl.load(order + slot, mask=slot < rows, other=0)
    begin = tl.load(crow_indices + row)
    end = tl.where(slot < rows, tl.load(crow_indices + row + 1), begin)
    pixel = program // tiles % pixels
    shift = pixel // out_width * stride_h * x_width + pixel % out_width * stride_w
    n = program // tiles // pixels * BN + tl.arange(0, BN)
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
        total = tl.where(total < 0, 0.0, total)  # NaN stays, as in torch
    at = (row * pixels + pixel).to(tl.int64)
    mask = (slot < rows)[:, None] & inside
    if gate is not None:
        opened = tl.load(gate + (at * ld_gate)[:, None] + n[None, :], mask=mask, other=0)
        total = tl.where(opened > 0, total, 0.0)
    total = tl.where((n < batch)[None, :], total, 0.0)
    tl.store(y + (at * ld_y)[:, None] + n[None, :], total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _spmm_narrow_kernel(
    x, values, bias, y, crow_indices, col_indices, batch, stride_split, stride_n,
    NB: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    begin, end = tl.load(crow_indices + row), tl.load(crow_indices + row + 1)
    n = tl.arange(0, NB)
    total = tl.zeros([BK, NB], tl.float32)
    for k in range(begin + split * BK, end, splits * BK):
        p = k + tl.arange(0, BK)
        live = p < end
        column = tl.load(col_indices + p, mask=live, other=0).to(tl.int32)
        if col_indices.dtype.element_ty == tl.int16:
            column = column & 0xFFFF
        value = tl.load(values + p, mask=live, other=0).to(tl.float32)
        part = tl.load(x + column.to(tl.int64)[:, None] * NB + n[None, :], mask=live[:, None], other=0)
        total += value[:, None] * part.to(tl.float32)
    result = tl.sum(total, 0)
    if bias is not None:
        result += tl.load(bias + row).to(tl.float32)
    tl.store(y + split * stride_split + n * stride_n + row, result.to(y.dtype.element_ty), mask=n < batch)


WARPS, UNROLL = 4, 4
NARROW = 16  # samples up to which `spmm_narrow` runs
BUSY = 2048  # programs that keep a large GPU busy


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
    programs = triton.cdiv(rows, height) * taps.pixels * triton.cdiv(columns(batch), bn)
    launch(
        _spmm_kernel, (programs,),
        x=x, values=values, bias=bias, gate=gate, y=y, order=order, crow_indices=crow_indices,
        col_indices=col_indices, perm=perm, rows=rows, batch=batch, columns=columns(batch), pixels=taps.pixels,
        ld_x=x.stride(0), ld_y=y.stride(0), ld_gate=0 if gate is None else gate.stride(0), **taps.arguments,
        KERNEL_H=taps.kernel_h, KERNEL_W=taps.kernel_w, RELU=relu, ROWS=height, BN=bn, UNROLL=UNROLL, num_warps=WARPS,
    )  # fmt: skip


def spmm_narrow(
    x: Tensor, values: Tensor, bias: Tensor | None, crow_indices: Tensor, col_indices: Tensor
) -> Tensor:  # fmt: skip
    """x Wᵀ + bias: (N, I) -> (N, O) contiguous, for N <= NARROW; col_indices int32, or their low halves as int16."""
    (batch, _), rows = x.shape, crow_indices.numel() - 1
    samples = triton.next_power_of_2(batch)
    beside = x.new_zeros(x.shape[1], samples)  # the samples of a feature side by side
    beside[:, :batch] = x.t()
    mean = values.numel() // rows
    bk = min(max(triton.next_power_of_2(mean // 2), 64), 512 // min(samples, 4))
    splits = min(triton.cdiv(BUSY, rows), triton.cdiv(mean, 4 * bk))
    whole = splits <= 1
    y = torch.empty((max(splits, 1), batch, rows), dtype=x.dtype if whole else torch.float32, device=x.device)
    launch(
        _spmm_narrow_kernel, (rows, max(splits, 1)), x=beside, values=values, bias=bias if whole else None, y=y,
        crow_indices=crow_indices, col_indices=col_indices, batch=batch, stride_split=y.stride(0),
        stride_n=y.stride(1), NB=samples, BK=bk, num_warps=1,
    )  # fmt: skip
    if whole:
        return y[0]
    total = y.sum(0) if bias is None else y.sum(0) + bias
    return total.to(x.dtype)

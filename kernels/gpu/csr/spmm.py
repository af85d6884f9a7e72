"""SpMM over CSR: y = W x, for single surviving weights, on CUDA cores, accumulated in fp32.

    y[o, pixel, n] = epilogue(Σ over the survivors (o; c, r, s) of values * x[c, pixel ∘ (r, s), n])

x (features, ld) and y (features, ld) are batch-minor rows (layout.py): one weight multiplies contiguous numbers. For a
convolution a feature is a pixel of a channel; a tap is then a constant offset, for which x carries its padding. For a
linear layer there is one pixel. The gradient of x is the same over the transpose (plan.py).

Terms (terms.py), made once a call, say where a weight meets x: the loop knows no masks, no permutation and no taps.
Rows are sorted by their survivors, so that those of a program are of nearly equal length. What one has more than the
shortest is masked; where it is far more, all rows of the program share the work on it.

L1 bounds it. For 128 multiply-adds a warp reads 512 bytes of x in fp32 and a term, 5 clocks at 128 bytes a clock, and
executes 9.5 instructions in fp32 and 13.9 in bf16 (sm_90, Triton 3.9), 2.4 and 3.5 clocks. A program has up to 32 warps
on one batch tile, so that rows share what they read of x; a nonzero reads 4 bytes a sample for 2 FLOP. 50 registers in
fp32, 64 in bf16. For few samples there is narrow.py.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...reference import LANES
from ..launch import MULTIPROCESSORS, launch, tuned
from ..layout import whole_lanes
from .taps import Taps, first_feature
from .terms import offset_and_weight, terms

ALIKE = tl.constexpr(64)  # more steps than twice the shortest row are not worth a mask


@triton.jit
def _spmm_kernel(
    x, terms, bias, gate, y, order, crow_indices, rows, batch, columns, pixels, ld_x, ld_y, ld_gate,
    filters_per_group, x_features, x_width, out_width, stride_h, stride_w,
    RELU: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    tiles, program = tl.cdiv(rows, ROWS), tl.program_id(0)
    slot, pixel = tl.arange(0, ROWS), program // tiles % pixels
    # Beyond the last row and the last columns the last ones are computed again: nothing needs a mask.
    row = tl.load(order + tl.minimum(program % tiles * ROWS + slot, rows - 1))
    start = tl.multiple_of(tl.minimum(program // tiles // pixels * BN, columns - BN), LANES)
    n = start + tl.arange(0, BN)
    begin, end = tl.load(crow_indices + row), tl.load(crow_indices + row + 1)
    feature = first_feature(row, pixel, filters_per_group, x_features, x_width, out_width, stride_h, stride_w)
    of_x = x + (feature.to(tl.int64) * ld_x)[:, None] + n[None, :]
    of_terms = terms + begin
    count = end - begin
    shortest, longest = tl.min(count, 0), tl.max(count, 0)
    total = tl.zeros([ROWS, BN], tl.float32)

    whole = shortest // UNROLL * UNROLL
    for k in range(0, whole, UNROLL):
        for u in tl.static_range(UNROLL):
            offset, weight = offset_and_weight(tl.load(of_terms + k + u), LANES)
            total += weight[:, None] * tl.load(of_x + offset[:, None]).to(tl.float32)

    alike = tl.minimum(longest, 2 * shortest + ALIKE)
    for k in range(whole, alike):
        live = k < count
        offset, weight = offset_and_weight(tl.load(of_terms + k, mask=live, other=0), LANES)
        total += weight[:, None] * tl.load(of_x + offset[:, None], mask=live[:, None], other=0).to(tl.float32)

    if alike < longest:  # a few long rows: all slots work on one of them at a time
        for long in range(0, ROWS):
            chosen = slot == long
            p = tl.sum(tl.where(chosen, begin, 0), 0) + alike
            stop = tl.sum(tl.where(chosen, end, 0), 0)
            of_row = x + tl.sum(tl.where(chosen, feature, 0), 0).to(tl.int64) * ld_x + n[None, :]
            part = tl.zeros([ROWS, BN], tl.float32)
            for k in range(p, stop, ROWS):
                live = k + slot < stop
                offset, weight = offset_and_weight(tl.load(terms + k + slot, mask=live, other=0), LANES)
                part += weight[:, None] * tl.load(of_row + offset[:, None], mask=live[:, None], other=0).to(tl.float32)
            if p < stop:
                total += tl.where(chosen[:, None], tl.sum(part, 0)[None, :], 0)

    if bias is not None:
        total += tl.load(bias + row).to(tl.float32)[:, None]
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # NaN stays, as in torch
    at = (row * pixels + pixel).to(tl.int64)
    if gate is not None:
        gates = tl.load(gate + (at * ld_gate)[:, None] + n[None, :])
        total = tl.where(gates <= 0, 0.0, total)  # through NaN a gradient passes, as in torch
    total = tl.where((n < batch)[None, :], total, 0.0)
    tl.store(y + (at * ld_y)[:, None] + n[None, :], total.to(y.dtype.element_ty))


UNROLL = 4


class Shape(NamedTuple):
    """A program's ROWS rows times BN samples, and its warps."""

    rows: int
    bn: int
    unroll: int
    warps: int


def shape(rows: int, pixels: int, batch: int, itemsize: int) -> Shape:
    """16 bytes of a row a thread; as many warps as leave every multiprocessor two programs."""
    per_thread, samples = 16 // itemsize, whole_lanes(batch)
    bn = min(1 << (max(samples, 1).bit_length() - 1), 64)
    tiles = pixels * triton.cdiv(samples, bn)
    warps = 32
    while warps > 4 and triton.cdiv(rows, 32 * warps * per_thread // bn) * tiles < 2 * MULTIPROCESSORS:
        warps //= 2
    return Shape(32 * warps * per_thread // bn, bn, UNROLL, warps)


def spmm(
    x: Tensor, values: Tensor, bias: Tensor | None, crow_indices: Tensor, col_indices: Tensor, order: Tensor,
    perm: Tensor | None, y: Tensor, batch: int, taps: Taps, relu: bool = False, gate: Tensor | None = None,
) -> None:  # fmt: skip
    """y = W x + bias, ReLU if `relu`, zero where gate <= 0.

    x, y, gate: rows (features, ld) of one dtype; values (nnz,), read at `perm` if given; bias (O,); order (O,).
    """
    rows, columns = crow_indices.numel() - 1, whole_lanes(batch)
    of = tuned("spmm", shape(rows, taps.pixels, batch, x.element_size()))
    if of.bn > columns:
        raise ValueError(f"bn: expected at most {columns}, the columns of {batch} samples, got {of.bn}")
    programs = triton.cdiv(rows, of.rows) * taps.pixels * triton.cdiv(columns, of.bn)
    launch(
        _spmm_kernel, (programs,), x=x, terms=terms(values, perm, col_indices, x.stride(0), taps), bias=bias, gate=gate,
        y=y, order=order, crow_indices=crow_indices, rows=rows, batch=batch, columns=columns, pixels=taps.pixels,
        ld_x=x.stride(0), ld_y=y.stride(0), ld_gate=0 if gate is None else gate.stride(0), **taps.of_pixel,
        RELU=relu, ROWS=of.rows, BN=of.bn, UNROLL=of.unroll, LANES=LANES, num_warps=of.warps,
    )  # fmt: skip

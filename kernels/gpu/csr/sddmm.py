"""SDDMM over CSR: gvalues = (gy xᵀ) at the surviving weights, on CUDA cores, accumulated in fp32.

    gvalues[o; c, r, s] = Σ over pixels and n of gy[o, pixel, n] * x[c, pixel ∘ (r, s), n]

x and gy are batch-minor rows, as in spmm.py. A program takes NNZ survivors of one row of W at a time: gy's row is read
once for all of them, sums stay apart along the batch until the end.

L2 bounds it: no program shares the x of another, so that each nonzero and sample takes 4 bytes from there in fp32, for
2 FLOP. Where many survive, whole tiles are faster (tiles.py). The inner loop has no barriers and, for 128 multiply-adds
of a warp, 10.5 instructions in fp32 and 18.4 in bf16, in 96 and 66 registers (sm_90, Triton 3.9).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..launch import MULTIPROCESSORS, launch, tuned
from ..layout import whole_lanes
from .taps import Taps, feature, first_feature


@triton.jit
def _sddmm_kernel(
    gy, x, gvalues, order, crow_indices, col_indices, columns, pixels, ld_gy, ld_x,
    x_height, dilation_h, dilation_w, filters_per_group, x_features, x_width, out_width, stride_h, stride_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, NNZ: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row = tl.load(order + tl.program_id(0))
    begin, end = tl.load(crow_indices + row), tl.load(crow_indices + row + 1)
    n = tl.arange(0, BN)[None, :]  # with this axis from the start gy's row is not exchanged between threads
    gy += row.to(tl.int64) * pixels * ld_gy
    for k in range(begin + tl.program_id(1) * NNZ, end, tl.num_programs(1) * NNZ):
        p = k + tl.arange(0, NNZ)
        column = tl.load(col_indices + p, mask=p < end, other=0)
        at = feature(column, x_height, x_width, dilation_h, dilation_w, KERNEL_H, KERNEL_W)
        total = tl.zeros([NNZ, BN], tl.float32)
        of_gy = gy
        for pixel in range(0, pixels):
            first = first_feature(row, pixel, filters_per_group, x_features, x_width, out_width, stride_h, stride_w)
            of_x = x + ((first + at).to(tl.int64) * ld_x)[:, None]
            for start in range(0, columns, BN):
                inside = start + n < columns
                g = tl.load(of_gy + start + n, mask=inside, other=0)
                part = tl.load(of_x + start + n, mask=inside, other=0)
                total += g.to(tl.float32) * part.to(tl.float32)
            of_gy += ld_gy
        tl.store(gvalues + p, tl.sum(total, 1).to(gvalues.dtype.element_ty), mask=p < end)


class Shape(NamedTuple):
    """A program's survivors at a time, samples at a time, and warps; programs of a row of W."""

    nnz: int
    bn: int
    warps: int
    splits: int


def shape(rows: int, nnz: int, batch: int, itemsize: int) -> Shape:
    """All threads side by side along the batch, 16 bytes each; programs for 8 of 4 warps on each multiprocessor.

    A warp for 1024 bytes: if warps of 64 threads had less of a row, they would exchange gy's for those of others.
    """
    bn = min(triton.next_power_of_2(whole_lanes(batch)), 4096 // itemsize)
    warps = max(bn * itemsize // 1024, 1)
    at_once = 32 * 32 * warps // bn  # sums: 32 a thread of 32 a warp
    splits = min(triton.cdiv(32 * MULTIPROCESSORS, rows), triton.cdiv(nnz, rows * at_once))
    return Shape(at_once, bn, warps, splits)


def sddmm(
    gy: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, order: Tensor, batch: int, taps: Taps
) -> Tensor:
    """(nnz,) of the dtype of x; gy, x: rows (features, ld), zero in columns >= batch of gy; order (O,)."""
    rows, nnz = crow_indices.numel() - 1, col_indices.numel()
    gvalues = x.new_empty(nnz)
    of = tuned("sddmm", shape(rows, nnz, batch, x.element_size()))
    launch(
        _sddmm_kernel, (rows, of.splits), gy=gy, x=x, gvalues=gvalues, order=order, crow_indices=crow_indices,
        col_indices=col_indices, columns=whole_lanes(batch), pixels=taps.pixels, ld_gy=gy.stride(0), ld_x=x.stride(0),
        **taps.of_column | taps.of_pixel,
        KERNEL_H=taps.kernel_h, KERNEL_W=taps.kernel_w, NNZ=of.nnz, BN=of.bn, num_warps=of.warps,
    )  # fmt: skip
    return gvalues

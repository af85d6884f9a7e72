"""SDDMM of a pattern that is dense enough: whole tiles of gyᵀ x on tensor cores, of which the survivors are taken.

    partial[split, tile, o, i] = Σ over the samples n of the split of gy[row(o), n] * x[column(i), n]
    gvalues[p] = Σ over the splits of partial at survivor p

x and gy are batch-minor rows, as in spmm.py, so both operands lie in memory as tensor cores want them. A step brings
(128 + 64) rows of the samples for 2 * 128 * 64 FLOP each: 21 FLOP/B in fp32, 43 in 16 bits. The partial results are
4 bytes a weight, written and read once. Per survivor and sample sddmm.py reads a number of x from L2 instead: with
5.5 TB/s there, tiles are faster from 3 % survivors on, if they multiply at 100 TFLOP/s in fp32 or 200 in 16 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block.shape import SPLITTING, split
from ..device import capability
from ..launch import launch, tuned
from ..layout import whole_lanes

ROWS, COLUMNS = 128, 64  # of a tile
DENSITY = 0.03  # from which on tiles are faster
SAMPLES = 256  # fewer do not pay for the partial results


@triton.jit
def _sddmm_tiles_kernel(
    x, gy, partial, in_features, out_features, columns, tiles, steps, ld_x, ld_gy,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile, part, across = pid % tiles, pid // tiles, tl.cdiv(in_features, COLUMNS)
    # Beyond the border the last row and column are computed again: nobody takes them, and nothing needs a mask.
    row = tl.minimum(tile // across * ROWS + tl.arange(0, ROWS), out_features - 1)
    column = tl.minimum(tile % across * COLUMNS + tl.arange(0, COLUMNS), in_features - 1)
    n = part * steps * BM + tl.arange(0, BM)
    of_gy = gy + (row.to(tl.int64) * ld_gy)[:, None] + n[None, :]
    of_x = x + (column.to(tl.int64) * ld_x)[None, :] + n[:, None]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(columns, BM))):
        inside = n < columns
        gy_tile = tl.load(of_gy, mask=inside[None, :], other=0)
        x_tile = tl.load(of_x, mask=inside[:, None], other=0)
        acc = tl.dot(gy_tile, x_tile, acc, input_precision=PRECISION)
        n += BM
        of_gy += BM
        of_x += BM
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(partial + pid.to(tl.int64) * (ROWS * COLUMNS) + at, acc)


@triton.jit
def _take_kernel(
    partial, gvalues, order, crow_indices, col_indices, in_features, tiles, splits,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, NNZ: tl.constexpr,
):  # fmt: skip
    row = tl.load(order + tl.program_id(0))
    begin, end = tl.load(crow_indices + row), tl.load(crow_indices + row + 1)
    first = row // ROWS * tl.cdiv(in_features, COLUMNS)
    for k in range(begin, end, NNZ):
        p = k + tl.arange(0, NNZ)
        column = tl.load(col_indices + p, mask=p < end, other=0)
        at = (first + column // COLUMNS).to(tl.int64) * ROWS + row % ROWS
        from_partial = partial + at * COLUMNS + column % COLUMNS
        total = tl.zeros([NNZ], tl.float32)
        for _ in range(splits):
            total += tl.load(from_partial, mask=p < end, other=0)
            from_partial += tl.cast(tiles, tl.int64) * (ROWS * COLUMNS)  # of one tile a Python int
        tl.store(gvalues + p, total.to(gvalues.dtype.element_ty), mask=p < end)


NNZ, TAKE_WARPS = 256, 4


def pays(x: Tensor, nnz: int, out_features: int) -> bool:
    """Are tiles the faster way for x (N, I)? Strict fp32 needs GPUs that multiply it as three products in TF32."""
    has = capability(x.device)
    able = has in SPLITTING if x.dtype == torch.float32 else has >= (8, 0)
    return able and len(x) >= SAMPLES and nnz >= DENSITY * out_features * x.shape[1]


def sddmm_tiles(gy: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, order: Tensor, batch: int) -> Tensor:
    """(nnz,) of the dtype of x; gy (O, ld), x (I, ld): rows, zero in columns >= batch; order (O,).

    fp32 by three products in TF32, strict to about 2**-22 (see block/shape.py).
    """
    out_features, in_features, nnz = len(gy), len(x), col_indices.numel()
    tiles = triton.cdiv(out_features, ROWS) * triton.cdiv(in_features, COLUMNS)
    precision = "tf32x3" if x.dtype == torch.float32 else "ieee"
    of = tuned("sddmm_tiles", split(whole_lanes(batch), tiles, ROWS, x, precision))
    partial = x.new_empty(of.splits, tiles, ROWS, COLUMNS, dtype=torch.float32)
    launch(
        _sddmm_tiles_kernel, (tiles * of.splits,), x=x, gy=gy, partial=partial, in_features=in_features,
        out_features=out_features, columns=whole_lanes(batch), tiles=tiles,
        steps=triton.cdiv(whole_lanes(batch), of.bm * of.splits), ld_x=x.stride(0), ld_gy=gy.stride(0),
        ROWS=ROWS, COLUMNS=COLUMNS, BM=of.bm, PRECISION=precision, num_warps=of.warps, num_stages=of.stages,
    )  # fmt: skip
    gvalues = x.new_empty(nnz)
    launch(
        _take_kernel, (out_features,), partial=partial, gvalues=gvalues, order=order, crow_indices=crow_indices,
        col_indices=col_indices, in_features=in_features, tiles=tiles, splits=of.splits,
        ROWS=ROWS, COLUMNS=COLUMNS, NNZ=NNZ, num_warps=TAKE_WARPS,
    )  # fmt: skip
    return gvalues

"""SDDMM over blocks on tensor cores: gvalues = (gyᵀ x) at the surviving weights.

    partial[split, tile, k, r] = Σ over the samples m of the split of x[m, column(k)] * gy[m, row(r)]

x (N, I) and gy (N, O) are row-major or batch-minor. A program owns a tile of W, 64 columns by R rows, for one split of
the samples. What lies beyond the border of W is garbage that `unpack` does not read.

x and gy from L2 are the bound: 2 * 64 R / ((64 + R) itemsize) FLOP/B; of bf16 21 for R = 32, 32 for R = 64, 43 for
R = 128. Of sm_90's registers a thread has 56, 79 and 74, and 138 for R = 64 in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .plan import TILE, Tiles
from .shape import Split
from .tile import alignment, columns, load_words, readable, store_tile


@triton.jit(do_not_specialize=["tiles", "steps"])
def _block_sddmm_kernel(
    x, gy, partial, tile_row, word, tiles, batch, x_batch, gy_batch, in_features, out_features, steps,
    stride_xm, stride_xk, stride_gm, stride_gn,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, RAGGED: tl.constexpr,
    X_ALIGN: tl.constexpr, GY_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile, split = pid % tiles, pid // tiles
    row = tl.load(tile_row + tile)
    if row >= 0:
        column, n = columns(load_words(word, tile, C, K), tile, C, K), row * R + tl.arange(0, R)
        ld_x, ld_gy, m = stride_xm * X_ALIGN, stride_gm * GY_ALIGN, tl.arange(0, BM)
        of_x = m[None, :] * ld_x + column.to(tl.int64)[:, None] * stride_xk
        of_gy = m[:, None] * ld_gy + n.to(tl.int64)[None, :] * stride_gn
        start = split * steps * BM
        x += start.to(tl.int64) * ld_x
        gy += start.to(tl.int64) * ld_gy
        m += start
        acc = tl.zeros([K, R], tl.float32)
        for _ in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(batch, BM))):
            x_mask, gy_mask = (m < x_batch)[None, :], (m < gy_batch)[:, None]
            if RAGGED:
                x_mask = x_mask & (column < in_features * X_ALIGN)[:, None]
                gy_mask = gy_mask & (n < out_features * GY_ALIGN)[None, :]
            x_tile = tl.load(x + of_x, mask=x_mask, other=0)
            gy_tile = tl.load(gy + of_gy, mask=gy_mask, other=0)
            x += BM * ld_x
            gy += BM * ld_gy
            m += BM
            acc = tl.dot(x_tile, gy_tile, acc, input_precision=PRECISION)
        store_tile(partial, acc, pid, K, R)


def sddmm(x: Tensor, gy: Tensor, tiles: Tiles, block: tuple[int, int], split: Split, precision: str) -> Tensor:
    """partial (splits, tiles, 64, R) of x (N, I) and gy (N, O), for blocks (R, C) as the tiles have them."""
    (R, C), count, x_align, gy_align = block, tiles.tile_row.numel(), alignment(x), alignment(gy)
    partial = x.new_empty(split.splits, count, TILE, R, dtype=torch.float32)
    launch(
        _block_sddmm_kernel, (count * split.splits,), x=x, gy=gy, partial=partial, tile_row=tiles.tile_row,
        word=tiles.word, tiles=count, batch=len(x), x_batch=readable(x), gy_batch=readable(gy),
        in_features=x.shape[1] // x_align, out_features=gy.shape[1] // gy_align,
        steps=triton.cdiv(len(x), split.bm * split.splits), stride_xm=x.stride(0) // x_align, stride_xk=x.stride(1),
        stride_gm=gy.stride(0) // gy_align, stride_gn=gy.stride(1),
        R=R, C=C, K=TILE, BM=split.bm, RAGGED=x.shape[1] % C + gy.shape[1] % R != 0, X_ALIGN=x_align,
        GY_ALIGN=gy_align, PRECISION=precision, num_warps=split.warps, num_stages=split.stages,
    )  # fmt: skip
    return partial

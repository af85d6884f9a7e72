"""SpMM over blocks on tensor cores: y = x Wᵀ and, by the transposed plan, gx = gy W.

    y[m, n] = act(Σ over the tiles of the row of blocks of n, Σ over their columns k of x[m, column(k)] * w[tile, n, k])

x (M, K) and y (M, N) are row-major or batch-minor. A program owns BM samples of one row of blocks, OUT columns of y.
x and W from L2 are the bound: 2 BM OUT / ((BM + OUT) itemsize) FLOP/B. Of bf16 that is 43 with 128 x 64, 51 with
256 x 64 and 64 with 128 x 128; on an H100 tensor cores take some 120. On sm_90:

    64x64 bf16      BM 256    2 programs of 8 warps on a multiprocessor    60 kB of shared memory
    128x128 bf16    BM 128    2 of 8 warps, 106 registers a thread         96 kB
    64x64 fp32      BM 128    2 of 4 warps, 244 registers a thread         64 kB; 579 instructions for 128 x 64 x 32
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .plan import TILE, Tiles
from .shape import Shape
from .tile import alignment, columns, multiply, readable, with_bias


@triton.jit
def _read_matrix(of_x, words, tile, RED: tl.constexpr, BK: tl.constexpr, FLAGS: tl.constexpr):
    """x (BM, BK), of which `of_x` has the pointers (BM, 1), the samples that there are, the stride and the width."""
    x, inside, stride_xk, width = of_x
    column = columns(words, tile, RED, BK)
    mask = inside & (column < width)[None, :] if FLAGS[0] else inside
    return tl.load(x + column.to(tl.int64)[None, :] * stride_xk, mask=mask, other=0)


@triton.jit
def _block_spmm_kernel(
    x, packed, bias, gate, y, order, tile_crow, word, rows, batch, x_batch, y_batch, in_features, out_features,
    stride_xm, stride_xk, stride_ym, stride_yn, stride_gm, stride_gn,
    OUT: tl.constexpr, RED: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RAGGED: tl.constexpr,
    ALIGN: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = tl.load(order + pid % rows)
    m, n = pid // rows * BM + tl.arange(0, BM), row * OUT + tl.arange(0, OUT)
    m64 = m.to(tl.int64)[:, None]
    of_x = x + m64 * stride_xm * ALIGN, (m < x_batch)[:, None], stride_xk, in_features * ALIGN
    acc = multiply(_read_matrix, of_x, (RAGGED,), packed, tile_crow, word, row, OUT, RED, K, BM, BK, PRECISION)
    acc = with_bias(acc, bias, n, out_features, RELU)
    if gate is not None:
        gates = tl.load(
            gate + m64 * stride_gm + n.to(tl.int64)[None, :] * stride_gn,
            mask=(m < batch)[:, None] & (n < out_features)[None, :], other=0,
        )  # fmt: skip
        acc = tl.where(gates <= 0, 0.0, acc)  # through NaN a gradient passes, as in torch
    acc = tl.where((m < batch)[:, None], acc, 0)
    tl.store(
        y + m64 * stride_ym + n.to(tl.int64)[None, :] * stride_yn, acc.to(y.dtype.element_ty),
        mask=(m < y_batch)[:, None] & (n < out_features)[None, :],
    )  # fmt: skip


def spmm(x: Tensor, packed: Tensor, bias: Tensor | None, tiles: Tiles, red: int, shape: Shape, precision: str,
         y: Tensor, relu: bool = False, gate: Tensor | None = None) -> None:  # fmt: skip
    """x (N, K) times the blocks `packed` (tiles * 64 // bk, out, bk) of `tiles`, red columns wide, into y (N, O)."""
    align, rows, of_gate = alignment(x), tiles.order.numel(), (0, 0) if gate is None else gate.stride()
    launch(
        _block_spmm_kernel, (rows * triton.cdiv(readable(y), shape.bm),), x=x, packed=packed, bias=bias, gate=gate,
        y=y, order=tiles.order, tile_crow=tiles.tile_crow, word=tiles.word, rows=rows, batch=len(x),
        x_batch=readable(x), y_batch=readable(y), in_features=x.shape[1] // align, out_features=y.shape[1],
        stride_xm=x.stride(0) // align, stride_xk=x.stride(1), stride_ym=y.stride(0), stride_yn=y.stride(1),
        stride_gm=of_gate[0], stride_gn=of_gate[1],
        OUT=packed.shape[1], RED=red, K=TILE, BM=shape.bm, BK=shape.bk, RAGGED=x.shape[1] % red != 0, ALIGN=align,
        RELU=relu, PRECISION=precision, num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip

"""SpMM over blocks on tensor cores: y = x Wᵀ and, by the transposed plan, gx = gy W.

    y[m, n] = act(Σ over the tiles of the row of blocks of n, Σ over their columns k of x[m, column(k)] * w[tile, n, k])

x (M, K) and y (M, N) are row-major or batch-minor. A program owns BM samples of one row of blocks, OUT columns of y.
The words of the next tile are loaded after the tiles of this one: only so does Triton pipeline those.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .plan import TILE, Tiles
from .tile import BUSY, alignment, columns, load_words, precision, readable


@triton.jit
def _block_spmm_kernel(
    x, packed, bias, gate, y, order, tile_crow, word, rows, batch, x_batch, y_batch, in_features, out_features,
    stride_xm, stride_xk, stride_ym, stride_yn, stride_gm, stride_gn,
    OUT: tl.constexpr, RED: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RAGGED: tl.constexpr,
    ALIGN: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.load(order + tl.program_id(0) % rows)
    begin, end = tl.load(tile_crow + row) * (K // BK), tl.load(tile_crow + row + 1) * (K // BK)
    m, n, k = tl.program_id(0) // rows * BM + tl.arange(0, BM), tl.arange(0, OUT), tl.arange(0, BK)
    inside = (m < x_batch)[:, None]
    x += m.to(tl.int64)[:, None] * stride_xm * ALIGN
    packed += begin.to(tl.int64) * (OUT * BK) + n[None, :] * BK + k[:, None]
    acc = tl.zeros([BM, OUT], tl.float32)
    words = load_words(word, begin, RED, BK)
    for tile in range(begin, end):
        column = columns(words, tile, RED, BK)
        mask = inside & (column < in_features * ALIGN)[None, :] if RAGGED else inside
        x_tile = tl.load(x + column.to(tl.int64)[None, :] * stride_xk, mask=mask, other=0)
        w_tile = tl.load(packed)
        words = load_words(word, tile + 1, RED, BK)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        packed += OUT * BK
    n += row * OUT
    if bias is not None:
        acc += tl.load(bias + n, mask=n < out_features, other=0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)
    m64 = m.to(tl.int64)[:, None]
    if gate is not None:
        gates = tl.load(
            gate + m64 * stride_gm + n.to(tl.int64)[None, :] * stride_gn,
            mask=(m < batch)[:, None] & (n < out_features)[None, :], other=0,
        )  # fmt: skip
        acc = tl.where(gates > 0, acc, 0)
    acc = tl.where((m < batch)[:, None], acc, 0)
    tl.store(
        y + m64 * stride_ym + n.to(tl.int64)[None, :] * stride_yn, acc.to(y.dtype.element_ty),
        mask=(m < y_batch)[:, None] & (n < out_features)[None, :],
    )  # fmt: skip


class Shape(NamedTuple):
    """How a kernel is launched: BM samples by BK columns at a time."""

    bm: int
    bk: int
    warps: int
    stages: int


def shape(samples: int, rows: int, out: int, itemsize: int, exact: bool) -> Shape:
    """For y of `samples` by `rows` rows of blocks, `out` columns each.

    exact: fp32 on CUDA cores, which hold the tiles of a step in registers: few columns. Else it is x that the kernel
    waits for: several programs on a multiprocessor, three tiles ahead.
    """
    bm = min(max(triton.next_power_of_2(samples), 16), 128)
    while bm > 64 and triton.cdiv(samples, bm) * rows < BUSY:
        bm //= 2
    bk = 16 if exact else 64 // (itemsize // 2)
    return Shape(bm, bk, 8 if bm * out >= (4096 if exact else 16384) else 4, 3)


def spmm(x: Tensor, packed: Tensor, bias: Tensor | None, tiles: Tiles, red: int, shape: Shape, y: Tensor,
         relu: bool = False, gate: Tensor | None = None) -> None:  # fmt: skip
    """x (N, K) times the blocks `packed` (tiles * 64 // bk, out, bk) of `tiles`, red columns wide, into y (N, O)."""
    out, align, rows = packed.shape[1], alignment(x), tiles.order.numel()
    launch(
        _block_spmm_kernel, (rows * triton.cdiv(readable(y), shape.bm),), x=x, packed=packed, bias=bias, gate=gate, y=y, order=tiles.order,
        tile_crow=tiles.tile_crow, word=tiles.word, rows=rows, batch=len(x), x_batch=readable(x), y_batch=readable(y),
        in_features=x.shape[1] // align, out_features=y.shape[1], stride_xm=x.stride(0) // align,
        stride_xk=x.stride(1), stride_ym=y.stride(0), stride_yn=y.stride(1),
        stride_gm=0 if gate is None else gate.stride(0), stride_gn=0 if gate is None else gate.stride(1),
        OUT=out, RED=red, K=TILE, BM=shape.bm, BK=shape.bk, RAGGED=x.shape[1] % red != 0, ALIGN=align, RELU=relu,
        PRECISION=precision(), num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip

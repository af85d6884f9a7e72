"""Weights between CSR order, as layers hold them, and tiles, as the tensor cores read them. See plan.py.

    packed (tiles * 64 // BK, OUT, BK)     the K tiles of one direction, K contiguous, zero where there is no weight
                                           (OUT = R and K over columns, or transposed: OUT = C and K over rows)
    partial (splits, tiles, 64, R)         parts of the gradient of tiles, fp32

Whatever the border and the order in memory, the kernels that multiply see whole tiles, aligned.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .plan import TILE, Tiles, tiled


@triton.jit
def _positions(
    crow_indices, within, step, word, tile, outer, out_features, width, n, k,
    R: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr, CONV: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Of the weights (n, k) of a tile in CSR order, and which of them there are."""
    RED: tl.constexpr = R if TRANSPOSED else C
    slot = tile * (K // RED) + k // RED
    inner = tl.load(word + slot)
    if CONV:
        inner = inner & 0xFFFF
    start, stride = tl.load(within + slot), tl.load(step + slot)
    if TRANSPOSED:
        row, c, column = inner * R + k % R, n, outer * C + n
    else:
        row, c, column = outer * R + n, k % C, inner * C + k % C
    live = (row < out_features) & (column < width) & (start >= 0)
    crow = tl.load(crow_indices + row, mask=row < out_features, other=0)
    return crow + start + c * stride, live


@triton.jit
def _pack_kernel(
    values, crow_indices, tile_row, within, step, word, packed, out_features, width,
    R: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr, CONV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    outer = tl.load(tile_row + tile)
    if outer >= 0:
        OUT: tl.constexpr = C if TRANSPOSED else R
        n, k = tl.arange(0, OUT)[:, None], tl.arange(0, K)[None, :]
        position, live = _positions(
            crow_indices, within, step, word, tile, outer, out_features, width, n, k, R, C, TRANSPOSED, CONV, K
        )
        tile_values = tl.load(values + position, mask=live, other=0)
        packed += tile.to(tl.int64) * (OUT * K)
        tl.store(packed + (k // BK) * (OUT * BK) + n * BK + k % BK, tile_values)


@triton.jit
def _scatter_kernel(
    values, crow_indices, tile_row, within, step, word, dense, out_features, width, R: tl.constexpr, K: tl.constexpr
):
    tile = tl.program_id(0)
    outer = tl.load(tile_row + tile)
    if outer >= 0:
        n, k = tl.arange(0, R)[:, None], tl.arange(0, K)[None, :]
        position, live = _positions(
            crow_indices, within, step, word, tile, outer, out_features, width, n, k, R, 1, False, False, K
        )
        tile_values = tl.load(values + position, mask=live, other=0)
        dense += (outer * R).to(tl.int64) * width
        tl.store(dense + n * width + tl.load(word + tile * K + k), tile_values, mask=live)


@triton.jit(do_not_specialize=["splits"])
def _unpack_kernel(
    partial, gvalues, crow_indices, tile_row, within, step, word, out_features, width, splits,
    R: tl.constexpr, C: tl.constexpr, CONV: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    outer = tl.load(tile_row + tile)
    if outer >= 0:
        at = tl.arange(0, K)[:, None] * R + tl.arange(0, R)[None, :]
        partial += tile.to(tl.int64) * (K * R)
        total = tl.zeros([K, R], tl.float32)
        for _ in tl.range(splits, loop_unroll_factor=3):  # three loads on their way
            total += tl.load(partial + at)
            partial += tl.num_programs(0).to(tl.int64) * (K * R)
        n, k = tl.arange(0, R)[:, None], tl.arange(0, K)[None, :]
        position, live = _positions(
            crow_indices, within, step, word, tile, outer, out_features, width, n, k, R, C, False, CONV, K
        )
        tl.store(gvalues + position, tl.trans(total).to(gvalues.dtype.element_ty), mask=live)


def warps(out: int) -> int:
    """For a tile of `out` rows: a thread has 16 weights at most, for twice as many do not fit its registers."""
    return max(out * TILE // (16 * 32), 4)


def pack(values: Tensor, crow_indices: Tensor, tiles: Tiles, block: tuple[int, int], width: int, bk: int,
         transposed: bool = False, conv: bool = False) -> Tensor:  # fmt: skip
    """(nnz,) -> packed, of the same dtype. width: in_features, or channels; tiles: of the direction."""
    (R, C), count = tiled(block, transposed), tiles.tile_row.numel()
    if TILE % bk:
        raise ValueError(f"bk: expected a divisor of {TILE}, got {bk}")
    packed = values.new_empty(count * TILE // bk, C if transposed else R, bk)
    launch(
        _pack_kernel, (count,), values=values, crow_indices=crow_indices, tile_row=tiles.tile_row, within=tiles.within,
        step=tiles.step, word=tiles.word, packed=packed, out_features=crow_indices.numel() - 1, width=width,
        R=R, C=C, TRANSPOSED=transposed, CONV=conv, K=TILE, BK=bk, num_warps=warps(C if transposed else R),
    )  # fmt: skip
    return packed


def scatter(values: Tensor, crow_indices: Tensor, tiles: Tiles, block: tuple[int, int], width: int) -> Tensor:
    """(nnz,) -> W (O, I) of columns of weights (R, 1), zero elsewhere."""
    dense = values.new_zeros(crow_indices.numel() - 1, width)
    launch(
        _scatter_kernel, (tiles.tile_row.numel(),), values=values, crow_indices=crow_indices, tile_row=tiles.tile_row,
        within=tiles.within, step=tiles.step, word=tiles.word, dense=dense, out_features=len(dense), width=width,
        R=block[0], K=TILE, num_warps=warps(block[0]),
    )  # fmt: skip
    return dense


def unpack(partial: Tensor, crow_indices: Tensor, tiles: Tiles, block: tuple[int, int], width: int, gvalues: Tensor,
           conv: bool = False) -> None:  # fmt: skip
    """Sums partial over its splits into gvalues (nnz,)."""
    R, C = tiled(block)
    launch(
        _unpack_kernel, (tiles.tile_row.numel(),), partial=partial, gvalues=gvalues, crow_indices=crow_indices,
        tile_row=tiles.tile_row, within=tiles.within, step=tiles.step, word=tiles.word,
        out_features=crow_indices.numel() - 1, width=width, splits=len(partial),
        R=R, C=C, CONV=conv, K=TILE, num_warps=warps(R),
    )  # fmt: skip

"""What the block kernels share: the loop over the tiles of a row of blocks, and what comes before and after it."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..layout import is_minor, whole_lanes


@triton.jit
def load_words(word, tile, RED: tl.constexpr, BK: tl.constexpr):
    """The words of a tile of BK columns of blocks that are RED wide: a scalar, or (BK,) one for each column."""
    if BK <= RED:
        words = tl.load(word + tile * BK // RED)
    else:
        words = tl.load(word + tile * (BK // RED) + tl.arange(0, BK) // RED)
    return words


@triton.jit
def columns(blocks, tile, RED: tl.constexpr, BK: tl.constexpr):
    """The columns (BK,) of a tile, given the column of blocks of each."""
    k = tl.arange(0, BK)
    if BK <= RED:
        found = tl.max_contiguous(tl.multiple_of(blocks * RED + tile * BK % RED + k, BK), BK)
    elif RED == 1:
        found = blocks
    else:
        found = tl.max_contiguous(tl.multiple_of(blocks * RED + k % RED, RED), RED)
    return found


@triton.jit
def multiply(
    read: tl.constexpr, of_x, FLAGS: tl.constexpr, packed, tile_crow, word, row,
    OUT: tl.constexpr, RED: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(BM, OUT): x by the blocks of a row, of whose tiles `read(of_x, words, tile, RED, BK, FLAGS)` reads x (BM, BK).

    The words of the next tile are loaded after the tiles of this one: only so does Triton pipeline those.
    """
    begin, end = tl.load(tile_crow + row) * (K // BK), tl.load(tile_crow + row + 1) * (K // BK)
    packed += begin.to(tl.int64) * (OUT * BK) + tl.arange(0, OUT)[None, :] * BK + tl.arange(0, BK)[:, None]
    acc = tl.zeros([BM, OUT], tl.float32)
    words = load_words(word, begin, RED, BK)
    for tile in range(begin, end):
        x_tile = read(of_x, words, tile, RED, BK, FLAGS)
        w_tile = tl.load(packed)
        words = load_words(word, tile + 1, RED, BK)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        packed += OUT * BK
    return acc


@triton.jit
def with_bias(acc, bias, n, out_features, RELU: tl.constexpr):
    """act(acc + bias), of columns n; a ReLU keeps NaN."""
    if bias is not None:
        acc += tl.load(bias + n, mask=n < out_features, other=0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)
    return acc


@triton.jit
def store_tile(partial, acc, pid, K: tl.constexpr, R: tl.constexpr):
    """partial[pid] = acc (K, R)."""
    partial += pid.to(tl.int64) * (K * R)
    tl.store(partial + tl.arange(0, K)[:, None] * R + tl.arange(0, R)[None, :], acc)


def readable(x: Tensor) -> int:
    """How many samples of x may be read: of batch-minor rows whole vectors. Those from N on are zeros."""
    return whole_lanes(x.shape[0]) if is_minor(x) else x.shape[0]


def alignment(x: Tensor) -> int:
    """The largest power of two, up to 16, that divides the row stride of row-major x (N, F) and F; 1 if batch-minor.

    Kernels get such sizes divided by it, as a constexpr: Triton itself would only see that they are divisible by 16.
    """
    return 1 if is_minor(x) else math.gcd(16, *x.shape[1:], x.stride(0))


def clear_padding(x: Tensor) -> None:
    """Zeros where samples N.. of x are `readable`."""
    batch, features = x.shape
    x.as_strided((features, readable(x) - batch), (x.stride(1), 1), x.storage_offset() + batch).zero_()

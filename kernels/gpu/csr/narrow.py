"""SpMM over CSR for up to 64 samples, where reading W is most of the work: y = relu?(W x + bias), summed in fp32.

A row of W belongs to `split` warps, whose threads take its weights side by side. Of a weight's column of x, batch-minor
rows (I, ld) as in layout.py, each of them reads 16 bytes; a single sample is read where it stands. Nothing else is
launched: y is written as its reader wants it, and sums of a row stay within a program.

What bounds it, in bf16 on an H100 (132 SMs at 1.75 GHz, 4 instructions and 128 bytes of L1 a clock each, 3 TB/s), for
the 4.5 million weights of 4096 -> 11008 at 10 %, for which the dense product reads 90 MB in 31 us:

    samples   bytes of HBM   instructions of a thread, in all   bytes of L1 for x   so at least, in us
    1         4 a weight     10 a weight                        2                   6.0 HBM, 1.5 issue
    16        4              26 x 2 threads                     32                  6.0 HBM, 7.9 issue, 4.9 L1
    32        4              26 x 4                             64                  16 issue, 9.8 L1
    64        4              26 x 8                             128                 32 issue, 20 L1

Instructions are those of the loop for sm_90 by Triton 3.9, 40 registers. So 64 samples gain nothing at 10 %, where
their 0.5 MB of x do not stay in L1 either, and up to 2x at 5 %. Of the 26, 16 unpack and multiply 8 samples: pairs of
bf16 are read as words, for a shift and a mask are cheaper than conversions; packed products would be rounded. A bitmap
costs about 8 operations for each of 45 million positions, of integers at half the rate: 24 us for any batch.

Transposing x first is one launch, and 0.13 MB for 16 samples; without it each weight would read a sector of 32 bytes
for every sample, 16 times the L1.

Weights and columns are read 2 bytes a thread. Eight neighbours a thread would be fewer loads, but the 32 columns that
a warp reads at once of a single sample would lie in 32 lines of L1 rather than, at 10 %, in 6: at a line a clock 20 us
instead of 4.6. Columns as 8-bit differences, 3 bytes a weight instead of 4, take 4.5 us of HBM, but prefix sums: 26
instructions a weight instead of 10, 6 of them shuffles, which take the path of the loads: 8 us there instead of 4.6.
With 4 bits a fifth of the weights, 0.9 ** 15, would need padding beside that.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...reference import unpack
from ..launch import MULTIPROCESSORS, launch, tuned
from ..layout import is_minor, whole_lanes


@triton.jit
def _low(pairs):
    return (pairs << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(pairs):
    return (pairs & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _add(
    total, odd, x, inside, values, col_indices, k, length,
    LD: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The sums with BK * UNROLL more weights of each row; MASKED where rows may end; inside: samples that there are."""
    other = 0 if MASKED else None
    for u in tl.static_range(UNROLL):
        at = k + u * BK + tl.arange(0, BK)[None, :]
        live = at < length[:, None] if MASKED else None
        column = tl.load(col_indices + at, mask=live, other=other).to(tl.int64)
        value = tl.load(values + at, mask=live, other=other).to(tl.float32)
        mask = live[:, :, None] if MASKED else inside
        if MASKED and inside is not None:
            mask = mask & inside
        part = tl.load(x + (column * LD)[:, :, None], mask=mask, other=None if mask is None else 0)
        if part.dtype == tl.uint32:
            total += value[:, :, None] * _low(part)
            odd += value[:, :, None] * _high(part)
        else:
            total += value[:, :, None] * part.to(tl.float32)
    return total, odd


@triton.jit
def _spmm_narrow_kernel(
    x, values, bias, y, order, crow_indices, col_indices, rows, batch, columns, stored, stride_n, stride_row,
    LD: tl.constexpr, NB: tl.constexpr, NY: tl.constexpr, RAGGED: tl.constexpr, RELU: tl.constexpr,
    ROWS: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(order + slot, mask=slot < rows, other=0)
    begin = tl.load(crow_indices + row)
    length = tl.where(slot < rows, tl.load(crow_indices + row + 1) - begin, 0)
    WORD: tl.constexpr = 2 if NB > 1 and x.dtype.element_ty == tl.bfloat16 else 1
    if WORD == 2:
        x = x.to(tl.pointer_type(tl.uint32))
    n = tl.arange(0, NB // WORD)[None, None, :]
    inside = n * WORD < columns if RAGGED else None
    x += n
    values += begin[:, None]
    col_indices += begin[:, None]
    total = tl.zeros([ROWS, BK, NB // WORD], tl.float32)
    odd = total
    whole = tl.min(length, 0) // (BK * UNROLL) * (BK * UNROLL)
    for k in range(0, whole, BK * UNROLL):
        total, odd = _add(total, odd, x, inside, values, col_indices, k, length, LD // WORD, BK, UNROLL, False)
    for k in range(whole, tl.max(length, 0), BK * UNROLL):
        total, odd = _add(total, odd, x, inside, values, col_indices, k, length, LD // WORD, BK, UNROLL, True)
    result = tl.sum(total, 1)
    if WORD == 2:
        result = tl.join(result, tl.sum(odd, 1)).reshape(ROWS, NB)
    if bias is not None:
        result += tl.load(bias + row).to(tl.float32)[:, None]
    if RELU:
        result = tl.where(result < 0, 0.0, result)  # NaN stays, as in torch
    n = tl.arange(0, NY)
    result = tl.where((n < batch)[None, :], result, 0.0)
    at = row.to(tl.int64)[:, None] * stride_row + n.to(tl.int64)[None, :] * stride_n
    tl.store(y + at, result.to(y.dtype.element_ty), mask=(slot < rows)[:, None] & (n < stored)[None, :])


NARROW = 64  # samples up to which `spmm_narrow` runs
WARPS, MAX_SPLIT = 4, 16
BUSY = 16 * MULTIPROCESSORS  # warps that keep a large GPU busy


class Shape(NamedTuple):
    """A program: `rows` rows of W, each of `split` warps, whose threads take `unroll` weights at a time."""

    rows: int
    split: int
    unroll: int


def shape(rows: int, nnz: int, samples: int, itemsize: int) -> Shape:
    """A warp a row; more where rows are few and long."""
    unroll = 8 if samples == 1 else 4
    step = lanes(samples, itemsize) * unroll
    useful = min(triton.cdiv(BUSY, rows), nnz // (rows * step), MAX_SPLIT)
    split = 1 << max(useful, 1).bit_length() - 1  # a power of two
    # Several rows of single samples Triton 3.6 moves between threads, with barriers at every weight.
    return Shape(1 if samples == 1 else max(WARPS // split, 1), split, unroll)


def lanes(samples: int, itemsize: int) -> int:
    """Weights that a warp takes side by side, each thread 16 bytes of x."""
    return 32 // max(samples * itemsize // 16, 1)


def spmm_narrow(
    x: Tensor, values: Tensor, bias: Tensor | None, crow_indices: Tensor, col_indices: Tensor, order: Tensor, y: Tensor,
    relu: bool = False,
) -> None:  # fmt: skip
    """y (N, O) = x Wᵀ + bias, then a ReLU if `relu`, for N <= NARROW.

    x (N, I) batch-minor, of strides (1, ld), or one sample; y row-major or batch-minor; values (nnz,); bias (O,);
    col_indices (nnz,) int32 or uint16; order (O,).
    """
    batch, rows = len(x), crow_indices.numel() - 1
    width = 1 if batch == 1 else whole_lanes(batch)
    if x.data_ptr() % 16 and batch > 1:  # a view that starts anywhere, which threads cannot read 16 bytes at a time
        x = unpack(x.as_strided((x.shape[1], width), x.stride()[::-1]).clone(), batch)
    samples = triton.next_power_of_2(width)
    stored = whole_lanes(batch) if is_minor(y) else batch
    of = tuned("spmm_narrow", shape(rows, values.numel(), samples, x.element_size()))
    launch(
        _spmm_narrow_kernel, (triton.cdiv(rows, of.rows),), x=x, values=values, bias=bias, y=y, order=order,
        crow_indices=crow_indices, col_indices=col_indices, rows=rows, batch=batch, columns=width, stored=stored,
        stride_n=y.stride(0), stride_row=y.stride(1), LD=x.stride(1), NB=samples, NY=max(samples, stored),
        RAGGED=width < samples, RELU=relu, ROWS=of.rows, BK=of.split * lanes(samples, x.element_size()),
        UNROLL=of.unroll, num_warps=of.rows * of.split,
    )  # fmt: skip

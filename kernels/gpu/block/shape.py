"""How the block kernels are launched: sizes of tiles, warps, stages, and how products of fp32 are made.

What a kernel waits for is x and gy from L2 (bytes per multiply-add in spmm.py and sddmm.py): tiles are as large as
registers allow, and programs as many as keep a large GPU busy, the same on all GPUs: so are the bits of the results.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..device import capability, shared_memory
from ..launch import MULTIPROCESSORS
from .plan import TILE

SHARED = 227 << 10  # bytes of shared memory of a multiprocessor of a large GPU
WAVES, RESIDENT = 4, 6  # of programs of the SDDMM; how many of them registers hold on a multiprocessor
LEAST_STEPS = 4  # of one of these programs: a result of fp32 is written, and read again, for each


class Shape(NamedTuple):
    """How an SpMM is launched: BM samples by BK columns at a time."""

    bm: int
    bk: int
    warps: int
    stages: int


class Split(NamedTuple):
    """How an SDDMM is launched: BM samples at a time, all samples in `splits` parts."""

    bm: int
    splits: int
    warps: int
    stages: int


def precision(x: Tensor, conv: bool = False) -> str:
    """How tl.dot multiplies x. fp32: in TF32 where torch may use it itself, else strictly.

    "tf32x3" is three products in TF32, of a = a' + a" and b = b' + b": a'b' + a'b" + a"b'. What is left out, a"b", and
    the rounding of a" and b" are some 2**-22 of ab, at random: 2**-22 sqrt(K) |ab| for K terms, where sums of fp32 as
    torch has them lose up to 2**-25 K |ab|. More than the largest fp32 is inf or NaN, as NaN is, never finite. For
    1,000 multiply-adds a warp of sm_90 executes 9 instructions, with "ieee" on CUDA cores 37, 31 of them FFMA.
    """
    if x.dtype != torch.float32:
        return "ieee"  # has no effect
    backend = torch.backends.cudnn.conv if conv else torch.backends.cuda.matmul
    if backend.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if capability(x.device) >= (9, 0) else "ieee"


def shape(samples: int, rows: int, out: int, x: Tensor, precision: str, conv: bool = False) -> Shape:
    """For y of `samples` by `rows` rows of blocks, `out` columns each, of products of x."""
    on_cuda_cores = x.dtype == torch.float32 and precision == "ieee"
    most = 256 if x.element_size() == 2 and out in (32, 64) else 128
    bm = min(max(triton.next_power_of_2(samples), 16), most)
    while bm > 64 and triton.cdiv(samples, bm) * rows < 2 * MULTIPROCESSORS:
        bm //= 2
    # Of 256 samples half as many columns: two programs fit on a multiprocessor. CUDA cores hold a step in registers.
    bk = 16 if on_cuda_cores else 32 if bm == 256 else 128 // x.element_size()
    # The accumulator has at most 64 registers of a thread, 32 on CUDA cores and where a convolution splits x.
    crowded = on_cuda_cores or (conv and precision == "tf32x3")
    warps = 8 if bm == 256 or bm * out > 32 * 4 * (32 if crowded else 64) else 4
    return Shape(bm, bk, warps, stages((bm + out) * bk * x.element_size(), x.device))


def split(samples: int, tiles: int, rows: int, x: Tensor, precision: str) -> Split:
    """For `tiles` tiles of W, `rows` rows each, of products of x."""
    on_cuda_cores = x.dtype == torch.float32 and precision == "ieee"
    bm = 16 if on_cuda_cores else 128 // x.element_size()
    step = (TILE + rows) * bm * x.element_size()
    wanted = WAVES * MULTIPROCESSORS * min(SHARED // (3 * step), RESIDENT)
    splits = min(triton.cdiv(wanted, max(tiles, 1)), triton.cdiv(samples, bm * LEAST_STEPS))
    return Split(bm, max(splits, 1), 8 if on_cuda_cores or rows > 64 else 4, stages(step, x.device))


def stages(step: int, device: torch.device) -> int:
    """Steps of a loop that are in shared memory at a time, `step` bytes each: three if they fit, else two."""
    return 3 if 3 * step <= shared_memory(device) else 2

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

SPLITTING = ((9, 0), (10, 0), (10, 3))  # compute capabilities of GPUs that multiply fp32 as three products in TF32
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
    the rounding of a" and b" are some 2**-22 of ab, at random: 2**-22 sqrt(K) |ab| for K terms, where a sum in fp32
    loses some 2**-25 K |ab|. Emulated for 64 to 4096 normal numbers, the largest error is 1 to 1.6 times torch's in
    fp32, and 2.3 times for 4096 positive ones. What is inf or NaN stays one of them; from 3.402e38 on all is inf.
    For 1,000 multiply-adds a warp of sm_90 executes 9 instructions, with "ieee" on CUDA cores 37, 31 of them FFMA.
    """
    if x.dtype != torch.float32:
        return "ieee"  # has no effect
    backend = torch.backends.cudnn.conv if conv else torch.backends.cuda.matmul
    if backend.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if capability(x.device) in SPLITTING else "ieee"


def shape(samples: int, rows: int, out: int, x: Tensor, precision: str, conv: bool = False) -> Shape:
    """For y of `samples` by `rows` rows of blocks, `out` columns each, of products of x."""
    on_cuda_cores = x.dtype == torch.float32 and precision == "ieee"
    # For 8 columns 64: of 128 samples, the pointers to x would not fit a thread's registers.
    most = 256 if x.element_size() == 2 and out in (32, 64) else 64 if out == 8 else 128
    bm = min(max(triton.next_power_of_2(samples), 16), most)
    while bm > 64 and triton.cdiv(samples, bm) * rows < 2 * MULTIPROCESSORS:
        bm //= 2
    # Of 256 samples half as many columns: two programs fit on a multiprocessor. CUDA cores hold a step in registers.
    bk = 16 if on_cuda_cores else 32 if bm == 256 else 128 // x.element_size()
    # Of a thread's registers the accumulator has at most 64, and 32 on CUDA cores and where a convolution splits x.
    crowded = on_cuda_cores or (conv and precision == "tf32x3")
    warps = 8 if bm == 256 or (bm == 128 and out > (32 if crowded else 64)) else 4
    return Shape(bm, bk, warps, stages((bm + out) * bk * x.element_size(), x.device))


def split(samples: int, tiles: int, rows: int, x: Tensor, precision: str) -> Split:
    """For `tiles` tiles of W, `rows` rows each, of products of x."""
    on_cuda_cores = x.dtype == torch.float32 and precision == "ieee"
    bm = 16 if on_cuda_cores else 128 // x.element_size()
    step = (TILE + rows) * bm * x.element_size()
    wanted = WAVES * MULTIPROCESSORS * min(SHARED // (3 * step), RESIDENT)
    splits = min(triton.cdiv(wanted, max(tiles, 1)), triton.cdiv(samples, bm * LEAST_STEPS))
    warps = 8 if rows > 64 and precision != "tf32x3" else 4
    return Split(bm, max(splits, 1), warps, stages(step, x.device))


def stages(step: int, device: torch.device) -> int:
    """Steps of a loop that are in shared memory at a time, `step` bytes each: three if they fit, else two."""
    return 3 if 3 * step <= shared_memory(device) else 2

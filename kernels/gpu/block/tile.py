"""What the block kernels share: from the words of a tile to columns, and sizes of tiles."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import columns as batch_columns
from ..layout import is_minor

BUSY = 264  # programs: two for each multiprocessor of a large GPU


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


def readable(x: Tensor) -> int:
    """How many samples of x may be read: of batch-minor rows whole vectors. Those from N on are zeros."""
    return batch_columns(x.shape[0]) if is_minor(x) else x.shape[0]


def alignment(x: Tensor) -> int:
    """The largest power of two, up to 16, that divides the row stride of row-major x (N, F) and F; 1 if batch-minor.

    Kernels get such sizes divided by it, as a constexpr: Triton itself would only see that they are divisible by 16.
    """
    return 1 if is_minor(x) else math.gcd(16, *x.shape[1:], x.stride(0))


def clear_padding(x: Tensor) -> None:
    """Zeros where samples N.. of x are `readable`."""
    batch, features = x.shape
    x.as_strided((features, readable(x) - batch), (x.stride(1), 1), x.storage_offset() + batch).zero_()


def exact(x: Tensor, precision: str) -> bool:
    """Are products of x on CUDA cores?"""
    return x.dtype == torch.float32 and precision == "ieee"


def precision(conv: bool = False) -> str:
    """Of products of fp32: TF32 only where torch may use it itself."""
    backend = torch.backends.cudnn.conv if conv else torch.backends.cuda.matmul
    return "tf32" if backend.fp32_precision == "tf32" else "ieee"

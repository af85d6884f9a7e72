"""The least time that a GPU needs for a layer: for its arithmetic at peak, or for its bytes at full bandwidth."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from time import perf_counter

import torch

from benchmarks.gpu.cases import Case, Conv, Linear, block
from benchmarks.gpu.problems import TORCH_DTYPE, precision

ADAM_ACCESSES = 6  # reads and writes of a weight and its two moments


@dataclass(frozen=True)
class Peaks:
    """Bytes and dense FLOPs a second."""

    bandwidth: float
    fp32: float
    tf32: float
    bf16: float


@lru_cache(maxsize=1)
def peaks(device: str) -> Peaks:
    """Of this device, measured: a data sheet's memory is a tenth faster than any copy."""
    return measured(device, 8192 if device == "cuda" else 64)


def described(peaks: Peaks) -> str:
    """For the head of a file."""
    return ", ".join(f"{name} {rate / 1e12:.3g} T/s" for name, rate in asdict(peaks).items()) + " (measured)"


def measured(device: str, size: int) -> Peaks:
    """The best of some copies and products of size x size matrices."""
    rates = {}
    for dtype, torch_dtype in TORCH_DTYPE.items():
        a = torch.randn(size, size, device=device).to(torch_dtype)
        with precision(dtype):
            rates[dtype] = 2 * size**3 / _best_seconds(lambda a=a: a @ a, device)
    a = torch.randn(size, size, device=device)
    b = torch.empty_like(a)
    return Peaks(2 * a.numel() * 4 / _best_seconds(lambda: b.copy_(a), device), **rates)


def _best_seconds(run, device: str) -> float:
    def seconds() -> float:
        start = perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - start

    return min(seconds() for _ in range(5))


def least_seconds(case: Case, nnz: int, peaks: Peaks) -> float | None:
    """For a weight of which nnz numbers are multiplied; None for a training step of a net.

    Each number is read or written once, the position of each block once.
    """
    if isinstance(case, Linear):
        inputs, outputs = case.batch * case.in_features, case.batch * case.out_features
        rows = case.batch
    elif isinstance(case, Conv):
        inputs = outputs = case.batch * case.channels * case.size**2
        rows = case.batch * case.size**2
    else:
        return None
    backward = case.op != "forward"
    flops = 2 * rows * nnz * (3 if backward else 1)
    numbers = (inputs + outputs + nnz) * (2 if backward else 1) + (ADAM_ACCESSES * nnz if case.op == "step" else 0)
    height, width = block(case.pattern)
    moved = numbers * TORCH_DTYPE[case.dtype].itemsize + 4 * nnz // (height * width)
    return max(flops / getattr(peaks, case.dtype), moved / peaks.bandwidth)

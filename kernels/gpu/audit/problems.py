"""The problems whose launches audit.py compiles: the functions of this package on layers of each kind.

Sizes are those of real layers: they decide which tiles are launched and what is divisible by 16. Weights are random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch

from ... import gpu
from ...reference import Geometry

# Every kind of block in bf16, as which fp16 compiles too; in fp32, exact or TF32, those whose tiles differ most.
BLOCKS = {
    (128, 128): ("bf16", "fp32"),
    (64, 64): ("bf16", "fp32"),
    (32, 32): ("bf16", "fp32"),
    (16, 16): ("bf16", "tf32"),
    (8, 8): ("bf16",),
    (128, 1): ("bf16",),
    (64, 1): ("bf16",),
    (32, 1): ("bf16", "fp32", "tf32"),
    (16, 1): ("bf16",),
}
CONV_BLOCKS = {(128, 128): ("bf16", "fp32"), (64, 64): ("bf16", "fp32", "tf32"), (16, 16): ("bf16",)}


class Problem(NamedTuple):
    name: str
    run: Callable[[], None]  # calls functions of this package on CPU tensors


def _mask(rows: int, columns: int, block: tuple[int, int], density: float = 0.1) -> torch.Tensor:
    """A random mask of whole blocks, no row of blocks empty."""
    height, width = block
    generator = torch.Generator().manual_seed(0)  # the number of weights decides what is divisible by 16
    blocks = torch.rand(-(-rows // height), -(-columns // width), generator=generator) < density
    blocks[:, 0] = True
    return blocks.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]


def _indices(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    crow_indices = torch.zeros(len(mask) + 1, dtype=torch.int32)
    crow_indices[1:] = mask.sum(1).cumsum(0)
    return crow_indices, mask.nonzero()[:, 1].int()


def _linear(
    batch: int, widths: list[int], block: tuple[int, int], dtype: torch.dtype, backward: bool = True
) -> None:  # fmt: skip
    """A chain of layers, forward and, if wanted, backward."""
    masks = [_mask(rows, columns, block) for columns, rows in pairwise(widths)]
    crow_indices, col_indices = map(list, zip(*map(_indices, masks), strict=True))
    plans = [
        gpu.plan(*indices, mask.shape[1], block)
        for *indices, mask in zip(crow_indices, col_indices, masks, strict=True)
    ]
    values = [torch.randn(len(columns), dtype=dtype) for columns in col_indices]
    biases = [torch.randn(rows, dtype=dtype) for rows in widths[1:]]
    x, gy = torch.randn(batch, widths[0], dtype=dtype), torch.randn(batch, widths[-1], dtype=dtype)
    _, saved = gpu.chain_forward(x, values, biases, crow_indices, col_indices, plans, False, backward)
    if not backward:
        return
    needs = True, [True] * len(plans), [True] * len(plans)
    gpu.chain_backward(gy, x, saved, values, crow_indices, col_indices, plans, *needs)


def _conv(batch: int, size: int, filters: int, geometry: Geometry, block: tuple[int, int], dtype: torch.dtype) -> None:
    """A convolution of square images, forward and backward."""
    taps = geometry.kernel_h * geometry.kernel_w
    channels = geometry.channels // geometry.groups
    by_tap = _mask(filters, taps * channels, block)
    indices = _indices(by_tap.view(filters, taps, channels).transpose(1, 2).flatten(1))
    plan = gpu.conv_plan(*indices, geometry, block)
    values, bias = torch.randn(len(indices[1]), dtype=dtype), torch.randn(filters, dtype=dtype)
    x = torch.randn(batch, geometry.channels, size, size, dtype=dtype)
    if block != (1, 1):
        x = x.contiguous(memory_format=torch.channels_last)
    y, winners = gpu.conv_forward(x, values, bias, *indices, plan, geometry, True, 1)
    gy = torch.randn_like(y)
    gpu.conv_backward(gy, x, y, winners, values, *indices, plan, geometry, True, 1, True, True, True)


def _in(precision: str, run: Callable[[], None]) -> None:
    """run() where torch may multiply fp32 in TF32 if precision is "tf32", and may not otherwise."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        run()
    finally:
        for backend, precision_before in zip(backends, before, strict=True):
            backend.fp32_precision = precision_before


def _square(channels: int, kernel: int, padding: int, stride: int = 1, groups: int = 1) -> Geometry:
    return Geometry(channels, kernel, kernel, stride, stride, *[padding] * 4, 1, 1, groups)


def _csr_problems() -> Iterator[Problem]:
    fp32, bf16 = torch.float32, torch.bfloat16
    yield Problem("linear 784-300-10 x60 fp32", partial(_linear, 60, [784, 300, 10], (1, 1), fp32))
    yield Problem("linear 1024 x16 fp32", partial(_linear, 16, [1024, 1024], (1, 1), fp32, False))
    for batch in (1, 16, 64):
        name, widths = f"linear 4096-11008-64 x{batch} bf16", [4096, 11008, 64]
        yield Problem(name, partial(_linear, batch, widths, (1, 1), bf16, False))
    yield Problem("conv3/2 64 x128 fp32", partial(_conv, 128, 16, 64, _square(64, 3, 1, 2), (1, 1), fp32))
    for name, dtype in (("fp32", fp32), ("bf16", bf16)):
        yield Problem(f"linear 1024 x1024 {name}", partial(_linear, 1024, [1024, 1024], (1, 1), dtype))
        yield Problem(f"linear 64-128 x256 {name}", partial(_linear, 256, [64, 128], (1, 1), dtype))  # one tile
        yield Problem(f"linear 1024 x1 {name}", partial(_linear, 1, [1024, 1024], (1, 1), dtype, False))
        yield Problem(f"conv3 64 x128 {name}", partial(_conv, 128, 16, 64, _square(64, 3, 1), (1, 1), dtype))


def _block_problems() -> Iterator[Problem]:
    yield Problem("linear 784-300-10 16x16 x60 bf16", partial(_linear, 60, [784, 300, 10], (16, 16), torch.bfloat16))
    for block, precisions in BLOCKS.items():
        run = partial(_linear, 8192, [1024, 1024], block)
        yield from _in_precisions(f"linear 1024 {block[0]}x{block[1]} x8192", run, precisions)
    for block, precisions in CONV_BLOCKS.items():
        run = partial(_conv, 128, 16, 128, _square(128, 3, 1), block)
        yield from _in_precisions(f"conv3 128 {block[0]}x{block[1]} x128", run, precisions)


def _in_precisions(name: str, run: Callable[[torch.dtype], None], precisions: tuple[str, ...]) -> Iterator[Problem]:
    for precision in precisions:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        yield Problem(f"{name} {precision}", partial(_in, precision, partial(run, dtype)))


PROBLEMS = [*_csr_problems(), *_block_problems()]

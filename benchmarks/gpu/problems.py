"""One masked layer with its input, output gradient and truth, on the device that it is measured on.

Axes: N batch, I in, O out; of images (N, C, H, W). Numbers are drawn in the dtype of the case, so that the truth, in
fp64, is that of the very numbers that everyone multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.cases import Conv, Linear, mask_of

TORCH_DTYPE = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "tf32": 2e-3, "bf16": 1e-2}  # relative to the norm of the truth; TF32 itself misses 1e-4


@dataclass(frozen=True)
class Problem:
    """weight (O, I) or (O, C, 3, 3) holds zeros where mask is False. truth: fp64 [y, gx, gvalues (nnz,), gbias].

    Images are channels_last.
    """

    x: Tensor
    weight: Tensor
    mask: Tensor
    bias: Tensor
    gy: Tensor
    truth: list[Tensor]

    @property
    def is_conv(self) -> bool:
        return self.weight.dim() == 4

    def layer(self) -> nn.Linear | nn.Conv2d:
        """The dense layer of this weight and bias."""
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        outputs, inputs, *_ = self.weight.shape
        layer = nn.Conv2d(inputs, outputs, 3, padding=1, **like) if self.is_conv else nn.Linear(inputs, outputs, **like)
        with torch.no_grad():
            layer.weight.copy_(self.weight)
            layer.bias.copy_(self.bias)
        return layer


def problem(case: Linear | Conv, device: str) -> Problem:
    """The last one is kept: cases that differ in the op alone share it."""
    return _problem(replace(case, op=""), device)


@lru_cache(maxsize=1)
def _problem(case: Linear | Conv, device: str) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    images = (case.size, case.size) if isinstance(case, Conv) else ()
    shape, inputs = case.weight_shape, case.weight_shape[1]
    mask = mask_of(case, generator)

    def randn(*size: int) -> Tensor:
        numbers = torch.randn(size, generator=generator, device=device).to(TORCH_DTYPE[case.dtype])
        return numbers.contiguous(memory_format=torch.channels_last) if len(size) == 4 else numbers

    weight = randn(*shape).contiguous() / (case.density * math.prod(shape[1:])) ** 0.5
    weight[weight == 0] = 1  # randn does give exact zeros, and torch's sparse formats would drop them
    weight *= mask
    x, gy, bias = randn(case.batch, inputs, *images), randn(case.batch, shape[0], *images), randn(shape[0])
    return Problem(x, weight, mask, bias, gy, _truth(x, weight, mask, bias, gy))


def _truth(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor, gy: Tensor) -> list[Tensor]:
    x, weight, bias = leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = F.linear(x, weight, bias) if weight.dim() == 2 else F.conv2d(x, weight, bias, padding=1)
    gx, gweight, gbias = torch.autograd.grad(y, leaves, gy.double())
    return [y.detach(), gx, gweight[mask], gbias]


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """TF32 in matrix products and convolutions for "tf32", else nowhere."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    for backend in backends:
        backend.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed

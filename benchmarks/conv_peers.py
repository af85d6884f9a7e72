"""What a masked convolution is measured against, and the masked one itself, as candidates on one problem.

Axes: N batch, C channels, O filters, H x H pixels, K x K kernel, padding K // 2. x (N, C, H, H) in, y (N, O, ...) and
gx (N, C, H, H) out, in the memory format of the problem: every pack is counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.timing import Candidate
from sparselottery import convert

if peers.SPARSEPROP_MISSING is None:
    from sparseprop.modules import SparseConv2d


@dataclass(frozen=True)
class ConvProblem:
    """A masked convolution with its input and output gradient. weight (O, C, K, K) holds zeros where mask is False."""

    x: Tensor
    weight: Tensor
    mask: Tensor
    bias: Tensor
    gy: Tensor
    stride: int
    memory_format: torch.memory_format = torch.contiguous_format

    @classmethod
    def random(
        cls, batch: int, channels: int, filters: int, kernel: int, stride: int, size: int, density: float, seed: int = 0
    ) -> ConvProblem:
        generator = torch.Generator().manual_seed(seed)
        shape = filters, channels, kernel, kernel
        mask = torch.rand(shape, generator=generator) < density
        weight = torch.randn(shape, generator=generator) / (density * channels * kernel**2) ** 0.5
        weight[weight == 0] = 1  # randn does give exact zeros, and SparseProp would prune them
        weight *= mask
        bias = torch.randn(filters, generator=generator)
        x = torch.randn(batch, channels, size, size, generator=generator)
        out = (size + 2 * (kernel // 2) - kernel) // stride + 1
        gy = torch.randn(batch, filters, out, out, generator=generator)
        return cls(x, weight, mask, bias, gy, stride)

    @property
    def padding(self) -> int:
        return self.weight.shape[-1] // 2

    def channels_last(self) -> ConvProblem:
        """The same numbers, images in channels_last."""
        last = torch.channels_last
        x, gy = (images.contiguous(memory_format=last) for images in (self.x, self.gy))
        return replace(self, x=x, gy=gy, memory_format=last)

    def truth(self) -> list[Tensor]:
        """fp64: [y, gx, gvalues (nnz,), gbias]; the first is that of the forward pass."""
        x, weight, bias = (t.double().requires_grad_() for t in (self.x, self.weight, self.bias))
        y = F.conv2d(x, weight, bias, self.stride, self.padding)
        gx, gweight, gbias = torch.autograd.grad(y, (x, weight, bias), self.gy.double())
        return [y.detach(), gx, gweight[self.mask], gbias]


def nn_conv2d(problem: ConvProblem, backward: bool) -> Candidate:
    """torch's dense layer (oneDNN), in the problem's memory format."""
    layer = _conv(problem).to(memory_format=problem.memory_format)
    return _module(problem, layer, lambda: layer.weight.grad[problem.mask], backward)


def sparselottery(problem: ConvProblem, backward: bool) -> Candidate:
    """As `convert` makes it of an example: sparse, or dense where that is faster on such images."""
    example = problem.x.detach().requires_grad_(backward)
    layer = convert(_conv(problem).train(backward), {"weight": problem.mask}, example)
    return _module(problem, layer, lambda: layer.values.grad, backward)


def sparseprop(problem: ConvProblem, backward: bool) -> Candidate:
    """Vectorised over the batch or, as its README advises (and is faster here), over rows of at least 32 pixels."""
    layer = SparseConv2d.from_dense(_conv(problem), vectorizing_over_on=problem.x.shape[-1] >= 32)
    return _module(problem, layer, lambda: layer.W_val.grad, backward)


def _conv(problem: ConvProblem) -> nn.Conv2d:
    filters, channels, kernel, _ = problem.weight.shape
    conv = nn.Conv2d(channels, filters, kernel, problem.stride, problem.padding)
    with torch.no_grad():
        conv.weight.copy_(problem.weight)
        conv.bias.copy_(problem.bias)
    return conv


def _module(problem: ConvProblem, layer: nn.Module, gvalues, backward: bool) -> Candidate:
    """peers.module; results become row-major after the clock has stopped."""
    candidate = peers.module(problem, layer, gvalues, backward, problem.memory_format)
    return Candidate(candidate.run, lambda: [result.contiguous() for result in candidate.read()])

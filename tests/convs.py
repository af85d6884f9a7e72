"""Sparse convolutions and their true results: what the tests of kernels, ops and layers share. See `chains`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from chains import EXACT_IN_FP32, integers
from torch import Tensor

from sparselottery import Pattern, ops
from sparselottery.kernels.reference import Geometry

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Conv:
    """y = x * W + b, a ReLU if `relu`, pooling; gy is y's gradient, mask the survivors of W (O, C / groups, R, S)."""

    x: Tensor
    gy: Tensor
    mask: Tensor
    values: Tensor
    bias: Tensor | None
    geometry: Geometry
    relu: bool
    pool: int

    def to(self, dtype: torch.dtype) -> Conv:
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, x=self.x.to(dtype), gy=self.gy.to(dtype), values=self.values.to(dtype), bias=bias)

    def absolute(self) -> Conv:
        bias = None if self.bias is None else self.bias.abs()
        return replace(self, x=self.x.abs(), gy=self.gy.abs(), values=self.values.abs(), bias=bias)

    @property
    def pattern(self) -> Pattern:
        return Pattern.from_mask(self.mask.flatten(1))

    def indices(self) -> tuple[Tensor, Tensor, Tensor]:
        """crow_indices, col_indices and plan."""
        pattern = self.pattern
        return pattern.crow_indices, pattern.col_indices, ops.compile_conv_plan(pattern, self.geometry)

    def leaves(self) -> list[Tensor]:
        """x, values and bias, if there is one, requiring gradients."""
        tensors = (self.x, self.values, self.bias)
        return [t.detach().clone().requires_grad_() for t in tensors if t is not None]

    def function(self):
        """ops.conv2d as a function of its leaves."""
        indices = self.indices()
        return lambda x, values, bias=None: ops.conv2d(x, values, bias, *indices, self.geometry, self.relu, self.pool)


def geometry(channels=1, kernel=(3, 3), stride=(1, 1), sides=(0, 0, 0, 0), dilation=(1, 1), groups=1) -> Geometry:
    """sides: top, bottom, left, right."""
    return Geometry(channels, *kernel, *stride, *sides, *dilation, groups)


def make(geometry: Geometry, filters=4, batch=2, size=(7, 9), density=0.5, entries=integers, bias=True, relu=False,
         pool=1, memory_format="contiguous") -> Conv:  # fmt: skip
    """A fp32 problem at a random mask."""
    mask = torch.rand(filters, geometry.columns) < density
    mask = mask.view(filters, geometry.channels // geometry.groups, geometry.kernel_h, geometry.kernel_w)
    x = entries(batch, geometry.channels, *size).to(memory_format=FORMATS[memory_format])
    gy = entries(batch, filters, *(side // pool for side in geometry.output_size(*size)))
    return Conv(x, gy, mask, entries(int(mask.sum())), entries(filters) if bias else None, geometry, relu, pool)


@st.composite
def convs(draw, **options) -> Conv:
    """Small in all but one dimension, which goes beyond a vector."""
    sizes = {"batch": draw(st.integers(0, 3)), "height": draw(st.integers(0, 6)), "width": draw(st.integers(0, 6))}
    sizes |= {
        "groups": draw(st.integers(1, 4)),
        "channels": draw(st.integers(1, 3)),
        "filters": draw(st.integers(1, 4)),
    }
    if large := draw(st.sampled_from(["", *sizes])):
        sizes[large] = draw(st.integers(7, 70 if large == "batch" else 40))
    groups, extra = sizes["groups"], (sizes["height"], sizes["width"])
    channels, filters = (groups * max(sizes[name] // groups, 1) for name in ("channels", "filters"))
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    stride, dilation = (draw(st.tuples(st.integers(1, 3), st.integers(1, 3))) for _ in range(2))
    sides = draw(st.tuples(*[st.integers(0, 3)] * 4))
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [max(span - sum(pad), 1) + e for span, pad, e in zip(spans, (sides[:2], sides[2:]), extra, strict=True)]
    torch.manual_seed(draw(st.integers(0, 2**31)))
    chosen = {
        "density": draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
        "bias": draw(st.booleans()),
        "relu": draw(st.booleans()),
        "memory_format": draw(st.sampled_from(list(FORMATS))),
    }
    shape = geometry(channels, kernel, stride, sides, dilation, groups)
    chosen["pool"] = draw(st.integers(1, min(4, *shape.output_size(*size))))
    return make(shape, filters, sizes["batch"], tuple(size), **{**chosen, **options})


def dense(conv: Conv) -> dict[str, Tensor]:
    """y and all gradients by dense torch ops and autograd, in the dtype of the problem."""
    shape = conv.geometry
    x, values, *bias = conv.leaves()
    weight = torch.zeros(conv.mask.shape, dtype=x.dtype).masked_scatter(conv.mask, values)
    padded = F.pad(x, (shape.left, shape.right, shape.top, shape.bottom))
    steps = {"stride": (shape.stride_h, shape.stride_w), "dilation": (shape.dilation_h, shape.dilation_w)}
    y = F.conv2d(padded, weight, *bias, **steps, groups=shape.groups)
    y = torch.relu(y) if conv.relu else y
    y = F.max_pool2d(y, conv.pool) if conv.pool > 1 else y
    return _named(y, torch.autograd.grad(y, [x, values, *bias], conv.gy))


def results(conv: Conv) -> dict[str, Tensor]:
    """y and all gradients by autograd over ops.conv2d."""
    inputs = conv.leaves()
    y = conv.function()(*inputs)
    return _named(y, torch.autograd.grad(y, inputs, conv.gy))


def assert_exact(got: dict[str, Tensor], conv: Conv) -> None:
    """Equal to the truth, to the bit; entries are `integers`."""
    terms = max(conv.gy.numel(), conv.mask.numel())
    assert 4 * terms < EXACT_IN_FP32, "the test itself: partial sums are not exact in fp32"
    for name, expected in dense(conv.to(torch.float64)).items():
        assert torch.equal(got[name].double(), expected), name


def assert_accurate(got: dict[str, Tensor], conv: Conv) -> None:
    """At most twice as far from the truth as dense PyTorch in the same dtype, and a few roundings of its sums."""
    theirs, truth = dense(conv), dense(conv.to(torch.float64))
    sums = dense(conv.absolute().to(torch.float64))
    for name, expected in truth.items():
        assert_close(got[name], theirs[name], expected, sums[name])


def assert_close(ours: Tensor, theirs: Tensor, truth: Tensor, sums: Tensor) -> None:
    """sums: the truth for the absolute values of all inputs, so the size that rounding errors are relative to."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, truth.shape)
    if truth.numel():
        slack = 4 * torch.finfo(ours.dtype).eps * float(sums.max())
        error, budget = (float((t.double() - truth).abs().max()) for t in (ours, theirs))
        assert error <= 2 * budget + slack


def _named(y: Tensor, grads) -> dict[str, Tensor]:
    return dict(zip(("y", "gx", "gvalues", "gbias"), (y.detach(), *grads), strict=False))

"""The op `conv_transpose2d`: what is the gradient of its image to `conv2d` is the result here, and the other way round.

    y = gx of conv2d at gy = x        gx = conv2d(gy)        gvalues = gvalues of conv2d for the image gy at gy = x

x (N, O, H, W), y (N, C, OH, OW): the pattern and its plan are those of the convolution (O, C x taps) from y to x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.reference import Geometry, conv_weight, image_format
from .common import LIBRARY, gradients_by_torch, operands
from .conv import _forward as convolve
from .conv import _gradients as gradients

LIBRARY.define(
    "conv_transpose2d(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor plan, int[] geometry, "
    "SymInt[] size) -> Tensor"
)
LIBRARY.define(
    "conv_transpose2d_backward(Tensor gy, Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, "
    "Tensor plan, int[] geometry, bool need_x, bool need_values) -> (Tensor, Tensor)"
)
_OP = torch.ops.sparselottery.conv_transpose2d.default
_OP_BACKWARD = torch.ops.sparselottery.conv_transpose2d_backward.default
_REST = (1, 1), False, 1  # no blocks; no ReLU, no pooling


def conv_transpose2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    crow_indices: Tensor,
    col_indices: Tensor,
    plan: Tensor,
    geometry: Geometry,
    size: Sequence[int],
) -> Tensor:
    """(N, O, H, W) -> (N, C, *size), C channels of the geometry; channels_last where x is that, else contiguous.

    geometry: of the convolution, which makes images of (H, W) of those of `size`. Differentiable in x, values and bias.
    Under autocast everything is computed from inputs rounded to its dtype.
    Raises TypeError if x, values and bias differ in dtype, ValueError if sizes do not fit.
    """
    x, values, bias = operands(x, values, bias, col_indices, geometry.channels)
    filters = len(crow_indices) - 1
    if x.dim() != 4 or x.shape[1] != filters:
        raise ValueError(f"x: expected shape (N, {filters}, H, W), got {tuple(x.shape)}")
    y = _OP(x, values, crow_indices, col_indices, plan, geometry, size)
    return y if bias is None else y + bias.view(-1, 1, 1)


def _impl(x, values, crow_indices, col_indices, plan, geometry, size):
    image, none, indices = _image(x, geometry, size), x.new_empty(0), (crow_indices, col_indices, plan)
    block, relu, pool = _REST
    if not image.numel() or not x.numel():
        return image.zero_()
    return gradients(x, image, none, none, values, *indices, block, geometry, relu, pool, True, False, False)[0]


def _image(x, geometry, size):
    return x.new_empty((x.shape[0], geometry[0], *size)).contiguous(memory_format=image_format(x))


def _fake(x, values, crow_indices, col_indices, plan, geometry, size):
    return _image(x, geometry, size)


def _backward_impl(gy, x, values, crow_indices, col_indices, plan, geometry, need_x, need_values):
    (block, relu, pool), indices, none = _REST, (crow_indices, col_indices, plan), gy.new_empty(0)
    gx = gvalues = none
    if not x.numel() or not gy.numel():
        return torch.zeros_like(x), torch.zeros_like(values)
    gy = gy.contiguous(memory_format=image_format(gy))
    if need_x:
        gx = convolve(gy, values, None, *indices, block, geometry, relu, pool)[0]
    if need_values:
        needs = False, True, False
        gvalues = gradients(x, gy, none, none, values, *indices, block, geometry, relu, pool, *needs)[1]
    return gx, gvalues


def _backward_fake(gy, x, values, crow_indices, col_indices, plan, geometry, need_x, need_values):
    gx = torch.empty_like(x, memory_format=image_format(gy)) if need_x else gy.new_empty(0)
    return gx, gy.new_empty(values.shape if need_values else 0)


def _setup(ctx, inputs, output):
    x, values, crow_indices, col_indices, plan, ctx.geometry, ctx.size = inputs
    ctx.save_for_backward(x, values, crow_indices, col_indices, plan)


def _gradients_of(ctx, gy):
    x, values, *indices = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    if torch.is_grad_enabled():

        def compute(x, values):
            return _by_torch(x, values, *indices[:2], Geometry(*ctx.geometry), ctx.size)

        grads = gradients_by_torch(compute, (x, values), needs, gy)
    else:
        grads = _OP_BACKWARD(gy, x, values, *indices, ctx.geometry, *needs)
        grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return *grads, None, None, None, None, None


def _by_torch(x, values, crow_indices, col_indices, geometry, size):
    """The same by torch's operators."""
    weight = conv_weight(values, crow_indices, col_indices, geometry)
    steps = (geometry.stride_h, geometry.stride_w), (geometry.dilation_h, geometry.dilation_w)
    whole = F.conv_transpose2d(x, weight, None, steps[0], groups=geometry.groups, dilation=steps[1])
    height, width = size
    missing = (0, max(0, width + geometry.left - whole.shape[3]), 0, max(0, height + geometry.top - whole.shape[2]))
    whole = F.pad(whole, missing)
    return whole[:, :, geometry.top : geometry.top + height, geometry.left : geometry.left + width]


LIBRARY.impl("conv_transpose2d", _impl, "CompositeExplicitAutograd")
LIBRARY.impl("conv_transpose2d_backward", _backward_impl, "CompositeExplicitAutograd")
torch.library.register_fake("sparselottery::conv_transpose2d", _fake)
torch.library.register_fake("sparselottery::conv_transpose2d_backward", _backward_fake)
torch.library.register_autograd("sparselottery::conv_transpose2d", _gradients_of, setup_context=_setup)

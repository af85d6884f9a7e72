"""The ops `conv2d` and `conv2d_backward`: one sparse 2-D convolution, with the ReLU and max pooling that may follow."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import cpu, gpu, native, reference
from ..kernels.reference import Geometry, Norm
from ..pattern import Pattern
from .common import LIBRARY, Block, gradients_by_torch, in_torch, operands, untraced

LIBRARY.define(
    "conv2d(Tensor x, Tensor values, Tensor? bias, Tensor crow_indices, Tensor col_indices, Tensor plan, "
    "int[] block, int[] geometry, bool relu, int pool) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "conv2d_backward(Tensor gy, Tensor x, Tensor y, Tensor winners, Tensor values, Tensor crow_indices, "
    "Tensor col_indices, Tensor plan, int[] block, int[] geometry, bool relu, int pool, bool need_x, "
    "bool need_values, bool need_bias) -> (Tensor, Tensor, Tensor)"
)
_CONV2D, _CONV2D_BACKWARD = torch.ops.sparselottery.conv2d.default, torch.ops.sparselottery.conv2d_backward.default


def compile_conv_plan(pattern: Pattern, geometry: Geometry, block: Block = (1, 1)) -> Tensor:
    """The native kernels' schedule for filters of a geometry: opaque int32, empty where no native kernel runs.

    block: of which the mask consists, filters x channels at one tap, for the kernels that use it.
    """
    device, indices = pattern.crow_indices.device, (pattern.crow_indices, pattern.col_indices)
    if all(pattern.shape) and gpu.runs_on(device):
        return gpu.conv_plan(*indices, geometry, block).words
    if all(pattern.shape) and device.type == "cpu" and cpu.available():
        return cpu.conv_plan(*indices, geometry)
    return pattern.crow_indices.new_empty(0)


def conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    crow_indices: Tensor,
    col_indices: Tensor,
    plan: Tensor,
    geometry: Geometry,
    relu: bool = False,
    pool: int = 1,
    norm: Norm | None = None,
    block: Block = (1, 1),
) -> Tensor:
    """max_pool?(relu?(x * W + b)): (N, C, H, W) -> (N, O, OH // pool, OW // pool).

    Differentiable in x, values and bias. Windows of the pooling are `pool` x `pool` and do not overlap; 1 is none, 15
    the largest. A `norm` comes before the ReLU, and only where `takes_norm(x)`. block: that of the plan. y is
    channels_last where x is that and not contiguous too, else contiguous. Under autocast everything is computed from
    inputs rounded to its dtype.
    Raises TypeError if x, values and bias differ in dtype, ValueError if sizes are not those of the indices and the
    geometry or the kernel does not fit into the padded image.
    """
    x, values, bias = operands(x, values, bias, col_indices, crow_indices.shape[0] - 1)
    if x.dim() != 4 or x.shape[1] != geometry.channels:
        raise ValueError(f"x: expected shape (N, {geometry.channels}, H, W), got {tuple(x.shape)}")
    if min(geometry.output_size(x.shape[2], x.shape[3])) < 1:
        raise ValueError(f"x: expected an image that the kernel fits into, got {tuple(x.shape)} for {geometry}")
    if pool != 1 and not 1 < pool <= min(15, *geometry.output_size(x.shape[2], x.shape[3])):
        raise ValueError(f"pool: expected windows of 1 to 15 pixels that fit into the output, got {pool}")
    args = x, values, bias, crow_indices, col_indices, plan, block, geometry, relu, pool
    if norm is not None:
        return _forward(*args, norm)[0]
    if in_torch(x):
        return reference.conv(x, values, bias, crow_indices, col_indices, geometry, relu, pool)
    if torch.compiler.is_compiling():
        return _CONV2D(*args)[0]
    if not torch.is_grad_enabled():
        return (_forward if untraced(x) else _CONV2D)(*args)[0]
    if untraced(x):
        with torch.no_grad():
            done = _forward(*args)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            done = _CONV2D(*args)
    return _APPLY(done, args[3:7], args[7:], x, values, bias)


def call_conv(
    x: Tensor, layer: torch.nn.Module, relu: bool = False, pool: int = 1, norm: Norm | None = None
) -> Tensor | None:
    """`conv2d` of a masked layer, where all is as usual, by one native call that looks for itself; else None."""
    if native.LIBRARY is None or torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return None
    y = native.LIBRARY.conv(x, native.ORDINARY, layer, relu, pool, norm, torch.get_num_threads())
    if type(y) is not tuple:
        return y
    done, indices, inputs = y
    return _APPLY(done, (*indices, (1, 1)), (layer.geometry, relu, pool), *inputs)


def call_conv_after_conv(
    x: Tensor,
    first: torch.nn.Module,
    relu_first: bool,
    layer: torch.nn.Module,
    relu: bool,
    pool: int,
    norm: Norm | None,
) -> Tensor | None:
    """Two masked layers in one native call, in which what is between them stays in the cache; same bits as two calls.

    None where anything is unusual, gradients are asked for or two calls are better: `first` has to be much the smaller.
    """
    if native.LIBRARY is None or torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return None
    how = relu_first, layer, relu, pool, norm, torch.get_num_threads()
    return native.LIBRARY.conv_after_conv(x, native.ORDINARY, first, *how)


def takes_norm(x: Tensor) -> bool:
    """May a call on x have a `norm`? Where nobody asks for gradients, traces or casts."""
    observed = torch.is_grad_enabled() or torch.compiler.is_compiling() or in_torch(x)
    return not observed and x.is_cpu and untraced(x) and not torch.is_autocast_enabled("cpu")


class _Conv2d(torch.autograd.Function):
    """Eager gradients of what is computed before: forward((y, winners), indices, settings, x, values, bias).

    indices: (crow_indices, col_indices, plan, block); settings: (geometry, relu, pool). In a third of the time of the
    op's registered autograd.
    """

    @staticmethod
    def forward(ctx, done, indices, settings, *inputs):
        _keep(ctx, done, indices, settings, inputs)
        return done[0]

    @staticmethod
    def backward(ctx, gy):
        return None, None, None, *_backward(ctx, gy, ctx.needs_input_grad[3:])


_APPLY = super(torch.autograd.Function, _Conv2d).apply  # without a look for functorch, which everybody here has had


def _keep(ctx, done, indices, settings, inputs):
    """For `_backward`."""
    (y, winners), (_, relu, pool) = done, settings
    ctx.save_for_backward(*inputs, y if relu and pool == 1 else None, winners)
    ctx.indices, ctx.settings = indices, settings


def _setup_context(ctx, inputs, output):
    _keep(ctx, output, inputs[3:7], inputs[7:], inputs[:3])


def _backward(ctx, gy, needs):
    """Of x, values and bias; None where not needed."""
    kept = ctx.saved_tensors
    if native.LIBRARY is not None:  # where all is as usual there is a shorter way
        call = native.ORDINARY, kept, ctx.indices, ctx.settings, needs, torch.get_num_threads()
        gradients = native.LIBRARY.conv_gradients(gy, *call)
        if gradients is not None:
            return gradients
    x, values, bias, y, winners = kept
    if torch.is_grad_enabled():
        (crow_indices, col_indices, *_), (geometry, *rest) = ctx.indices, ctx.settings

        def compute(x, values, bias):
            return reference.conv(x, values, bias, crow_indices, col_indices, Geometry(*geometry), *rest)

        return tuple(gradients_by_torch(compute, (x, values, bias), needs, gy))
    y, winners = (x.new_empty(0) if each is None else each for each in (y, winners))
    op = _gradients if untraced(gy) and untraced(x) else _CONV2D_BACKWARD
    gradients = op(gy, x, y, winners, values, *ctx.indices, *ctx.settings, *needs)
    return tuple(grad if need else None for grad, need in zip(gradients, needs, strict=True))


def _op_backward(ctx, gy, _gwinners):
    return *_backward(ctx, gy, ctx.needs_input_grad[:3]), *[None] * 7


def _backend(x, plan, block, pool):
    """The kernels that this call runs on, and the plan as they take it."""
    if gpu.runs_on(x.device):
        plan = gpu.Plan(plan, tuple(block))
        return (gpu if x.numel() and pool == 1 and gpu.supports(x.dtype, [plan]) else reference), plan
    return (cpu if x.is_cpu and x.numel() and cpu.supports(x.dtype, [plan]) else reference), plan


def _forward(x, values, bias, crow_indices, col_indices, plan, block, geometry, relu, pool, *norm):
    """By the kernels for x: y, and the winners of a pooling."""
    backend, plan = _backend(x, plan, block, pool)
    args = x, values, bias, crow_indices, col_indices, plan, Geometry(*geometry), relu, pool
    return backend.conv_forward(*args, *norm)


def _gradients(gy, x, y, winners, values, crow_indices, col_indices, plan, block, geometry, relu, pool, *needs):
    """The same for the gradients."""
    backend, plan = _backend(x, plan, block, pool)
    args = gy, x, y, winners, values, crow_indices, col_indices, plan, Geometry(*geometry), relu, pool
    return backend.conv_backward(*args, *needs)


def _forward_impl(x, *args):
    y, winners = _forward(x, *args)
    return y, x.new_empty(0, dtype=torch.uint8) if winners is None else winners


def _backward_impl(gy, *args):
    return tuple(gy.new_empty(0) if gradient is None else gradient for gradient in _gradients(gy, *args))


def _forward_fake(x, values, bias, crow_indices, col_indices, plan, block, geometry, relu, pool):
    images, channels, geometry = x.shape[0], crow_indices.shape[0] - 1, Geometry(*geometry)
    size = height, width = geometry.output_size(x.shape[2], x.shape[3])
    kept = reference.winners_shape(images, channels, geometry, size, pool) if pool > 1 else 0
    winners, y = x.new_empty(kept, dtype=torch.uint8), x.new_empty(images, channels, height // pool, width // pool)
    return y.contiguous(memory_format=reference.image_format(x)), winners


def _backward_fake(gy, x, y, winners, values, crow_indices, col_indices, plan, block, geometry, relu, pool, *needs):
    need_x, need_values, need_bias = needs
    gx = x.new_empty(x.shape if need_x else 0)
    gx = gx.contiguous(memory_format=reference.image_format(x)) if need_x else gx
    gvalues = values.new_empty(values.shape if need_values else 0)
    return gx, gvalues, x.new_empty(crow_indices.shape[0] - 1 if need_bias else 0)


LIBRARY.impl("conv2d", _forward_impl, "CompositeExplicitAutograd")
LIBRARY.impl("conv2d_backward", _backward_impl, "CompositeExplicitAutograd")
torch.library.register_fake("sparselottery::conv2d", _forward_fake)
torch.library.register_fake("sparselottery::conv2d_backward", _backward_fake)
torch.library.register_autograd("sparselottery::conv2d", _op_backward, setup_context=_setup_context)

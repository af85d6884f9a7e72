"""The ops `chain` and `chain_backward`: sparse linear layers with a ReLU between them, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from ..kernels import cpu, gpu, reference
from ..pattern import Pattern
from .common import LIBRARY, Block, autocast, in_torch, misfit, misplaced, untraced

LIBRARY.define(
    "chain(Tensor x, Tensor[] values, Tensor?[] biases, Tensor[] crow_indices, Tensor[] col_indices, Tensor[] plans, "
    "int[] blocks, bool batch_minor, bool save) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "chain_backward(Tensor gy, Tensor x, Tensor saved, Tensor[] values, Tensor[] crow_indices, "
    "Tensor[] col_indices, Tensor[] plans, int[] blocks, bool need_x, bool[] need_values, bool[] need_bias) "
    "-> (Tensor, Tensor[], Tensor[])"
)
LARGE = 2**16  # elements of an input, from which keeping it but once is worth ten microseconds
_CHAIN, _CHAIN_BACKWARD = torch.ops.sparselottery.chain.default, torch.ops.sparselottery.chain_backward.default


def compile_plan(pattern: Pattern, block: Block = (1, 1)) -> Tensor:
    """The native kernels' schedule for a pattern: an opaque int32 tensor, empty where no native kernel runs.

    block: of which the mask consists, for the kernels that use it.
    """
    device, indices = pattern.crow_indices.device, (pattern.crow_indices, pattern.col_indices)
    if all(pattern.shape) and gpu.runs_on(device):
        return gpu.plan(*indices, pattern.shape[1], block).words
    if all(pattern.shape) and device.type == "cpu" and cpu.available():
        return cpu.plan(*indices, pattern.shape[1])
    return pattern.crow_indices.new_empty(0)


def chain(
    x: Tensor,
    values: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    crow_indices: Sequence[Tensor],
    col_indices: Sequence[Tensor],
    plans: Sequence[Tensor],
    batch_minor: bool = False,
    blocks: Sequence[Block] | None = None,
) -> Tensor:
    """spmm(... relu(spmm(x)) ...): (N, I) -> (N, O), differentiable in x, values and biases.

    Layers are in order. With `batch_minor`, or where x is batch-minor itself, y has strides (1, ld): the next masked
    layer reads it without repacking. blocks: those that the plans were compiled for, None: all (1, 1). Under autocast
    everything is computed from inputs rounded to the autocast dtype.
    Raises TypeError if x, values and biases differ in dtype, ValueError if their sizes are not those of the indices.
    """
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, values = autocast(x, dtype), [autocast(v, dtype) for v in values]
        biases = [autocast(b, dtype) for b in biases]
    if x.dtype != values[0].dtype:
        raise TypeError(f"x: expected {values[0].dtype}, the dtype of the values, got {x.dtype}")
    for value, bias, crow, col in zip(values, biases, crow_indices, col_indices, strict=True):
        if value.is_cpu != x.is_cpu:
            raise misplaced(x, value)
        if value.dtype != x.dtype or value.shape != col.shape:
            raise misfit("values", value, x.dtype, col.shape)
        if bias is not None and (bias.dtype != x.dtype or bias.shape != (crow.shape[0] - 1,)):
            raise misfit("bias", bias, x.dtype, (crow.shape[0] - 1,))
    batch_minor = batch_minor or reference.is_packed(x)
    if in_torch(x):
        return reference.chain_forward(x, values, biases, crow_indices, col_indices, plans, False, False)[0]
    flat = [1, 1] * len(values) if blocks is None else [side for block in blocks for side in block]
    indices, grad = (crow_indices, col_indices, plans, flat), torch.is_grad_enabled()
    if torch.compiler.is_compiling():  # a list with None in it gets no gradients
        biases = [x.new_zeros(c.shape[0] - 1) if b is None else b for b, c in zip(biases, crow_indices, strict=True)]
        return _CHAIN(x, values, biases, *indices, batch_minor, grad)[0]
    if grad:
        y = _Chain.apply(x, indices, batch_minor, *values, *biases)
        if x.numel() >= LARGE and y.grad_fn is not None:
            _keep_one_copy(y.grad_fn)
        return y
    return (_chain_impl if untraced(x) else _CHAIN)(x, values, biases, *indices, batch_minor, False)[0]


class _Chain(torch.autograd.Function):
    """The eager path: forward(x, (crow_indices, col_indices, plans, blocks), batch_minor, *values, *biases).

    Does what the op's registered autograd does, in a third of the time per call.
    """

    @staticmethod
    def forward(ctx, x, indices, batch_minor, *params):
        layers = len(params) // 2
        values, biases = params[:layers], params[layers:]
        args = x, values, biases, *indices, batch_minor, any(ctx.needs_input_grad)
        if untraced(x):
            y, saved = _chain_impl(*args)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                y, saved = _CHAIN(*args)
        _save(ctx, x, values, biases, indices, saved)
        if x.numel() >= LARGE:
            ctx.copied = saved, x.shape
        return y.data if batch_minor else y  # not a view: it may be modified in place

    @staticmethod
    def backward(ctx, gy):
        needs = ctx.needs_input_grad
        gx, gvalues, gbiases = _backward(ctx, gy, needs[0], needs[3 : 3 + ctx.layers], needs[3 + ctx.layers :])
        return gx, None, None, *gvalues, *gbiases


def _save(ctx, x, values, biases, indices, saved):
    ctx.save_for_backward(x, saved, *values, *biases)
    ctx.indices, ctx.layers = indices, len(values)


def _keep_one_copy(ctx):
    """Where `saved` begins with x, packed, x is not kept as well. Backward then reads its sizes alone, or the copy."""
    (saved, (batch, features)), ctx.copied = ctx.copied, None
    ld = reference.leading_dim(batch)
    if saved.numel() == ld * sum(crow.shape[0] - 1 for crow in ctx.indices[0][:-1]):
        return

    def restored(_):
        stand_in = saved.as_strided((batch, features), (features, 1))
        if torch.is_grad_enabled():  # gradients of gradients read x; autograd knows where it came from
            backend, _plans = _backend(stand_in, *ctx.indices[2:])
            return (cpu if backend is cpu else reference).saved_input(saved, batch, features)
        return stand_in

    with suppress(RuntimeError):  # hooks of the caller have it already: they decide
        ctx._raw_saved_tensors[0].register_hooks(lambda x: None, restored)


def _backward(ctx, gy, need_x, need_values, need_biases):
    x, saved, *params = ctx.saved_tensors
    values, biases = params[: ctx.layers], params[ctx.layers :]
    if torch.is_grad_enabled() or (saved.numel() == 0 and _saved_features(x, *ctx.indices)):
        return _differentiable_backward(ctx, gy, x, values, biases, need_x, need_values, need_biases)
    op = _chain_backward_impl if untraced(gy) and untraced(x) else _CHAIN_BACKWARD
    gx, gvalues, gbiases = op(gy, x, saved, values, *ctx.indices, need_x, need_values, need_biases)
    gvalues = [g if need else None for g, need in zip(gvalues, need_values, strict=True)]
    gbiases = [g if need else None for g, need in zip(gbiases, need_biases, strict=True)]
    return gx if need_x else None, gvalues, gbiases


def _differentiable_backward(ctx, gy, x, values, biases, need_x, need_values, need_biases):
    """The same gradients by torch ops: for create_graph=True, or where forward was told not to save."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():  # aliases: the gradient stops here, wherever x comes from and whatever is shared
        x, values = x.view_as(x), [v.view_as(v) for v in values]
        biases = [None if b is None else b.view_as(b) for b in biases]
        y, _ = reference.chain_forward(x, values, biases, *ctx.indices[:3], batch_minor=False, save=False)
    inputs, needs = [x, *values, *biases], [need_x, *need_values, *need_biases]
    needed = [t for t, need in zip(inputs, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(y, needed, gy, create_graph=create_graph))
    gx, *rest = [next(grads) if need else None for need in needs]
    return gx, rest[: ctx.layers], rest[ctx.layers :]


def _setup_context(ctx, inputs, output):
    x, values, biases, *indices, _batch_minor, _save_inputs = inputs
    _save(ctx, x, values, biases, indices, output[1])
    ctx.set_materialize_grads(False)
    ctx.needs = x.requires_grad, [v.requires_grad for v in values], [b is not None and b.requires_grad for b in biases]


def _op_backward(ctx, gy, _gsaved):
    gx, gvalues, gbiases = _backward(ctx, gy, *ctx.needs)
    return gx, gvalues, gbiases, *([None] * ctx.layers for _ in range(3)), None, None, None


def _backend(x, plans, blocks):
    """The kernels that this call runs on, and the plans as they take them."""
    if gpu.runs_on(x.device):
        plans = [gpu.Plan(plan, tuple(blocks[2 * i : 2 * i + 2])) for i, plan in enumerate(plans)]
        return (gpu if x.shape[0] and gpu.supports(x.dtype, plans) else reference), plans
    return (cpu if x.is_cpu and x.shape[0] and cpu.supports(x.dtype, plans) else reference), plans


def _saved_features(x, crow_indices, _col_indices, plans, blocks):
    backend, plans = _backend(x, plans, blocks)
    return gpu.saved_features(x, crow_indices, plans) if backend is gpu else reference.saved_features(x, crow_indices)


def _chain_impl(x, values, biases, crow_indices, col_indices, plans, blocks, batch_minor, save):
    backend, plans = _backend(x, plans, blocks)
    return backend.chain_forward(x, values, biases, crow_indices, col_indices, plans, batch_minor, save)


def _chain_backward_impl(gy, x, saved, values, crow_indices, col_indices, plans, blocks, *needs):
    backend, plans = _backend(x, plans, blocks)
    return backend.chain_backward(gy, x, saved, values, crow_indices, col_indices, plans, *needs)


def _chain_fake(x, values, biases, crow_indices, col_indices, plans, blocks, batch_minor, save):
    batch, ld = x.shape[0], reference.leading_dim(x.shape[0])
    features = _saved_features(x, crow_indices, col_indices, plans, blocks) if save else []
    saved = x.new_empty(sum(features) * ld)
    out_features = crow_indices[-1].shape[0] - 1
    if batch_minor:
        return reference.unpack(x.new_empty(out_features, ld), batch), saved
    return x.new_empty(batch, out_features), saved


def _chain_backward_fake(gy, x, saved, values, crow_indices, col_indices, plans, blocks, *needs):
    need_x, need_values, need_bias = needs
    batch, features = x.shape
    gvalues = [v.new_empty(v.shape if need else 0) for v, need in zip(values, need_values, strict=True)]
    gbias = [gy.new_empty(c.shape[0] - 1 if need else 0) for c, need in zip(crow_indices, need_bias, strict=True)]
    if not need_x:
        return gy.new_empty(0), gvalues, gbias
    if reference.is_packed(x):
        return reference.unpack(x.new_empty(features, reference.leading_dim(batch)), batch), gvalues, gbias
    return x.new_empty(batch, features), gvalues, gbias


LIBRARY.impl("chain", _chain_impl, "CompositeExplicitAutograd")
LIBRARY.impl("chain_backward", _chain_backward_impl, "CompositeExplicitAutograd")
torch.library.register_fake("sparselottery::chain", _chain_fake)
torch.library.register_fake("sparselottery::chain_backward", _chain_backward_fake)
torch.library.register_autograd("sparselottery::chain", _op_backward, setup_context=_setup_context)

"""The ops `chain` and `chain_backward`: sparse linear layers with a ReLU between them, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from ..kernels import cpu, gpu, native, reference
from ..pattern import Pattern
from .common import (
    LIBRARY,
    Block,
    autocast,
    gradients_by_torch,
    in_torch,
    is_ordinary,
    is_wrapped,
    misfit,
    misplaced,
    on_gpu,
    untraced,
)

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

    Layers are in order. With `batch_minor` y has strides (1, ld), and the next masked layer reads it without repacking;
    else it is contiguous, whatever x is. blocks: those that the plans were compiled for, None: all (1, 1). Under
    autocast everything is computed from inputs rounded to the autocast dtype.
    Raises TypeError if x, values and biases differ in dtype, ValueError if their sizes are not those of the indices.
    """
    flat = [1, 1] * len(values) if blocks is None else [side for block in blocks for side in block]
    indices, grad = (crow_indices, col_indices, plans, flat), torch.is_grad_enabled()
    if is_ordinary(x):
        if grad:
            return _apply(x, values, biases, indices, batch_minor)
        return _forward(x, values, biases, *indices, batch_minor, False)[0]
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, values = autocast(x, dtype), [autocast(v, dtype) for v in values]
        biases = [autocast(b, dtype) for b in biases]
    _check(x, values, biases, crow_indices, col_indices)
    if in_torch(x):
        return reference.chain_forward(x, values, biases, crow_indices, col_indices, plans, False, False)[0]
    if torch.compiler.is_compiling():  # a list with None in it gets no gradients
        biases = [x.new_zeros(c.shape[0] - 1) if b is None else b for b, c in zip(biases, crow_indices, strict=True)]
        return _CHAIN(x, values, biases, *indices, batch_minor, grad)[0]
    if grad:
        return _apply(x, values, biases, indices, batch_minor)
    return (_forward if untraced(x) else _CHAIN)(x, values, biases, *indices, batch_minor, False)[0]


def call_chain(x: Tensor, layers: Sequence[torch.nn.Module], batch_minor: bool = False) -> Tensor | None:
    """`chain` of masked layers, where all is as usual, by one native call that looks for itself; else None."""
    if native.LIBRARY is None or torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return None
    y = native.LIBRARY.chain(x, native.ORDINARY, layers, batch_minor, torch.get_num_threads())
    if y is None and type(x) is Tensor and x.dim() > 2 and not batch_minor and is_ordinary(x):  # gradients are of rows
        y = call_chain(x.flatten(0, -2), layers)
        return None if y is None else y.view(*x.shape[:-1], y.shape[1])
    if type(y) is not tuple:
        return reference.unpack(y, len(x)) if batch_minor and y is not None else y
    (y, saved), indices, inputs = y
    done = reference.unpack(y, len(x)) if batch_minor else y, saved
    return _differentiable(done, (*indices, (1, 1) * len(layers)), batch_minor, *inputs)


def _check(x, values, biases, crow_indices, col_indices):
    if x.dtype != values[0].dtype:
        raise TypeError(f"x: expected {values[0].dtype}, the dtype of the values, got {x.dtype}")
    for value, bias, crow, col in zip(values, biases, crow_indices, col_indices, strict=True):
        if value.is_cpu != x.is_cpu:
            raise misplaced(x, value)
        if value.dtype != x.dtype or value.shape != col.shape:
            raise misfit("values", value, x.dtype, col.shape)
        if bias is not None and (bias.dtype != x.dtype or bias.shape != (crow.shape[0] - 1,)):
            raise misfit("bias", bias, x.dtype, (crow.shape[0] - 1,))


def _apply(x, values, biases, indices, batch_minor):
    if not any(t is not None and t.requires_grad for t in (x, *values, *biases)):
        return (_forward if untraced(x) else _CHAIN)(x, values, biases, *indices, batch_minor, False)[0]
    if untraced(x):
        with torch.no_grad():
            done = _forward(x, values, biases, *indices, batch_minor, True)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            done = _CHAIN(x, values, biases, *indices, batch_minor, True)
    return _differentiable(done, indices, batch_minor, x, *values, *biases)


def _differentiable(done, indices, batch_minor, x, *params):
    """The y of a forward pass, with its gradients."""
    y = _APPLY(done, indices, batch_minor, x, *params)
    if x.numel() >= LARGE:
        _keep_one_copy(y.grad_fn)
    return y


class _Chain(torch.autograd.Function):
    """Eager gradients of what is computed before: forward((y, saved), indices, batch_minor, x, *values, *biases).

    indices: (crow_indices, col_indices, plans, blocks). In a third of the time of the op's registered autograd.
    """

    @staticmethod
    def forward(ctx, done, indices, batch_minor, x, *params):
        y, saved = done
        ctx.save_for_backward(x, saved, *params)
        ctx.indices = indices
        if x.numel() >= LARGE:
            ctx.copied = saved, x.shape
        return y.data if batch_minor else y  # not a view: it may be modified in place

    @staticmethod
    def backward(ctx, gy):
        needs = ctx.needs_input_grad[3:]
        if is_wrapped(gy):  # a batch of them, by is_grads_batched: for torch's ops, which read all of x
            with torch.enable_grad():
                kept = ctx.saved_tensors
            return None, None, None, *_backward_by_torch(ctx, gy, kept, needs)
        kept = ctx.saved_tensors
        if native.LIBRARY is not None:  # where all is as usual there is a shorter way
            threads = torch.get_num_threads()
            gradients = native.LIBRARY.chain_gradients(gy, native.ORDINARY, kept, ctx.indices, needs, threads)
            if gradients is not None:
                return None, None, None, *gradients
        return None, None, None, *_backward(ctx, gy, kept, needs)


_APPLY = super(torch.autograd.Function, _Chain).apply  # without a look for functorch, which everybody here has had


def _keep_one_copy(ctx):
    """Where `saved` begins with x, packed, x is not kept as well. Backward then reads its sizes alone, or the copy."""
    (saved, (batch, features)), ctx.copied = ctx.copied, None
    indices = ctx.indices  # not ctx, which owns the hook, unseen by the garbage collector
    if saved.numel() == reference.leading_dim(batch) * sum(crow.shape[0] - 1 for crow in indices[0][:-1]):
        return

    def restored(_):
        stand_in = saved.as_strided((batch, features), (features, 1))
        if torch.is_grad_enabled():  # gradients of gradients read x; autograd knows where it came from
            plans, blocks = indices[2:]
            on_cpu = saved.is_cpu and _gpu_plans(stand_in, plans, blocks) is None and cpu.supports(saved.dtype, plans)
            return (cpu if on_cpu else reference).saved_input(saved, batch, features, *indices[:2])
        return stand_in

    with suppress(RuntimeError):  # hooks of the caller have it already: they decide
        ctx._raw_saved_tensors[0].register_hooks(lambda x: None, restored)


def _backward(ctx, gy, kept, needs):
    """(gx, *gvalues, *gbiases), each None where it is not needed. kept: may be asked for but once."""
    x, saved, *params = kept
    if torch.is_grad_enabled() or (saved.numel() == 0 and _saved_features(x, *ctx.indices)):
        return _backward_by_torch(ctx, gy, kept, needs)
    layers = len(params) // 2
    needs = needs[0], needs[1 : 1 + layers], needs[1 + layers :]
    args = gy, x, saved, params[:layers], *ctx.indices, *needs
    found = _gradients(*args) if untraced(gy) and untraced(x) else _needed(_CHAIN_BACKWARD(*args), *needs)
    return found[0], *found[1], *found[2]


def _needed(gradients, need_x, need_values, need_biases):
    """None in place of the others."""
    gx, gvalues, gbiases = gradients
    gvalues = [g if need else None for g, need in zip(gvalues, need_values, strict=True)]
    gbiases = [g if need else None for g, need in zip(gbiases, need_biases, strict=True)]
    return gx if need_x else None, gvalues, gbiases


def _backward_by_torch(ctx, gy, kept, needs):
    """The same: for create_graph=True, batches of gradients, and where forward was told not to save."""

    def compute(x, *params):
        layers = len(params) // 2
        args = x, params[:layers], params[layers:], *ctx.indices[:3]
        return reference.chain_forward(*args, batch_minor=False, save=False)[0]

    x, _, *params = kept
    return gradients_by_torch(compute, (x, *params), needs, gy)


def _setup_context(ctx, inputs, output):
    x, values, biases, *indices, _batch_minor, _save_inputs = inputs
    ctx.save_for_backward(x, output[1], *values, *biases)
    ctx.indices = indices
    ctx.set_materialize_grads(False)
    ctx.needs = [t is not None and t.requires_grad for t in (x, *values, *biases)]


def _op_backward(ctx, gy, _gsaved):
    gx, *gradients = _backward(ctx, gy, ctx.saved_tensors, ctx.needs)
    layers = len(gradients) // 2
    return gx, gradients[:layers], gradients[layers:], *([None] * layers for _ in range(3)), None, None, None


def _gpu_plans(x, plans, blocks):
    """The plans as the GPU's kernels take them; None if this call does not run on them."""
    if not on_gpu(x):
        return None
    plans = [gpu.Plan(plan, tuple(blocks[2 * i : 2 * i + 2])) for i, plan in enumerate(plans)]
    return plans if x.shape[0] and gpu.supports(x.dtype, plans) else None


def _saved_features(x, crow_indices, _col_indices, plans, blocks):
    found = _gpu_plans(x, plans, blocks)
    return reference.saved_features(x, crow_indices) if found is None else gpu.saved_features(x, crow_indices, found)


def _forward(x, values, biases, crow_indices, col_indices, plans, blocks, batch_minor, save):
    """By the kernels for x: y, and what they save for the gradients, or None."""
    if (found := _gpu_plans(x, plans, blocks)) is None and x.is_cpu and cpu.available():
        done = cpu.chain_forward(x, values, biases, crow_indices, col_indices, plans, batch_minor, save)
        if done is not None:
            return done
    _check(x, values, biases, crow_indices, col_indices)
    backend, plans = (reference, plans) if found is None else (gpu, found)
    return backend.chain_forward(x, values, biases, crow_indices, col_indices, plans, batch_minor, save)


def _gradients(gy, x, saved, values, crow_indices, col_indices, plans, blocks, *needs):
    """The same for the gradients: None in place of those that are not needed."""
    if (found := _gpu_plans(x, plans, blocks)) is None and x.is_cpu and cpu.available():
        done = cpu.chain_backward(gy, x, saved, values, crow_indices, col_indices, plans, *needs)
        if done is not None:
            return done
        if x.shape[0] and cpu.supports(x.dtype, plans):  # what native code saved, nobody else reads
            raise ValueError("chain_backward: expected what a forward pass had and saved, got other tensors")
    backend, plans = (reference, plans) if found is None else (gpu, found)
    return _needed(backend.chain_backward(gy, x, saved, values, crow_indices, col_indices, plans, *needs), *needs)


def _chain_impl(x, *args):
    y, saved = _forward(x, *args)
    return y, x.new_empty(0) if saved is None else saved


def _chain_backward_impl(gy, *args):
    gx, *gradients = _gradients(gy, *args)
    gvalues, gbiases = ([gy.new_empty(0) if g is None else g for g in each] for each in gradients)
    return gy.new_empty(0) if gx is None else gx, gvalues, gbiases


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

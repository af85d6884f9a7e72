"""Chains of masked linear layers: which kernels each layer gets, and in which layout activations pass between them.

Single weights (csr) multiply batch-minor activations (layout.py) and so do columns of weights (R, 1); wider blocks
(block) multiply any. What a layer writes, it writes as its reader wants it, where it can.
"""

from __future__ import annotations

from torch import Tensor

from ..reference import is_packed, leading_dim, unpack
from . import Plan, block, csr
from .layout import is_minor, major, minor


def plan(crow_indices: Tensor, col_indices: Tensor, in_features: int, shape: tuple[int, int] = (1, 1)) -> Plan:
    """The plan of a valid CSR pattern that consists of blocks of `shape` (R, C). Waits for the device."""
    if shape == (1, 1):
        return Plan(csr.plan.build(crow_indices, col_indices, in_features), shape)
    return Plan(block.plan.build(crow_indices, col_indices, in_features, shape), shape)


def saved_features(x: Tensor, crow_indices: list[Tensor], plans: list[Plan]) -> list[int]:
    """Features of what a chain saves: x if the first layer has it copied, then each hidden layer's."""
    copied = _reads_minor(plans[0]) and not is_packed(x)
    return ([x.shape[1]] if copied else []) + [crow.shape[0] - 1 for crow in crow_indices[:-1]]


def chain_forward(x, values, biases, crow_indices, col_indices, plans, batch_minor, save):
    """As reference.chain_forward; saved is the input of each layer as the layer reads it."""
    x, values, size = _readable(x), [v.contiguous() for v in values], leading_dim(len(x))
    kept = x.new_empty(sum(saved_features(x, crow_indices, plans)) * size)
    single = len(x) == 1 and not save
    inputs = _inputs(x, kept, crow_indices, plans, single)
    if single and plans[0].block == (1, 1):
        inputs[0] = x
    if inputs[0] is not x:
        minor(x, kept[: x.shape[1] * size])
    y = _empty(x, crow_indices[-1].shape[0] - 1, batch_minor)
    for layer, (h, out, bias) in enumerate(zip(inputs, [*inputs[1:], y], biases, strict=True)):
        args = values[layer], bias, crow_indices[layer], col_indices[layer], plans[layer]
        _kernels(plans[layer]).forward(h, *args, out, out is not y)
    return y, kept if save else x.new_empty(0)


def chain_backward(gy, x, saved, values, crow_indices, col_indices, plans, need_x, need_values, need_bias):
    """As reference.chain_backward."""
    x, values, gy = _readable(x), [v.contiguous() for v in values], _readable(gy)
    inputs, packed = _inputs(x, saved, crow_indices, plans), is_packed(x)
    gvalues, gbias = [gy.new_empty(0) for _ in values], [gy.new_empty(0) for _ in values]
    for layer in reversed(range(len(values))):
        h, kernels, args = (
            inputs[layer],
            _kernels(plans[layer]),
            (crow_indices[layer], col_indices[layer], plans[layer]),
        )
        if need_bias[layer]:
            gbias[layer] = gy.sum(0)
        if kernels is csr and not is_minor(gy):
            gy = minor(gy)
        if need_values[layer]:
            gvalues[layer] = kernels.grad_values(gy, h, *args)
        if layer or need_x:
            wanted = _reads_minor(plans[layer - 1]) if layer else packed
            gx = _empty(gy, h.shape[1], wanted or kernels is csr)
            kernels.grad_x(gy, values[layer], *args, gx, h if layer else None)
            gy = gx
    if not need_x:
        return gy.new_empty(0), gvalues, gbias
    return (gy if packed == is_minor(gy) else major(gy)), gvalues, gbias


def _kernels(plan: Plan):
    return csr if plan.block == (1, 1) else block


def _reads_minor(plan: Plan) -> bool:
    return plan.block[1] == 1


def _readable(x: Tensor) -> Tensor:
    """x, row-major unless it is a packed activation; also in the strides of dimensions of size 1."""
    return x if is_packed(x) else x.contiguous().flatten().view(x.shape)


def _empty(like: Tensor, features: int, batch_minor: bool) -> Tensor:
    """An unwritten (N, features)."""
    batch = len(like)
    return (
        unpack(like.new_empty(features, leading_dim(batch)), batch) if batch_minor else like.new_empty(batch, features)
    )


def _inputs(x: Tensor, kept: Tensor, crow_indices: list[Tensor], plans: list[Plan], single=False) -> list[Tensor]:
    """The input (N, F) of each layer, as the layer reads it: x, or its part of what is kept.

    single: of one sample, which single weights (1, 1) then read row-major.
    """
    (batch, _), size, features = x.shape, leading_dim(len(x)), saved_features(x, crow_indices, plans)
    parts = kept.split([size * each for each in features])
    readers = plans[len(plans) - len(parts) :]
    found = [
        unpack(part.view(-1, size), batch)
        if _reads_minor(plan) and not (single and plan.block == (1, 1))
        else part[: len(part) // size * batch].view(batch, -1)
        for part, plan in zip(parts, readers, strict=True)
    ]
    return [x] * (len(plans) - len(found)) + found

"""Masked convolutions: implicit GEMM over the pixels, by blocks on channels_last images or by single weights on rows.

Single weights (1, 1) multiply batch-minor rows (layout.py) that carry the padding: a tap is then a constant offset, and
the kernels are those of a linear layer. The gradient of x is the same over the transpose with flipped taps, with gy
spread out by the stride. Blocks (block) need no copies where images are channels_last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import Geometry, image_format, leading_dim, relu_gradient
from . import Plan, block, csr
from .csr import sddmm, spmm, taps
from .layout import Placing, pack, unpack


def conv_plan(crow_indices: Tensor, col_indices: Tensor, geometry: Geometry, shape: tuple[int, int] = (1, 1)) -> Plan:
    """The plan of a valid CSR pattern (O, C / groups * taps) that consists of blocks of `shape`, filters x channels.

    Waits for the device.
    """
    if shape == (1, 1):
        return Plan(csr.plan.build(crow_indices, col_indices, geometry.columns, geometry), shape)
    return Plan(block.plan.build(crow_indices, col_indices, geometry.columns, shape, geometry), shape)


def conv_forward(x, values, bias, crow_indices, col_indices, plan, geometry, relu, pool):
    """As reference.conv_forward, without pooling."""
    values, filters = values.contiguous(), len(crow_indices) - 1
    out = x.shape[0], filters, *geometry.output_size(*x.shape[2:])
    winners = x.new_empty(0, dtype=torch.uint8)
    if plan.block != (1, 1):
        y = _empty(out, x, torch.channels_last)
        block.conv_forward(_last(x), values, bias, crow_indices, col_indices, plan, geometry, y, relu)
        return y.contiguous(memory_format=image_format(x)), winners
    order = csr.plan.sections(plan.words, filters, geometry.channels, len(values)).order
    of = taps.forward(geometry, filters, *x.shape[2:])
    rows = x.new_empty(filters * of.pixels, _ld(x))
    spmm.spmm(_padded(x, geometry, of), values, bias, crow_indices, col_indices, order, None, rows, len(x), of, relu)
    y = _empty(out, x, image_format(x))
    unpack(rows, y)
    return y, winners


def conv_backward(
    gy, x, y, winners, values, crow_indices, col_indices, plan, geometry, relu, pool, need_x, need_values, need_bias
):
    """As reference.conv_backward, without pooling."""
    gy = relu_gradient(gy, y) if relu else gy
    none = gy.new_empty(0)
    gbias = gy.sum((0, 2, 3)) if need_bias else none
    grads = _block_grads if plan.block != (1, 1) else _csr_grads
    gx, gvalues = grads(gy, x, values.contiguous(), crow_indices, col_indices, plan, geometry, need_x, need_values)
    return none if gx is None else gx, none if gvalues is None else gvalues, gbias


def _block_grads(gy, x, values, crow_indices, col_indices, plan, geometry, need_x, need_values):
    gx = gvalues = None
    gy, indices = _last(gy), (crow_indices, col_indices, plan, geometry)
    if need_values:
        gvalues = block.conv_grad_values(gy, _last(x), *indices)
    if need_x:
        gx = _empty(x.shape, x, torch.channels_last)
        block.conv_grad_x(gy, values, *indices, gx)
        gx = gx.contiguous(memory_format=image_format(x))
    return gx, gvalues


def _csr_grads(gy, x, values, crow_indices, col_indices, plan, geometry, need_x, need_values):
    gx = gvalues = None
    filters, size = len(crow_indices) - 1, x.shape[2:]
    sections = csr.plan.sections(plan.words, filters, geometry.channels, len(values))
    if need_values:
        of, rows = taps.forward(geometry, filters, *size), pack(gy, Placing(*gy.shape[2:]))
        gvalues = sddmm.sddmm(rows, _padded(x, geometry, of), crow_indices, col_indices, sections.order, len(x), of)
    if need_x:
        of = taps.backward(geometry, filters, *size)
        top, left = of.x_height - size[0] - geometry.top, of.x_width - size[1] - geometry.left
        spread = Placing(of.x_height, of.x_width, top, left, geometry.stride_h, geometry.stride_w)
        rows = x.new_empty(geometry.channels * of.pixels, _ld(x))
        indices = sections.t_crow, sections.t_cols, sections.t_order, sections.perm
        spmm.spmm(pack(gy, spread), values, None, *indices, rows, len(x), of)
        gx = _empty(x.shape, x, image_format(x))
        unpack(rows, gx)
    return gx, gvalues


def _padded(x: Tensor, geometry: Geometry, of: taps.Taps) -> Tensor:
    """The rows of x with its padding."""
    return pack(x, Placing(of.x_height, of.x_width, geometry.top, geometry.left))


def _ld(x: Tensor) -> int:
    return leading_dim(len(x))


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty(shape: tuple[int, ...], like: Tensor, memory_format: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)

"""Layers whose mask consists of blocks (R, C) of surviving weights: tensor cores, the functions of csr.

Activations (N, F) are row-major or, as csr has them, views of batch-minor rows (F, ld); images are channels_last.
Columns of weights (R, 1) take batch-minor x only. Weights, in CSR order, are packed into tiles for each call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference import Geometry, to_dense
from .. import Plan
from ..layout import is_minor
from .conv import View, conv, conv_sddmm
from .plan import BlockPlan, plan, views
from .sddmm import sddmm
from .spmm import shape, spmm
from .tile import clear_padding, exact, precision
from .values import pack, unpack

__all__ = ["conv_forward", "conv_grad_values", "conv_grad_x", "forward", "grad_values", "grad_x", "plan", "takes"]

SIDES = (8, 16, 32, 64)  # of square blocks
HEIGHTS = (16, 32, 64, 128)  # of columns (R, 1)
CONV_SIDES = (16, 32, 64)


def takes(block: tuple[int, int], geometry: Geometry | None = None) -> bool:
    """Are there kernels for blocks (R, C) of a linear layer or, of filters x channels, of a convolution?"""
    if geometry is None:
        return (block[0] == block[1] and block[0] in SIDES) or (block[1] == 1 and block[0] in HEIGHTS)
    return block[0] == block[1] and block[0] in CONV_SIDES and geometry.groups == 1


def forward(x, values, bias, crow_indices, col_indices, plan, y, relu=False):
    """y (N, O) = x Wᵀ + bias, then a ReLU if `relu`. Raises ValueError if x must be batch-minor and is not."""
    if plan.block[1] == 1 and not is_minor(x):
        raise ValueError(f"x: expected strides (1, ld) for blocks {plan.block}, got {x.stride()}")
    tiles = _views(plan, y.shape[1], x.shape[1]).forward
    of = shape(len(x), tiles.order.numel(), plan.block[0], x.element_size(), exact(x, precision()))
    packed = pack(values, crow_indices, tiles, plan.block, x.shape[1], of.bk)
    spmm(x, packed, bias, tiles, plan.block[1], of, y, relu)


def grad_x(gy, values, crow_indices, col_indices, plan, gx, gate=None):
    """gx (N, I) = gy W, zero where gate (N, I) <= 0.

    Of columns of weights (R, 1) the dense product: single columns leave nothing of gx for a tile to share.
    """
    if plan.block[1] == 1:
        product = gy @ to_dense(values, crow_indices, col_indices, gx.shape[1])
        gx.copy_(product if gate is None else torch.where(gate > 0, product, 0))
        clear_padding(gx)
        return
    tiles = _views(plan, gy.shape[1], gx.shape[1]).transposed
    of = shape(len(gy), tiles.order.numel(), plan.block[1], gy.element_size(), exact(gy, precision()))
    packed = pack(values, crow_indices, tiles, plan.block, gx.shape[1], of.bk, transposed=True)
    spmm(gy, packed, None, tiles, plan.block[0], of, gx, gate=gate)


def grad_values(gy, x, crow_indices, col_indices, plan):
    """(nnz,), of the dtype of x: gyᵀ x at the pattern."""
    tiles, gvalues = _views(plan, gy.shape[1], x.shape[1]).forward, x.new_empty(col_indices.numel())
    unpack(sddmm(x, gy, tiles, plan.block), crow_indices, tiles, plan.block, x.shape[1], gvalues)
    return gvalues


def conv_forward(x, values, bias, crow_indices, col_indices, plan, geometry, y, relu=False):
    """y (N, O, OH, OW) = x * W + bias, then a ReLU if `relu`."""
    tiles = _views(plan, y.shape[1], x.shape[1]).forward
    of = _conv_shape(y, tiles.order.numel(), plan.block[0])
    packed = pack(values, crow_indices, tiles, plan.block, x.shape[1], of.bk, conv=True)
    conv(x, packed, bias, tiles, plan.block[1], geometry, View.forward(geometry), of, y, relu)


def conv_grad_x(gy, values, crow_indices, col_indices, plan, geometry, gx):
    """gx (N, C, H, W): the gradient of x."""
    tiles = _views(plan, gy.shape[1], gx.shape[1]).transposed
    of = _conv_shape(gx, tiles.order.numel(), plan.block[1])
    packed = pack(values, crow_indices, tiles, plan.block, gx.shape[1], of.bk, transposed=True, conv=True)
    conv(gy, packed, None, tiles, plan.block[0], geometry, View.backward(geometry), of, gx)


def conv_grad_values(gy, x, crow_indices, col_indices, plan, geometry):
    """(nnz,), of the dtype of x: the gradient of the values."""
    tiles, gvalues = _views(plan, gy.shape[1], x.shape[1]).forward, x.new_empty(col_indices.numel())
    partial = conv_sddmm(x, gy, tiles, plan.block, geometry)
    unpack(partial, crow_indices, tiles, plan.block, x.shape[1], gvalues, conv=True)
    return gvalues


def _views(plan: Plan, out_features: int, width: int) -> BlockPlan:
    return views(plan.words, out_features, width, plan.block)


def _conv_shape(y: Tensor, rows: int, out: int):
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    return shape(pixels, rows, out, y.element_size(), exact(y, precision(conv=True)))

"""Layers whose mask consists of blocks (R, C) of surviving weights: tensor cores, the functions of csr.

Activations (N, F) are row-major or, as csr has them, views of batch-minor rows (F, ld); images are channels_last.
Columns of weights (R, 1) take batch-minor x only. Weights, in CSR order, are packed into tiles for each call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference import Geometry
from .. import TENSOR_CORES, Plan
from ..device import capability
from ..launch import tuned
from ..layout import is_minor
from . import conv, sddmm, shape, spmm
from .plan import BlockPlan, Tiles, tiled, views
from .tile import clear_padding
from .values import pack, scatter, unpack

__all__ = ["conv_forward", "conv_grad_values", "conv_grad_x", "forward", "grad_values", "grad_x", "plan", "takes"]

SIDES = (8, 16, 32, 64, 128)  # of square blocks
HEIGHTS = (16, 32, 64, 128)  # of columns (R, 1)
CONV_SIDES = (16, 32, 64, 128)


def takes(block: tuple[int, int], device: torch.device, geometry: Geometry | None = None) -> bool:
    """Has a device kernels for blocks (R, C) of a linear layer or, of filters x channels, of a convolution?"""
    if capability(device) < TENSOR_CORES:
        return False
    if geometry is None:
        return (block[0] == block[1] and block[0] in SIDES) or (block[1] == 1 and block[0] in HEIGHTS)
    return block[0] == block[1] and block[0] in CONV_SIDES and geometry.groups == 1


def forward(x, values, bias, crow_indices, col_indices, plan, y, relu=False):
    """y (N, O) = x Wᵀ + bias, then a ReLU if `relu`. Raises ValueError if x must be batch-minor and is not."""
    if plan.block[1] == 1 and not is_minor(x):
        raise ValueError(f"x: expected strides (1, ld) for blocks {plan.block}, got {x.stride()}")
    tiles, (out, red), fp32 = _views(plan, y.shape[1], x.shape[1]).forward, tiled(plan.block), shape.precision(x)
    of = _shape(len(x), tiles, out, x, fp32)
    packed = pack(values, crow_indices, tiles, plan.block, x.shape[1], of.bk)
    spmm.spmm(x, packed, bias, tiles, red, of, fp32, y, relu)


def grad_x(gy, values, crow_indices, col_indices, plan, gx, gate=None):
    """gx (N, I) = gy W, zero where gate (N, I) <= 0.

    Of columns of weights (R, 1) the dense product: single columns leave nothing of gx for a tile to share. With it,
    of three dense products two may be sparse: forward and backward are at most 3 times as fast.
    """
    if plan.block[1] == 1:
        tiles = _views(plan, gy.shape[1], gx.shape[1]).forward
        torch.mm(gy, scatter(values, crow_indices, tiles, plan.block, gx.shape[1]), out=gx)
        if gate is not None:
            gx.masked_fill_(gate <= 0, 0)
        clear_padding(gx)
        return
    tiles, (red, out), fp32 = (
        _views(plan, gy.shape[1], gx.shape[1]).transposed,
        tiled(plan.block, True),
        shape.precision(gy),
    )
    of = _shape(len(gy), tiles, out, gy, fp32)
    packed = pack(values, crow_indices, tiles, plan.block, gx.shape[1], of.bk, transposed=True)
    spmm.spmm(gy, packed, None, tiles, red, of, fp32, gx, gate=gate)


def grad_values(gy, x, crow_indices, col_indices, plan):
    """(nnz,), of the dtype of x: gyᵀ x at the pattern."""
    tiles, gvalues, fp32 = (
        _views(plan, gy.shape[1], x.shape[1]).forward,
        x.new_empty(col_indices.numel()),
        shape.precision(x),
    )
    of = _split(len(x), tiles, plan, x, fp32)
    unpack(sddmm.sddmm(x, gy, tiles, tiled(plan.block), of, fp32), crow_indices, tiles, plan.block, x.shape[1], gvalues)
    return gvalues


def conv_forward(x, values, bias, crow_indices, col_indices, plan, geometry, y, relu=False):
    """y (N, O, OH, OW) = x * W + bias, then a ReLU if `relu`."""
    tiles, (out, red), fp32 = (
        _views(plan, y.shape[1], x.shape[1]).forward,
        tiled(plan.block),
        shape.precision(x, conv=True),
    )
    of = _shape(_pixels(y), tiles, out, x, fp32, "block_conv")
    packed = pack(values, crow_indices, tiles, plan.block, x.shape[1], of.bk, conv=True)
    conv.conv(x, packed, bias, tiles, red, geometry, conv.View.forward(geometry), of, fp32, y, relu)


def conv_grad_x(gy, values, crow_indices, col_indices, plan, geometry, gx):
    """gx (N, C, H, W): the gradient of x."""
    tiles, (red, out) = _views(plan, gy.shape[1], gx.shape[1]).transposed, tiled(plan.block, True)
    fp32 = shape.precision(gy, conv=True)
    of = _shape(_pixels(gx), tiles, out, gy, fp32, "block_conv")
    packed = pack(values, crow_indices, tiles, plan.block, gx.shape[1], of.bk, transposed=True, conv=True)
    conv.conv(gy, packed, None, tiles, red, geometry, conv.View.backward(geometry), of, fp32, gx)


def conv_grad_values(gy, x, crow_indices, col_indices, plan, geometry):
    """(nnz,), of the dtype of x: the gradient of the values."""
    tiles, gvalues = _views(plan, gy.shape[1], x.shape[1]).forward, x.new_empty(col_indices.numel())
    fp32 = shape.precision(x, conv=True)
    of = _split(_pixels(gy), tiles, plan, x, fp32, "block_conv_sddmm")
    partial = conv.conv_sddmm(x, gy, tiles, tiled(plan.block), geometry, of, fp32)
    unpack(partial, crow_indices, tiles, plan.block, x.shape[1], gvalues, conv=True)
    return gvalues


def _views(plan: Plan, out_features: int, width: int) -> BlockPlan:
    return views(plan.words, out_features, width, plan.block)


def _shape(samples: int, tiles: Tiles, out: int, x: Tensor, fp32: str, kernel: str = "block_spmm") -> shape.Shape:
    return tuned(kernel, shape.shape(samples, tiles.order.numel(), out, x, fp32, kernel == "block_conv"))


def _split(samples: int, tiles: Tiles, plan: Plan, x: Tensor, fp32: str, kernel: str = "block_sddmm") -> shape.Split:
    return tuned(kernel, shape.split(samples, tiles.tile_row.numel(), plan.block[0], x, fp32))


def _pixels(images: Tensor) -> int:
    return images.shape[0] * images.shape[2] * images.shape[3]

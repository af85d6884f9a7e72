"""The functions of `reference`, native: packs arguments for csrc/, in place of which the reference is used elsewhere.

The plan of a pattern (csrc/plan.h) is a flat int32 tensor; strips and tiles are sized here. Convolutions are in
`cpu_conv`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .cpu_conv import conv_backward, conv_forward, conv_plan
from .native import HALF, available, status
from .reference import is_packed, leading_dim, pack, saved_features, unpack

__all__ = [
    "available",
    "chain_backward",
    "chain_forward",
    "conv_backward",
    "conv_forward",
    "conv_plan",
    "plan",
    "status",
    "supports",
]

_ROW_MAJOR, _BATCH_MINOR, _PACKED = 0, 1, 2  # Layout in csrc/chain.cpp


def supports(dtype: torch.dtype, plans: list[Tensor]) -> bool:
    """Can the native chain run on this dtype and on these plans?"""
    known = dtype in (torch.float32, torch.float64, *HALF)
    return known and native.LIBRARY is not None and all(plan.is_cpu and plan.numel() for plan in plans)


def tile_shape(out_features: int, in_features: int, nnz: int) -> tuple[int, int]:
    """(strip, block) of the plan: blocks as small as L1 likes, but wide enough for 8 entries a row segment."""
    size = out_features * in_features
    narrowest = 32 if nnz > 0.6 * size else 64
    return 256, min(max(8 * size // max(nnz, 1) // 16 * 16, narrowest), 512)


def plan(
    crow_indices: Tensor,
    col_indices: Tensor,
    in_features: int,
    tile: tuple[int, int] | None = None,
    backward: bool = True,
    strips: tuple[int, int] | None = None,
) -> Tensor:
    """The plan of a valid CSR pattern as a flat int32 tensor; `tile` = (strip, block) overrides its tiling.

    backward: False leaves out what only gradients need, two thirds of it. strips: rows of a strip of W and of Wᵀ;
    None: as many as `tile` says, or fewer, so that threads find at least eight strips to share.
    """
    out_features = crow_indices.numel() - 1
    strip, block = tile or tile_shape(out_features, in_features, col_indices.numel())
    strips = strips or [min(strip, max(32, rows // 8 // 16 * 16)) for rows in (out_features, in_features)]
    crow_indices, col_indices = crow_indices.contiguous(), col_indices.contiguous()
    indices = native.pointer(crow_indices), native.pointer(col_indices)
    return native.take(native.LIBRARY.sparselottery_plan, out_features, in_features, *indices, *strips, block, backward)


def chain_forward(x, values, biases, crow_indices, col_indices, plans, batch_minor, save):
    """As reference.chain_forward."""
    if x.dtype in HALF:
        wide = [v.float() for v in values], [None if b is None else b.float() for b in biases]
        y, saved = chain_forward(_widen(x), *wide, crow_indices, col_indices, plans, False, save)
        y = y.to(x.dtype)
        return unpack(pack(y), len(y)) if batch_minor else y, saved.to(x.dtype)
    values, biases = [v.contiguous() for v in values], [None if b is None else b.contiguous() for b in biases]
    x, x_stride, x_layout = _layout(x)
    batch, out_features = x.shape[0], crow_indices[-1].shape[0] - 1
    ld, size = leading_dim(batch), x.element_size()
    y = x.new_empty((out_features, ld) if batch_minor else (batch, out_features))
    elements = sum(saved_features(x, crow_indices)) * ld
    packed = x.new_empty(elements if save else 0)
    single = batch == 1 and not save and x_layout == _ROW_MAJOR and not batch_minor
    args = [size == 8, torch.get_num_threads(), len(values), batch, x.shape[1], ld, x.data_ptr(), x_stride, x_layout]
    args += [y.data_ptr(), y.stride(0), _PACKED if batch_minor else _ROW_MAJOR, 0]
    start = packed.data_ptr() if save else native.LIBRARY.sparselottery_workspace(elements * size)
    at, ld_in = (x.data_ptr(), x_stride) if x_layout == _PACKED else (start, ld)
    for layer, (value, bias, crow) in enumerate(zip(values, biases, crow_indices, strict=True)):
        args += [plans[layer].data_ptr(), plans[layer].numel(), crow.shape[0] - 1, value.numel(), value.data_ptr()]
        args += [0 if bias is None else bias.data_ptr(), 0 if single and not layer else at, ld_in, 0, 0, 0]
        if layer == 0 and x_layout == _PACKED:
            at = start
        else:
            at += (x.shape[1] if layer == 0 else crow_indices[layer - 1].shape[0] - 1) * ld * size
        ld_in = ld
    native.call(native.LIBRARY.sparselottery_chain_forward, args)
    return (unpack(y, batch) if batch_minor else y), packed


def chain_backward(gy, x, saved, values, crow_indices, col_indices, plans, need_x, need_values, need_bias):
    """As reference.chain_backward."""
    if x.dtype in HALF:
        wide = gy.float(), _widen(x), saved.float(), [v.float() for v in values]
        gx, gvalues, gbias = chain_backward(*wide, crow_indices, col_indices, plans, need_x, need_values, need_bias)
        gx = gx.to(x.dtype)
        gx = unpack(pack(gx), len(gx)) if need_x and is_packed(x) else gx
        return gx, [g.to(x.dtype) for g in gvalues], [g.to(x.dtype) for g in gbias]
    values = [v.contiguous() for v in values]
    gy, gy_stride, gy_layout = _layout(gy)
    batch, out_features, in_features = gy.shape[0], gy.shape[1], x.shape[1]
    ld, size, packed_x = leading_dim(batch), gy.element_size(), is_packed(x)
    shape = ((in_features, ld) if packed_x else (batch, in_features)) if need_x else 0
    gx = gy.new_empty(shape)
    # Packed gradients: of y unless it comes packed, then of each hidden layer.
    widths = [0 if gy_layout == _PACKED else out_features] + [crow.shape[0] - 1 for crow in crow_indices[:-1]]
    scratch = native.LIBRARY.sparselottery_workspace(sum(widths) * ld * size)
    args = [size == 8, torch.get_num_threads(), len(values), batch, in_features, ld]
    args += [gy.data_ptr(), gy_stride, gy_layout]
    args += [gx.data_ptr(), gx.stride(0), _PACKED if packed_x else _ROW_MAJOR, scratch]
    at, ginput = saved.data_ptr(), scratch + widths[0] * ld * size
    gvalues, gbias = [], []
    for layer, (value, crow) in enumerate(zip(values, crow_indices, strict=True)):
        gvalues.append(gy.new_empty(value.shape if need_values[layer] else 0))
        gbias.append(gy.new_empty(crow.shape[0] - 1 if need_bias[layer] else 0))
        args += [plans[layer].data_ptr(), plans[layer].numel(), crow.shape[0] - 1, value.numel(), value.data_ptr(), 0]
        args += (x.data_ptr(), x.stride(1)) if packed_x and layer == 0 else (at, ld)
        args += [gvalues[-1].data_ptr(), gbias[-1].data_ptr(), ginput if layer else 0]
        if layer or not packed_x:
            at += (widths[layer] if layer else in_features) * ld * size
        if layer:
            ginput += widths[layer] * ld * size
    native.call(native.LIBRARY.sparselottery_chain_backward, args)
    return (unpack(gx, batch) if need_x and packed_x else gx), gvalues, gbias


def _widen(x: Tensor) -> Tensor:
    """x in fp32, packed if and only if x is."""
    return x.float() if is_packed(x) else x.float().contiguous()


def _layout(x: Tensor) -> tuple[Tensor, int, int]:
    """x, or a copy where its strides are none we read; its leading stride; its layout."""
    if is_packed(x):
        return x, x.stride(1), _PACKED
    if x.stride(1) == 1:
        return x, x.stride(0), _ROW_MAJOR
    if x.stride(0) == 1:
        return x, x.stride(1), _BATCH_MINOR
    return x.contiguous(), x.shape[1], _ROW_MAJOR

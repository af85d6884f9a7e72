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
    "saved_input",
    "status",
    "supports",
]


def supports(dtype: torch.dtype, plans: list[Tensor]) -> bool:
    """Can the native chain run on this dtype and on these plans?"""
    known = dtype in (torch.float32, torch.float64, *HALF)
    return known and native.LIBRARY is not None and all(plan.is_cpu and plan.numel() for plan in plans)


def tile_shape(out_features: int, in_features: int, nnz: int) -> tuple[int, int]:
    """(strip, block) of the plan: as many packed rows of 8 vectors as fill 32 KiB of L1, more for 10 entries a segment.

    Measured with 1024 x 1024 weights at 50, 20, 10, 5 and 2 % on AVX-512 and AVX2: within 5 % of the best of 27 shapes.
    """
    in_l1 = 2**15 // (8 * native.VECTOR_BYTES)
    wanted = 10 * out_features * in_features // max(nnz, 1)
    return 256, min(max(wanted // 16 * 16, in_l1), 256)


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
    x, matrix = _matrix(x)
    batch, out_features = x.shape[0], crow_indices[-1].shape[0] - 1
    ld, size = leading_dim(batch), x.element_size()
    y = x.new_empty((out_features, ld) if batch_minor else (batch, out_features))
    inputs = [x.shape[1], *(crow.shape[0] - 1 for crow in crow_indices[:-1])]
    elements = sum(saved_features(x, crow_indices)) * ld
    saved = x.new_empty(elements if save else 0)
    single = batch == 1 and not save and not matrix[2] and not batch_minor
    at = native.LIBRARY.sparselottery_workspace(sum(inputs) * ld * size)
    addresses = _addresses(inputs, ld * size, at, saved.data_ptr() if save else None, is_packed(x))
    args = [size == 8, torch.get_num_threads(), len(values), batch, x.shape[1], *matrix]
    args += [y.data_ptr(), y.stride(0), batch_minor, 0, 0, 0, 0]
    for layer, (value, bias, crow) in enumerate(zip(values, biases, crow_indices, strict=True)):
        args += [plans[layer].data_ptr(), plans[layer].numel(), crow.shape[0] - 1, value.numel(), value.data_ptr()]
        args += [0 if bias is None else bias.data_ptr(), 0 if single and not layer else addresses[layer], 0, 0, 0]
    native.call(native.LIBRARY.sparselottery_chain_forward, args)
    return (unpack(y, batch) if batch_minor else y), saved


def saved_input(saved: Tensor, batch: int, features: int) -> Tensor:
    """As reference.saved_input."""
    if saved.dtype in HALF:
        return saved_input(saved.float(), batch, features).to(saved.dtype)
    x = saved.new_empty(batch, features)
    native.LIBRARY.sparselottery_unpack(saved.element_size() == 8, saved.data_ptr(), batch, features, x.data_ptr())
    return x


def chain_backward(gy, x, saved, values, crow_indices, col_indices, plans, need_x, need_values, need_bias):
    """As reference.chain_backward."""
    if x.dtype in HALF:
        wide = gy.float(), _widen(x), saved.float(), [v.float() for v in values]
        gx, gvalues, gbias = chain_backward(*wide, crow_indices, col_indices, plans, need_x, need_values, need_bias)
        gx = gx.to(x.dtype)
        gx = unpack(pack(gx), len(gx)) if need_x and is_packed(x) else gx
        return gx, [g.to(x.dtype) for g in gvalues], [g.to(x.dtype) for g in gbias]
    values = [v.contiguous() for v in values]
    gy, matrix = _matrix(gy)
    batch, in_features, packed_x = gy.shape[0], x.shape[1], is_packed(x)
    ld, size = leading_dim(batch), gy.element_size()
    gx = gy.new_empty(((in_features, ld) if packed_x else (batch, in_features)) if need_x else 0)
    inputs = [in_features, *(crow.shape[0] - 1 for crow in crow_indices[:-1])]
    # Packed: gy, then the gradients of hidden layers, then x where forward did not save it.
    widths = [gy.shape[1], *inputs[1:], in_features * packed_x]
    scratch = native.LIBRARY.sparselottery_workspace(sum(widths) * ld * size)
    ginputs = [scratch + sum(widths[:layer]) * ld * size for layer in range(len(widths))]
    addresses = _addresses(inputs, ld * size, ginputs[-1], saved.data_ptr(), packed_x)
    args = [size == 8, torch.get_num_threads(), len(values), batch, in_features, *matrix]
    args += [gx.data_ptr(), gx.stride(0), packed_x, *(_matrix(x)[1] if packed_x else (0, 0, 0)), scratch]
    gvalues, gbias = [], []
    for layer, (value, crow) in enumerate(zip(values, crow_indices, strict=True)):
        gvalues.append(gy.new_empty(value.shape if need_values[layer] else 0))
        gbias.append(gy.new_empty(crow.shape[0] - 1 if need_bias[layer] else 0))
        args += [plans[layer].data_ptr(), plans[layer].numel(), crow.shape[0] - 1, value.numel(), value.data_ptr(), 0]
        args += [addresses[layer], gvalues[-1].data_ptr(), gbias[-1].data_ptr(), ginputs[layer] if layer else 0]
    native.call(native.LIBRARY.sparselottery_chain_backward, args)
    return (unpack(gx, batch) if need_x and packed_x else gx), gvalues, gbias


def _addresses(features: list[int], size: int, own: int, saved: int | None, packed_x: bool) -> list[int]:
    """Of all layers' packed inputs, `size` bytes a feature: in `own` memory, or saved but for an x that is packed."""
    first = own if saved is None or packed_x else saved
    rest = first + features[0] * size if first == saved or saved is None else saved
    return [first, *(rest + sum(features[1:layer]) * size for layer in range(1, len(features)))]


def _widen(x: Tensor) -> Tensor:
    """x in fp32, packed if and only if x is."""
    return x.float() if is_packed(x) else x.float().contiguous()


def _matrix(x: Tensor) -> tuple[Tensor, tuple[int, int, bool]]:
    """x, or a copy where its strides are none that are read; its words of a Matrix in csrc/chain.cpp."""
    if is_packed(x) or (x.stride(1) != 1 and x.stride(0) == 1):
        return x, (x.data_ptr(), x.stride(1), True)
    x = x if x.stride(1) == 1 else x.contiguous()
    return x, (x.data_ptr(), x.stride(0), False)

"""Sparse convolution on the CPU, by csrc/conv.cpp."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from . import native, reference
from .native import HALF
from .reference import Geometry, Norm, image_format

_L1 = 20 << 10  # bytes of packed input that a tile may read
_STRIP = 256  # rows of a strip: output channels


def conv_plan(crow_indices: Tensor, col_indices: Tensor, geometry: Geometry, backward: bool = True) -> Tensor:
    """The plan of a convolution's valid CSR pattern (O, C / groups * kernel_h * kernel_w) as a flat int32 tensor.

    backward: False leaves out what only gradients need.
    """
    out_channels, geometry = crow_indices.numel() - 1, _unstrided(geometry)
    crow_indices, col_indices = crow_indices.contiguous(), col_indices.contiguous()
    taps = array("i", _taps(geometry))
    size = geometry.kernel_h * geometry.kernel_w
    density = col_indices.numel() / max(1, out_channels * geometry.channels * size)
    blocks = conv_block(geometry, density, geometry.channels, 12), conv_block(geometry, density, out_channels, 32)
    pointers = taps.buffer_info()[0], crow_indices.data_ptr(), col_indices.data_ptr()
    sizes = _STRIP, *blocks, backward, torch.get_num_threads()
    return native.take(native.LIBRARY.conv_plan, out_channels, *pointers, *sizes)


def conv_block(geometry: Geometry, density: float, channels: int, entries: int) -> int:
    """Channels per tile: what they read fits L1, but a row segment has so many entries.

    12 of W, and 32 of Wᵀ, whose segments read two rows in place of one. Measured on Zen 4 with seven convolutions at 20
    to 5 %: forward + backward 2 to 7 % faster than with 12 of both; 64 is no faster, nor 20 of W.
    """
    taps = geometry.kernel_h * geometry.kernel_w
    step = native.VECTOR_BYTES // 8  # 8 vectors of fp32, in pixels of 16 images
    fits = _L1 // (64 * geometry.kernel_h * (step + geometry.kernel_w - 1))
    return min(max(1, fits, int(entries / max(density * taps, 1e-9))), max(1, channels), 65536 // taps)


def conv_forward(x, values, bias, crow_indices, col_indices, plan, geometry, relu, pool, norm=None):
    """As reference.conv_forward, but for None in place of winners where nothing is pooled."""
    if x.dtype in HALF:
        wide = x.float(), values.float(), None if bias is None else bias.float()
        norm = norm and Norm(*(None if t is None else t.float() for t in norm[:4]), norm.epsilon)
        y, winners = conv_forward(*wide, crow_indices, col_indices, plan, geometry, relu, pool, norm)
        return y.to(x.dtype), winners
    geometry, call = Geometry(*geometry), (relu, pool, norm)
    args = _seen(x, geometry), values, bias, crow_indices, plan, _unstrided(geometry)
    done = native.LIBRARY.conv_forward(*args, *call, torch.get_num_threads())
    return done or reference.conv_forward(x, values, bias, crow_indices, col_indices, plan, geometry, *call)


def conv_backward(
    gy, x, y, winners, values, crow_indices, col_indices, plan, geometry, relu, pool, need_x, need_values, need_bias
):
    """As reference.conv_backward, but for None in place of gradients not needed."""
    if x.dtype in HALF:
        wide = gy.float(), x.float(), y.float(), winners, values.float()
        needs = need_x, need_values, need_bias
        grads = conv_backward(*wide, crow_indices, col_indices, plan, geometry, relu, pool, *needs)
        return tuple(None if g is None else g.to(x.dtype) for g in grads)
    geometry, call = Geometry(*geometry), (relu, pool, need_x, need_values, need_bias)
    args = gy, _seen(x, geometry), y, winners, values, plan, _unstrided(geometry)
    done = native.LIBRARY.conv_backward(*args, *call, torch.get_num_threads())
    if done is None:
        indices = crow_indices, col_indices, plan
        return reference.conv_backward(gy, x, y, winners, values, *indices, geometry, *call)
    if need_x and _skips(geometry):
        gx = torch.zeros_like(x, memory_format=image_format(x))
        gx[:, :, :: geometry.stride_h, :: geometry.stride_w] = done[0]
        return gx, *done[1:]
    return done


def _unstrided(geometry: Geometry) -> Geometry:
    """The geometry of the same product over the pixels `_seen`."""
    return geometry._replace(stride_h=1, stride_w=1) if _skips(geometry) else geometry


def _seen(x: Tensor, geometry: Geometry) -> Tensor:
    """x without the pixels that a stride skips."""
    if not _skips(geometry):
        return x
    return x[:, :, :: geometry.stride_h, :: geometry.stride_w].contiguous(memory_format=image_format(x))


def _skips(g: Geometry) -> bool:
    """Are there pixels that no tap meets, whatever their channel? A 1x1 kernel with a stride skips all but a few."""
    unpadded = not (g.top or g.bottom or g.left or g.right)
    return g.kernel_h == g.kernel_w == 1 and unpadded and (g.stride_h, g.stride_w) != (1, 1)


def _taps(g: Geometry) -> list[int]:
    """Taps in csrc/plan.h."""
    around = [g.kernel_h, g.kernel_w, g.stride_h, g.stride_w, g.top, g.left, g.dilation_h, g.dilation_w]
    return [g.channels, *around, g.groups]

"""Sparse convolution on the CPU: packs the arguments of csrc/conv.cpp."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from . import native, reference
from .native import HALF
from .reference import Geometry, Norm, image_format, lanes, winners_shape

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
    blocks = [conv_block(geometry, density, channels) for channels in (geometry.channels, out_channels)]
    pointers = taps.buffer_info()[0], crow_indices.data_ptr(), col_indices.data_ptr()
    sizes = _STRIP, *blocks, backward, torch.get_num_threads()
    return native.take(native.LIBRARY.conv_plan, out_channels, *pointers, *sizes)


def conv_block(geometry: Geometry, density: float, channels: int) -> int:
    """Channels per tile: what they read fits L1, but a row segment has 12 entries."""
    taps = geometry.kernel_h * geometry.kernel_w
    step = native.VECTOR_BYTES // 8  # 8 vectors of fp32, in pixels of 16 images
    fits = _L1 // (64 * geometry.kernel_h * (step + geometry.kernel_w - 1))
    return min(max(1, fits, int(12 / max(density * taps, 1e-9))), max(1, channels), 65536 // taps)


def conv_forward(x, values, bias, crow_indices, col_indices, plan, geometry, relu, pool, norm=None):
    """As reference.conv_forward."""
    if x.dtype in HALF:
        wide = x.float(), values.float(), None if bias is None else bias.float()
        norm = norm and Norm(*(None if t is None else t.float() for t in norm[:4]), norm.epsilon)
        y, winners = conv_forward(*wide, crow_indices, col_indices, plan, geometry, relu, pool, norm)
        return y.to(x.dtype), winners
    images, strided = x, Geometry(*geometry)
    x, geometry = _seen(x, strided), _unstrided(strided)
    out_size = geometry.output_size(*x.shape[2:])
    shape = x.shape[0], crow_indices.shape[0] - 1, *(size // pool for size in out_size)
    y = native.empty(*shape, dtype=x.dtype, memory_format=image_format(images))
    size = winners_shape(*shape[:2], geometry, out_size, pool) if pool > 1 else [0]
    winners = native.empty(*size, dtype=torch.uint8)
    values, bias = values.contiguous(), None if bias is None else bias.contiguous()
    pointers = [
        plan.data_ptr(),
        plan.numel(),
        values.numel(),
        values.data_ptr(),
        0 if bias is None else bias.data_ptr(),
    ]
    strides = [*_strides(x), *_strides(y), 0, 0, 0, 0, 0, 0]
    taps = array("i", _taps(geometry))
    args = [
        *_sizes(x, y, geometry, out_size, relu, pool),
        taps.buffer_info()[0],
        *pointers,
        x.data_ptr(),
        y.data_ptr(),
        0,
        0,
    ]
    statistics, epsilon = [0, 0, 0, 0], 0.0
    if norm is not None:
        norm = Norm(*(None if t is None else t.contiguous() for t in norm[:4]), norm.epsilon)
        statistics, epsilon = [0 if t is None else t.data_ptr() for t in norm[:4]], norm.epsilon
    args += [*strides, 0, 0, winners.data_ptr(), *statistics, _bits(epsilon)]
    if native.LIBRARY.conv_forward(args) == native.TOO_LARGE:
        indices = crow_indices, col_indices, plan
        return reference.conv_forward(images, values, bias, *indices, strided, relu, pool, norm)
    return y, winners


def conv_backward(
    gy, x, y, winners, values, crow_indices, col_indices, plan, geometry, relu, pool, need_x, need_values, need_bias
):
    """As reference.conv_backward."""
    if x.dtype in HALF:
        wide = gy.float(), x.float(), y.float(), winners, values.float()
        needs = need_x, need_values, need_bias
        grads = conv_backward(*wide, crow_indices, col_indices, plan, geometry, relu, pool, *needs)
        return tuple(g.to(x.dtype) for g in grads)
    images, strided = x, Geometry(*geometry)
    x, geometry, gy, values = _seen(x, strided), _unstrided(strided), _dense_images(gy), values.contiguous()
    gated = relu and pool == 1
    if gated and gy.stride() != y.stride():
        gy = torch.empty_like(y).copy_(gy)
    gx = torch.empty_like(x) if need_x else x.new_empty(0)
    gvalues = values.new_empty(values.shape if need_values else 0)
    gbias = values.new_empty(gy.shape[1] if need_bias else 0)
    strides = [*_strides(x), 0, 0, 0, *_strides(gy), *(_strides(gx) if need_x else (0, 0, 0))]
    taps = array("i", _taps(geometry))
    out_size = geometry.output_size(*x.shape[2:])
    args = [
        *_sizes(x, gy, geometry, out_size, relu, pool),
        taps.buffer_info()[0],
        plan.data_ptr(),
        plan.numel(),
        values.numel(),
        values.data_ptr(),
        0,
    ]
    args += [x.data_ptr(), y.data_ptr() if gated else 0, gy.data_ptr(), gx.data_ptr(), *strides]
    args += [gvalues.data_ptr(), gbias.data_ptr(), winners.data_ptr(), 0, 0, 0, 0, 0]
    if native.LIBRARY.conv_backward(args) == native.TOO_LARGE:
        tensors, needs = (gy, images, y, winners, values, crow_indices, col_indices), (need_x, need_values, need_bias)
        return reference.conv_backward(*tensors, plan, strided, relu, pool, *needs)
    if need_x and geometry != strided:
        gx, seen = torch.zeros_like(images, memory_format=image_format(images)), gx
        gx[:, :, :: strided.stride_h, :: strided.stride_w] = seen
    return gx, gvalues, gbias


def _unstrided(geometry: Geometry) -> Geometry:
    """The geometry of the same product over the pixels `_seen`."""
    return geometry._replace(stride_h=1, stride_w=1) if _skips(geometry) else geometry


def _seen(x: Tensor, geometry: Geometry) -> Tensor:
    """x, as `_dense_images`, without the pixels that a stride skips."""
    if not _skips(geometry):
        return _dense_images(x)
    return x[:, :, :: geometry.stride_h, :: geometry.stride_w].contiguous(memory_format=image_format(x))


def _skips(g: Geometry) -> bool:
    """Are there pixels that no tap meets, whatever their channel? A 1x1 kernel with a stride skips all but a few."""
    unpadded = not (g.top or g.bottom or g.left or g.right)
    return g.kernel_h == g.kernel_w == 1 and unpadded and (g.stride_h, g.stride_w) != (1, 1)


def _taps(g: Geometry) -> list[int]:
    """Taps in csrc/plan.h."""
    around = [g.kernel_h, g.kernel_w, g.stride_h, g.stride_w, g.top, g.left, g.dilation_h, g.dilation_w]
    return [g.channels, *around, g.groups]


def _sizes(x: Tensor, y: Tensor, geometry: Geometry, out_size: tuple[int, int], relu: bool, pool: int) -> list[int]:
    """The head of ConvArgs in csrc/cut.h: y may be pooled, out_size is before that."""
    flat = lanes(x.shape[0], geometry, out_size) == 1
    return [x.element_size() == 8, torch.get_num_threads(), flat, relu, pool, *x.shape, y.shape[1], *out_size]


def _dense_images(x: Tensor) -> Tensor:
    """x (N, C, H, W), or a copy where neither its pixels nor its channels are contiguous."""
    _, channel, row, pixel = x.stride()
    readable = row == x.shape[3] * pixel and (pixel == 1 or channel == 1)
    return x if readable else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of an image, a channel and a pixel."""
    image, channel, _, pixel = x.stride()
    return image, channel, pixel


def _bits(number: float) -> int:
    """A double as the integer of the same bits."""
    return array("q", array("d", [number]).tobytes())[0]

"""The functions of `reference`, native: packs arguments for csrc/, in place of which the reference is used elsewhere.

One shared library per instruction-set level is built by setup.py; the best one that this processor runs is loaded. The
plan of a pattern (csrc/plan.h) is a flat int32 tensor; strips and tiles are sized here.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import reference
from .reference import (
    Geometry,
    Norm,
    image_format,
    is_packed,
    lanes,
    leading_dim,
    pack,
    saved_features,
    unpack,
    winners_shape,
)

# What torch calls the processor's capability -> the levels of setup.py that run on it, best first.
LEVELS = {"AVX512": ("avx512", "avx2", "base"), "AVX2": ("avx2", "base")}

_CONV_L1 = 20 << 10  # bytes of packed input that a tile of a convolution may read
_HALF = (torch.bfloat16, torch.float16)  # computed in fp32
_ROW_MAJOR, _BATCH_MINOR, _PACKED = 0, 1, 2  # Layout in csrc/chain.cpp


def load(path: Path) -> ctypes.CDLL:
    """The native library at `path`. Raises OSError if it does not load."""
    library = ctypes.CDLL(str(path))
    library.sparselottery_plan.restype = ctypes.c_int64
    library.sparselottery_workspace.argtypes = [ctypes.c_int64]
    library.sparselottery_workspace.restype = ctypes.c_void_p
    library.sparselottery_conv_plan.restype = ctypes.c_int64
    for name, result in (("chain", None), ("conv", ctypes.c_bool)):
        for direction in ("forward", "backward"):
            function = getattr(library, f"sparselottery_{name}_{direction}")
            function.argtypes, function.restype = [ctypes.c_void_p], result
    return library


def _best() -> tuple[ctypes.CDLL | None, str]:
    """The library for this processor, and in words which one it is or why there is none."""
    capability = torch.backends.cpu.get_cpu_capability()
    folder = Path(__file__).resolve().parent
    for level in LEVELS.get(capability, ("base",)):
        for path in sorted(folder.glob(f"_native_{level}.*")):
            try:
                return load(path), f"native, {level} (processor: {capability})"
            except OSError as error:
                return None, f"torch reference: {path.name} does not load ({error})"
    return None, "torch reference: no native library was built (was there a C++ compiler at install time?)"


_LIBRARY, _STATUS = _best()


def available() -> bool:
    return _LIBRARY is not None


def status() -> str:
    return _STATUS


def supports(dtype: torch.dtype, plans: list[Tensor]) -> bool:
    """Can the native chain run on this dtype and on these plans?"""
    native = dtype in (torch.float32, torch.float64, *_HALF)
    return native and _LIBRARY is not None and all(plan.numel() for plan in plans)


def tile_shape(out_features: int, in_features: int, nnz: int) -> tuple[int, int]:
    """(strip, block) of the plan: blocks as small as L1 likes, but wide enough for 8 entries a row segment."""
    size = out_features * in_features
    narrowest = 32 if nnz > 0.6 * size else 64
    return 256, min(max(8 * size // max(nnz, 1) // 16 * 16, narrowest), 512)


def plan(crow_indices: Tensor, col_indices: Tensor, in_features: int, tile: tuple[int, int] | None = None) -> Tensor:
    """The plan of a valid CSR pattern as a flat int32 tensor; `tile` = (strip, block) overrides its tiling."""
    out_features = crow_indices.numel() - 1
    strip, block = tile or tile_shape(out_features, in_features, col_indices.numel())
    crow_indices, col_indices = crow_indices.contiguous(), col_indices.contiguous()
    indices = _pointer(crow_indices), _pointer(col_indices)
    return _take(_LIBRARY.sparselottery_plan, out_features, in_features, *indices, strip, block)


def _take(build: Callable[..., int], *args: object) -> Tensor:
    """The words that a native plan builder leaves, as an int32 tensor."""
    words = ctypes.POINTER(ctypes.c_int32)()
    count = build(*args, ctypes.byref(words))
    if count < 0:
        raise MemoryError("no memory for the plan")
    out = torch.empty(count, dtype=torch.int32)
    ctypes.memmove(out.data_ptr(), words, 4 * count)
    _LIBRARY.sparselottery_free(words)
    return out


def chain_forward(x, values, biases, crow_indices, col_indices, plans, batch_minor, save):
    """As reference.chain_forward."""
    if x.dtype in _HALF:
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
    args = [size == 8, torch.get_num_threads(), len(values), batch, ld, x.data_ptr(), x_stride, x_layout]
    args += [y.data_ptr(), y.stride(0), _PACKED if batch_minor else _ROW_MAJOR, 0]
    start = packed.data_ptr() if save else _LIBRARY.sparselottery_workspace(elements * size)
    at, ld_in = (x.data_ptr(), x_stride) if x_layout == _PACKED else (start, ld)
    for layer, (value, bias, crow) in enumerate(zip(values, biases, crow_indices, strict=True)):
        args += [plans[layer].data_ptr(), crow.data_ptr(), col_indices[layer].data_ptr(), value.data_ptr()]
        args += [0 if bias is None else bias.data_ptr(), 0 if single and not layer else at, ld_in, 0, 0, 0]
        if layer == 0 and x_layout == _PACKED:
            at = start
        else:
            at += (x.shape[1] if layer == 0 else crow_indices[layer - 1].shape[0] - 1) * ld * size
        ld_in = ld
    _call(_LIBRARY.sparselottery_chain_forward, args)
    return (unpack(y, batch) if batch_minor else y), packed


def chain_backward(gy, x, saved, values, crow_indices, col_indices, plans, need_x, need_values, need_bias):
    """As reference.chain_backward."""
    if x.dtype in _HALF:
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
    scratch = _LIBRARY.sparselottery_workspace(sum(widths) * ld * size)
    args = [size == 8, torch.get_num_threads(), len(values), batch, ld, gy.data_ptr(), gy_stride, gy_layout]
    args += [gx.data_ptr(), gx.stride(0), _PACKED if packed_x else _ROW_MAJOR, scratch]
    at, ginput = saved.data_ptr(), scratch + widths[0] * ld * size
    gvalues, gbias = [], []
    for layer, (value, crow) in enumerate(zip(values, crow_indices, strict=True)):
        gvalues.append(gy.new_empty(value.shape if need_values[layer] else 0))
        gbias.append(gy.new_empty(crow.shape[0] - 1 if need_bias[layer] else 0))
        args += [plans[layer].data_ptr(), crow.data_ptr(), col_indices[layer].data_ptr(), value.data_ptr(), 0]
        args += (x.data_ptr(), x.stride(1)) if packed_x and layer == 0 else (at, ld)
        args += [gvalues[-1].data_ptr(), gbias[-1].data_ptr(), ginput if layer else 0]
        if layer or not packed_x:
            at += (widths[layer] if layer else in_features) * ld * size
        if layer:
            ginput += widths[layer] * ld * size
    _call(_LIBRARY.sparselottery_chain_backward, args)
    return (unpack(gx, batch) if need_x and packed_x else gx), gvalues, gbias


def conv_plan(crow_indices: Tensor, col_indices: Tensor, geometry: Geometry) -> Tensor:
    """The plan of a convolution's valid CSR pattern (O, C / groups * kernel_h * kernel_w) as a flat int32 tensor."""
    out_channels = crow_indices.numel() - 1
    crow_indices, col_indices = crow_indices.contiguous(), col_indices.contiguous()
    taps = array("i", _taps(geometry))
    size = geometry.kernel_h * geometry.kernel_w
    density = col_indices.numel() / max(1, out_channels * geometry.channels * size)
    blocks = [conv_block(geometry, density, channels) for channels in (geometry.channels, out_channels)]
    indices = _pointer(crow_indices), _pointer(col_indices)
    return _take(
        _LIBRARY.sparselottery_conv_plan, out_channels, ctypes.c_void_p(taps.buffer_info()[0]), *indices, 256, *blocks
    )


def conv_block(geometry: Geometry, density: float, channels: int) -> int:
    """Channels per tile: what they read fits L1, but a row segment has 12 entries."""
    taps = geometry.kernel_h * geometry.kernel_w
    fits = _CONV_L1 // (64 * geometry.kernel_h * (8 + geometry.kernel_w - 1))
    return min(max(1, fits, int(12 / max(density * taps, 1e-9))), max(1, channels), 65536 // taps)


def conv_forward(x, values, bias, crow_indices, col_indices, plan, geometry, relu, pool, norm=None):
    """As reference.conv_forward."""
    if x.dtype in _HALF:
        wide = x.float(), values.float(), None if bias is None else bias.float()
        norm = norm and Norm(*(None if t is None else t.float() for t in norm[:4]), norm.epsilon)
        y, winners = conv_forward(*wide, crow_indices, col_indices, plan, geometry, relu, pool, norm)
        return y.to(x.dtype), winners
    geometry, x = Geometry(*geometry), _dense_images(x)
    out_size = geometry.output_size(*x.shape[2:])
    shape = x.shape[0], crow_indices.shape[0] - 1, *(size // pool for size in out_size)
    y = torch.empty(shape, dtype=x.dtype, memory_format=image_format(x))
    size = winners_shape(*shape[:2], geometry, out_size, pool) if pool > 1 else 0
    winners = torch.empty(size, dtype=torch.uint8)
    values, bias = values.contiguous(), None if bias is None else bias.contiguous()
    pointers = [plan.data_ptr(), values.data_ptr(), 0 if bias is None else bias.data_ptr()]
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
    if not _call(_LIBRARY.sparselottery_conv_forward, args):
        indices = crow_indices, col_indices, plan
        return reference.conv_forward(x, values, bias, *indices, geometry, relu, pool, norm)
    return y, winners


def conv_backward(
    gy, x, y, winners, values, crow_indices, col_indices, plan, geometry, relu, pool, need_x, need_values, need_bias
):
    """As reference.conv_backward."""
    if x.dtype in _HALF:
        wide = gy.float(), x.float(), y.float(), winners, values.float()
        needs = need_x, need_values, need_bias
        grads = conv_backward(*wide, crow_indices, col_indices, plan, geometry, relu, pool, *needs)
        return tuple(g.to(x.dtype) for g in grads)
    geometry, x, gy, values = Geometry(*geometry), _dense_images(x), _dense_images(gy), values.contiguous()
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
        values.data_ptr(),
        0,
    ]
    args += [x.data_ptr(), y.data_ptr() if gated else 0, gy.data_ptr(), gx.data_ptr(), *strides]
    args += [gvalues.data_ptr(), gbias.data_ptr(), winners.data_ptr(), 0, 0, 0, 0, 0]
    if not _call(_LIBRARY.sparselottery_conv_backward, args):
        tensors, needs = (gy, x, y, winners, values, crow_indices, col_indices), (need_x, need_values, need_bias)
        return reference.conv_backward(*tensors, plan, geometry, relu, pool, *needs)
    return gx, gvalues, gbias


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


def _widen(x: Tensor) -> Tensor:
    """x in fp32, packed if and only if x is."""
    return x.float() if is_packed(x) else x.float().contiguous()


def _call(function: Callable[[int], bool | None], args: list[int]) -> bool | None:
    """Calls a function of csrc/chain.cpp or conv.cpp with its arguments, all fields 8 bytes."""
    block = array("q", args)
    return function(block.buffer_info()[0])


def _bits(number: float) -> int:
    """A double as the integer of the same bits."""
    return array("q", array("d", [number]).tobytes())[0]


def _layout(x: Tensor) -> tuple[Tensor, int, int]:
    """x, or a copy where its strides are none we read; its leading stride; its layout."""
    if is_packed(x):
        return x, x.stride(1), _PACKED
    if x.stride(1) == 1:
        return x, x.stride(0), _ROW_MAJOR
    if x.stride(0) == 1:
        return x, x.stride(1), _BATCH_MINOR
    return x.contiguous(), x.shape[1], _ROW_MAJOR


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())

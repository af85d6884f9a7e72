"""Frozen nets, fp32: stages packed once, so that inference is one native call (csrc/net.cpp, rows.cpp, chain.cpp).

Raw tensors in: CSR indices and values of each layer, on the CPU. What is packed is read only: any number of threads may
run it at once. Axes: N images or samples.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu, native
from .reference import Geometry

Shape = tuple[int, ...]  # of one input: (features,) or (C, H, W)

_CONVOLUTION, _LINEAR, _MEAN = range(3)  # Kind in csrc/net.h
_STRIP, _ROWS = 64, 8  # of csrc/net.cpp and net.h
_PIXELS, _SLACK = 128, 64  # of csrc/net.cpp
_MAX_ELEMENTS = 2**31 - 1  # of a field: offsets have 32 bits


class Linear(NamedTuple):
    """relu?(x Wᵀ + bias): crow_indices (O + 1,), col_indices (nnz,), values (nnz,), bias (O,) or None."""

    in_features: int
    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    bias: Tensor | None
    relu: bool = False


class Conv(NamedTuple):
    """max_pool?(relu?(scale (x * W) + shift)): as Linear, W being (O, C / groups * kernel_h * kernel_w).

    scale, shift: (O,), of the bias and a batchnorm, or None. Windows of the pooling are pool x pool, without overlap.
    """

    geometry: Geometry
    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    scale: Tensor | None
    shift: Tensor | None
    relu: bool = False
    pool: int = 1


class Mean(NamedTuple):
    """The mean of each channel: (C, H, W) -> (C,)."""


Stage = Linear | Conv | Mean


class _Packed:
    """Call it on x (N, ...), contiguous fp32 on the CPU: y (N, *out_shape)."""

    out_shape: Shape
    address: int  # of the packed arguments

    @staticmethod
    def function() -> Callable[[int, int, int, int], None]:
        """The native function that takes them."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        return self.bind(len(x))(x)

    def bind(self, batch: int) -> Callable[[Tensor], Tensor]:
        """The call for one N: all that a call can leave to its caller is done."""
        function, address, empty, shape = self.function(), self.address, torch.empty, (batch, *self.out_shape)

        def call(x: Tensor, _net: _Packed = self) -> Tensor:  # which lives as long as its calls
            y = empty(*shape)
            function(address, x.data_ptr(), y.data_ptr(), batch)
            return y

        return call


class Net(_Packed):
    """Packed stages, for inputs of in_shape."""

    @staticmethod
    def function() -> Callable[[int, int, int, int], None]:
        return native.LIBRARY.sparselottery_net

    def __init__(self, stages: Sequence[Stage], in_shape: Shape, threads: int) -> None:
        """Raises ValueError if a stage cannot read what comes before it, or a field is too large for 32-bit offsets."""
        shapes = [in_shape]
        for stage in stages:
            shapes.append(_output_shape(stage, shapes[-1]))
        self.out_shape, self.threads = shapes[-1], threads
        fields = [_field(stage, shape) for stage, shape in zip(stages, shapes, strict=False)]
        if max(map(_elements, fields)) > _MAX_ELEMENTS:
            raise ValueError(f"in_shape: expected images for 32-bit offsets, got {in_shape}")
        self._kept: list[Tensor] = []
        words: list[int] = []
        for stage, shape, field in zip(stages, shapes, fields, strict=False):
            words += self._pack(stage, shape, field)
        scratch = [_sums(stage, shape) for stage, shape in zip(stages, shapes, strict=False)]
        sizes = [
            len(stages),
            threads,
            threads,
            _size(in_shape),
            _size(self.out_shape),
            max(map(_elements, fields)) + _SLACK,
        ]
        sizes.append(_size(in_shape) + 1 + max(scratch))
        self._block = array("q", [*sizes, *_plain(self.out_shape), *words])
        self.address = self._block.buffer_info()[0]
        if threads > 1:
            self._choose_sharers(torch.zeros(1, *in_shape))

    def _choose_sharers(self, x: Tensor) -> None:
        """One thread for each image or all: where cores are far from each other, sharing costs more than it saves."""
        seconds = {}
        for sharers in (1, self.threads) * 4:
            self._block[2] = sharers
            began = perf_counter()
            for _ in range(3):
                self(x)
            seconds[sharers] = min(perf_counter() - began, seconds.get(sharers, math.inf))
        self._block[2] = min(seconds, key=seconds.__getitem__)

    @property
    def nbytes(self) -> int:
        """Of what was packed."""
        return sum(tensor.nbytes for tensor in self._kept)

    def _keep(self, tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int:
        """The address of a tensor that lives as long as the net."""
        if tensor is None:
            return 0
        tensor = tensor.detach().to(dtype).contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _pack(self, stage: Stage, shape: Shape, field: list[int]) -> list[int]:
        """The words of a Stage."""
        if isinstance(stage, Mean):
            return [_MEAN, shape[0], 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, *field]
        rows = len(stage.crow_indices) - 1
        if isinstance(stage, Linear):
            begin, columns, values, order, shift = _pack_linear(stage)
            wide = columns.dtype == torch.int32
            words = [self._keep(begin, torch.int32), self._keep(columns, columns.dtype), self._keep(values)]
            words += [self._keep(order, torch.int32), 0, self._keep(shift)]
            return [_LINEAR, rows, *words, stage.relu, 1, wide, 0, 0, 0, *field]
        height, width = stage.geometry.output_size(*shape[1:])
        offsets = _offsets(stage, field)
        words = [
            self._keep(stage.crow_indices, torch.int32),
            self._keep(offsets, torch.int32),
            self._keep(stage.values),
        ]
        words += [0, self._keep(stage.scale), self._keep(stage.shift)]
        by_pixels = _elements(field) > len(offsets) and height // stage.pool >= 2 * self.threads
        return [_CONVOLUTION, rows, *words, stage.relu, stage.pool, 0, height, width, by_pixels, *field]


class Chain(_Packed):
    """Linear layers with a ReLU between them, packed for batches (N, in_features)."""

    @staticmethod
    def function() -> Callable[[int, int, int, int], None]:
        return native.LIBRARY.sparselottery_chain_infer

    def __init__(self, stages: Sequence[Linear], threads: int) -> None:
        self.out_shape = (len(stages[-1].crow_indices) - 1,)
        self._kept, words = [], [threads, len(stages)]
        for stage in stages:
            indices = stage.crow_indices.contiguous(), stage.col_indices.contiguous()
            plan = cpu.plan(*indices, stage.in_features, backward=False)
            bias = None if stage.bias is None else stage.bias.detach().contiguous()
            self._kept += [plan, *indices, stage.values.detach().contiguous(), bias]
            words += [0 if tensor is None else tensor.data_ptr() for tensor in self._kept[-5:]]
        self._block = array("q", words)
        self.address = self._block.buffer_info()[0]


class Rows(_Packed):
    """The same for some samples at once, from CSR as it is."""

    @staticmethod
    def function() -> Callable[[int, int, int, int], None]:
        return native.LIBRARY.sparselottery_rows

    def __init__(self, stages: Sequence[Linear], threads: int) -> None:
        sizes = [len(stage.crow_indices) - 1 for stage in stages]
        self.out_shape = (sizes[-1],)
        self._kept, words = [], [len(stages), threads, max(*sizes, *(stage.in_features for stage in stages))]
        for stage, rows in zip(stages, sizes, strict=True):
            tensors = stage.crow_indices, stage.col_indices, stage.values.detach(), stage.bias
            self._kept += [None if tensor is None else tensor.contiguous() for tensor in tensors]
            pointers = [0 if tensor is None else tensor.data_ptr() for tensor in self._kept[-4:]]
            words += [rows, stage.in_features, *pointers]
        self._block = array("q", words)
        self.address = self._block.buffer_info()[0]


def _output_shape(stage: Stage, shape: Shape) -> Shape:
    if isinstance(stage, Linear):
        if _size(shape) != stage.in_features:
            raise ValueError(f"stages: expected {stage.in_features} features, got {shape}")
        return (len(stage.crow_indices) - 1,)
    if isinstance(stage, Mean) and len(shape) == 3:
        return (shape[0],)
    if isinstance(stage, Conv) and len(shape) == 3 and shape[0] == stage.geometry.channels:
        height, width = stage.geometry.output_size(*shape[1:])
        if min(height, width) >= stage.pool:
            return len(stage.crow_indices) - 1, height // stage.pool, width // stage.pool
    raise ValueError(f"stages: expected an input for {type(stage).__name__}, got {shape}")


def _field(stage: Stage, shape: Shape) -> list[int]:
    """The words of the Field that a stage reads."""
    if not isinstance(stage, Conv):
        return _plain(shape)
    g = stage.geometry
    out_height, out_width = g.output_size(*shape[1:])
    rows = -(-((out_height - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1) // g.stride_h)
    rows = max(rows, -(-(g.top + shape[1]) // g.stride_h))
    columns = [out_width, g.kernel_w, g.stride_w, g.dilation_w, g.left]
    return [*shape, *columns, g.stride_h, rows, g.top]


def _plain(shape: Shape) -> list[int]:
    channels, height, width = shape if len(shape) == 3 else (_size(shape), 1, 1)
    return [channels, height, width, width, 1, 1, 1, 0, 1, height, 0]


def _elements(field: list[int]) -> int:
    channels, _, _, columns, copies, _, _, _, phases, rows, _ = field
    return channels * copies * phases * rows * columns


def _sums(stage: Stage, shape: Shape) -> int:
    """Elements of scratch for the sums of a row of a convolution."""
    if not isinstance(stage, Conv):
        return 0
    width = stage.geometry.output_size(*shape[1:])[1]
    return max(_PIXELS, width * stage.pool) + width


def _size(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _offsets(stage: Conv, field: list[int]) -> Tensor:
    """Of each entry's tap in the field: int32 (nnz,)."""
    g = stage.geometry
    _, _, _, columns, copies, _, _, _, phases, rows, _ = field
    plane = rows * columns
    tap = torch.arange(g.kernel_h)[:, None] * g.dilation_h
    tap = (torch.arange(copies) * phases + tap % phases) * plane + tap // phases * columns
    channel = torch.arange(g.channels // g.groups)[:, None] * copies * phases * plane
    offsets = (channel + tap.flatten()).to(torch.int32).flatten()[stage.col_indices]
    if g.groups > 1:
        group = torch.arange(g.groups, dtype=torch.int32) * (g.channels // g.groups * copies * phases * plane)
        filters = (len(stage.crow_indices) - 1) // g.groups
        counts = stage.crow_indices[::filters].diff()
        offsets += group.repeat_interleave(counts)
    return offsets


def _pack_linear(stage: Linear) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(begin, columns, values, order, shift): `_ROWS` rows of about equal length at a time, entry by entry of them all.

    Rows are filled up with zeros times a zero that follows the last feature of the input, so that what is infinite
    there stays out of other rows.
    """
    counts = stage.crow_indices.diff()
    rows = len(counts)
    groups = -(-rows // _ROWS)
    order = torch.argsort(torch.arange(rows) // _STRIP * (stage.in_features + 1) - counts, stable=True)
    lengths = torch.zeros(groups * _ROWS, dtype=torch.int64)
    lengths[:rows] = counts[order]
    begin = torch.zeros(groups + 1, dtype=torch.int64)
    torch.cumsum(lengths.view(groups, _ROWS).amax(1), 0, out=begin[1:])
    place = torch.empty(rows, dtype=torch.int64)  # of each row's first entry
    place[order] = begin[torch.arange(rows) // _ROWS] * _ROWS + torch.arange(rows) % _ROWS
    number = torch.arange(len(stage.values)) - stage.crow_indices[:-1].repeat_interleave(counts)
    to = place.repeat_interleave(counts) + number * _ROWS
    columns = torch.full((_ROWS * int(begin[-1]),), stage.in_features, dtype=torch.int32)
    columns[to] = stage.col_indices.to(torch.int32)
    values = torch.zeros(columns.shape)
    values[to] = stage.values.detach()
    padded, shift = torch.full((groups * _ROWS,), -1), torch.zeros(groups * _ROWS)
    padded[:rows] = order
    if stage.bias is not None:
        shift[:rows] = stage.bias.detach()[order]
    return begin, columns.to(torch.uint16) if stage.in_features < 2**16 else columns, values, padded, shift

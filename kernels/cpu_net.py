"""Frozen nets, fp32: stages packed once, so that inference is one native call (csrc/net.cpp, rows.cpp, chain.cpp).

What is packed is read only: any number of threads may run it at once. Axes: N images or samples.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from time import perf_counter

import torch
from torch import Tensor

from . import abi, cpu, native
from .cpu_stages import (
    Linear,
    Mean,
    Shape,
    Stage,
    field_elements,
    input_field,
    output_shape,
    pack_linear,
    plain_field,
    scratch_elements,
    size,
    tap_offsets,
)

_CONVOLUTION, _LINEAR, _MEAN = range(3)  # Kind in csrc/net.h
_MAX_ELEMENTS = 2**31 - 1  # of a field: offsets have 32 bits


class _Packed:
    """Call it on x (N, ...), contiguous fp32 on the CPU: y (N, *out_shape)."""

    out_shape: Shape
    address: int  # of the packed arguments

    @staticmethod
    def function() -> Callable[[int, Tensor, tuple[int, ...]], Tensor]:
        """The native function that takes them."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        return self.function()(self.address, x, (len(x), *self.out_shape))

    def bound(
        self, batch: int
    ) -> tuple[Callable[[int, Tensor, tuple[int, ...]], Tensor], int, tuple[int, ...], _Packed]:
        """The native function, what it takes before and after x for one N, and the net, which lives as long."""
        return self.function(), self.address, (batch, *self.out_shape), self


class Net(_Packed):
    """Packed stages, for inputs of in_shape."""

    @staticmethod
    def function() -> Callable[[int, Tensor, tuple[int, ...]], Tensor]:
        return native.LIBRARY.net

    def __init__(self, stages: Sequence[Stage], in_shape: Shape, threads: int) -> None:
        """Raises ValueError if a stage cannot read what comes before it, or a field is too large for 32-bit offsets."""
        shapes = [in_shape]
        for stage in stages:
            shapes.append(output_shape(stage, shapes[-1]))
        self.out_shape, self.threads = shapes[-1], threads
        fields = [input_field(stage, shape) for stage, shape in zip(stages, shapes, strict=False)]
        if max(map(field_elements, fields)) > _MAX_ELEMENTS:
            raise ValueError(f"in_shape: expected images for 32-bit offsets, got {in_shape}")
        self._kept: list[Tensor] = []
        words: list[int] = []
        for stage, shape, field in zip(stages, shapes, fields, strict=False):
            words += self._pack(stage, shape, field)
        scratch = [scratch_elements(stage, shape) for stage, shape in zip(stages, shapes, strict=False)]
        sizes = [
            len(stages),
            threads,
            threads,
            size(in_shape),
            size(self.out_shape),
            max(map(field_elements, fields)) + abi.SLACK,
        ]
        sizes.append(size(in_shape) + 1 + max(scratch))
        self._block = array("q", [*sizes, *plain_field(self.out_shape), *words])
        self.address = self._block.buffer_info()[0]
        if threads > 1:
            self._choose_sharers(native.empty(1, *in_shape).zero_())

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
            begin, columns, values, order, shift = pack_linear(stage)
            wide = columns.dtype == torch.int32
            words = [self._keep(begin, torch.int32), self._keep(columns, columns.dtype), self._keep(values)]
            words += [self._keep(order, torch.int32), 0, self._keep(shift)]
            return [_LINEAR, rows, *words, stage.relu, 1, wide, 0, 0, 0, *field]
        height, width = stage.geometry.output_size(*shape[1:])
        offsets = tap_offsets(stage, field)
        words = [
            self._keep(stage.crow_indices, torch.int32),
            self._keep(offsets, torch.int32),
            self._keep(stage.values),
        ]
        words += [0, self._keep(stage.scale), self._keep(stage.shift)]
        by_pixels = field_elements(field) > len(offsets) and height // stage.pool >= 2 * self.threads
        return [_CONVOLUTION, rows, *words, stage.relu, stage.pool, 0, height, width, by_pixels, *field]


class Chain(_Packed):
    """Linear layers with a ReLU between them, packed for batches (N, in_features)."""

    @staticmethod
    def function() -> Callable[[int, Tensor, tuple[int, ...]], Tensor]:
        return native.LIBRARY.chain_infer

    def __init__(self, stages: Sequence[Linear], threads: int) -> None:
        self.out_shape = (len(stages[-1].crow_indices) - 1,)
        self._kept, words = [], [threads, len(stages)]
        for stage in stages:
            plan = cpu.plan(stage.crow_indices, stage.col_indices, stage.in_features, backward=False)
            bias = None if stage.bias is None else stage.bias.detach().contiguous()
            self._kept += [plan, stage.values.detach().contiguous(), bias]
            words += [0 if tensor is None else tensor.data_ptr() for tensor in self._kept[-3:]]
        self._block = array("q", words)
        self.address = self._block.buffer_info()[0]


class Rows(_Packed):
    """The same for some samples at once, from a copy of the CSR indices, which nobody else can write to."""

    @staticmethod
    def function() -> Callable[[int, Tensor, tuple[int, ...]], Tensor]:
        return native.LIBRARY.rows

    def __init__(self, stages: Sequence[Linear], threads: int) -> None:
        sizes = [len(stage.crow_indices) - 1 for stage in stages]
        self.out_shape = (sizes[-1],)
        self._kept, words = [], [len(stages), threads, max(*sizes, *(stage.in_features for stage in stages))]
        for stage, rows in zip(stages, sizes, strict=True):
            tensors = stage.crow_indices.clone(), stage.col_indices.clone(), stage.values.detach(), stage.bias
            self._kept += [None if tensor is None else tensor.contiguous() for tensor in tensors]
            self._kept.append(native.empty(rows // abi.ALIKE + 1, dtype=torch.int32))
            pointers = [0 if tensor is None else tensor.data_ptr() for tensor in self._kept[-5:]]
            native.LIBRARY.quads(rows, *pointers[:2], pointers[-1])
            words += [rows, stage.in_features, *pointers]
        self._block = array("q", words)
        self.address = self._block.buffer_info()[0]

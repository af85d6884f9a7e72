"""Buffers with canaries: what a kernel reads or writes beside a tensor shows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MARGIN = 64  # elements before and after; keeps the alignment of 16 bytes


class Canaries:
    """Tensors in guarded memory: NaN before and after (for integers -1), which must still be there at the end.

    A kernel that multiplies what it reads outside shows by NaN in its results, one that writes there by `check`.
    """

    def __init__(self, device: str | torch.device = "cpu"):
        self._device = device
        self._guarded: list[tuple[Tensor, int]] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """`tensor` in guarded memory, of the same strides; elements of its storage in between hold canaries too."""
        return self._empty(tensor.shape, tensor.stride(), tensor.dtype).copy_(tensor)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, memory_format=torch.contiguous_format) -> Tensor:
        """Unwritten memory for a kernel to fill, NaN or -1."""
        strides = torch.empty(shape, device="meta").contiguous(memory_format=memory_format).stride()
        return self._empty(shape, strides, dtype)

    def rows(self, x: Tensor, ld: int) -> Tensor:
        """x (N, F) as a batch-minor view: of guarded rows (F, ld), zeros from column N on."""
        rows = self.copy(torch.zeros(x.shape[1], ld, dtype=x.dtype))
        rows[:, : x.shape[0]] = x.t().to(rows.device)
        return rows[:, : x.shape[0]].t()

    def empty_rows(self, batch: int, features: int, ld: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The view (N, F) of unwritten guarded rows (F, ld)."""
        return self.empty(features, ld, dtype=dtype)[:, :batch].t()

    def check(self) -> None:
        """Raises AssertionError if any canary was overwritten."""
        for buffer, size in self._guarded:
            for margin in (buffer[:MARGIN], buffer[MARGIN + size :]):
                alive = margin.isnan() if margin.is_floating_point() else margin == -1
                assert alive.all(), f"written beside a tensor of {size} elements: {margin}"

    def _empty(self, shape, strides, dtype: torch.dtype) -> Tensor:
        spans = [(length - 1) * stride for length, stride in zip(shape, strides, strict=True)]
        size = 0 if 0 in shape else 1 + sum(spans)
        poison = math.nan if dtype.is_floating_point else -1
        buffer = torch.full((size + 2 * MARGIN,), poison, dtype=dtype, device=self._device)
        self._guarded.append((buffer, size))
        return buffer.as_strided(shape, strides, MARGIN)

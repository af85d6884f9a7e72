"""Patterns in CSR on the CPU, native: packs arguments for csrc/pattern.cpp.

Tensors are contiguous, on the CPU, and nobody traces or transforms what is done with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native

SIZES = (2, 4, 8)  # bytes of an element that can be carried


def crow_indices(mask: Tensor) -> tuple[Tensor, int]:
    """Of a bool mask (O, I), and how many of its elements are True; more than int32 holds, they are not valid."""
    rows, columns = mask.shape
    found = native.empty(rows + 1, dtype=torch.int32)
    threads = torch.get_num_threads()
    return found, native.LIBRARY.mask_rows(mask.data_ptr(), rows, columns, found.data_ptr(), threads)


def col_indices(mask: Tensor, crow_indices: Tensor, nnz: int) -> Tensor:
    """Of the same mask."""
    found = native.empty(nnz, dtype=torch.int32)
    pointers = crow_indices.data_ptr(), found.data_ptr()
    native.LIBRARY.mask_columns(mask.data_ptr(), *mask.shape, *pointers, torch.get_num_threads())
    return found


def is_valid(crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int]) -> bool:
    """Are these int32 (O + 1,) and (nnz,) the indices of a matrix (O, I)?"""
    pointers = crow_indices.data_ptr(), col_indices.data_ptr()
    return bool(native.LIBRARY.is_pattern(*shape, col_indices.numel(), *pointers))


def sources(columns: int, crow_indices: Tensor, col_indices: Tensor, their_rows: Tensor, their_columns: Tensor):
    """Of each value of a pattern its index among those of another of its shape, their number where it has none.

    Both are valid CSR; int32 (nnz,).
    """
    found = torch.empty_like(col_indices)
    pointers = [each.data_ptr() for each in (crow_indices, col_indices, their_rows, their_columns, found)]
    native.LIBRARY.sources(crow_indices.numel() - 1, columns, *pointers, torch.get_num_threads())
    return found


def carry(tensor: Tensor, sources: Tensor, fill: float) -> Tensor:
    """The elements of a tensor (n,) at `sources`, and `fill` where these are n."""
    carried = tensor.new_empty(sources.numel())
    newcomer = tensor.new_full((1,), fill) if fill else None
    pointers = tensor.data_ptr(), carried.data_ptr(), newcomer.data_ptr() if fill else 0
    sizes = sources.numel(), tensor.numel(), tensor.element_size()
    native.LIBRARY.carry(sources.data_ptr(), *sizes, *pointers, torch.get_num_threads())
    return carried

"""Patterns in CSR on the CPU, native: packs arguments for csrc/pattern.cpp.

Tensors are contiguous, on the CPU, and nobody traces or transforms what is done with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import native

_INDICES = native.empty(0, dtype=torch.int32)  # what indices are made like


def compiled(mask: Tensor, most: int) -> tuple[Tensor, Tensor | None, int]:
    """crow_indices (O + 1,), col_indices (nnz,) and nnz of a bool mask (O, I); no columns if nnz is above `most`."""
    return native.LIBRARY.compiled(mask, _INDICES, most, torch.get_num_threads())


def is_valid(crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int]) -> bool:
    """Are these int32 (O + 1,) and (nnz,) the indices of a matrix (O, I)?"""
    pointers = crow_indices.data_ptr(), col_indices.data_ptr()
    return bool(native.LIBRARY.is_pattern(*shape, col_indices.numel(), *pointers))


def copied(indices: tuple[Tensor, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """crow_indices and col_indices in memory of their own; None if they are no ordinary tensors, or no pattern's."""
    return native.LIBRARY.copied(*indices, *shape, native.ORDINARY)


def positions(crow_indices: Tensor, col_indices: Tensor, columns: int) -> Tensor:
    """Of each value of valid CSR its place in the matrix when flattened: int64 (nnz,)."""
    found = native.empty(col_indices.numel(), dtype=torch.int64)
    pointers = crow_indices.data_ptr(), col_indices.data_ptr(), found.data_ptr()
    native.LIBRARY.positions(crow_indices.numel() - 1, columns, *pointers)
    return found


def at_positions(positions: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """The CSR indices of values at these places, int64 (nnz,); None if they do not ascend in the matrix."""
    indices = native.empty(shape[0] + 1, dtype=torch.int32), native.empty(positions.numel(), dtype=torch.int32)
    pointers = positions.data_ptr(), *(each.data_ptr() for each in indices)
    return indices if native.LIBRARY.at_positions(*shape, positions.numel(), *pointers) else None


def sources(columns: int, crow_indices: Tensor, col_indices: Tensor, their_rows: Tensor, their_columns: Tensor):
    """Of each value of a pattern its index among those of another of its shape, their number where it has none.

    Both are valid CSR; int32 (nnz,).
    """
    found = torch.empty_like(col_indices)
    pointers = [each.data_ptr() for each in (crow_indices, col_indices, their_rows, their_columns, found)]
    native.LIBRARY.sources(crow_indices.numel() - 1, columns, *pointers, torch.get_num_threads())
    return found


def carried(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], columns: int, tensors: Sequence[Tensor], fills: Sequence[float]
) -> list[Tensor] | None:
    """Of each tensor with an element a value of the pattern `theirs`, (crow_indices, col_indices), one for `ours`.

    What is not there has the fill of the tensor. None if one has no ordinary memory, or elements of another size than
    2, 4 or 8 bytes.
    """
    newcomers = [tensor.new_full((1,), fill) if fill else None for tensor, fill in zip(tensors, fills, strict=True)]
    given = tensors, newcomers, native.ORDINARY, torch.get_num_threads()
    return native.LIBRARY.carried(*ours, *theirs, columns, *given)


def bits(places: Tensor, size: int) -> Tensor:
    """Of each of `size` elements whether it is at one of the places, int32 (nnz,): uint8, whole words of 64 bits."""
    flags = np.zeros(-(-size // 64) * 64, bool)
    flags[places.numpy()] = True
    return torch.from_numpy(np.packbits(flags, bitorder="little"))


def gathered(dense: Tensor, places: Tensor, bits: Tensor) -> Tensor:
    """The elements of a tensor at these places in it when flattened, int32 (nnz,), ascending; of 2, 4 or 8 bytes each.

    bits: those of the places. (nnz,).
    """
    found = dense.new_empty(places.numel())
    native.LIBRARY.gather(*_moved(found, places, bits, dense))
    return found


def scatter(values: Tensor, places: Tensor, bits: Tensor, dense: Tensor) -> None:
    """The inverse, into a tensor that is zero at all other places."""
    native.LIBRARY.scatter(*_moved(values, places, bits, dense))


def _moved(values: Tensor, places: Tensor, bits: Tensor, dense: Tensor) -> tuple[int, ...]:
    sizes = places.numel(), dense.numel(), dense.element_size()
    pointers = [each.data_ptr() for each in (places, bits, values, dense)]
    return *pointers[:2], *sizes, *pointers[2:], torch.get_num_threads()

"""A compiled mask: where the surviving weights are.

CSR, the field's standard sparse format. The 3x4 mask

    [[1, 0, 0, 1],          crow_indices = [0, 2, 2, 4]     row r owns values[crow[r]:crow[r + 1]]
     [0, 0, 0, 0],          col_indices  = [0, 3, 1, 2]     their columns, ascending within a row
     [0, 1, 1, 0]]          values       = [a, b, c, d]     held by the layer, in this order

Index tensors are int32 on the device of the mask. The values are not part of a pattern: a mask is data, never
inferred from weights.

A mask may consist of whole blocks of R rows x C columns, as `prune(..., granularity=(R, C))` leaves them; blocks begin
at multiples of R and C and are cut off at the border of the matrix. Indices and values stay as above: a block is a
property of the mask, found in the indices, and kernels may use it. In a convolution's weight (O, C, kernel_h,
kernel_w) a block is R filters x C channels at one tap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .kernels import cpu_pattern, native
from .pieces import divisible, places, spans

MAX_INT32 = 2**31 - 1
# Blocks (R, C) that kernels exist for, the preferred first.
BLOCKS = ((128, 128), (64, 64), (32, 32), (16, 16), (8, 8), (128, 1), (64, 1), (32, 1), (16, 1))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(O, I) of a weight (O, ...) as a matrix, the dimensions after the first flattened."""
    return shape[0], math.prod(shape[1:])


@dataclass(frozen=True, eq=False)
class Pattern:
    """CSR positions of the surviving weights of an (O, I) matrix.

    Examples:
        >>> pattern = Pattern.from_mask(torch.tensor([[True, False, True], [False, True, False]]))
        >>> pattern.crow_indices.tolist(), pattern.col_indices.tolist()
        ([0, 2, 3], [0, 2, 1])

    crow_indices: int32 (O + 1,); col_indices: int32 (nnz,), ascending within each row; shape: (O, I).
    """

    crow_indices: Tensor
    col_indices: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_mask(cls, mask: Tensor) -> Pattern:
        """Compile a boolean mask of shape (O, I), True where a weight survives.

        Raises TypeError if it is not boolean and ValueError if it is not 2-D or too large for int32 indices.
        """
        return cls._compiled(mask)[0]

    @classmethod
    def of_survivors(cls, mask: Tensor, dense: Tensor) -> tuple[Pattern, Tensor]:
        """`from_mask(mask)` and what it gathers from an (O, I) matrix, not differentiable, in one pass over both."""
        dense = dense.detach()
        if dense.shape == mask.shape and divisible(mask, dense):
            return cls._compiled(mask, dense)
        pattern = cls.from_mask(mask)
        return pattern, pattern.gather(dense)

    @classmethod
    def _compiled(cls, mask: Tensor, dense: Tensor | None = None) -> tuple[Pattern, Tensor | None]:
        """The pattern, and of a matrix that can be passed in pieces the values."""
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, got {mask.dtype}")
        if mask.layout != torch.strided:  # which have no strides, or only seem to have some
            raise TypeError(f"mask: expected an ordinary tensor, as mask.to_dense() is, got {mask.layout}")
        if mask.dim() != 2:
            raise ValueError(f"mask: expected shape (out_features, in_features), got {tuple(mask.shape)}")
        if mask.is_meta:
            raise ValueError("mask: expected one with data, got one on the meta device")
        if mask.numel() and mask.stride() == (0, 0) and not bool(mask[0, 0]):  # one False for all: no pass over it
            crow_indices = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
            pattern = cls(crow_indices, crow_indices.new_empty(0), (mask.shape[0], mask.shape[1]))
            return pattern, None if dense is None else dense.new_empty(0)
        shape, fast = (mask.shape[0], mask.shape[1]), dense is None and native.available() and divisible(mask)
        if fast:
            crow_indices, columns, nnz = cpu_pattern.compiled(mask.contiguous(), MAX_INT32)
        else:
            counts = torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1)) if divisible(mask) else mask.sum(dim=1)
            nnz = int(counts.sum())
        if nnz > MAX_INT32 or max(shape) > MAX_INT32:
            raise ValueError(f"mask: expected at most {MAX_INT32} survivors, got {nnz}")
        if fast:
            return cls(crow_indices, columns, shape), None
        crow_indices = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
        torch.cumsum(counts, 0, dtype=torch.int32, out=crow_indices[1:])
        if not divisible(mask):
            return cls(crow_indices, mask.nonzero()[:, 1].to(torch.int32), shape), None
        columns = torch.empty(int(crow_indices[-1]), dtype=torch.int32, device="cpu")
        values = None if dense is None else dense.new_empty(len(columns))
        column = torch.arange(shape[1], dtype=torch.int32, device="cpu")
        for rows in spans(*shape):
            part, span = mask[rows], slice(int(crow_indices[rows.start]), int(crow_indices[rows.stop]))
            of_part = column.expand(len(part), -1).flatten()  # of all weights: faster than dividing positions
            if len(columns[span]) == part.numel():
                columns[span] = of_part
                if dense is not None:
                    values[span] = dense[rows].flatten()
                continue
            at = places(part)
            torch.index_select(of_part, 0, at, out=columns[span])
            if dense is not None:
                torch.index_select(dense[rows].flatten(), 0, at, out=values[span])
        return cls(crow_indices, columns, shape), values

    @classmethod
    def from_positions(cls, positions: Tensor, shape: tuple[int, int]) -> Pattern:
        """The pattern of an (O, I) matrix with survivors at these positions of it when flattened.

        positions: int64 (nnz,), strictly ascending. Raises TypeError or ValueError if they are not.
        """
        if positions.dtype != torch.int64 or positions.dim() != 1:
            raise TypeError(f"positions: expected a 1-D int64 tensor, got {positions.dtype} {tuple(positions.shape)}")
        if len(positions) > MAX_INT32 or max(shape) > MAX_INT32:
            raise ValueError(f"positions: expected at most {MAX_INT32} survivors, rows and columns, got {shape}")
        if native.available() and divisible(positions):
            indices = cpu_pattern.at_positions(positions.contiguous(), shape)
            if indices is not None:
                return cls(*indices, (shape[0], shape[1]))
        total = shape[0] * shape[1]
        if len(positions) and not (
            int(positions[0]) >= 0 and int(positions[-1]) < total and bool((positions[1:] > positions[:-1]).all())
        ):
            raise ValueError(f"positions: expected strictly ascending positions in [0, {total}), got others")
        if divisible(positions):  # NumPy repeats faster than torch divides
            starts = np.arange(shape[0] + 1, dtype=np.int64) * shape[1]
            bounds = np.searchsorted(positions.numpy(), starts)
            columns = positions.numpy() - np.repeat(starts[:-1], np.diff(bounds))
            indices = (torch.from_numpy(each.astype(np.int32)) for each in (bounds, columns))
            return cls(*indices, (shape[0], shape[1]))
        starts = torch.arange(shape[0] + 1, dtype=torch.int64, device=positions.device).mul_(shape[1])
        crow_indices = torch.searchsorted(positions, starts, out_int32=True)
        return cls(crow_indices, (positions % max(shape[1], 1)).to(torch.int32), (shape[0], shape[1]))

    def validate(self) -> Pattern:
        """Check every invariant of the format (for indices read from files), quickly; raises ValueError.

        Returns self, or where files hold col_indices as int16 the same with int32.
        """
        crow_indices, col_indices, (rows, cols) = self.crow_indices, self.col_indices, self.shape
        for name, tensor in (("crow_indices", crow_indices), ("col_indices", col_indices)):
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name}: expected an ordinary tensor with data, got {type(tensor).__name__}")
            if tensor.layout != torch.strided or tensor.is_meta:
                got = f"one on {tensor.device}, {tensor.layout}"
                raise ValueError(f"{name}: expected an ordinary tensor with data, got {got}")
        if col_indices.dtype == torch.int16:
            return Pattern(crow_indices, col_indices.to(torch.int32), self.shape).validate()
        for name, tensor in (("crow_indices", crow_indices), ("col_indices", col_indices)):
            if tensor.dtype != torch.int32 or tensor.dim() != 1:
                raise ValueError(f"{name}: expected a 1-D int32 tensor, got {tensor.dtype} {tuple(tensor.shape)}")
        if max(rows, cols, col_indices.numel()) > MAX_INT32:
            raise ValueError(f"shape: expected at most {MAX_INT32} rows, columns and survivors, got {self.shape}")
        if len(crow_indices) != rows + 1:
            raise ValueError(f"crow_indices: expected length {rows + 1}, got {len(crow_indices)}")
        fast = rows >= 0 and native.available() and divisible(crow_indices, col_indices)
        if fast and cpu_pattern.is_valid(crow_indices.contiguous(), col_indices.contiguous(), self.shape):
            return self  # what follows is as strict, and says what is wrong
        if int(crow_indices[0]) != 0 or int(crow_indices[-1]) != len(col_indices):
            raise ValueError(
                f"crow_indices: expected to run from 0 to nnz = {len(col_indices)}, "
                f"got {int(crow_indices[0])} to {int(crow_indices[-1])}"
            )
        if bool((crow_indices[1:] < crow_indices[:-1]).any()):  # a difference could wrap around
            raise ValueError("crow_indices: expected a non-decreasing sequence, got a decreasing one")
        if len(col_indices):
            low, high = map(int, col_indices.aminmax())
            if low < 0 or high >= cols:
                raise ValueError(f"col_indices: expected values in [0, {cols}), got {low} to {high}")
            ascending = col_indices.new_ones(len(col_indices) + 1, dtype=torch.bool)
            torch.gt(col_indices[1:], col_indices[:-1], out=ascending[1:-1])
            ascending[crow_indices] = True  # rows begin anew
            if not bool(ascending.all()):
                raise ValueError("col_indices: expected strictly ascending columns within each row")
        return self

    def copied(self, device: torch.device) -> Pattern:
        """The same on a device, in memory of its own and checked as by `validate`."""
        fast = native.available() and device.type == "cpu"
        indices = cpu_pattern.copied(self.indices, self.shape) if fast else None
        if indices is None:
            valid = self.validate()
            indices = (each.to(device).clone(memory_format=torch.contiguous_format) for each in valid.indices)
        return Pattern(*indices, self.shape)

    @property
    def indices(self) -> tuple[Tensor, Tensor]:
        return self.crow_indices, self.col_indices

    @property
    def nnz(self) -> int:
        return self.col_indices.numel()

    @property
    def density(self) -> float:
        """Share of the weights that survive, in [0, 1] (0 for an empty matrix)."""
        total = self.shape[0] * self.shape[1]
        return self.nnz / total if total else 0.0

    @cached_property
    def block(self) -> tuple[int, int]:
        """`block_of` this pattern as the weight (O, I) of a linear layer."""
        return block_of(self, self.shape)

    def transposed(self) -> tuple[Pattern, Tensor]:
        """The pattern of the transposed matrix (I, O), and of each of its values the index here: int64 (nnz,)."""
        rows, cols = self.shape
        positions, order = self.col_indices.long().mul_(rows).add_(self.row_indices()).sort()
        return Pattern.from_positions(positions, (cols, rows)), order

    def row_indices(self) -> Tensor:
        """The row of each value: int64 (nnz,)."""
        counts = self.crow_indices.diff()
        rows = torch.arange(self.shape[0], dtype=torch.int64, device=self.crow_indices.device)
        return torch.repeat_interleave(rows, counts, output_size=self.nnz)

    def positions(self) -> Tensor:
        """Of each value in the matrix when flattened: int64 (nnz,)."""
        if native.available() and divisible(*self.indices):
            return cpu_pattern.positions(*(each.contiguous() for each in self.indices), self.shape[1])
        if divisible(*self.indices):
            starts = np.arange(self.shape[0], dtype=np.int64) * self.shape[1]
            return torch.from_numpy(np.repeat(starts, np.diff(self.crow_indices.numpy()))).add_(self.col_indices)
        return self.row_indices().mul_(self.shape[1]).add_(self.col_indices)

    def indices_in(self, other: Pattern) -> Tensor:
        """Of each value its index among the values of another pattern of this shape, its nnz where it has none there.

        int32 (nnz,). Both have to be valid. No more than a piece of the matrix is held at once.
        """
        if self.shape != other.shape:
            raise ValueError(f"other: expected a pattern of shape {self.shape}, got {other.shape}")
        if not divisible(self.col_indices, other.col_indices):
            end = other.col_indices.new_full((1,), torch.iinfo(torch.int64).max, dtype=torch.int64)
            theirs, ours = torch.cat([other.positions(), end]), self.positions()
            index = torch.searchsorted(theirs, ours, out_int32=True)
            return torch.where(theirs[index] == ours, index, other.nnz)
        if native.available():
            return cpu_pattern.sources(self.shape[1], *(each.contiguous() for each in (*self.indices, *other.indices)))
        indices, order = np.empty(self.nnz, dtype=np.int32), np.arange(other.nnz, dtype=np.int32)
        for (rows, span, at), (_, their_span, their_at) in zip(self._pieces(), other._pieces(), strict=True):
            index = np.full((rows.stop - rows.start) * self.shape[1], other.nnz, dtype=np.int32)
            index[their_at.numpy()] = order[their_span]
            np.take(index, at.numpy(), out=indices[span], mode="clip")  # without a check of bounds
        return torch.from_numpy(indices)

    def _pieces(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Runs of rows: which they are, their values, and where these are in the rows when flattened (int64)."""
        crow_indices, cols = self.crow_indices.numpy(), self.shape[1]
        for rows in spans(*self.shape):
            bounds = crow_indices[rows.start : rows.stop + 1]
            values = slice(int(bounds[0]), int(bounds[-1]))
            starts = np.arange(0, (len(bounds) - 1) * cols, cols) if cols else np.zeros(len(bounds) - 1, dtype=np.int64)
            at = np.repeat(starts, np.diff(bounds))
            at += self.col_indices[values].numpy()
            yield rows, values, torch.from_numpy(at)

    @property
    def _whole(self) -> bool:
        return 0 < self.nnz == self.shape[0] * self.shape[1]

    def mask(self) -> Tensor:
        """The boolean (O, I) mask this pattern was compiled from."""
        true = self.col_indices.new_ones(1, dtype=torch.bool)
        return self.scatter(true.expand(self.nnz))

    def gather(self, dense: Tensor) -> Tensor:
        """The (nnz,) values of an (O, I) matrix at the pattern; differentiable."""
        if tuple(dense.shape) != self.shape:
            raise ValueError(f"dense: expected shape {self.shape}, got {tuple(dense.shape)}")
        if self._whole:
            return dense.flatten().clone(memory_format=torch.contiguous_format)
        if not divisible(dense, self.col_indices):
            return dense[self.row_indices(), self.col_indices]
        values = dense.new_empty(self.nnz)
        for rows, span, at in self._pieces():
            torch.index_select(dense[rows].flatten(), 0, at, out=values[span])
        return values

    def scatter(self, values: Tensor) -> Tensor:
        """The (O, I) matrix with `values` (nnz,) at the pattern and zeros elsewhere; differentiable."""
        if values.shape != (self.nnz,):
            raise ValueError(f"values: expected shape ({self.nnz},), got {tuple(values.shape)}")
        if self._whole:
            return values.clone(memory_format=torch.contiguous_format).view(self.shape)
        flat = values.new_zeros(self.shape[0] * self.shape[1])
        if not divisible(values, self.col_indices):
            return flat.scatter(0, self.positions(), values).view(self.shape)
        dense = flat.view(self.shape)
        for rows, span, at in self._pieces():
            dense[rows].view(-1).scatter_(0, at, values[span])
        return dense


def block_of(pattern: Pattern, shape: Sequence[int]) -> tuple[int, int]:
    """The first (R, C) of `BLOCKS` that the mask of a weight of `shape` consists of, whole; (1, 1) if there is none.

    shape: of the weight, (O, I) or (O, C, kernel_h, kernel_w), whose matrix (O, I) the pattern is of.
    Quick for an unstructured mask; for another it takes O(nnz). Synchronises with the device of the indices.
    Raises ValueError if the shape is not that of the pattern's matrix.
    """
    return next((block for block in BLOCKS if has_blocks(pattern, shape, block)), (1, 1))


def has_blocks(pattern: Pattern, shape: Sequence[int], block: tuple[int, int]) -> bool:
    """Does the mask of a weight of `shape` consist of whole blocks (R, C)? As `block_of`, but for any R, C >= 1."""
    if matrix_shape(shape) != pattern.shape:
        raise ValueError(f"shape: expected that of a weight with the matrix {pattern.shape}, got {tuple(shape)}")
    if not 0 < pattern.nnz < math.prod(shape):
        return True
    # The rows of a block are equally long, and the first rows alone have whole blocks: masks without blocks end here.
    counts = pattern.crow_indices.diff()
    firsts = torch.arange(len(counts), dtype=torch.int64, device=counts.device) // block[0] * block[0]
    if bool((counts != counts[firsts]).any()):
        return False
    start = int(counts.nonzero()[0])  # the first row that is not empty is the first of its block
    rows = min(block[0], len(counts) - start)
    crow_indices = pattern.crow_indices[start : start + rows + 1]
    first = Pattern(crow_indices, pattern.col_indices[: int(crow_indices[-1])], (rows, pattern.shape[1]))
    return all(_blocks_are_whole(part, shape, block) for part in (first, pattern))


def _blocks_are_whole(pattern: Pattern, shape: Sequence[int], block: tuple[int, int]) -> bool:
    """Has each block as many survivors as weights, or none?"""
    rows, channels, taps, (height, width) = pattern.shape[0], shape[1], math.prod(shape[2:]), block
    across = -(-channels // width) * taps  # blocks side by side
    channel, tap = pattern.col_indices // taps, pattern.col_indices % taps
    index = pattern.row_indices() // height * across + channel // width * taps + tap
    counts = torch.bincount(index, minlength=-(-rows // height) * across).view(-1, across)
    heights = _extents(rows, height, counts.device)
    widths = _extents(channels, width, counts.device).repeat_interleave(taps)
    return bool(((counts == 0) | (counts == heights[:, None] * widths)).all())


def _extents(size: int, step: int, device: torch.device) -> Tensor:
    """How many of `size` rows or columns each block of `step` has: all but the last `step`. int64."""
    return (size - torch.arange(0, size, step, dtype=torch.int64, device=device)).clamp(max=step)

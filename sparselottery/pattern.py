"""A compiled mask: where the surviving weights are.

CSR, the field's standard sparse format. The 3x4 mask

    [[1, 0, 0, 1],          crow_indices = [0, 2, 2, 4]     row r owns values[crow[r]:crow[r + 1]]
     [0, 0, 0, 0],          col_indices  = [0, 3, 1, 2]     their columns, ascending within a row
     [0, 1, 1, 0]]          values       = [a, b, c, d]     held by the layer, in this order

Index tensors are int32 on the device of the mask. The values are not part of a pattern: a mask is data, never
inferred from weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_INT32 = 2**31 - 1


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(O, I) of a weight (O, ...) as a matrix, the dimensions after the first flattened."""
    return shape[0], math.prod(shape[1:])


@dataclass(frozen=True, eq=False)
class Pattern:
    """CSR positions of the surviving weights of an (O, I) matrix.

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
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, got {mask.dtype}")
        if mask.dim() != 2:
            raise ValueError(f"mask: expected shape (out_features, in_features), got {tuple(mask.shape)}")
        counts = mask.sum(dim=1)
        if int(counts.sum()) > MAX_INT32 or max(mask.shape) > MAX_INT32:
            raise ValueError(f"mask: expected at most {MAX_INT32} survivors, got {int(counts.sum())}")
        crow_indices = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
        torch.cumsum(counts, 0, dtype=torch.int32, out=crow_indices[1:])
        col_indices = mask.nonzero()[:, 1].to(torch.int32)
        return cls(crow_indices, col_indices, (mask.shape[0], mask.shape[1]))

    def validate(self) -> Pattern:
        """Check every invariant of the format (for indices read from files); returns self, raises ValueError."""
        crow_indices, col_indices, (rows, cols) = self.crow_indices, self.col_indices, self.shape
        for name, tensor in (("crow_indices", crow_indices), ("col_indices", col_indices)):
            if tensor.dtype != torch.int32 or tensor.dim() != 1:
                raise ValueError(f"{name}: expected a 1-D int32 tensor, got {tensor.dtype} {tuple(tensor.shape)}")
        if len(crow_indices) != rows + 1:
            raise ValueError(f"crow_indices: expected length {rows + 1}, got {len(crow_indices)}")
        if int(crow_indices[0]) != 0 or int(crow_indices[-1]) != len(col_indices):
            raise ValueError(
                f"crow_indices: expected to run from 0 to nnz = {len(col_indices)}, "
                f"got {int(crow_indices[0])} to {int(crow_indices[-1])}"
            )
        if bool((crow_indices[1:] < crow_indices[:-1]).any()):  # a difference could wrap around
            raise ValueError("crow_indices: expected a non-decreasing sequence, got a decreasing one")
        if len(col_indices):
            low, high = int(col_indices.min()), int(col_indices.max())
            if low < 0 or high >= cols:
                raise ValueError(f"col_indices: expected values in [0, {cols}), got {low} to {high}")
            row_indices = self.row_indices()
            same_row = row_indices[1:] == row_indices[:-1]
            if bool((same_row & (col_indices.diff() <= 0)).any()):
                raise ValueError("col_indices: expected strictly ascending columns within each row")
        return self

    @property
    def nnz(self) -> int:
        return self.col_indices.numel()

    @property
    def density(self) -> float:
        """Share of the weights that survive, in [0, 1] (0 for an empty matrix)."""
        total = self.shape[0] * self.shape[1]
        return self.nnz / total if total else 0.0

    def row_indices(self) -> Tensor:
        """The row of each value: int64 (nnz,)."""
        counts = self.crow_indices.diff()
        rows = torch.arange(self.shape[0], device=self.crow_indices.device)
        return torch.repeat_interleave(rows, counts, output_size=self.nnz)

    def positions(self) -> Tensor:
        """Of each value in the matrix when flattened: int64 (nnz,)."""
        return self.row_indices() * self.shape[1] + self.col_indices

    def mask(self) -> Tensor:
        """The boolean (O, I) mask this pattern was compiled from."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.col_indices.device)
        mask[self.row_indices(), self.col_indices] = True
        return mask

    def gather(self, dense: Tensor) -> Tensor:
        """The (nnz,) values of an (O, I) matrix at the pattern; differentiable."""
        if tuple(dense.shape) != self.shape:
            raise ValueError(f"dense: expected shape {self.shape}, got {tuple(dense.shape)}")
        return dense[self.row_indices(), self.col_indices]

    def scatter(self, values: Tensor) -> Tensor:
        """The (O, I) matrix with `values` (nnz,) at the pattern and zeros elsewhere; differentiable."""
        if values.shape != (self.nnz,):
            raise ValueError(f"values: expected shape ({self.nnz},), got {tuple(values.shape)}")
        flat = values.new_zeros(self.shape[0] * self.shape[1])
        return flat.scatter(0, self.positions(), values).view(self.shape)

"""What the CSR kernels need beside crow_indices and col_indices: the order of the rows, the transpose, narrow indices.

A convolution's W (O, I) has I = channels / groups * taps, column (c, r, s). Its transpose has the C input channels as
rows; the column of an entry is (o, flipped tap), so that the gradient of x is a convolution too. A linear layer is the
case of one tap. Worked miniature, a linear layer, the pattern of sparselottery/pattern.py:

    [[1, 0, 0, 1],          order     = [0, 2, 1]           rows, most survivors first
     [0, 0, 0, 0],          t_crow    = [0, 1, 2, 3, 4]     survivors of each column
     [0, 1, 1, 0]]          t_cols    = [0, 2, 2, 0]        their rows
                            perm      = [0, 2, 3, 1]        and where they stand among the values
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...reference import Geometry, row_indices

MAX_NARROW = 2**16  # columns that an index of 16 bits reaches


_ALIGN = 4  # every part starts at a multiple of 16 bytes, however many survive: Triton compiles a kernel once for all


class CsrPlan(NamedTuple):
    """Views of a plan (words,) int32. T rows of the transpose: the in_features, or the input channels."""

    order: Tensor  # (O,)
    t_order: Tensor  # (T,)
    t_crow: Tensor  # (T + 1,)
    t_cols: Tensor  # (nnz,)
    perm: Tensor  # (nnz,)
    narrow: Tensor  # (nnz,) uint16: col_indices; (0,) where they need more bits


def sections(words: Tensor, rows: int, t_rows: int, nnz: int) -> CsrPlan:
    """The views, from sizes known on the host."""
    sizes = [part for size in (rows, t_rows, t_rows + 1, nnz, nnz) for part in (size, -size % _ALIGN)]
    *parts, narrow = words.split([*sizes, words.numel() - sum(sizes)])
    return CsrPlan(*parts[::2], narrow.view(torch.uint16)[:nnz])


def build(crow_indices: Tensor, col_indices: Tensor, in_features: int, geometry: Geometry | None = None) -> Tensor:
    """The plan of a valid pattern, on its device; of a convolution if there is a geometry. Waits for the device."""
    rows, nnz = crow_indices.numel() - 1, col_indices.numel()
    row, code = row_indices(crow_indices, nnz), col_indices.long()
    t_rows, taps, filters, channels = in_features, 1, rows, in_features  # the last two: of a group
    if geometry is not None:
        t_rows, taps = geometry.channels, geometry.kernel_h * geometry.kernel_w
        filters, channels = rows // geometry.groups, geometry.channels // geometry.groups
    t_row = row // filters * channels + code // taps
    t_col = row * taps + (taps - 1 - code % taps)
    perm = (t_row * (rows * taps) + t_col).argsort()
    t_crow = torch.zeros(t_rows + 1, dtype=torch.int64, device=row.device)
    t_crow[1:] = torch.bincount(t_row, minlength=t_rows).cumsum(0)
    parts = [heaviest_first(crow_indices), heaviest_first(t_crow), t_crow, t_col[perm], perm]
    if geometry is None and in_features <= MAX_NARROW:
        parts.append(_narrow(col_indices))
    return torch.cat([_padded(part.to(torch.int32), _ALIGN) for part in parts])


def heaviest_first(crow_indices: Tensor) -> Tensor:
    """The rows in descending order of their survivors: rows of a tile are then alike, and the last tiles short."""
    return crow_indices.diff().argsort(descending=True, stable=True)


def _narrow(col_indices: Tensor) -> Tensor:
    """(nnz,) -> int32 words of two 16-bit indices each."""
    return _padded(col_indices, 2).to(torch.int16).view(torch.int32)  # keeps the low halves


def _padded(part: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(part, (0, -part.numel() % multiple))

"""The terms of a sparse product: where a weight meets x, and the weight, in the 64 bits that one load brings.

    low half     offset of a row of x, in vectors of LANES elements: rows start at multiples of it
    high half    the weight, as fp32

They are made once a call, 8 bytes a survivor, so that the loop of spmm.py knows neither taps nor the order of values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference import LANES
from ..launch import launch
from .taps import Taps, feature


@triton.jit(do_not_specialize=["nnz"])
def _terms_kernel(
    values, perm, col_indices, terms, nnz, vectors, x_height, x_width, dilation_h, dilation_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, NNZ: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * NNZ + tl.arange(0, NNZ)
    live = p < nnz
    at = p if perm is None else tl.load(perm + p, mask=live, other=0)
    weight = tl.load(values + at, mask=live, other=0).to(tl.float32).to(tl.int32, bitcast=True)
    column = tl.load(col_indices + p, mask=live, other=0)
    row = feature(column, x_height, x_width, dilation_h, dilation_w, KERNEL_H, KERNEL_W)
    offset = row.to(tl.int64) * vectors
    tl.store(terms + p, (weight.to(tl.int64) << 32) | (offset & 0xFFFFFFFF), mask=live)


NNZ = 1024


def terms(values: Tensor, perm: Tensor | None, col_indices: Tensor, ld_x: int, taps: Taps) -> Tensor:
    """int64 (nnz,): of the weights values[perm], or of `values`, at columns of W col_indices; ld_x of the rows of x."""
    nnz = col_indices.numel()
    made = torch.empty(nnz, dtype=torch.int64, device=values.device)
    launch(
        _terms_kernel, (triton.cdiv(nnz, NNZ),), values=values, perm=perm, col_indices=col_indices, terms=made, nnz=nnz,
        vectors=ld_x // LANES, **taps.of_column,
        KERNEL_H=taps.kernel_h, KERNEL_W=taps.kernel_w, NNZ=NNZ, num_warps=4,
    )  # fmt: skip
    return made


@triton.jit
def offset_and_weight(term, LANES: tl.constexpr):
    """The elements from the start of x, and the weight in fp32."""
    return term.to(tl.int32).to(tl.int64) * LANES, (term >> 32).to(tl.int32).to(tl.float32, bitcast=True)

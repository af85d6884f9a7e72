"""A linear layer of single surviving weights (1, 1): the CSR kernels, on activations in batch-minor layout.

The functions of block. Activations here are views (N, F), strides (1, ld), of rows (F, ld).
"""

from __future__ import annotations

from torch import Tensor

from ...reference import leading_dim, unpack
from .. import Plan
from ..layout import is_minor, major
from . import narrow, sddmm, spmm, tiles
from .plan import CsrPlan, sections
from .taps import linear


def forward(x, values, bias, crow_indices, col_indices, plan, y, relu=False):
    """y = x Wᵀ + bias, then a ReLU if `relu`; y may be row-major, and so may x be if it is one sample."""
    of = _sections(plan, crow_indices, col_indices, x.shape[1])
    if len(x) <= narrow.NARROW:
        columns = of.narrow if of.narrow.numel() else col_indices
        narrow.spmm_narrow(x, values, bias, crow_indices, columns, of.order, y, relu)
        return
    out = y if is_minor(y) else unpack(y.new_empty(y.shape[1], leading_dim(len(y))), len(y))
    taps = linear(y.shape[1], x.shape[1])
    spmm.spmm(x.t(), values, bias, crow_indices, col_indices, of.order, None, out.t(), len(x), taps, relu)
    if out is not y:
        major(out, y)


def grad_x(gy, values, crow_indices, col_indices, plan, gx, gate=None):
    """gx = gy W, zero where gate <= 0."""
    of = _sections(plan, crow_indices, col_indices, gx.shape[1])
    taps, gate = linear(gx.shape[1], gy.shape[1]), None if gate is None else gate.t()
    spmm.spmm(gy.t(), values, None, of.t_crow, of.t_cols, of.t_order, of.perm, gx.t(), len(gy), taps, gate=gate)


def grad_values(gy, x, crow_indices, col_indices, plan):
    """(nnz,): gyᵀ x at the pattern."""
    order = _sections(plan, crow_indices, col_indices, x.shape[1]).order
    if tiles.pays(x, col_indices.numel(), gy.shape[1]):
        return tiles.sddmm_tiles(gy.t(), x.t(), crow_indices, col_indices, order, len(x))
    return sddmm.sddmm(gy.t(), x.t(), crow_indices, col_indices, order, len(x), linear(gy.shape[1], x.shape[1]))


def _sections(plan: Plan, crow_indices: Tensor, col_indices: Tensor, in_features: int) -> CsrPlan:
    return sections(plan.words, crow_indices.numel() - 1, in_features, col_indices.numel())

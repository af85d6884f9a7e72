"""Lottery tickets that train and infer faster: only the surviving weights are stored and multiplied."""

from . import started  # noqa: F401 - first: what follows takes seconds to import
from .convert import convert, to_dense
from .explain import explain
from .export import export
from .fold import fold
from .info import info
from .interop import masks_from_scipy, masks_from_torch_prune, masks_from_zeros
from .lottery import find_ticket
from .moves import set_masks
from .nn import MaskedConv2d, MaskedLinear, MaskedSequential, ScatteredLayer, register
from .pattern import Pattern
from .pruning import prune
from .regroup import regroup
from .runtime import SparseModel, load_sparse
from .ticket import Ticket
from .weight_decay import SparseLotteryWarning, param_groups

__version__ = "0.1.0"
__all__ = [
    "MaskedConv2d",
    "MaskedLinear",
    "MaskedSequential",
    "Pattern",
    "ScatteredLayer",
    "SparseLotteryWarning",
    "SparseModel",
    "Ticket",
    "convert",
    "explain",
    "export",
    "find_ticket",
    "fold",
    "info",
    "load_sparse",
    "masks_from_scipy",
    "masks_from_torch_prune",
    "masks_from_zeros",
    "param_groups",
    "prune",
    "register",
    "regroup",
    "set_masks",
    "to_dense",
]

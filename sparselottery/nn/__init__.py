"""Layers that store and multiply only the surviving weights."""

from .attention import MaskedMultiheadAttention
from .base import MaskedLayer
from .conv import MaskedConv1d, MaskedConv2d, MaskedConvolution, geometry_of
from .conv_transpose import MaskedConvTranspose, MaskedConvTranspose1d, MaskedConvTranspose2d
from .embedding import MaskedEmbedding, MaskedEmbeddingBag
from .encoder import keep_from_fast_path
from .executions import EXECUTIONS, NATIVE, Measured
from .indices import IndexedLayer
from .linear import MaskedLinear
from .opened import OpenedModule
from .own_forward import has_own_forward, with_forward_of
from .registry import as_module, masked_type_of, name_of, opened_type_of, register
from .runs import count_packs, native_runs
from .scattered import (
    MaskedConv3d,
    MaskedConvTranspose3d,
    ScatteredLayer,
)
from .sequential import MaskedSequential
from .transposed import MaskedTransposedLinear

__all__ = [
    "EXECUTIONS",
    "NATIVE",
    "IndexedLayer",
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedConv3d",
    "MaskedConvTranspose",
    "MaskedConvTranspose1d",
    "MaskedConvTranspose2d",
    "MaskedConvTranspose3d",
    "MaskedConvolution",
    "MaskedEmbedding",
    "MaskedEmbeddingBag",
    "MaskedLayer",
    "MaskedLinear",
    "MaskedMultiheadAttention",
    "MaskedSequential",
    "MaskedTransposedLinear",
    "Measured",
    "OpenedModule",
    "ScatteredLayer",
    "as_module",
    "count_packs",
    "geometry_of",
    "has_own_forward",
    "keep_from_fast_path",
    "masked_type_of",
    "name_of",
    "native_runs",
    "opened_type_of",
    "register",
    "with_forward_of",
]

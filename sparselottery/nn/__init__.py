"""Layers that store and multiply only the surviving weights."""

from .base import MaskedLayer
from .conv import MaskedConv2d, geometry_of
from .encoder import keep_from_fast_path
from .executions import EXECUTIONS, NATIVE, Measured
from .indices import IndexedLayer
from .linear import MaskedLinear
from .runs import count_packs, native_runs
from .sequential import MaskedSequential

__all__ = [
    "EXECUTIONS",
    "NATIVE",
    "IndexedLayer",
    "MaskedConv2d",
    "MaskedLayer",
    "MaskedLinear",
    "MaskedSequential",
    "Measured",
    "count_packs",
    "geometry_of",
    "keep_from_fast_path",
    "native_runs",
]

"""Layers that store and multiply only the surviving weights."""

from .base import MaskedLayer
from .conv import MaskedConv2d
from .linear import MaskedLinear
from .sequential import MaskedSequential

__all__ = ["MaskedConv2d", "MaskedLayer", "MaskedLinear", "MaskedSequential"]

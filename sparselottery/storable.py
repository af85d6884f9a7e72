"""What of a state_dict a safetensors file can hold."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of masked weights


def check_storable(weights: Mapping[str, Tensor], others: Mapping[str, Any]) -> None:
    """Raise TypeError naming the first entry of a state_dict that a file cannot hold. weights: of masked layers."""
    for name, values in weights.items():
        if values.dtype not in DTYPES:
            raise TypeError(f"{name}: expected weights of one of {DTYPES}, got {values.dtype}")
    for name, entry in others.items():
        if why := why_not_storable(entry):
            raise TypeError(f"{name}: expected a dense tensor, as files hold no others, got {why}")


def why_not_storable(entry: Any) -> str | None:
    """What an entry of a state_dict is, if a safetensors file cannot hold it; else None."""
    if not isinstance(entry, Tensor):
        return f"{type(entry).__name__} of get_extra_state"
    if entry.is_nested:
        return "a nested tensor"
    if entry.layout != torch.strided:
        return f"a tensor of {entry.layout}"
    if entry.is_quantized or not _holds(entry.dtype):
        return f"a tensor of {entry.dtype}"
    return "a tensor on the meta device" if entry.is_meta else None


@cache
def _holds(dtype: torch.dtype) -> bool:
    """Does this version of safetensors know the dtype?"""
    try:
        return load(save({"": torch.empty(0, dtype=dtype, device="cpu")}))[""].dtype == dtype
    except (LookupError, RuntimeError, TypeError, ValueError, SafetensorError):
        return False

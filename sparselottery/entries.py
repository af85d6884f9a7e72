"""Entries of a state_dict, as a ticket keeps them: on the CPU, its own, and each once."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .convert import copy_of
from .storable import why_not_storable


def tied_places(weights: Mapping[str, Any], masks: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of weights that lie where a masked one lies, with the name of that."""

    def place(entry: Any) -> tuple | None:
        if not isinstance(entry, Tensor) or entry.layout != torch.strided or entry.is_meta or not entry.numel():
            return None
        return entry.data_ptr(), entry.dtype, entry.device, entry.shape, entry.stride()

    first: dict[tuple | None, str] = {}
    for name in masks:
        first.setdefault(place(weights[name]), name)
    first.pop(None, None)
    places = ((name, place(entry)) for name, entry in weights.items() if name not in masks)
    return {name: first[at] for name, at in places if at in first}


def with_data(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """The model, or a copy with data where it has parameters and buffers on the meta device; shared ones stay shared.

    Raises ValueError if the weights lack one of those.
    """
    memo: dict[int, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            given = weights.get(name)
            if given is None or given.shape != tensor.shape:
                got = "none" if given is None else tuple(given.shape)
                raise ValueError(f"model: expected {name!r} {tuple(tensor.shape)}, on meta, in the ticket, got {got}")
            data = given.to(tensor.dtype, copy=True)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if is_parameter else data
    return copy.deepcopy(model, memo) if memo else model


def owned(name: str, entry: Any, copied: bool = False) -> Any:
    """A copy of a state_dict's entry on the CPU; if the entry is a copy already, that itself may do."""
    if is_lazy(entry):
        raise ValueError(f"weights[{name!r}]: expected a tensor, got a lazy one without a shape: call the model once")
    if isinstance(entry, Tensor) and entry.is_meta:
        raise ValueError(f"weights[{name!r}]: expected values, got a tensor on the meta device, which has none")
    entry = entry if copied else copy_of(entry)
    return entry.cpu() if isinstance(entry, Tensor) else entry


def as_tensors(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a file cannot hold as the bytes that torch.save makes of it."""
    return {name: _bytes_of(entry) if why_not_storable(entry) else entry for name, entry in weights.items()}


def _bytes_of(entry: Any) -> Tensor:
    buffer = io.BytesIO()
    torch.save(entry, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)

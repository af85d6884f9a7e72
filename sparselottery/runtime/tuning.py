"""Sparse or dense: frozen layers are timed both ways, on inputs like those that their model gives them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..timing import interleaved_ms
from .layer import FrozenLayer

LIKELY = 0.1  # density below which dense has never been faster, and making it would take memory for nothing
MARGIN = 0.97  # dense is chosen below this share of the time
LIMITS = {"bursts": 5, "burst_ms": 2.0, "limit_ms": 200.0}


def choose_dense(net: nn.Module, args: tuple) -> None:
    """Replace frozen layers of a density of at least 0.1 that are faster dense on what `net(*args)` gives them."""
    inputs: dict[FrozenLayer, Tensor] = {}
    names = {m: name for name, m in net.named_modules() if isinstance(m, FrozenLayer) and m.density >= LIKELY}

    def note(layer: FrozenLayer, given: tuple) -> None:
        inputs.setdefault(layer, torch.randn_like(given[0]))

    handles = [layer.register_forward_pre_hook(note) for layer in names]
    try:
        with torch.no_grad():
            net(*args)  # layers with hooks are called on their own
    finally:
        for handle in handles:
            handle.remove()
    for layer, x in inputs.items():
        dense = layer.to_dense()
        with torch.no_grad():
            sparse_ms, dense_ms = interleaved_ms(lambda: layer(x), lambda: dense(x), **LIMITS)  # noqa: B023
        if dense_ms < MARGIN * sparse_ms and names[layer]:
            parent, _, name = names[layer].rpartition(".")
            setattr(net.get_submodule(parent), name, dense)

"""Sparse or dense: frozen layers are timed both ways, on inputs like those that their model gives them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..calls import Arguments
from ..copying import copied
from ..execution import MARGIN
from ..timing import interleaved_ms
from .layer import FrozenLayer

LIKELY = 0.1  # density below which dense has never been faster, and making it would take memory for nothing
LIMITS = {"bursts": 5, "burst_ms": 2.0, "limit_ms": 200.0}


def choose_dense(net: nn.Module, given: Arguments) -> nn.Module:
    """The net with the frozen layers dense that have a density of at least 0.1 and are faster so on these arguments."""
    inputs: dict[FrozenLayer, Tensor] = {}

    def note(layer: FrozenLayer, args: tuple) -> None:
        inputs.setdefault(layer, torch.randn_like(args[0]))

    frozen = [module for module in net.modules() if isinstance(module, FrozenLayer) and module.is_measurable]
    layers = [layer for layer in frozen if layer.density >= LIKELY]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            given(net)  # layers with hooks are called on their own
    finally:
        for handle in handles:
            handle.remove()
    faster = {}
    for layer, x in inputs.items():
        dense = layer.to_dense()
        with torch.no_grad():
            sparse_ms, dense_ms = interleaved_ms(partial(layer.forward, x), partial(dense.forward, x), **LIMITS)
        if dense_ms < MARGIN * sparse_ms:
            faster[layer] = dense
    same = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    return copied(net, faster, same) if faster else net

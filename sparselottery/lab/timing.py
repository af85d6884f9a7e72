"""Timing that survives a shared machine: short bursts of every candidate in turn, then the medians."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter

import torch
from torch import nn

from ..nn import MaskedLinear


def interleaved_ms(*calls: Callable[[], object], bursts: int = 15, burst_ms: float = 3.0) -> list[float]:
    """Median milliseconds of one call of each of ``calls``, over ``bursts`` bursts of about ``burst_ms`` each.

    The bursts alternate between the calls, so whatever slows the machine down for a while slows all of them.
    """
    repeats = []
    for call in calls:
        for _ in range(3):
            call()
        repeats.append(max(1, round(burst_ms / _ms(call, 1))))
    columns: list[list[float]] = [[] for _ in calls]
    for _ in range(bursts):
        for call, repeat, column in zip(calls, repeats, columns, strict=True):
            column.append(_ms(call, repeat))
    return [median(column) for column in columns]


def _ms(call: Callable[[], object], repeat: int) -> float:
    began = perf_counter()
    for _ in range(repeat):
        call()
    return (perf_counter() - began) * 1e3 / repeat


def linear_ms(batch: int, in_features: int, out_features: int, density: float) -> dict[str, float]:
    """MaskedLinear with a random mask against nn.Linear, both float32, row-major in and out.

    Returns ``forward_sparse_ms``, ``forward_dense_ms`` (without autograd) and ``both_sparse_ms``, ``both_dense_ms``
    (forward and backward, gradients of input, weights and bias).
    """
    if not 0 <= density <= 1:
        raise ValueError(f"expected a density in [0, 1], got {density}")
    dense = nn.Linear(in_features, out_features)
    sparse = MaskedLinear.from_dense(dense, torch.rand(out_features, in_features) < density)
    x = torch.randn(batch, in_features, requires_grad=True)
    grad = torch.randn(batch, out_features)

    def forward(layer: nn.Module) -> None:
        with torch.no_grad():
            layer(x)

    def both(layer: nn.Module) -> None:
        torch.autograd.grad(layer(x), (x, *layer.parameters()), grad)

    calls = {
        "forward_sparse_ms": partial(forward, sparse),
        "forward_dense_ms": partial(forward, dense),
        "both_sparse_ms": partial(both, sparse),
        "both_dense_ms": partial(both, dense),
    }
    return dict(zip(calls, interleaved_ms(*calls.values()), strict=True))

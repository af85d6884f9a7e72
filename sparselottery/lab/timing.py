"""A linear layer, sparse against dense."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from ..nn import MaskedLinear
from ..timing import interleaved_ms


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

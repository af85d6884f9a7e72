"""How important each weight of a model is, for `prune(..., scores=...)`: the lowest go first.

Each function returns {"fc1.weight": scores}: of a masked layer (n,), of its survivors by index; of a dense one of the
weight's shape. The model runs in the mode that it is in: where it trains, batch norms follow the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .convert import masked_layers, prunable
from .survey import survey


def taylor(model: nn.Module, batches: Iterable, loss: Callable[[nn.Module, object], Tensor]) -> dict[str, Tensor]:
    """|w g|: how much the loss changes, to first order, without the weight (Molchanov et al. 2017, eq. 7).

    Examples:
        >>> model, batches = nn.Sequential(nn.Linear(8, 4)), [torch.randn(16, 8)]
        >>> scores = taylor(model, batches, lambda model, x: model(x).square().mean())
        >>> masks = prune(model, 0.5, scores=scores)

    g: the gradient of the sum of loss(model, batch) over `batches`. `.grad` of the parameters is left as it is.
    Raises ValueError if there is no batch, or a weight does not require a gradient.
    """
    weights, gradients = _weights(model), {}
    for found in _gradients(model, weights, batches, loss):
        gradients = {name: gradients[name] + g if gradients else g for name, g in found.items()}
    return _by_mask(model, {name: (weight.detach() * gradients[name]).abs_() for name, weight in weights.items()})


def fisher(model: nn.Module, batches: Iterable, loss: Callable[[nn.Module, object], Tensor]) -> dict[str, Tensor]:
    """w² Σ g²: the loss without the weight to second order, by the empirical Fisher (Theis et al. 2018, eq. 5).

    Examples:
        >>> model, samples = nn.Sequential(nn.Linear(8, 4)), torch.randn(16, 8).split(1)
        >>> scores = fisher(model, samples, lambda model, x: model(x).square().sum())
        >>> masks = prune(model, 0.5, scores=scores)

    g: the gradient of loss(model, batch), of each batch by itself: batches of one sample give the Fisher information.
    """
    weights, squares = _weights(model), {}
    for found in _gradients(model, weights, batches, loss):
        squares = {name: squares[name] + g * g if squares else g * g for name, g in found.items()}
    return _by_mask(model, {name: weight.detach() ** 2 * squares[name] for name, weight in weights.items()})


def _by_mask(model: nn.Module, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of masked layers in the order of their masks."""
    layers = masked_layers(model)
    return {name: layers[name].by_mask(each) if name in layers else each for name, each in scores.items()}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    found = survey(model)
    weights = {name: found.maskable[name].parameter for name in prunable(model, found)}
    if frozen := [name for name, weight in weights.items() if not weight.requires_grad]:
        raise ValueError(f"model: expected weights that require gradients, got {frozen[0]!r}, which does not")
    return weights


def _gradients(model: nn.Module, weights: dict, batches: Iterable, loss: Callable):
    none = True
    for batch in batches:
        none = False
        with torch.enable_grad():
            found = torch.autograd.grad(loss(model, batch), list(weights.values()), allow_unused=True)
        yield {
            name: torch.zeros_like(w) if g is None else g.detach()
            for (name, w), g in zip(weights.items(), found, strict=True)
        }
    if none:
        raise ValueError("batches: expected at least one, got none")

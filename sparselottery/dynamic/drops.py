"""The scores of survivors, of which the lowest are dropped: functions (name, layer) -> (nnz,)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..nn import MaskedLayer

Score = Callable[[str, MaskedLayer], Tensor]


def magnitude(name: str, layer: MaskedLayer) -> Tensor:
    """|w| of the survivors: (nnz,)."""
    return layer.values.detach().abs()


def saliency(name: str, layer: MaskedLayer) -> Tensor:
    """|w g|: how much the loss changes without the weight, to first order (Molchanov et al. 2017; SNIP's score).

    Raises ValueError for a layer without gradients: those of the step must be there still.
    """
    if layer.values.grad is None:
        raise ValueError(f"drop: expected {name} to have a gradient after the optimiser's step, got None")
    return (layer.values.detach() * layer.values.grad).abs()


DROP: dict[str, Score] = {"magnitude": magnitude, "saliency": saliency}

"""One training in place of a ladder: masks that move, to as many weights in each layer as all rounds would leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from .. import dynamic
from ..convert import masked_layers

if TYPE_CHECKING:
    from .settings import Settings

EVERY, UPDATES = 100, 50  # iterations from one update to the next, as RigL has them, and fewer where they would be few

# Each is given model, optimiser, the density of the end, the iterations of the training, and what all take.
METHODS: dict[str, Callable[..., dynamic.MaskUpdater]] = {
    "gmp": lambda m, o, d, n, **how: dynamic.gmp(m, o, d, end=_most(n), **how),
    "set": lambda m, o, d, n, **how: dynamic.set_training(m, o, d, end=_most(n), **how),
    "rigl": lambda m, o, d, n, **how: dynamic.rigl(m, o, d, end=_most(n), **how),
    "topk": lambda m, o, d, n, **how: dynamic.topk(m, o, d, end=max(1, n // 2), **how | {"every": 1}),
    "dsd": lambda m, o, d, n, **how: dynamic.dsd(m, o, d, max(1, n // 3), max(2, 2 * n // 3), **_each_step(how)),
    "iht": lambda m, o, d, n, **how: dynamic.iht(
        m, o, d, end=_most(n), sparse_steps=max(1, n // 10), dense_steps=max(1, n // 10), **_each_step(how)
    ),
    "single-cycle": lambda m, o, d, n, **how: dynamic.single_cycle(m, o, d, end=_most(n), **how),
}


def updater(
    settings: Settings, densities: Mapping[str, float], model: nn.Module, optimizer: Optimizer
) -> dynamic.MaskUpdater:
    """That of the settings' method, to these densities by name; it draws from the settings' seed."""
    sizes = {name: layer.mask.numel() for name, layer in masked_layers(model).items()}
    density = sum(densities[name] * size for name, size in sizes.items()) / sum(sizes.values())
    how = {"distribution": dynamic.toward(densities), "seed": settings.seed}
    how["every"] = max(1, min(EVERY, settings.iterations // UPDATES))
    return METHODS[settings.method](model, optimizer, density, settings.iterations, **how)


def _most(iterations: int) -> int:
    """Of which masks move: the last quarter trains at the last ones (Evci et al. 2020)."""
    return max(1, 3 * iterations // 4)


def _each_step(how: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in how.items() if key != "every"}

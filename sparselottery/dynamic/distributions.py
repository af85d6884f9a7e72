"""Who has how many of the weights: functions of the layers' shapes and of a density that give one for each layer.

`uniform` and `erk` are given by name to `MaskUpdater`. A distribution of your own has their arguments and result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

Shapes = Mapping[str, tuple[int, ...]]
Distribution = Callable[[Shapes, float], dict[str, float]]


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """The same in each layer.

    Examples:
        >>> uniform({"a": (10, 10), "b": (10, 1_000)}, 0.1)
        {'a': 0.1, 'b': 0.1}
    """
    return dict.fromkeys(shapes, density)


def erk(shapes: Shapes, density: float) -> dict[str, float]:
    """Erdős-Rényi-Kernel (Evci et al. 2020, section 3): of a weight (O, I, H, W) by (O + I + H + W) / (O I H W).

    Examples:
        >>> {name: round(each, 3) for name, each in erk({"a": (100, 100), "b": (100, 1_000)}, 0.1).items()}
        {'a': 0.169, 'b': 0.093}

    Of linear layers it is that of SET (Mocanu et al. 2018). Layers that would have more than all weights are whole, and
    the others make up for it, so that all together have `density`.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    whole = {name for name, size in sizes.items() if size == 0}
    while True:
        others = [name for name in shapes if name not in whole]
        left = density * sum(sizes.values()) - sum(sizes[name] for name in whole)
        scale = left / sum(sum(shapes[name]) for name in others) if others else 0.0
        densities = {name: scale * sum(shapes[name]) / sizes[name] for name in others}
        full = {name for name, each in densities.items() if each > 1}
        if not full:
            return dict.fromkeys(shapes, 1.0) | densities
        whole |= full


def toward(densities: Mapping[str, float]) -> Distribution:
    """From whole layers to these densities of single ones, in step: as the density of all comes down to theirs.

    Examples:
        >>> distribution = toward({"a": 0.5, "b": 0.1})
        >>> {name: round(each, 3) for name, each in distribution({"a": (10, 10), "b": (10, 100)}, 0.6).items()}
        {'a': 0.768, 'b': 0.583}
    """

    def distribution(shapes: Shapes, density: float) -> dict[str, float]:
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        pruned = sum(size * (1 - densities[name]) for name, size in sizes.items())
        share = min(1.0, (1 - density) * sum(sizes.values()) / pruned) if pruned else 0.0
        return {name: 1 - share * (1 - densities[name]) for name in shapes}

    return distribution


DISTRIBUTIONS: dict[str, Distribution] = {"uniform": uniform, "erk": erk}

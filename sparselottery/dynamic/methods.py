"""The methods of the field, each a schedule, a distribution and a rule of what comes and goes.

    model = convert(model, masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    updater = rigl(model, optimizer, density=0.05, end=30_000)

All return a `MaskUpdater`, whose further arguments they take by name. `density` is that of the end, or for `dsd` of the
sparse phase; `end` is the step from which masks stay. `initial` is the density of the beginning: below 1.0 for a model
that is pruned already, which else grows first.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .schedules import alternating, constant, cosine, cubic, linear, phases
from .updater import MaskUpdater


def gmp(
    model: nn.Module, optimizer: Any, density: float, end: int, begin: int = 0, initial: float = 1.0, **others: Any
) -> MaskUpdater:
    """Gradual magnitude pruning (Zhu & Gupta 2017): along a cubic, from `begin` on.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> model = convert(model, prune(model, 0.0))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> updater = gmp(model, optimizer, density=0.1, end=10_000)
    """
    return MaskUpdater(model, optimizer, cubic(density, end, begin, initial), end=end, **others)


def single_cycle(
    model: nn.Module, optimizer: Any, density: float, end: int, begin: int = 0, initial: float = 1.0, **others: Any
) -> MaskUpdater:
    """Progressive magnitude pruning in one training cycle, in place of a cycle a round (Qureshi et al. 2026).

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> model = convert(model, prune(model, 0.0))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> updater = single_cycle(model, optimizer, density=0.1, end=10_000)
    """
    return MaskUpdater(model, optimizer, linear(density, end, begin, initial), end=end, **others)


def set_training(
    model: nn.Module, optimizer: Any, density: float, end: int, drop_fraction: float = 0.3, **others: Any
) -> MaskUpdater:
    """SET, sparse evolutionary training (Mocanu et al. 2018): sparse from the start, the smallest go, any others come.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> model = convert(model, prune(model, 0.9))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> updater = set_training(model, optimizer, density=0.1, end=10_000)

    The paper does so once an epoch, and draws the first masks by the Erdős-Rényi rule ("erk").
    """
    how = {"distribution": "erk", **others}
    return MaskUpdater(model, optimizer, constant(density), end=end, drop_fraction=constant(drop_fraction), **how)


def rigl(
    model: nn.Module, optimizer: Any, density: float, end: int, drop_fraction: float = 0.3, **others: Any
) -> MaskUpdater:
    """RigL (Evci et al. 2020): as SET, but those come whose gradient is largest, and ever fewer are exchanged.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> model = convert(model, prune(model, 0.9))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> updater = rigl(model, optimizer, density=0.1, end=10_000)

    The paper ends at 3/4 of the training and puts the update in the place of an optimiser's step; here it follows one.
    Gradients are exact and taken strip by strip; `candidates` draws some.
    """
    how = {"distribution": "erk", "grow": "gradient", **others}
    return MaskUpdater(model, optimizer, constant(density), end=end, drop_fraction=cosine(drop_fraction, end), **how)


def topk(
    model: nn.Module,
    optimizer: Any,
    density: float,
    end: int,
    explore: float = 0.1,
    initial: float = 1.0,
    **others: Any,
) -> MaskUpdater:
    """The largest weights after every step, fewer and fewer (Gao et al. 2025, weight-sparse transformers).

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> model = convert(model, prune(model, 0.0))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> updater = topk(model, optimizer, density=0.1, end=10_000)

    There all weights take AdamW's step and then compete; here the share `explore` of the survivors does so that begins
    anew, at zero and at random places, after each step until `end`. In the paper that is half the training.
    """
    how = {"every": 1, "drop_fraction": lambda step: explore if step < end else 0.0, **others}
    return MaskUpdater(model, optimizer, linear(density, end, 0, initial), end=end, **how)


def dsd(
    model: nn.Module, optimizer: Any, density: float, sparse_from: int, dense_from: int, **others: Any
) -> MaskUpdater:
    """Dense-sparse-dense training (Han et al. 2017): pruned once, and made whole again, from zero.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> model = convert(model, prune(model, 0.0))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> updater = dsd(model, optimizer, density=0.6, sparse_from=1_000, dense_from=2_000)

    The paper prunes 30 to 50 % of each layer, and lowers the learning rate tenfold for the last phase.
    """
    if not 0 < sparse_from < dense_from:
        raise ValueError(f"dsd: expected 0 < sparse_from < dense_from, got {sparse_from} and {dense_from}")
    schedule = phases({0: 1.0, sparse_from: density, dense_from: 1.0})
    return MaskUpdater(model, optimizer, schedule, every=1, end=dense_from, **others)


def iht(
    model: nn.Module, optimizer: Any, density: float, end: int, sparse_steps: int, dense_steps: int, **others: Any
) -> MaskUpdater:
    """Iterative hard thresholding (Jin et al. 2016): for some steps the largest weights alone, for others all.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> model = convert(model, prune(model, 0.0))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> updater = iht(model, optimizer, density=0.1, end=10_000, sparse_steps=100, dense_steps=50)

    The first threshold is taken after step 1, of weights that are trained already or as they were drawn.
    """
    schedule = alternating(density, sparse_steps, dense_steps, end)
    return MaskUpdater(model, optimizer, lambda step: schedule(step) if step else 1.0, every=1, end=end, **others)

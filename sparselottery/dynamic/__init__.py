"""Masks that move while a net trains: pruned gradually, regrown, exchanged, at sparse cost.

    from sparselottery import convert, dynamic

    updater = dynamic.rigl(model, optimizer, density=0.05, end=30_000)
    for x, y in batches:
        loss(model(x), y).backward()
        optimizer.step()
        updater.step()
        optimizer.zero_grad()

A method (`methods`) is a schedule of the density (`schedules`), a distribution of it over layers (`distributions`) and
a rule for what is dropped and grown (`updater`). No dense gradient of the net is made (`gradients`).
"""

from .distributions import erk, toward, uniform
from .drops import magnitude, saliency
from .methods import dsd, gmp, iht, rigl, set_training, single_cycle, topk
from .schedules import alternating, constant, cosine, cubic, exponential, linear, phases
from .updater import MaskUpdater

__all__ = [
    "MaskUpdater",
    "alternating",
    "constant",
    "cosine",
    "cubic",
    "dsd",
    "erk",
    "exponential",
    "gmp",
    "iht",
    "linear",
    "magnitude",
    "phases",
    "rigl",
    "saliency",
    "set_training",
    "single_cycle",
    "topk",
    "toward",
    "uniform",
]

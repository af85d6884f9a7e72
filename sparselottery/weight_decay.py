"""Weight decay of survivors: they are a 1-D parameter, which the usual groups take for a bias."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .nn import MaskedLayer, as_module
from .nn.base import layers_alive


class SparseLotteryWarning(UserWarning):
    """Something runs, but probably not as it was meant.

    Examples:
        >>> import warnings
        >>> warnings.simplefilter("error", SparseLotteryWarning)
    """


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimiser: what is decayed by `weight_decay`, and what is not.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 10))
        >>> sparse = convert(model, prune(model, 0.9))
        >>> optimizer = torch.optim.AdamW(param_groups(sparse, weight_decay=0.1), lr=3e-4)

    Decayed are the `values` of masked layers and all parameters of two or more dimensions; not decayed are the biases
    and the weights of norms. Of a dense model these are the groups by `p.ndim >= 2`, so that a model and its converted
    one train alike. Shared parameters are in one group, once; frozen ones are in none.
    Raises ValueError for lazy parameters, which have no dimensions before the model's first call.
    """
    survivors = {id(layer.values) for layer in as_module(model).modules() if isinstance(layer, MaskedLayer)}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if is_lazy(parameter):
                raise ValueError(f"model: expected parameters with a shape, got the lazy {name!r}: call it once first")
            groups[parameter.dim() >= 2 or id(parameter) in survivors].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


_SEEN: WeakSet[Optimizer] = WeakSet()


def _warn_once(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """At the first step of an optimiser: are there survivors without decay beside parameters with it?"""
    if torch.compiler.is_compiling() or optimizer in _SEEN:
        return
    _SEEN.add(optimizer)
    decays = [bool(group.get("weight_decay")) for group in optimizer.param_groups]
    if all(decays) or not any(decays):
        return
    undecayed = {
        id(parameter)
        for group, decay in zip(optimizer.param_groups, decays, strict=True)
        if not decay
        for parameter in group["params"]
    }
    if missed := sum(id(layer._parameters.get("values")) in undecayed for layer in layers_alive()):
        warnings.warn(
            f"the weights of {missed} masked layers are in a group without weight decay, beside a group with it: "
            "their `values` are 1-D and not named weight. sparselottery.param_groups(model, weight_decay) makes the "
            "right groups; if yours are meant, ignore sparselottery.SparseLotteryWarning",
            SparseLotteryWarning,
            stacklevel=4,
        )


def known_optimizers(holds: Callable[[Optimizer], bool]) -> list[Optimizer]:
    """The optimisers for which that is true, of those that are in use and have made a step."""
    if not any(map(holds, list(_SEEN))):
        return []
    gc.collect()  # one that refers to itself, as its schedule does, outlives its use
    return [optimizer for optimizer in list(_SEEN) if holds(optimizer)]


register_optimizer_step_pre_hook(_warn_once)

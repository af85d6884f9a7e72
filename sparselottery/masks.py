"""Scores in, masks out: pruning without a model.

A mask is a bool tensor, True where a weight survives; `Masks` keys them by parameter name ("fc1.weight"). Masks are
data: they are never read off the values of weights, and here they only ever lose True entries. Every function is pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

Masks = dict[str, Tensor]
Score = Callable[[str], Tensor]  # layer name -> scores (nnz,) of its survivors, in index order; the lowest go first
SCOPES = ("layer", "global")


class Pool(NamedTuple):
    """Weights that compete: `fraction` of the survivors of all `names` together is removed."""

    names: tuple[str, ...]
    fraction: float


def survivors(masks: Mapping[str, Tensor]) -> int:
    """How many weights survive, over all masks."""
    return sum(int(mask.sum()) for mask in masks.values())


def check(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError or TypeError unless each mask is boolean and of the shape of the weight it is named after."""
    for name, mask in masks.items():
        if name not in weights:
            raise ValueError(f"masks: expected names among {list(weights)}, got {name!r}")
        if mask.dtype != torch.bool:
            raise TypeError(f"masks[{name!r}]: expected a bool tensor, got {mask.dtype}")
        if mask.shape != weights[name].shape:
            expected, got = tuple(weights[name].shape), tuple(mask.shape)
            raise ValueError(f"masks[{name!r}]: expected shape {expected}, got {got}")


def lowest(scores: Tensor, k: int) -> Tensor:
    """Bool (n,), True at exactly the k lowest of `scores` (n,); among equal scores the first by index. O(n) time."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    if k == 0:
        return chosen
    threshold = scores.kthvalue(k).values
    chosen = scores < threshold
    ties = (scores == threshold).nonzero().squeeze(1)
    chosen[ties[: k - int(chosen.sum())]] = True
    return chosen


def by_magnitude(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Score:
    """The smallest |w| go first. The score raises ValueError for a layer with survivors that are not finite."""

    def score(name: str) -> Tensor:
        scores = weights[name].detach()[masks[name]].abs()
        if bad := int((~scores.isfinite()).sum()):
            raise ValueError(f"{name}: expected finite weights, got {bad} that are nan or inf")
        return scores

    return score


def at_random(masks: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Score:
    """Any go first. Scores are float64, so that ties (broken by index, hence not random) all but never occur."""

    def score(name: str) -> Tensor:
        scores = torch.rand(int(masks[name].sum()), dtype=torch.float64, generator=generator, device=_device(generator))
        return scores.to(masks[name].device)

    return score


def pools(
    names: Sequence[str],
    fraction: float,
    *,
    scope: str = "layer",
    rates: Mapping[str, float] | None = None,
    output_fraction: float | None = None,
    ignore: Sequence[str] = (),
) -> list[Pool]:
    """Who competes with whom, and at which fraction: the arguments of `prune`, validated, without its weights.

    A layer that is ignored, the last one under `output_fraction`, and a layer named in `rates` (in this order of
    precedence) is a pool of its own. The others are a pool each (scope "layer") or one pool together ("global").
    """
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {SCOPES}, got {scope!r}")
    if isinstance(ignore, str):
        raise TypeError(f"ignore: expected a sequence of names, got the string {ignore!r}")
    _check_fraction("fraction", fraction)
    own: dict[str, float] = {}
    for pattern, rate in (rates or {}).items():
        _check_fraction(f"rates[{pattern!r}]", rate)
        for name in _matching("rates", pattern, names):
            own.setdefault(name, float(rate))  # the first pattern that matches decides
    if output_fraction is not None:
        _check_fraction("output_fraction", output_fraction)
        own[names[-1]] = float(output_fraction)
    for pattern in ignore:
        own.update(dict.fromkeys(_matching("ignore", pattern, names), 0.0))
    rest = [name for name in names if name not in own]
    together = [tuple(rest)] if scope == "global" else [(name,) for name in rest]
    return [Pool((name,), rate) for name, rate in own.items()] + [Pool(group, float(fraction)) for group in together]


def prune_pools(masks: Mapping[str, Tensor], chosen: Iterable[Pool], score: Score) -> Masks:
    """New masks, in which each pool has lost exactly round(fraction * survivors) of its survivors: the lowest scores.

    Ties go by index, layers in the order of the pool; only one pool's scores are held at a time. `masks` is left as
    it is and nothing returned aliases it.
    """
    pruned = {name: mask.clone() for name, mask in masks.items()}
    for names, fraction in chosen:
        counts = [int(masks[name].sum()) for name in names]
        k = round(fraction * sum(counts))
        if k == 0:
            continue
        removed = lowest(torch.cat([score(name) for name in names]), k)
        for name, part in zip(names, removed.split(counts), strict=True):
            pruned[name][masks[name]] = ~part
    return pruned


def rearrange(masks: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Masks:
    """New masks with the survivors of each layer at random places in it: the control of paper App. E."""
    rearranged = {}
    for name, mask in masks.items():
        order = torch.randperm(mask.numel(), generator=generator, device=_device(generator))
        rearranged[name] = mask.flatten()[order.to(mask.device)].view_as(mask)
    return rearranged


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _check_fraction(what: str, value: float) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{what}: expected a number, got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"{what}: expected a value in [0, 1), got {value}")


def _matching(what: str, pattern: str, names: Sequence[str]) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise ValueError(f"{what}: expected a name or pattern among {list(names)}, got {pattern!r}, which matches none")
    return found

"""Which weights or blocks go and which come, in a pool of layers: places in it are int64 (`pools`)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .. import pieces
from ..masks import lowest
from ..nn import MaskedLayer
from .gradients import Watch
from .pools import Pool


def highest(scores: Tensor, k: int) -> Tensor:
    """Bool (n,), True at exactly the k highest of `scores` (n,); among equal scores the first by index."""
    return lowest(-scores, k)


def kept(pool: Pool, k: int, target: int, score: Callable[[str, MaskedLayer], Tensor]) -> Tensor | None:
    """The places of the k survivors with the highest scores; None if a score is not finite. target: as `Pool.stays`."""
    of_values = pool.of_values()
    places = pool.distinct(of_values)
    if k == len(places):
        return places
    scores = torch.cat([score(name, layer) for name, layer in pool.layers.items()])
    if scores.shape != of_values.shape:
        raise ValueError(f"drop: expected a score for each of {len(of_values)} weights, got {tuple(scores.shape)}")
    if not finite(scores):
        return None
    return pieces.take(places, pool.stays(pool.means(scores, of_values, places), places, k, target))


def at_random(pool: Pool, without: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k places that are not among those of `without`, each set of them equally likely, ascending."""
    ranks = sample(pool.total - len(without), k, generator).to(without.device)
    # As many places that are not free lie before the r-th free one as `without` has less their own number up to r.
    own = torch.arange(len(without), device=without.device)
    return ranks.add_(pieces.places_in(without - own, ranks, right=True))


def sample(total: int, k: int, generator: torch.Generator) -> Tensor:
    """k different numbers below `total`, ascending, int64: in O(k) where they are few."""
    if 2 * k > total:
        rest = torch.ones(total, dtype=torch.bool, device="cpu")
        rest[sample(total, total - k, generator)] = False
        return rest.nonzero().squeeze(1)
    drawn = torch.empty(0, dtype=torch.int64, device="cpu")
    while len(drawn) < k:
        more = torch.randint(total, (2 * (k - len(drawn)),), generator=generator, device="cpu")
        drawn = ascending(torch.cat([drawn, more]))
        drawn = pieces.take(drawn, torch.cat([drawn.new_ones(1, dtype=torch.bool), drawn[1:] != drawn[:-1]]))
    chosen = torch.zeros(len(drawn), dtype=torch.bool, device="cpu")
    chosen[torch.randperm(len(drawn), generator=generator, device="cpu")[:k]] = True
    return pieces.take(drawn, chosen)


def by_gradient(pool: Pool, without: Tensor, k: int, watch: Watch) -> Tensor | None:
    """The k places with the largest gradients that are not among those of `without`; None if one is not finite.

    Strip by strip: of the strips that were seen, only the best k are held.
    """
    best, places, worst = without.new_empty(0, dtype=torch.float64), without.new_empty(0), -1.0
    for name, begin in zip(pool.layers, pool.begins, strict=False):
        for start, strip in watch.strips(name):
            scores = strip.abs_()
            if not finite(scores):
                return None
            start, scores = pool.of_strip(name, start, scores)
            start += begin
            first, last = torch.searchsorted(
                without, torch.tensor([start, start + len(scores)], dtype=torch.int64, device=without.device)
            )
            scores[without[first:last] - start] = -1.0
            above = highest(scores, k) if len(scores) > k else torch.ones_like(scores, dtype=torch.bool)
            at = above.logical_and_(scores > worst).nonzero().squeeze(1)
            best, places = torch.cat([best, scores[at]]), torch.cat([places, at + start])
            if len(best) >= k:
                chosen = highest(best, k)
                best, places = best[chosen], places[chosen]
                worst = float(best.min()) if k else math.inf
    return places.sort().values


def gradients_at(pool: Pool, places: Tensor, watch: Watch) -> Tensor:
    """Of the weights at ascending places: (n,). Of blocks the means of their absolute values."""
    patterns = pool.patterns(places)
    gradients = torch.cat([watch.at(name, pattern) for name, pattern in patterns.items()])
    if pool.block == (1, 1):
        return gradients
    return pool.means(gradients.abs_(), pool.of_weights(patterns), places)


def merged(one: Tensor, other: Tensor) -> Tensor:
    """Ascending places of both, which share none."""
    return ascending(torch.cat([one, other]), in_runs=True) if len(other) else one


def ascending(places: Tensor, in_runs: bool = False) -> Tensor:
    """Sorted, on the CPU by NumPy, which is faster. in_runs: a stable sort merges them, in a twentieth of the time."""
    if not places.is_cpu:
        return places.sort().values
    return torch.from_numpy(np.sort(places.numpy(), kind="stable" if in_runs else None))


def finite(scores: Tensor) -> bool:
    """Are all of them numbers? In one pass: a NaN is both the lowest and the highest."""
    return not len(scores) or all(math.isfinite(each) for each in torch.stack(scores.aminmax()).tolist())

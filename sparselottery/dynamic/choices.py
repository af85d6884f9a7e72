"""Which weights go and which come, in a pool of layers: places in it are int64, as if its weights lay end to end."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..masks import lowest
from ..nn import MaskedLayer
from ..pattern import Pattern, matrix_shape
from .gradients import Watch


class Pool:
    """Layers whose weights compete, by name. `begins` says where the places of each begin, and last where they end."""

    def __init__(self, layers: dict[str, MaskedLayer]) -> None:
        self.layers = layers
        self.begins = [0]
        for layer in layers.values():
            self.begins.append(self.begins[-1] + math.prod(layer.shape))

    @property
    def total(self) -> int:
        return self.begins[-1]

    @property
    def nnz(self) -> int:
        return sum(layer.nnz for layer in self.layers.values())

    def places(self) -> Tensor:
        """Of all weights that survive, ascending."""
        return torch.cat([
            layer.pattern.positions() + begin for layer, begin in zip(self.layers.values(), self.begins, strict=False)
        ])  # fmt: skip

    def patterns(self, places: Tensor) -> dict[str, Pattern]:
        """Of each layer, given the ascending places of all."""
        bounds = torch.searchsorted(places, torch.tensor(self.begins, dtype=torch.int64, device=places.device)).tolist()
        return {
            name: Pattern.from_positions(places[start:stop] - begin, matrix_shape(layer.shape))
            for (name, layer), begin, start, stop in zip(
                self.layers.items(), self.begins, bounds, bounds[1:], strict=False
            )
        }


def highest(scores: Tensor, k: int) -> Tensor:
    """Bool (n,), True at exactly the k highest of `scores` (n,); among equal scores the first by index."""
    return lowest(-scores, k)


def kept(pool: Pool, k: int, score: Callable[[str, MaskedLayer], Tensor]) -> Tensor | None:
    """The places of the k survivors with the highest scores; None if a score is not finite."""
    places = pool.places()
    if k == len(places):
        return places
    scores = torch.cat([score(name, layer) for name, layer in pool.layers.items()])
    if scores.shape != places.shape:
        raise ValueError(f"drop: expected a score for each of {len(places)} weights, got {tuple(scores.shape)}")
    if not finite(scores):
        return None
    return places[~lowest(scores, len(places) - k)]


def at_random(pool: Pool, without: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k places that are not among those of `without`, each set of them equally likely, ascending."""
    ranks = sample(pool.total - len(without), k, generator).to(without.device)
    # As many places that are not free lie before the r-th free one as `without` has less their own number up to r.
    own = torch.arange(len(without), device=without.device)
    return ranks + torch.searchsorted(without - own, ranks, right=True)


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
        drawn = drawn[torch.cat([drawn.new_ones(1, dtype=torch.bool), drawn[1:] != drawn[:-1]])]
    chosen = torch.zeros(len(drawn), dtype=torch.bool, device="cpu")
    chosen[torch.randperm(len(drawn), generator=generator, device="cpu")[:k]] = True
    return drawn[chosen]


def by_gradient(pool: Pool, without: Tensor, k: int, watch: Watch) -> Tensor | None:
    """The k places with the largest gradients that are not among those of `without`; None if one is not finite.

    Strip by strip: of the strips that were seen, only the best k are held.
    """
    best, places, worst = without.new_empty(0, dtype=torch.float64), without.new_empty(0), -1.0
    for name, begin in zip(pool.layers, pool.begins, strict=False):
        for start, strip in watch.strips(name):
            start += begin
            scores = strip.abs_()
            if not finite(scores):
                return None
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
    """Of the weights at ascending places: (n,)."""
    return torch.cat([watch.at(name, pattern) for name, pattern in pool.patterns(places).items()])


def merged(one: Tensor, other: Tensor) -> Tensor:
    """Ascending places of both, which share none."""
    return ascending(torch.cat([one, other])) if len(other) else one


def ascending(places: Tensor) -> Tensor:
    """Sorted, on the CPU by NumPy, which is faster."""
    return torch.from_numpy(np.sort(places.numpy())) if places.is_cpu else places.sort().values


def finite(scores: Tensor) -> bool:
    """Are all of them numbers? In one pass: a NaN is both the lowest and the highest."""
    return not len(scores) or all(math.isfinite(each) for each in torch.stack(scores.aminmax()).tolist())

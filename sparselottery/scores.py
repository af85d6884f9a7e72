"""What goes first: scores of the weights of a layer, or of its blocks, and the lowest of them. See `masks`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .grids import Block, block_sums, grid_of
from .masks import Score, generator_device
from .pieces import count, scratch, take

Scores = Mapping[str, Tensor]  # by layer


def by_magnitude(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Score:
    """The blocks with the smallest mean |w| go first; see `by_score`."""

    def magnitudes(name: str) -> Tensor:
        copy = take(weights[name].detach().to(masks[name].device), masks[name])
        return copy.abs() if copy.is_complex() else copy.abs_()

    return _by_mean(magnitudes, masks)


def by_magnitude_of_survivors(values: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Score:
    """As `by_magnitude`, given the weights (n,) of a layer that survive, by index, alone."""

    def magnitudes(name: str) -> Tensor:
        alive = values[name].detach().to(masks[name].device)
        return alive.abs() if alive.is_complex() else torch.abs(alive, out=scratch(len(alive), alive))

    return _by_mean(magnitudes, masks)


def by_score(score_of: Callable[[str], Tensor], masks: Mapping[str, Tensor]) -> Score:
    """The blocks with the smallest mean score go first. By their sums, those that the border cuts off would.

    score_of: layer -> scores of its single weights, of its mask's shape. The mean is float64, so that blocks of equal
    float32 scores tie, whatever their sizes. The result raises ValueError for a layer with survivors that are not
    finite.
    """
    return _by_mean(lambda name: take(score_of(name).to(masks[name].device), masks[name]), masks)


def by_given(scores: Scores, masks: Mapping[str, Tensor]) -> Score:
    """As `by_score`, of scores of each layer's mask's shape, or (n,) of its survivors, by index. Raises for others."""
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores: expected tensors by layer, got {type(scores).__name__}")

    if unknown := scores.keys() - masks.keys():
        raise ValueError(f"scores: expected names among {list(masks)}, got {min(unknown)!r}")

    def alive(name: str) -> Tensor:
        mask = masks[name]
        if name not in scores:
            raise ValueError(f"scores: expected those of {name!r}, got those of {list(scores)}")
        given = scores[name]
        if not isinstance(given, Tensor) or given.dtype == torch.bool or given.is_complex():
            got = given.dtype if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f"scores[{name!r}]: expected a tensor of real numbers, got {got}")
        given = given.detach().to(mask.device)
        if given.shape == mask.shape:
            return take(given, mask)
        if given.shape != (count(mask),):
            expected = f"{tuple(mask.shape)} or ({count(mask)},)"
            raise ValueError(f"scores[{name!r}]: expected shape {expected}, got {tuple(given.shape)}")
        return given

    return _by_mean(alive, masks, "scores")


def _by_mean(alive_of: Callable[[str], Tensor], masks: Mapping[str, Tensor], what: str = "weights") -> Score:
    """As `by_score`. alive_of: layer -> scores (n,) of the weights that survive, by index."""

    def score(name: str, block: Block = (1, 1)) -> Tensor:
        mask, alive = masks[name], alive_of(name)
        if alive.numel() and not all(map(math.isfinite, map(float, alive.aminmax()))):
            bad = int(alive.isfinite().logical_not_().count_nonzero())
            raise ValueError(f"{name}: expected finite {what}, got {bad} that are nan or inf")
        if block == (1, 1):
            return alive
        scores = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
        sums = block_sums(scores.masked_scatter_(mask, alive.double()), block)
        counts = block_sums(mask, block)
        return (sums / counts)[counts > 0]

    return score


def at_random(masks: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Score:
    """Any go first. Scores are float64, so that ties (broken by index, hence not random) all but never occur."""

    def score(name: str, block: Block = (1, 1)) -> Tensor:
        count = int(grid_of(masks, name, block).sum())
        scores = torch.rand(count, dtype=torch.float64, generator=generator, device=generator_device(generator))
        return scores.to(masks[name].device)

    return score

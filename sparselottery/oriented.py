"""Weights as pruning sees their blocks: (O, C', ...), rows being outputs, whatever the dense weight's dimensions are.

Transformers' Conv1D holds (in, out), a transposed convolution (in, out / groups, *taps), experts (E, out, in). Single
weights are pruned where they are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .grids import Block, Grain, Rows, check_smaller
from .masks import Masks, Pool
from .nn import MaskedConvTranspose, MaskedConvTranspose3d, MaskedEmbedding, MaskedEmbeddingBag
from .nn.experts import MaskedMatrices
from .orders import Permuted
from .survey import Survey, Weight
from .weight_decay import SparseLotteryWarning

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag, MaskedEmbedding, MaskedEmbeddingBag)


class View(NamedTuple):
    """seen: of a dense weight, or its mask, what pruning sees; restored: the inverse."""

    seen: Callable[[Tensor], Tensor]
    restored: Callable[[Tensor], Tensor]


class Views:
    """Of the layers of these pools that are not pruned where they are.

    Raises ValueError for rows of an embedding: they are words.
    """

    def __init__(self, found: Survey, chosen: Iterable[Pool]) -> None:
        self._views: dict[str, View] = {}
        for pool in chosen:
            for name in pool.names if pool.fraction and pool.block != (1, 1) else ():
                if view := _view(found.maskable[name], pool.block):
                    self._views[name] = view

    def seen(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights or masks by layer, as pruning sees them."""
        views = self._views
        return {name: views[name].seen(each).contiguous() if name in views else each for name, each in tensors.items()}

    def restored(self, masks: Mapping[str, Tensor]) -> Masks:
        """The inverse of `seen`."""
        views = self._views
        return {
            name: views[name].restored(mask).contiguous() if name in views else mask for name, mask in masks.items()
        }

    def of_scores(self, scores: Any, masks: Mapping[str, Tensor]) -> Any:
        """Scores by layer, of a mask's shape or (n,) of its survivors, as `seen`; what is no such thing as it is."""
        if not isinstance(scores, Mapping):
            return scores
        return {name: self._of_score(name, each, masks) for name, each in scores.items()}

    def _of_score(self, name: Any, score: Any, masks: Mapping[str, Tensor]) -> Any:
        if name not in self._views or not isinstance(score, Tensor):
            return score
        mask, seen = masks[name], self._views[name].seen
        if score.shape == mask.shape:
            return seen(score)
        number = int(mask.count_nonzero())
        if score.shape != (number,):
            return score
        index = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
        index.masked_scatter_(mask, torch.arange(number, device=mask.device))
        return score[seen(index)[seen(mask)].to(score.device)]


def fitted(chosen: Sequence[Pool], masks: Mapping[str, Tensor]) -> list[Pool]:
    """The pools for weights of these shapes: rows compete with those of their length.

    Raises ValueError for a layer to be pruned that is no more than one block.
    """
    found = []
    for pool in chosen:
        alike: dict[int, list[str]] = {}
        for name in pool.names:
            shape = masks[name].shape
            if pool.fraction and isinstance(pool.block, (tuple, Permuted)):
                check_smaller(name, shape, pool.block)
            alike.setdefault(math.prod(shape[1:]) if isinstance(pool.block, Rows) else 0, []).append(name)
        found += [pool._replace(names=tuple(names)) for names in alike.values()]
    return found


def tell_of_small(chosen: Sequence[Pool], masks: Mapping[str, Tensor], stacklevel: int) -> None:
    """Warn (`SparseLotteryWarning`) of pools with nothing pruned of whose few blocks the fraction rounds to none."""
    small: list[str] = []
    for pool in chosen:
        if pool.fraction and isinstance(pool.block, (tuple, Permuted)):
            blocks = sum(_blocks(masks[name].shape, pool.block) for name in pool.names)
            if blocks and round(pool.fraction * blocks) == 0 and all(bool(masks[name].all()) for name in pool.names):
                small.append(f"{pool.fraction:g} of the {blocks} of {', '.join(pool.names)}")
    if small:
        warnings.warn(
            f"nothing is pruned where the fraction is less than half a weight or block: {'; '.join(small)}. "
            "scope='global' has layers compete, `rates` gives single ones another fraction, and `ignore` says that "
            "they are meant to stay",
            SparseLotteryWarning,
            stacklevel=stacklevel + 1,
        )


def _blocks(shape: Sequence[int], grain: Block | Permuted) -> int:
    rows, columns = grain.block if isinstance(grain, Permuted) else grain
    return math.ceil(shape[0] / rows) * math.ceil(shape[1] / columns) * math.prod(shape[2:])


def _view(weight: Weight, grain: Grain) -> View | None:
    """None where the dense weight is (O, C', ...)."""
    rows, kind = isinstance(grain, Rows), weight.masked_type
    if rows and any(isinstance(use.layer, EMBEDDINGS) for use in weight.uses):
        raise ValueError(
            f"granularity: expected blocks or N:M of the embedding {weight.name!r}, whose rows are words, got 'rows'; "
            "ignore=[...] leaves a layer as it is"
        )
    if issubclass(kind, MaskedMatrices):  # blocks are of one expert, as others are of one tap
        number, turned = weight.shape[0], torch.Tensor.mT.__get__ if weight.layer.inputs_first else _as_it_is
        if rows:
            return View(lambda dense: turned(dense).flatten(0, 1), lambda seen: turned(seen.unflatten(0, (number, -1))))
        return View(lambda dense: turned(dense).movedim(0, -1), lambda seen: turned(seen.movedim(-1, 0)))
    if kind.transposed:
        return View(torch.t, torch.t)
    if issubclass(kind, (MaskedConvTranspose, MaskedConvTranspose3d)):
        groups = weight.layer.groups
        return View(lambda dense: _turned(dense, groups), lambda seen: _turned(seen, groups))
    return None


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _turned(tensor: Tensor, groups: int) -> Tensor:
    """(I, O / groups, ...) as (O, I / groups, ...), and back."""
    return tensor.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)

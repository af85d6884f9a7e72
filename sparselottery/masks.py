"""Scores in, masks out: pruning without a model.

A mask is a bool tensor, True where a weight survives; `Masks` keys them by parameter name ("fc1.weight"). Masks are
data: they are never read off the values of weights, and here they only ever lose True entries. Every function is pure.

What is pruned are the blocks of a grid (see `grids`), with (1, 1) single weights. Where they are `Permuted`, the order
of rows and columns is found anew whenever blocks go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .arrange import Sought, find_orders
from .grids import Block, Grain, Links, Rows, block_sums, connected, grid_of, mask_of, order_in, orders_in
from .lowest import lowest
from .n_of_m import NofM, fraction_of, n_of_m
from .orders import Permuted
from .pieces import count, put

Masks = dict[str, Tensor]
Granularity = Block | str | Mapping[str, Block | str]  # of all layers, or by name or pattern, the others being (1, 1)
Score = Callable[[str, Block], Tensor]  # layer -> scores (n,) of its n surviving blocks, in order; the lowest go first
SCOPES = ("layer", "global")


class Pool(NamedTuple):
    """Blocks that compete: `fraction` of the surviving ones of all `names` together is removed.

    A layer with N:M is alone, and its single weights compete within their groups.
    """

    names: tuple[str, ...]
    fraction: float
    block: Grain = (1, 1)


def survivors(masks: Mapping[str, Tensor]) -> int:
    """How many weights survive, over all masks."""
    return sum(map(count, masks.values()))


def as_mask(name: str, mask: Tensor | np.ndarray) -> Tensor:
    """The mask of a weight as a bool tensor, copied where torch cannot hold an array. Raises TypeError for others."""
    if isinstance(mask, np.ndarray) and mask.dtype == bool:
        fits = mask.flags.writeable and min(mask.strides, default=0) >= 0
        return torch.from_numpy(mask if fits else mask.copy())
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = f"{type(mask).__name__} of {mask.dtype}" if hasattr(mask, "dtype") else type(mask).__name__
        raise TypeError(f"masks[{name!r}]: expected a bool tensor or bool NumPy array, got {got}")
    if mask.layout != torch.strided:
        raise TypeError(f"masks[{name!r}]: expected an ordinary tensor, as mask.to_dense() is, got {mask.layout}")
    return mask


def by_name(masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The masks; raises TypeError if they are no mapping from names."""
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks: expected a dict of masks by parameter name, got {type(masks).__name__}")
    if strange := [name for name in masks if not isinstance(name, str)]:
        raise TypeError(f"masks: expected names of parameters, as '0.weight' is, got {strange[0]!r}")
    return masks


def check(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError or TypeError unless each mask is boolean and of the shape of the weight it is named after."""
    for name, mask in by_name(masks).items():
        if name not in weights:
            raise ValueError(f"masks: expected names among {list(weights)}, got {name!r}")
        mask = as_mask(name, mask)
        if mask.shape != weights[name].shape:
            expected, got = tuple(weights[name].shape), tuple(mask.shape)
            raise ValueError(f"masks[{name!r}]: expected shape {expected}, got {got}")


def check_blocks(masks: Mapping[str, Tensor], chosen: Iterable[Pool]) -> None:
    """Raise ValueError unless the mask of each layer that is to be pruned has whole blocks, or leads to N:M."""
    for pool in chosen:
        for name in pool.names if pool.fraction else ():
            grid_of(masks, name, pool.block)
            if isinstance(pool.block, NofM):
                _check_leads_to(name, masks[name], pool)


def to_counts(masks: Mapping[str, Tensor], chosen: Iterable[Pool], like: Mapping[str, Tensor]) -> list[Pool]:
    """The pools with the fractions that leave each of them as many surviving blocks of `masks` as `like` has in it.

    Raises ValueError for a pool of which `like` has more, and for a mask that has not whole blocks.
    """
    exact = []
    for pool in chosen:
        before, after = (
            sum(int(grid_of(each, name, pool.block).sum()) for name in pool.names) for each in (masks, like)
        )
        if after > before:
            raise ValueError(f"{', '.join(pool.names)}: expected at most {before} survivors, got {after}")
        exact.append(pool._replace(fraction=(before - after) / max(before, 1)))
    return exact


def pools(
    names: Sequence[str],
    fraction: float,
    *,
    scope: str = "layer",
    rates: Mapping[str, float] | None = None,
    output_fraction: float | None = None,
    ignore: Sequence[str] = (),
    granularity: Granularity = (1, 1),
    permute: bool = False,
) -> list[Pool]:
    """Who competes with whom, and at which fraction: the arguments of `prune`, validated, without its weights.

    A layer that is ignored, the last one under `output_fraction`, a layer named in `rates`, and the last one where all
    have the granularity "rows", which leaves it whole, is (in this order of precedence) a pool of its own. The others
    are a pool each (scope "layer") or one pool of all with the same block ("global"): means over blocks of different
    sizes do not compare, those over large ones never being small.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {SCOPES}, got {scope!r}")
    _check_fraction("fraction", fraction)
    if not isinstance(rates, Mapping | None):
        raise TypeError(f"rates: expected a dict of fractions by name, got {type(rates).__name__}")
    left = ignored(ignore, names)
    own: dict[str, float] = {}
    for pattern, rate in (rates or {}).items():
        _check_fraction(f"rates[{pattern!r}]", rate)
        for name in _matching("rates", pattern, names):
            own.setdefault(name, float(rate))  # the first pattern that matches decides
    if output_fraction is not None:
        _check_fraction("output_fraction", output_fraction)
        own[names[-1]] = float(output_fraction)
    elif granularity in ("rows", Rows()) and len(names) > 1:
        own.setdefault(names[-1], 0.0)  # its units are the outputs
    own.update(dict.fromkeys(left, 0.0))
    grains = granularities(names, granularity, permute)
    groups: dict[object, list[str]] = {}
    for name in names:
        if name not in own:
            together = scope == "global" and not isinstance(grains[name], NofM)
            groups.setdefault(grains[name] if together else name, []).append(name)
    alone = [Pool((name,), rate, grains[name]) for name, rate in own.items()]
    return alone + [Pool(tuple(group), float(fraction), grains[group[0]]) for group in groups.values()]


def ignored(ignore: Sequence[str], names: Sequence[str]) -> list[str]:
    """Those of the names that `ignore` names, or that match a pattern in it; TypeError or ValueError for others."""
    if isinstance(ignore, str) or not isinstance(ignore, Iterable):
        raise TypeError(f"ignore: expected a sequence of names, got {ignore!r}")
    return [name for pattern in ignore for name in _matching("ignore", pattern, names)]


def granularities(names: Iterable[str], granularity: Granularity, permute: bool = False) -> dict[str, Grain]:
    """The grain of each layer, by the first pattern that matches; raises for what is neither (R, C) nor "N:M".

    permute: are blocks those of permuted weights? Raises ValueError where there are none but single weights and N:M.
    """
    names = list(names)
    if isinstance(granularity, Mapping):
        grains = {}
        for pattern, grain in granularity.items():
            grain = _checked_grain(f"granularity[{pattern!r}]", grain)
            for name in _matching("granularity", pattern, names):
                grains.setdefault(name, grain)
        grains = {name: grains.get(name, (1, 1)) for name in names}
    else:
        grains = dict.fromkeys(names, _checked_grain("granularity", granularity))
    if permute:
        blocks = {name: Permuted(*grain) for name, grain in grains.items() if isinstance(grain, tuple)}
        blocks = {name: grain for name, grain in blocks.items() if grain.block != (1, 1)}
        if names and not blocks:
            raise ValueError(f"permute: expected a granularity with blocks to gather weights into, got {granularity!r}")
        grains |= blocks
    return grains


def prune_pools(masks: Mapping[str, Tensor], chosen: Iterable[Pool], score: Score, links: Links = ()) -> Masks:
    """New masks, in which each pool has lost exactly round(fraction * n) of its n surviving blocks: the lowest scores.

    Of rows each layer keeps the one with the highest score. Ties go by index, layers in the order of the pool; only one
    pool's scores are held at a time. `masks` is left as it is and nothing returned aliases it. links: names of
    layers whose outputs are inputs of others, and of those: permuted blocks as high in the ones as they are wide in the
    others share an order there. Raises ValueError for a layer to be pruned whose mask has not whole blocks.
    """
    chosen = [pool for pool in chosen if pool.fraction]
    permuted = [pool for pool in chosen if isinstance(pool.block, Permuted)]
    pruned = _prune_permuted(masks, permuted, score, links)
    for pool in (each for each in chosen if each not in permuted):
        if isinstance(pool.block, NofM):
            check_blocks(masks, [pool])
            pruned |= {name: n_of_m(masks[name], score(name, (1, 1)), pool.block) for name in pool.names}
            continue
        before = [grid_of(masks, name, pool.block) for name in pool.names]
        counts = [count(grid) for grid in before]
        k = round(pool.fraction * sum(counts))
        if isinstance(pool.block, Rows):
            k = min(k, sum(n - 1 for n in counts if n))
        if k == 0:
            continue
        scores = [score(name, pool.block) for name in pool.names]
        if isinstance(pool.block, Rows):
            scores = [each.index_fill(0, each.argmax(), math.inf) if len(each) else each for each in scores]
        removed = lowest(scores[0] if len(scores) == 1 else torch.cat(scores), k)
        for name, grid, part in zip(pool.names, before, removed.split(counts), strict=True):
            pruned[name] = mask_of(put(grid, part.logical_not_()), pool.block, masks[name].shape)
    return {name: pruned[name] if name in pruned else mask.clone() for name, mask in masks.items()}


def _prune_permuted(masks: Mapping[str, Tensor], chosen: Sequence[Pool], score: Score, links: Links) -> Masks:
    """As `prune_pools`, of pools with `Permuted` blocks: layers are put in order for the share that their pools keep.

    Blocks of the new order are parts of several of the old one: those of which a part is gone already go first. What
    leads to a unit without outputs, or away from one without inputs, counts as the lowest score of its layer: trainings
    leave such weights where they began, and blocks of them would crowd out others.
    """
    pool_of = {name: pool for pool in chosen for name in pool.names}
    alive = {name: count(grid_of(masks, name, pool.block)) for name, pool in pool_of.items()}
    dense = {}
    for name in pool_of:
        like = torch.zeros(masks[name].shape, dtype=torch.float64, device=masks[name].device)
        dense[name] = like.masked_scatter_(masks[name], score(name, (1, 1)).double())
    for outputs, inputs, *_ in links:
        for names, side, others in ((outputs, 0, inputs), (inputs, 1, outputs)):
            if not all(other in masks for other in others):
                continue
            live = [masks[other].transpose(0, 1 - side).flatten(1).any(1) for other in others]
            dead = (~torch.stack(live).any(0)).nonzero()[:, 0]
            for name in names:
                if name in dense and alive[name]:
                    dense[name].index_fill_(side, dead, float(dense[name][masks[name]].min()))
    orders = {}
    for names in connected(list(pool_of), links):
        grains = {name: pool_of[name].block for name in names}
        axes, start = orders_in(masks, grains, links)
        kept = {name: alive[name] - int(pool_of[name].fraction * alive[name]) for name in names}
        layers = [Sought(dense[name], masks[name], grains[name].block, kept[name]) for name in names]
        orders |= zip(names, find_orders(layers, axes, start), strict=True)
    pruned = {}
    for pool in chosen:
        block, grids, means = pool.block.block, [], []
        for name in pool.names:
            sizes = block_sums(torch.ones_like(masks[name]), block)
            grids.append(block_sums(orders[name].permuted(masks[name]), block) == sizes)
            means.append((block_sums(orders[name].permuted(dense[name]), block) / sizes)[grids[-1]])
        counts, before = [len(each) for each in means], sum(alive[name] for name in pool.names)
        removed = lowest(torch.cat(means), sum(counts) - before + round(pool.fraction * before))
        for name, grid, part in zip(pool.names, grids, removed.split(counts), strict=True):
            permuted = mask_of(put(grid, part.logical_not_()), block, masks[name].shape)
            pruned[name] = orders[name].restored(permuted)
    return pruned


def _check_leads_to(name: str, mask: Tensor, pool: Pool) -> None:
    goes = fraction_of(mask, pool.block)
    if not math.isclose(goes, pool.fraction, abs_tol=1e-9):
        raise ValueError(f"{name}: expected the fraction {goes:g}, which leaves {pool.block}, got {pool.fraction:g}")


def rearrange(
    masks: Mapping[str, Tensor], generator: torch.Generator | None = None, granularity: Granularity = (1, 1)
) -> Masks:
    """New masks with the survivors of each layer at random places in it: the control of paper App. E.

    granularity: as given to `prune`: whole blocks move, and so a mask of blocks stays one; with (1, 1) it does not.
    Blocks change places with those of as many weights only, so that each layer keeps its number of survivors: a block
    that the border cuts off stays at the border. Raises ValueError for a mask that has not whole blocks.
    """
    rearranged = {}
    for name, grain in granularities(masks, granularity).items():
        mask, grid = masks[name], grid_of(masks, name, grain)
        block = grain.block if isinstance(grain, Permuted) else (1, 1) if isinstance(grain, NofM) else grain
        flat = grid.flatten()
        moved = flat.clone()
        for same in _places_by_size(mask, block):
            order = torch.randperm(len(same), generator=generator, device=generator_device(generator))
            moved[same] = flat[same[order.to(mask.device)]]
        rearranged[name] = mask_of(moved.view(grid.shape), block, mask.shape)
        if isinstance(grain, Permuted):
            rearranged[name] = order_in(masks, name, grain).restored(rearranged[name])
    return rearranged


def _places_by_size(mask: Tensor, block: Block) -> list[Tensor]:
    """The indices in the flattened grid of the blocks of each size."""
    if block == (1, 1):
        return [torch.arange(mask.numel(), device=mask.device)]
    sizes = block_sums(torch.ones_like(mask), block).flatten()
    return [(sizes == size).nonzero().squeeze(1) for size in sizes.unique()]


def generator_device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _check_fraction(what: str, value: float) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{what}: expected a number, got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"{what}: expected a value in [0, 1), got {value}")


def _checked_grain(what: str, block: Block | NofM | str) -> Grain:
    if isinstance(block, (NofM, Permuted, Rows)):
        return block
    if block == "rows":
        return Rows()
    if isinstance(block, str):
        return NofM.read(what, block)
    if not isinstance(block, Sequence) or len(block) != 2 or not all(isinstance(side, Integral) for side in block):
        raise TypeError(f"{what}: expected two ints, rows and columns, 'rows' or N:M, got {block!r}")
    if min(block) < 1:
        raise ValueError(f"{what}: expected at least (1, 1), got {block!r}")
    return int(block[0]), int(block[1])


def _matching(what: str, pattern: str, names: Sequence[str]) -> list[str]:
    if not isinstance(pattern, str):
        raise TypeError(f"{what}: expected names of parameters, as '0.weight' is, got {pattern!r}")
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise ValueError(f"{what}: expected a name or pattern among {list(names)}, got {pattern!r}, which matches none")
    return found

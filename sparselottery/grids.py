"""Which blocks of a weight survive: grids of masks, and masks of grids.

The blocks (R, C) of a weight (O, C', ...) are R rows (filters) x C columns (channels) at one place of the other
dimensions (a convolution's taps). They begin at multiples of R and C and are cut off at the border; with (1, 1) they
are single weights. The grid of a mask is the bool tensor (ceil(O / R), ceil(C' / C), ...), True where a block survives;
block order is index order in it. The grid of `Permuted` blocks is that of the permuted mask (see `orders`), that of
`Rows` says which rows survive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .n_of_m import NofM
from .orders import Order, Permuted, order_of, shared_orders
from .pattern import Pattern


@dataclass(frozen=True)
class Rows:
    """Whole rows: all weights of a unit, of a convolution all of a filter. A grid of them is (O,)."""

    def __str__(self) -> str:
        return "rows"


Block = tuple[int, int]
Grain = Block | NofM | Permuted | Rows
Links = Sequence[tuple]  # that begin with two tuples of names: the outputs of the first are inputs of the second


def grid_of(masks: Mapping[str, Tensor], name: str, block: Grain) -> Tensor:
    """Which blocks of a layer survive; for (1, 1) and N:M its mask. ValueError if of any block only a part does."""
    mask = masks[name]
    if block == (1, 1) or isinstance(block, NofM):
        return mask
    if isinstance(block, Permuted):
        return block_sums(order_in(masks, name, block).permuted(mask), block.block) > 0
    counts = block_sums(mask, block)
    grid = counts > 0
    if partial := int((grid & (counts < block_sums(torch.ones_like(mask), block))).sum()):
        what = "rows" if isinstance(block, Rows) else f"{block[0]}x{block[1]} blocks"
        raise ValueError(f"masks[{name!r}]: expected whole {what}, got {partial} that are partly pruned")
    return grid


def order_in(masks: Mapping[str, Tensor], name: str, grain: Permuted) -> Order:
    """That in which the mask of a layer has whole blocks; ValueError if there is none."""
    mask = masks[name]
    order = order_of(Pattern.from_mask(mask.flatten(1)), mask.shape, grain.block)
    if order is None:
        height, width = grain.block
        raise ValueError(
            f"masks[{name!r}]: expected whole {height}x{width} blocks in some order of its rows and columns, got a "
            "mask that has them in none"
        )
    return order


def connected(names: Sequence[str], links: Links) -> list[list[str]]:
    """The names in groups, in order, each of those that links join."""
    group = {name: [name] for name in names}
    for outputs, inputs, *_ in links:
        parts = {id(group[name]): group[name] for name in (*outputs, *inputs) if name in group}
        joined = [name for part in parts.values() for name in part]
        group |= dict.fromkeys(joined, joined)
    return list({id(each): each for each in group.values()}.values())


def orders_in(
    masks: Mapping[str, Tensor], grains: Mapping[str, Permuted], links: Links
) -> tuple[list[tuple[int, int]], list[Order]]:
    """Which sides of these layers are one (see `shared_orders`), and orders in which all masks have whole blocks.

    Sides that a link joins are one if the blocks have the same extent there, or 1, and if all masks have an order in
    common. Raises ValueError for a mask without an order.
    """
    axes = {name: [2 * at, 2 * at + 1] for at, name in enumerate(grains)}
    for outputs, inputs, *_ in links:
        sides = [(name, 0) for name in outputs if name in axes] + [(name, 1) for name in inputs if name in axes]
        if len({grains[name].block[dim] for name, dim in sides} - {1}) < 2:
            for name, dim in sides:
                axes[name][dim] = axes[sides[0][0]][sides[0][1]]
    layers = [(Pattern.from_mask(masks[name].flatten(1)), masks[name].shape, grains[name].block) for name in grains]
    pairs = [(rows, columns) for rows, columns in axes.values()]
    if (orders := shared_orders(layers, pairs)) is None:
        pairs = [(2 * at, 2 * at + 1) for at in range(len(layers))]
        orders = [order_in(masks, name, grain) for name, grain in grains.items()]
    return pairs, orders


def mask_of(grid: Tensor, block: Block | Rows, shape: Sequence[int]) -> Tensor:
    """The mask of `shape` whose surviving blocks are those of the grid; the inverse of `grid_of`."""
    if isinstance(block, Rows):
        return grid.view(-1, *[1] * (len(shape) - 1)).expand(*shape).clone()
    if block == (1, 1):
        return grid
    rows, cols = (torch.arange(size, device=grid.device) // step for size, step in zip(shape[:2], block, strict=True))
    return grid[rows][:, cols]


def check_smaller(name: str, shape: Sequence[int], grain: Block | Permuted) -> None:
    """Raise ValueError for a layer that is one block, of which no part can be pruned; not for a single weight."""
    block = grain.block if isinstance(grain, Permuted) else grain
    covered = all(size <= side for size, side in zip(shape[:2], block, strict=True))
    if covered and math.prod(shape[2:]) == 1 < math.prod(shape):
        raise ValueError(
            f"granularity: expected blocks smaller than {name!r}, which is {shape[0]}x{shape[1]}, "
            f"got {block[0]}x{block[1]}; a mapping gives it by layer"
        )


def block_sums(tensor: Tensor, block: Block | Rows) -> Tensor:
    """Sums (ceil(O / R), ceil(C' / C), ...) of an (O, C', ...) tensor over blocks, (O,) over rows; int64 of bools."""
    if isinstance(block, Rows):
        return tensor.flatten(1).sum(1)
    sizes = tensor.shape[:2]
    height, width = (max(1, min(step, size)) for step, size in zip(block, sizes, strict=True))
    padding = [0, 0] * (tensor.dim() - 2) + [0, -sizes[1] % width, 0, -sizes[0] % height]  # the last dimension first
    padded = F.pad(tensor, padding)
    by_column = padded.unflatten(1, (padded.shape[1] // width, width))
    return by_column.unflatten(0, (padded.shape[0] // height, height)).sum((1, 3))

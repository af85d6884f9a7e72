"""The search for an order of rows and columns in which few blocks hold the highest scores. Pure and deterministic.

Rows and columns take turns. While the columns stay, so does what each row would add to each group of R rows of the
blocks that are kept now, and two rows change places where that adds the most, until no exchange adds anything. Layers
may have a side in common: the rows of one are the columns of the next, and both say what an exchange adds.

What counts is not what this round of pruning keeps alone: as later rounds can move only rows that have stayed alike, it
is the mean over this round and those later ones that keep the shares `AHEAD` of all blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .orders import Order

AHEAD = (0.12, 0.02)  # shares of the blocks: later rounds that an early one already looks for
STEP = 0.8  # from one of those rounds to the next
TURNS, SWEEPS = 30, 200  # at most: of rows and columns in turns, of exchanges in a turn
GAIN = 1e-4  # of all that is kept: a smaller one ends the search


class Sought(NamedTuple):
    """A layer that is to be put in order.

    scores: (O, C', ...), finite. alive: bool of that shape. A block (R, C) is whole if all of it is alive. kept: of how
    many whole blocks with the highest means the scores count. ahead: do those of the best of them, too?
    """

    scores: Tensor
    alive: Tensor
    block: tuple[int, int]
    kept: int
    ahead: bool = True


def find_orders(layers: Sequence[Sought], axes: Sequence[tuple[int, int]], start: Sequence[Order]) -> list[Order]:
    """Orders of layers as `orders.shared_orders` has them, in which the blocks that count hold much.

    start: in these orders `kept` blocks of each layer are whole, and so they are in those returned. Where all of each
    layer is alive, the search begins at the rows and columns by their sums as well.
    """
    if not all(layer.scores.numel() for layer in layers):
        return list(start)
    search = _Search(layers, axes)
    lines: dict[int, Tensor] = {}
    for pair, order in zip(axes, start, strict=True):
        lines |= zip(pair, order, strict=True)
    starts = [lines]
    if all(bool(layer.alive.all()) for layer in layers):
        starts.append({side: total.argsort(descending=True, stable=True) for side, total in search.sums().items()})
    lines = max(map(search.from_start, starts), key=lambda found: found[0])[1]
    return [Order(lines[rows], lines[columns]) for rows, columns in axes]


class _Search:
    def __init__(self, layers: Sequence[Sought], axes: Sequence[tuple[int, int]]) -> None:
        self.layers, self.axes = [_Layer(*layer) for layer in layers], axes
        self.members: dict[int, list[tuple[int, int]]] = {}
        for at, pair in enumerate(axes):
            for dim, side in enumerate(pair):
                self.members.setdefault(side, []).append((at, dim))

    def sums(self) -> dict[int, Tensor]:
        """Of the lines of each side."""
        return {
            side: torch.stack([self.layers[at].scores.sum((1 - dim, 2)) for at, dim in members]).sum(0)
            for side, members in self.members.items()
        }

    def from_start(self, lines: dict[int, Tensor]) -> tuple[float, dict[int, Tensor]]:
        """How much the blocks hold, and in which order."""
        best, last = (-math.inf, lines), -math.inf
        for _ in range(TURNS):
            value = sum(self._layer(at, lines)[0] for at in range(len(self.layers)))
            if value > best[0]:
                best = value, lines
            if value <= last + GAIN * abs(last):
                break
            last = value
            for side, members in self.members.items():
                moved = [(at, dim) for at, dim in members if self.layers[at].block[dim] > 1]
                if moved:
                    adds = sum(self._adds(at, dim, lines) for at, dim in moved)
                    smallest = GAIN / sum(self.layers[at].scores.numel() for at, _ in moved)
                    step = self.layers[moved[0][0]].block[moved[0][1]]
                    lines = {**lines, side: _exchanged(adds, lines[side], step, smallest)}
        return best

    def _layer(self, at: int, lines: dict[int, Tensor]) -> tuple[float, Tensor]:
        return self.layers[at].weighed(*(lines[side] for side in self.axes[at]))

    def _adds(self, at: int, dim: int, lines: dict[int, Tensor]) -> Tensor:
        """(lines, groups): what each line of a side would add in each group of it."""
        layer, other = self.layers[at], 1 - dim
        parts = _grouped(layer.scores, lines[self.axes[at][other]], layer.block[other], other)
        _, weights = self._layer(at, lines)
        return parts.transpose(0, dim).flatten(1) @ weights.transpose(0, dim).flatten(1).T


class _Layer:
    """Scores as shares of their sum, of which what is dead is worse than any exchange is good."""

    def __init__(self, scores: Tensor, alive: Tensor, block: tuple[int, int], kept: int, ahead: bool) -> None:
        scores, alive = (each.reshape(*each.shape[:2], -1) for each in (scores.float(), alive))
        size = scores.abs().sum((1, 2)), scores.abs().sum((0, 2))
        total = float(size[0].sum()) or 1.0
        worst = 2 * max(float(each.max()) for each in size) / total + 1 / scores.numel()
        self.scores = torch.where(alive, scores / total, -worst)
        self.block = tuple(max(1, min(step, side)) for step, side in zip(block, scores.shape, strict=False))
        heights, widths = (
            (side - torch.arange(0, side, step, device=scores.device)).clamp(max=step)
            for step, side in zip(self.block, scores.shape, strict=False)
        )
        self.sizes = (heights[:, None] * widths).float()[:, :, None]
        most, least = (share * self.sizes.numel() * scores.shape[2] for share in AHEAD)
        later = (most * STEP**i for i in range(math.ceil(math.log(least / most, STEP))))
        self.kept = [kept, *(max(1, round(each)) for each in later if ahead and each < kept)]

    def weighed(self, rows: Tensor, columns: Tensor) -> tuple[float, Tensor]:
        """What the blocks hold that count, and of each block in which share of the rounds it does."""
        sums = _grouped(_grouped(self.scores, columns, self.block[1], 1), rows, self.block[0], 0)
        by_mean = (sums / self.sizes).flatten().argsort(descending=True, stable=True)
        weights = torch.zeros_like(sums).flatten()
        for kept in self.kept:
            weights[by_mean[:kept]] += 1 / len(self.kept)
        return float(sums.flatten() @ weights), weights.view(sums.shape)


def _exchanged(adds: Tensor, lines: Tensor, step: int, smallest: float) -> Tensor:
    """The lines in a better order. adds: (lines, groups); smallest: what an exchange has to add."""
    groups = adds.shape[1]
    own = torch.arange(len(lines), device=lines.device) // step
    nobody = adds.new_full((groups * step - len(lines), groups), -math.inf)  # in the group that the border cuts off
    for _ in range(SWEEPS):
        gains = adds[lines]
        gains = torch.cat([gains - gains.gather(1, own[:, None]), nobody])
        best, who = gains.view(groups, step, groups).max(1)  # from each group to each other
        most, partner = (each.tolist() for each in (best + best.T).fill_diagonal_(-math.inf).max(1))
        pairs, met = [], set()
        for group in sorted(range(groups), key=lambda group: -most[group]):
            if most[group] > smallest and not {group, partner[group]} & met:
                pairs.append((group, partner[group]))
                met |= {group, partner[group]}
        if not pairs:
            break
        one, other = torch.tensor(pairs, dtype=torch.int64, device=lines.device).T
        one, other = one * step + who[one, other], other * step + who[other, one]
        lines = lines.clone()
        lines[one], lines[other] = lines[other], lines[one]
    return lines


def _grouped(tensor: Tensor, order: Tensor, step: int, dim: int) -> Tensor:
    """Sums of each `step` lines along dim 0 or 1, in this order."""
    if step == 1:
        return tensor.index_select(dim, order)
    ordered, rest = tensor.index_select(dim, order), -len(order) % step
    if rest:
        shape = [rest if at == dim else side for at, side in enumerate(tensor.shape)]
        ordered = torch.cat([ordered, tensor.new_zeros(shape)], dim)
    return ordered.unflatten(dim, (-1, step)).sum(dim + 1)

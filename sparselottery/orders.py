"""Blocks of a permuted weight: rows and columns are put into an order in which few blocks hold much.

A mask has whole blocks (R, C) in some order of its rows and columns if equal rows, and equal columns, come in multiples
of R and C. So the order is a property of the mask: `order_of` finds it there, and nobody has to keep it. `arrange`
looks for the order in which the blocks that pruning keeps hold the most.

    [[1, 0, 0, 1],       rows 0 and 2 are equal, and so are 1 and 3, columns 0 and 3, and 1 and 2:
     [0, 1, 1, 0],       two whole blocks (2, 2) in the order rows [0, 2, 1, 3], columns [0, 3, 1, 2]
     [1, 0, 0, 1],
     [0, 1, 1, 0]]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .pattern import BLOCKS, Pattern, has_blocks


@dataclass(frozen=True)
class Permuted:
    """Blocks of R rows x C columns of a weight (O, C', ...) in any order of its rows and its columns."""

    rows: int
    columns: int

    @property
    def block(self) -> tuple[int, int]:
        return self.rows, self.columns

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} permuted"


class Order(NamedTuple):
    """rows: int64 (O,), columns: int64 (C',); the first row of the permuted weight is `rows[0]` of the weight."""

    rows: Tensor
    columns: Tensor

    def permuted(self, tensor: Tensor) -> Tensor:
        return tensor[self.rows][:, self.columns]

    def restored(self, permuted: Tensor) -> Tensor:
        """The inverse of `permuted`."""
        return permuted[self.rows.argsort()][:, self.columns.argsort()]

    @property
    def is_natural(self) -> bool:
        return all(map(is_natural, self))


def is_natural(lines: Tensor) -> bool:
    return bool((lines.diff() == 1).all())


def order_of(pattern: Pattern, shape: Sequence[int], block: tuple[int, int]) -> Order | None:
    """An order in which the mask of a weight of `shape` has whole blocks (R, C); None if there is none. O(nnz).

    It is the natural one if that will do; else equal rows (columns) follow each other, those first whose first is.
    """
    found = shared_orders([(pattern, shape, block)], [(0, 1)])
    return found and found[0]


def shared_orders(
    layers: Sequence[tuple[Pattern, Sequence[int], tuple[int, int]]], axes: Sequence[tuple[int, int]]
) -> list[Order] | None:
    """As `order_of`, of several layers, some of which have a side in common: the rows of one are columns of another.

    axes: of each layer numbers that name its rows and its columns; sides of one number have one order, and as many
    lines, and blocks of one extent there unless that is 1.
    """
    sides = [(side, at, dim) for at, pair in enumerate(axes) for dim, side in enumerate(pair)]
    if all(has_blocks(*layer) for layer in layers):
        device = layers[0][0].col_indices.device
        lines = {side: torch.arange(layers[at][1][dim], device=device) for side, at, dim in sides}
        return [Order(lines[rows], lines[columns]) for rows, columns in axes]
    sums, steps, lines = [_sums(pattern, shape) for pattern, shape, _ in layers], {}, {}
    for side, at, dim in sides:
        steps[side] = max(steps.get(side, 1), layers[at][2][dim])
    for each, step in steps.items():
        binding = [sums[at][dim] for side, at, dim in sides if side == each and layers[at][2][dim] > 1]
        free = next(sums[at][dim] for side, at, dim in sides if side == each)
        lines[each] = _Alike.of(torch.cat(binding or [free], 1)).in_steps(step)
    orders = [_whole(*layer, lines[rows], lines[columns]) for layer, (rows, columns) in zip(layers, axes, strict=True)]
    return None if None in orders else orders


def permuted_block_of(pattern: Pattern, shape: Sequence[int]) -> tuple[tuple[int, int], Order | None]:
    """The first of `BLOCKS` that the mask has whole in some order, and the order; (1, 1) and None if there is none.

    Quick for most masks of single weights: alike rows are equally long.
    """
    least = math.gcd(*(rows for rows, _ in BLOCKS))
    if int((torch.bincount(pattern.crow_indices.diff()) % least > 0).sum()) > 1:
        return (1, 1), None
    alike = [_Alike.of(each) for each in _sums(pattern, shape)]
    for block in BLOCKS:
        lines = (each.in_steps(step) for each, step in zip(alike, block, strict=True))
        if order := _whole(pattern, shape, block, *lines):
            return block, order
    return (1, 1), None


def _whole(pattern: Pattern, shape: Sequence[int], block: tuple[int, int], *lines: Tensor | None) -> Order | None:
    """The order, if there is one of both and the blocks are whole in it: not if `_sums` of others met by chance."""
    if any(each is None for each in lines):
        return None
    order = Order(*lines)
    return order if has_blocks(permuted_pattern(pattern, shape, order)[0], shape, block) else None


def _sums(pattern: Pattern, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """float64 (O, 2) and (C', 2): equal rows, and columns, have equal sums of two random numbers of each place."""
    taps, row, at = math.prod(shape[2:]), pattern.row_indices(), pattern.col_indices.long()
    generator, found = torch.Generator().manual_seed(0), []
    for line, place, lines, places in (
        (row, at, *pattern.shape),
        (at // taps, row * taps + at % taps, shape[1], shape[0] * taps),
    ):  # sums below 2^53 are exact
        numbers = torch.randint(2**22, (2, places), generator=generator, dtype=torch.int64, device="cpu").to(at.device)
        found.append(torch.stack([torch.bincount(line, each[place].double(), lines) for each in numbers], 1))
    return found[0], found[1]


class _Alike(NamedTuple):
    """Which lines are alike. first: (lines,), the first line of its kind; counts: (lines,), how many are."""

    first: Tensor
    counts: Tensor

    @classmethod
    def of(cls, sums: Tensor) -> _Alike:
        """sums: (lines, n), equal where lines are alike."""
        _, kind, counts = sums.unique(dim=0, return_inverse=True, return_counts=True)
        index = torch.arange(len(sums), device=sums.device)
        first = index.new_full((len(counts),), len(sums)).scatter_reduce(0, kind, index, "amin")
        return cls(first[kind], counts[kind])

    def in_steps(self, step: int) -> Tensor | None:
        """The lines, those alike together; where `step` does not divide one kind, its rest is last. None if more."""
        lines = torch.arange(len(self.first), device=self.first.device)
        if step == 1:
            return lines
        odd = self.first[self.counts % step > 0]
        if len(odd) == 0:
            return self.first.argsort(stable=True)
        if not bool((odd == odd[0]).all()):
            return None
        rest = lines[self.first == odd[0]][-(len(odd) % step) :]
        return self.first.index_fill(0, rest, len(lines)).argsort(stable=True)


def alike_rows(pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Of each row the first one with its columns, and how many have them: int64 (O,) each."""
    return _Alike.of(_sums(pattern, pattern.shape)[0])


def permuted_pattern(pattern: Pattern, shape: Sequence[int], order: Order) -> tuple[Pattern, Tensor]:
    """The pattern of the permuted weight, and of each of its values the index among the pattern's: int64 (nnz,)."""
    taps = math.prod(shape[2:])
    to_row, to_column = order.rows.argsort(), order.columns.argsort()
    column = to_column[pattern.col_indices.long() // taps] * taps + pattern.col_indices % taps
    positions, index = (to_row[pattern.row_indices()] * pattern.shape[1] + column).sort()
    return Pattern.from_positions(positions, pattern.shape), index

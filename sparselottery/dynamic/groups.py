"""Layers with N:M: weights go and come within their groups of M, all of which have equally many survivors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import lowest
from ..n_of_m import NofM
from ..nn import MaskedLayer
from ..pattern import matrix_shape
from .gradients import Watch, strips_of
from .pools import Pool


class Groups(Pool):
    """One layer, whose groups are those of `n_of_m`. Its density says how many of each survive, at least N.

    Raises ValueError if the mask has more survivors in one group than in another, but for those that the border cuts.
    """

    def __init__(self, layers: dict[str, MaskedLayer], pattern: NofM) -> None:
        super().__init__(layers)
        self.pattern = pattern
        ((self.name, self.layer),) = layers.items()
        self._most = {self._survivors(each): each for each in range(pattern.group, -1, -1)}  # of a group, by their sum
        counts, most = self._counts(self.places()), self._most.get(self.count)
        if most is None or not torch.equal(counts, self._sizes(most)):
            raise ValueError(
                f"granularity: expected {self.name} to have a mask with equally many survivors in each {pattern.group} "
                f"weights: all, or as prune(model, granularity='{pattern}') leaves them"
            )

    def target(self, share: float) -> int:
        most = round(share * self.pattern.group)
        if most < self.pattern.kept:
            raise ValueError(
                f"density: expected at least that of {self.pattern} for {self.name}, also by the distribution, which "
                f"may be 'uniform', got {share:.4g}"
            )
        return self._survivors(most)

    def stays(self, scores: Tensor, places: Tensor, k: int, target: int) -> Tensor:
        """Of each group those with the highest scores, as many as it may have; of these the k highest of all."""
        order = scores.sort(stable=True).indices
        order = order[self._group(places[order]).sort(stable=True).indices]  # by group, the lowest first
        groups = self._group(places[order])
        ends = torch.searchsorted(groups, groups, right=True)
        left = ends - torch.arange(len(groups), device=groups.device)  # in the group, from here on
        stays = torch.zeros(len(places), dtype=torch.bool, device=places.device)
        stays[order[left <= self._most[target]]] = True
        at = stays.nonzero().squeeze(1)
        stays[at[lowest(scores[at], max(0, len(at) - k))]] = False
        return stays

    def grown(self, without: Tensor, target: int, by: Watch | torch.Generator) -> Tensor | None:
        """The places that come: in each group as many as are missing, of those that are not among `without`.

        by: gradients, of which the largest are taken, or what draws. None if a gradient is not finite.
        """
        found, columns = [], matrix_shape(self.layer.shape)[1]
        for start, scores in self._scores(by):
            if not bool(scores.isfinite().all()):
                return None
            first, last = torch.searchsorted(without, without.new_tensor([start, start + len(scores)]))
            inside = without[first:last] - start
            scores[inside] = -torch.inf
            missing = self._sizes(self._most[target], len(scores) // columns) - self._counts(
                inside, len(scores) // columns
            )
            across, taps = self._shape()
            grouped = F.pad(
                scores.view(-1, self.layer.shape[1], taps),
                (0, 0, 0, across * self.pattern.group - self.layer.shape[1]),
                value=-torch.inf,
            ).unflatten(1, (across, -1))
            order = grouped.argsort(dim=2, descending=True, stable=True)
            number = torch.arange(self.pattern.group, device=without.device)[:, None]
            come = torch.zeros_like(grouped, dtype=torch.bool)
            come.scatter_(2, order, number < missing.view(-1, across, 1, taps))
            found.append(come.flatten(1, 2)[:, : self.layer.shape[1]].flatten().nonzero().squeeze(1) + start)
        return torch.cat(found)

    def _scores(self, by: Watch | torch.Generator) -> Iterator[tuple[int, Tensor]]:
        """Strips of rows: where they begin, and scores that are not negative."""
        if isinstance(by, Watch):
            yield from ((start, strip.abs_()) for start, strip in by.strips(self.name))
            return
        columns = matrix_shape(self.layer.shape)[1]
        for start, stop in strips_of(self.layer):
            drawn = torch.rand((stop - start) * columns, generator=by, dtype=torch.float32, device="cpu")
            yield start * columns, drawn.to(self.layer.values.device)

    def _shape(self) -> tuple[int, int]:
        """Groups across, and taps."""
        return -(-self.layer.shape[1] // self.pattern.group), matrix_shape(self.layer.shape[1:])[1]

    def _group(self, places: Tensor) -> Tensor:
        """The number of the group in which each place is."""
        (across, taps), columns = self._shape(), matrix_shape(self.layer.shape)[1]
        row, column = places // columns, places % columns
        return (row * across + column // taps // self.pattern.group) * taps + column % taps

    def _counts(self, places: Tensor, rows: int | None = None) -> Tensor:
        """How many of the places, of so many rows, are in each group."""
        across, taps = self._shape()
        rows = self.layer.shape[0] if rows is None else rows
        return torch.bincount(self._group(places), minlength=rows * across * taps)

    def _sizes(self, most: int, rows: int | None = None) -> Tensor:
        """How many survive in each group of so many rows, where these are `most` of M."""
        (across, taps), channels = self._shape(), self.layer.shape[1]
        rows = self.layer.shape[0] if rows is None else rows
        begins = torch.arange(across, device=self.layer.values.device) * self.pattern.group
        sizes = (channels - begins).clamp(max=most)
        return sizes[None, :, None].expand(rows, across, taps).flatten()

    def _survivors(self, most: int) -> int:
        channels, group = self.layer.shape[1], self.pattern.group
        of_row = channels // group * most + min(channels % group, most)
        return of_row * self._shape()[1] * self.layer.shape[0]

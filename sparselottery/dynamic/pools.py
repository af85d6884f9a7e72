"""Layers whose weights, or blocks of weights, compete: places in a pool are int64, as if all of them lay end to end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..convert import masked_layers
from ..masks import Block, Granularity, Rows, block_sums, granularities, ignored, lowest
from ..n_of_m import NofM
from ..nn import MaskedLayer
from ..pattern import Pattern, has_blocks, matrix_shape
from ..pieces import places_in


class Pool:
    """Layers by name. `begins` says where the places of each begin, and last where they end.

    block: (rows, columns) of the weight (O, C, ...) that go and come together, at one tap; the border cuts some off.
    Raises ValueError if the mask of a layer does not consist of whole blocks.
    """

    def __init__(self, layers: dict[str, MaskedLayer], block: Block = (1, 1)) -> None:
        self.layers, self.block = layers, block
        self.begins = [0]
        for name, layer in layers.items():
            if block != (1, 1) and not has_blocks(layer.pattern, layer.shape, block):
                raise ValueError(f"granularity: expected {name} to have a mask of whole {block[0]}x{block[1]} blocks")
            self.begins.append(self.begins[-1] + math.prod(self._grid(layer)))

    @property
    def total(self) -> int:
        return self.begins[-1]

    @property
    def count(self) -> int:
        """Of the places that survive."""
        if self.block == (1, 1):
            return sum(layer.nnz for layer in self.layers.values())
        return len(self.places())

    def places(self) -> Tensor:
        """Of all that survive, ascending."""
        return self.distinct(self.of_values())

    def of_values(self) -> Tensor:
        """Of each value of all layers its place."""
        return self.of_weights({name: layer.pattern for name, layer in self.layers.items()})

    def of_weights(self, patterns: Mapping[str, Pattern]) -> Tensor:
        """Of each weight of the patterns of all layers its place."""
        return torch.cat([
            self._place(layer, patterns[name].positions()) + begin
            for (name, layer), begin in zip(self.layers.items(), self.begins, strict=False)
        ])  # fmt: skip

    def distinct(self, of_values: Tensor) -> Tensor:
        return of_values if self.block == (1, 1) else of_values.unique()

    def means(self, scores: Tensor, of_values: Tensor, places: Tensor) -> Tensor:
        """Of the scores of single weights, at their places, the mean at each place, so that borders are no less."""
        if self.block == (1, 1):
            return scores
        index = torch.searchsorted(places, of_values)
        sums = scores.new_zeros(len(places), dtype=torch.float64).index_add_(0, index, scores.double())
        return sums / torch.bincount(index, minlength=len(places))

    def target(self, share: float) -> int:
        """How many of the places survive at a density."""
        return round(share * self.total)

    def stays(self, scores: Tensor, places: Tensor, k: int, target: int) -> Tensor:
        """Bool, of scores at distinct places: the k highest. target: how many there are when others have come."""
        return ~lowest(scores, len(places) - k)

    def patterns(self, places: Tensor) -> dict[str, Pattern]:
        """Of each layer, given the ascending places of all."""
        bounds = places_in(places, torch.tensor(self.begins, dtype=torch.int64, device=places.device)).tolist()
        return {
            name: Pattern.from_positions(self._positions(layer, places[start:stop] - begin), matrix_shape(layer.shape))
            for (name, layer), begin, start, stop in zip(
                self.layers.items(), self.begins, bounds, bounds[1:], strict=False
            )
        }

    def of_strip(self, name: str, start: int, scores: Tensor) -> tuple[int, Tensor]:
        """The first place in the layer and the means of blocks, of scores of whole rows from a position on."""
        if self.block == (1, 1):
            return start, scores
        shape = self.layers[name].shape
        columns = matrix_shape(shape)[1]
        scores = scores.view(-1, *shape[1:]).double()
        sizes = block_sums(torch.ones_like(scores, dtype=torch.bool), self.block)
        first = start // columns // self.block[0] * math.prod(self._grid(self.layers[name])[1:])
        return first, (block_sums(scores, self.block) / sizes).flatten()

    def _grid(self, layer: MaskedLayer) -> tuple[int, int, int]:
        """Blocks down, blocks across, taps."""
        rows, channels, *taps = layer.shape
        return -(-rows // self.block[0]), -(-channels // self.block[1]), math.prod(taps)

    def _place(self, layer: MaskedLayer, positions: Tensor) -> Tensor:
        """Of weights in the layer."""
        if self.block == (1, 1):
            return positions
        _, across, taps = self._grid(layer)
        row, column = positions // matrix_shape(layer.shape)[1], positions % matrix_shape(layer.shape)[1]
        block = row // self.block[0] * across + column // taps // self.block[1]
        return block * taps + column % taps

    def _positions(self, layer: MaskedLayer, places: Tensor) -> Tensor:
        """Of all weights of these places of the layer, ascending."""
        if self.block == (1, 1):
            return places
        _, across, taps = self._grid(layer)
        block, tap = places // taps, places % taps
        down, right = (torch.arange(side, dtype=torch.int64, device=places.device) for side in self.block)
        row = (block // across * self.block[0])[:, None, None] + down[:, None]
        channel = (block % across * self.block[1])[:, None, None] + right
        inside = (row < layer.shape[0]) & (channel < layer.shape[1])
        positions = (row * layer.shape[1] + channel) * taps + tap[:, None, None]
        return positions[inside].sort().values


def sharing(model: nn.Module, ignore: Sequence[str]) -> dict[str, list[MaskedLayer]]:
    """The layers that take part, by the first name of their values: one, or all that share them."""
    layers = masked_layers(model)
    left = set(ignored(ignore, list(layers)))
    found: dict[int, list[tuple[str, MaskedLayer]]] = {}
    for name, layer in layers.items():
        found.setdefault(id(layer.values), []).append((name, layer))
    taking_part = {
        together[0][0]: [layer for _, layer in together]
        for together in found.values()
        if left.isdisjoint(name for name, _ in together)
    }
    if not taking_part:
        raise ValueError("model: expected masked layers that may move, got none: convert(model, masks) makes them")
    return taking_part


def grains_of(
    layers: Mapping[str, MaskedLayer], granularity: Granularity, grow: str, sampled: bool
) -> dict[str, Block | NofM]:
    """Blocks, or N:M, of each layer. Those of one weight are the same for all that is done."""
    grains = granularities(layers, granularity)
    for name, grain in grains.items():
        if isinstance(grain, Rows):
            raise ValueError(f"granularity: expected blocks (rows, columns) or N:M, got {grain} for {name}")
        if grain != (1, 1) and grow == "momentum":
            raise ValueError(f"grow: expected random or gradient with blocks, as {grain} of {name}, got {grow!r}")
        if isinstance(grain, NofM) and sampled:
            raise ValueError(f"candidates: expected None with {grain} of {name}, of which all in a group are asked")
    return grains

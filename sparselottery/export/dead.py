"""Dead units removed, exactly.

A unit is an output of one layer and an input of the next: a row of nn.Linear or a filter of nn.Conv2d. One with no way
out, none of its weights in the next layer surviving, is dropped. One with no way in, no weight of its own surviving, is
a constant: that is carried through activations, norms and pooling into the next bias, and the unit is dropped. Where a
constant is not one at the border, as before a convolution padded with zeros, this is done only if it is zero.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import prelu

from ..architecture import ELEMENTWISE, build
from ..ticket import Ticket
from .simplify import SKIPPED, Node, affine, leaves

LAYERS = ("Linear", "Conv2d")
ACTIVATIONS = {kind.__name__ for kind in ELEMENTWISE}
POOLS = ("MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "AdaptiveMaxPool2d")
WIDTHS = {"BatchNorm1d": "num_features", "BatchNorm2d": "num_features", "PReLU": "num_parameters"}
NORMS = ("BatchNorm1d", "BatchNorm2d")
PARTS = ("weight", "bias", "running_mean", "running_var")


class Removed(NamedTuple):
    """How many units went, by the layer that they were outputs of, and what was left alone and why."""

    units: dict[str, int]
    notes: tuple[str, ...]


def remove_dead(ticket: Ticket) -> tuple[Ticket, Removed]:
    """The ticket without the dead units between any two layers of its chain, of which at least one always stays.

    A layer in which all units are dead keeps one. Biases are added where constants need them. Repeats until nothing
    more is dead.
    """
    architecture = copy.deepcopy(ticket.architecture)
    net = _Net(dict(ticket.weights), dict(ticket.masks), leaves(architecture))
    stops = [index for index, (_, node) in enumerate(net.chain) if node["type"] in LAYERS]
    pairs, notes = [], []
    for start, stop in pairwise(stops):
        if why := _barrier(net, start, stop):
            notes.append(f"{net.chain[start][0]}: its units are left alone, because of {why}")
        else:
            pairs.append((start, stop))
    removed: dict[str, int] = {}
    while counts := {start: count for start, stop in pairs if (count := net.remove(start, stop))}:
        for start, count in counts.items():
            removed[net.chain[start][0]] = removed.get(net.chain[start][0], 0) + count
    for start, stop in pairs:
        if kept := net.dead(start, stop).kept:
            notes.append(
                f"{net.chain[start][0]}: {kept} constant units stay, as the next layer sees them differently at borders"
            )
    return Ticket(net.weights, net.masks, ticket.recipe, architecture), Removed(removed, tuple(notes))


def _barrier(net: _Net, start: int, stop: int) -> str | None:
    """What between two layers may mix units or tell them apart; None if nothing does."""
    (name, before), (next_name, after) = net.chain[start], net.chain[stop]
    for layer_name, layer in ((name, before), (next_name, after)):
        if layer["arguments"].get("groups", 1) != 1:
            return f"the groups of {layer_name}"
    convolution, flat = before["type"] == "Conv2d", before["type"] == "Linear"
    units = len(net.weight(start))
    for inner_name, node in net.chain[start + 1 : stop]:
        kind, arguments = node["type"], node["arguments"]
        width = arguments.get(WIDTHS.get(kind))
        if kind == "Flatten" and (arguments["start_dim"], arguments["end_dim"]) == (1, -1):
            flat = True
        elif kind == ("BatchNorm1d" if flat else "BatchNorm2d"):
            if not arguments["track_running_stats"] or width != (net.inputs(stop) if flat else units):
                return inner_name
        elif kind == "PReLU":
            if width not in (1, net.inputs(stop) if flat else units):
                return inner_name
        elif kind in POOLS:
            if flat or arguments.get("return_indices"):
                return inner_name
        elif kind not in ACTIVATIONS and kind not in SKIPPED:
            return inner_name
    spread, rest = divmod(net.inputs(stop), units) if units else (0, 0)
    fits = spread == 1 or (convolution and flat)
    if rest or not fits or flat != (after["type"] == "Linear"):
        return f"the shape of {next_name}"
    return None


class _Dead(NamedTuple):
    """dropped: bool (units,); kept: how many constants have to stay; addition: float64, to the next layer's bias."""

    dropped: Tensor
    kept: int
    addition: Tensor


@dataclass
class _Net:
    """The tensors by name, and the modules in order, all changed in place; layers are given by their index there."""

    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    chain: list[tuple[str, Node]]

    def weight(self, index: int) -> Tensor:
        return self.weights[f"{self.chain[index][0]}.weight"]

    def mask(self, index: int) -> Tensor:
        name = f"{self.chain[index][0]}.weight"
        return self.masks[name] if name in self.masks else torch.ones_like(self.weights[name], dtype=torch.bool)

    def inputs(self, index: int) -> int:
        return self.weight(index).shape[1]

    def dead(self, start: int, stop: int) -> _Dead:
        """Which units between two layers go. One always stays."""
        own, following = self.mask(start).flatten(1), self.mask(stop)
        units = len(own)
        no_way_out = ~following.unflatten(1, (units, -1)).transpose(0, 1).flatten(1).any(1)
        no_way_in = ~own.any(1) & ~no_way_out
        constants, exact = self._constants(start, stop)
        by_unit = constants.view(units, -1)
        if _pads_with_zeros(self.chain[stop][1]):
            exact = exact & (by_unit == 0).all(1)
        carried = no_way_in & exact & by_unit.isfinite().all(1)
        kept = int((no_way_in & ~carried).sum())
        if bool((no_way_out | carried).all()):
            no_way_out[0] = carried[0] = False
        columns = carried.repeat_interleave(by_unit.shape[1])
        taps = math.prod(following.shape[2:])
        weight = self.weight(stop).double().reshape(len(following), len(columns), taps).sum(2)
        addition = weight[:, columns] @ constants[columns]
        if not bool(addition.isfinite().all()):
            return _Dead(no_way_out, kept + int(carried.sum()), torch.zeros_like(addition))
        return _Dead(no_way_out | carried, kept, addition)

    def remove(self, start: int, stop: int) -> int:
        """Drop the dead units between two layers; how many there were."""
        dropped, _, addition = self.dead(start, stop)
        count = int(dropped.sum())
        if count == 0:
            return 0
        if bool(addition.any()):
            self._add_to_bias(stop, addition)
        units = (~dropped).nonzero().squeeze(1)
        columns = (~dropped).repeat_interleave(self.inputs(stop) // len(dropped)).nonzero().squeeze(1)
        (name, before), (next_name, after) = self.chain[start], self.chain[stop]
        self._select(name, before, units, len(dropped))
        before["arguments"]["out_features" if before["type"] == "Linear" else "out_channels"] = len(units)
        for inner_name, node in self.chain[start + 1 : stop]:
            if (width := WIDTHS.get(node["type"])) and node["arguments"][width] > 1:
                kept = units if node["arguments"][width] == len(dropped) else columns
                self._select(inner_name, node, kept, node["arguments"][width])
                node["arguments"][width] = len(kept)
        for tensors in (self.weights, self.masks):
            if (key := f"{next_name}.weight") in tensors:
                tensors[key] = tensors[key].index_select(1, columns)
        after["arguments"]["in_features" if after["type"] == "Linear" else "in_channels"] = len(columns)
        return count

    def _constants(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """float64 (inputs of stop,): what each is if its unit is a constant; bool (units,): is it one everywhere?"""
        units, bias = len(self.weight(start)), self.weights.get(f"{self.chain[start][0]}.bias")
        value = torch.zeros(units, dtype=torch.float64, device="cpu") if bias is None else bias.double()
        exact = torch.ones(units, dtype=torch.bool, device="cpu")
        for name, node in self.chain[start + 1 : stop]:
            kind, arguments = node["type"], node["arguments"]
            if kind in ACTIVATIONS:
                value = build(node, device="cpu")(value.clone())
            elif kind in NORMS:
                scale, shift = affine(self.weights, name, node)
                value = value * scale + shift
            elif kind == "PReLU":
                value = prelu(value[None], self.weights[f"{name}.weight"].double())[0]
            elif kind == "MaxPool2d" and _sides(arguments["padding"]) and set(_sides(arguments["dilation"])) != {1}:
                exact = torch.zeros_like(exact)  # a window may lie in the padding
            elif kind == "AvgPool2d" and not _averages_constants(arguments):
                exact = exact & (value == 0)
            elif kind == "Flatten":
                value = value.repeat_interleave(self.inputs(stop) // len(value))
        return value, exact

    def _add_to_bias(self, index: int, addition: Tensor) -> None:
        name, node = self.chain[index]
        weight, bias = self.weight(index), self.weights.get(f"{name}.bias")
        before = torch.zeros_like(addition) if bias is None else bias.double()
        self.weights[f"{name}.bias"] = (before + addition).to(weight.dtype)
        node["arguments"]["bias"] = True

    def _select(self, name: str, node: Node, kept: Tensor, width: int) -> None:
        for part in PARTS:
            for tensors in (self.weights, self.masks):
                tensor = tensors.get(f"{name}.{part}")
                if tensor is not None and tensor.dim() and len(tensor) == width:
                    tensors[f"{name}.{part}"] = tensor.index_select(0, kept)


def _sides(value: Any) -> list[Any]:
    """Those that are not 0, of an argument for one side or for all."""
    return [side for side in (value if isinstance(value, list) else [value]) if side not in (0, "valid")]


def _pads_with_zeros(node: Node) -> bool:
    arguments = node["arguments"]
    return node["type"] == "Conv2d" and arguments["padding_mode"] == "zeros" and bool(_sides(arguments["padding"]))


def _averages_constants(arguments: dict[str, Any]) -> bool:
    """Is the average of a constant image, at its border too, the constant?"""
    padded = arguments["count_include_pad"] and _sides(arguments["padding"])
    return not padded and arguments["divisor_override"] is None

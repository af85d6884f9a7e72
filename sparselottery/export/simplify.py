"""Tickets of chains with less in them and the same outputs: batchnorms folded, dead units removed.

Both work on a ticket with an architecture, in which modules follow each other in one order: the leaves of the tree.
Numbers are computed in float64 and rounded once.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..architecture import NOTHING
from ..ticket import Ticket

Node = dict[str, Any]
NORM_OF = {"Linear": "BatchNorm1d", "Conv2d": "BatchNorm2d"}
SKIPPED = {kind.__name__ for kind in NOTHING}


def leaves(node: Node, name: str = "") -> list[tuple[str, Node]]:
    """The modules of a described model that are no Sequential, by name, in the order in which they run."""
    if node["type"] != "Sequential":
        return [(name, node)]
    prefix = name and f"{name}."
    return [leaf for child, inner in node["children"] for leaf in leaves(inner, prefix + child)]


def fold_batchnorm(ticket: Ticket) -> tuple[Ticket, tuple[str, ...]]:
    """(ticket, names of the norms) with each batchnorm that follows an nn.Linear or nn.Conv2d folded into it.

    In place of a norm is an nn.Identity, so that no other name changes. A norm without running statistics, or whose
    folding would not be finite, is left alone. A BatchNorm1d is taken for one of the features of (N, features).
    """
    architecture, weights, folded = copy.deepcopy(ticket.architecture), dict(ticket.weights), []
    chain = [leaf for leaf in leaves(architecture) if leaf[1]["type"] not in SKIPPED]
    for (name, layer), (norm_name, norm) in pairwise(chain):
        if NORM_OF.get(layer["type"]) == norm["type"] and _fold(weights, name, layer, norm_name, norm):
            folded.append(norm_name)
    return Ticket(weights, ticket.masks, ticket.recipe, architecture), tuple(folded)


def _fold(weights: dict[str, Tensor], name: str, layer: Node, norm_name: str, norm: Node) -> bool:
    """Fold one norm, in place; False, with nothing changed, if that is not possible."""
    weight = weights[f"{name}.weight"]
    if not norm["arguments"]["track_running_stats"] or norm["arguments"]["num_features"] != len(weight):
        return False
    scale, shift = affine(weights, norm_name, norm)
    bias = weights[f"{name}.bias"].double() if layer["arguments"]["bias"] else torch.zeros_like(shift)
    new = (weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
    new_bias = (bias * scale + shift).to(weight.dtype)
    if not bool(new.isfinite().all()) or not bool(new_bias.isfinite().all()):
        return False
    weights[f"{name}.weight"], weights[f"{name}.bias"] = new, new_bias
    layer["arguments"]["bias"] = True
    for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        weights.pop(f"{norm_name}.{part}", None)
    norm.update(type="Identity", arguments={})
    return True


def affine(weights: dict[str, Tensor], name: str, norm: Node) -> tuple[Tensor, Tensor]:
    """(scale, shift) float64 (features,) of a batchnorm in evaluation: y = x * scale + shift."""
    scale = (weights[f"{name}.running_var"].double() + norm["arguments"]["eps"]).rsqrt()
    shift = -weights[f"{name}.running_mean"].double() * scale
    if norm["arguments"]["affine"]:
        gain = weights[f"{name}.weight"].double()
        return scale * gain, shift * gain + weights[f"{name}.bias"].double()
    return scale, shift

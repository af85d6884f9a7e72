"""Which layers of a model follow each other so that a unit, an output of one, is an input of the next and of no other.

Units may then change places without a trace: what permutes the outputs of one layer and the inputs of the next alike
computes the same.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from torch import nn

from .nn import MaskedConv2d, MaskedLinear, MaskedSequential
from .nn.fuse import ELEMENTWISE, NOTHING, is_observed

LINEAR, CONV = (nn.Linear, MaskedLinear), (nn.Conv2d, MaskedConv2d)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
# What treats units alike, or has parameters of each: of a linear layer's outputs, of images, of flattened images.
BETWEEN = {
    "features": {*ELEMENTWISE, *NOTHING, nn.BatchNorm1d},
    "images": {*ELEMENTWISE, *NOTHING, *POOLS, nn.BatchNorm2d},
    "flat": {*ELEMENTWISE, *NOTHING, nn.BatchNorm1d},
}
# Flattened images come from each unit's pixels: only where it has one are they as many as the units.
TAKES = {"features": LINEAR, "images": CONV, "flat": LINEAR}


class Link(NamedTuple):
    """Two weights by name, "fc1.weight" and "fc2.weight", and the names of the modules between their layers."""

    outputs: str
    inputs: str
    between: tuple[str, ...]


def links(model: nn.Module) -> list[Link]:
    """Those between children of one nn.Sequential, called as a whole and on batches.

    No layer that is used twice is in any, and none whose call somebody observes, by a hook or a forward of its own, nor
    is such a module between two. A norm after a linear layer is of its units only if these are dimension 1, which
    depends on the input.
    """
    uses = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    uses.update(each for module in model.modules() for each in module._parameters.values() if each is not None)
    found = []
    for path, parent in model.named_modules():
        before, form, between = None, "", []  # the last layer, its weight and size; what it gives; what follows it
        whole = type(parent) in (nn.Sequential, MaskedSequential) and "forward" not in vars(parent)
        for name, child in parent._modules.items() if whole else ():
            name = f"{path}.{name}" if path else name
            once = all(uses[each] == 1 for each in (child, *child.parameters()))
            observed = is_observed(child)
            if once and not observed and type(child) in LINEAR + CONV and getattr(child, "groups", 1) == 1:
                outputs, inputs = _sizes(child)
                if before and type(child) in TAKES[form] and before[1] == inputs:
                    found.append(Link(before[0], f"{name}.weight", tuple(between)))
                form = "images" if type(child) in CONV else "features"
                before, between = (f"{name}.weight", outputs), []
            elif before and form == "images" and not observed and _flattens(child):
                form = "flat"
                between.append(name)
            elif before and type(child) in BETWEEN[form] and not observed and (once or not child.state_dict()):
                between.append(name)
            else:
                before = None
    return found


def _flattens(child: nn.Module) -> bool:
    return type(child) is nn.Flatten and (child.start_dim, child.end_dim) == (1, -1)


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """How many outputs and inputs."""
    if isinstance(layer, CONV):
        return layer.out_channels, layer.in_channels
    return layer.out_features, layer.in_features

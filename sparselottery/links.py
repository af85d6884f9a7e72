"""Which layers of a model follow each other so that a unit, an output of one, is an input of the next and of no other.

Units may then change places without a trace: what permutes the outputs of one layer and the inputs of the next alike
computes the same.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from torch import nn

from .nn import MaskedConv2d, MaskedLinear, MaskedSequential
from .nn.fuse import ELEMENTWISE, NOTHING

LAYERS = (nn.Linear, nn.Conv2d, MaskedLinear, MaskedConv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
# They treat units alike, or have parameters of each. Flatten leaves units what they are where it leaves them as many.
BETWEEN = {*ELEMENTWISE, *NOTHING, *NORMS, *POOLS, nn.Flatten}


class Link(NamedTuple):
    """Two weights by name, "fc1.weight" and "fc2.weight", and the names of the modules between their layers."""

    outputs: str
    inputs: str
    between: tuple[str, ...]


def links(model: nn.Module) -> list[Link]:
    """Those between children of one nn.Sequential, called as a whole. No layer that is used twice is in any."""
    uses = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    uses.update(each for module in model.modules() for each in module._parameters.values() if each is not None)
    found = []
    for path, parent in model.named_modules():
        before, between = None, []
        for name, child in parent._modules.items() if type(parent) in (nn.Sequential, MaskedSequential) else ():
            name = f"{path}.{name}" if path else name
            once = all(uses[each] == 1 for each in (child, *child.parameters()))
            if once and type(child) in LAYERS and getattr(child, "groups", 1) == 1:
                outputs, inputs = _sizes(child)
                if before and before[1] == inputs:
                    found.append(Link(before[0], f"{name}.weight", tuple(between)))
                before, between = (f"{name}.weight", outputs), []
            elif type(child) in BETWEEN and (once or not any(True for _ in child.parameters())):
                between.append(name)
            else:
                before = None
    return found


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """How many outputs and inputs."""
    if isinstance(layer, (nn.Conv2d, MaskedConv2d)):
        return layer.out_channels, layer.in_channels
    return layer.out_features, layer.in_features

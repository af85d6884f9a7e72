"""The paper's nets. Gaussian Glorot weights, zero biases (section 2, footnote 1)."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import nn


def lenet_300_100(in_features: int = 784, classes: int = 10, hidden: tuple[int, ...] = (300, 100)) -> nn.Sequential:
    """Lenet-300-100: ``fc1 relu1 fc2 relu2 fc3``, with as many hidden layers as ``hidden`` has widths.

    Maps (N, in_features) to logits (N, classes). Draws from torch's global generator.
    """
    widths = (in_features, *hidden, classes)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (width_in, width_out) in enumerate(pairwise(widths), start=1):
        layer = nn.Linear(width_in, width_out)
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers[f"fc{i}"] = layer
        if i <= len(hidden):
            layers[f"relu{i}"] = nn.ReLU()
    return nn.Sequential(layers)

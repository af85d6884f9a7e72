"""Layers that execute densely, for tests of their buffer."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparselottery import MaskedConv2d, MaskedLinear
from sparselottery.nn import dense

X = torch.linspace(-1, 1, 15).view(3, 5)
IMAGES = torch.linspace(-1, 1, 2 * 5 * 4 * 4).view(2, 5, 4, 4)


def mask_of(*taps):
    """Of a weight (4, 5, ...) with a dead row and a dead column."""
    mask = torch.rand(4, 5, *taps, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[:, 0], mask[1] = True, False
    mask[:, 3] = False
    return mask


def linear(execution="dense", **options):
    layer = MaskedLinear(5, 4, mask=mask_of(), **options)
    layer.execution = execution
    return layer


def conv(execution="dense", **options):
    layer = MaskedConv2d(5, 4, 3, mask=mask_of(3, 3), **options)
    layer.execution = execution
    return layer


BUILT = {"linear": (linear, X), "conv": (conv, IMAGES)}


def expected(layer, x):
    """By a weight that is made anew."""
    return F.linear(x, layer.weight, layer.bias) if x.dim() == 2 else F.conv2d(x, layer.weight, layer.bias)


def assert_right(layer, x=X):
    torch.testing.assert_close(layer(x), expected(layer, x))


def in_place(layer):
    with torch.no_grad():
        layer.values.mul_(3)


class Writes(dict):
    """How often values were written into a buffer, or a weight was made of them, since the last `forget`."""

    def __init__(self, monkeypatch):
        self.forget()
        for owner, name, what in ((dense, "_write", "written"), (torch.Tensor, "scatter", "made")):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name), what))

    def _counted(self, write, what):
        def counted(*args):
            self[what] += 1
            return write(*args)

        return counted

    def forget(self):
        self.update(written=0, made=0)

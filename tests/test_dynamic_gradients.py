"""Gradients of weights that are not there, against those of a dense layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparselottery import Pattern, convert
from sparselottery.dynamic import gradients
from sparselottery.dynamic.gradients import Watch
from sparselottery.pattern import matrix_shape

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (2, 3, 7)),
    "one-row": (lambda: nn.Linear(7, 5), (7,)),
    "conv": (lambda: nn.Conv2d(3, 5, 3, padding=1), (2, 3, 6, 7)),
    "one-image": (lambda: nn.Conv2d(3, 5, 3, padding=1), (3, 6, 7)),
    "strided": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 3), dilation=(1, 2)), (2, 3, 8, 9)),
    "same": (lambda: nn.Conv2d(3, 5, (2, 4), padding="same"), (2, 3, 6, 7)),
    "reflect": (lambda: nn.Conv2d(3, 5, 3, padding=(2, 1), padding_mode="reflect"), (2, 3, 6, 7)),
    "groups": (lambda: nn.Conv2d(6, 9, 3, groups=3), (2, 6, 6, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 6, 7)),
}


def loss(y, number):
    return (y * torch.linspace(-1, number, y.numel(), dtype=y.dtype).view(y.shape)).square().sum()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("strip", [1, 30, 2**20])
@pytest.mark.parametrize("kind", LAYERS)
def test_strips_and_chosen_ones_are_parts_of_the_dense_gradient(kind, strip, monkeypatch):
    monkeypatch.setattr(gradients, "STRIP", strip)
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    dense = make().double()
    mask = torch.rand(dense.weight.shape) < 0.4
    layer = convert(nn.Sequential(dense), {"0.weight": mask})[0]
    with torch.no_grad():
        dense.weight.mul_(mask)
    watch = Watch({"weight": [layer]}, {"weight": 1})
    watch.start()
    for number in range(2):  # as in gradients accumulated over two backwards
        x = torch.randn(shape, dtype=torch.float64)
        for each in (dense, layer):
            loss(each(x), number).backward()
    with torch.no_grad():
        layer(x)
    parts = list(watch.strips("weight"))
    assert [start for start, _ in parts] == [sum(len(each) for _, each in parts[:n]) for n in range(len(parts))]
    assert strip > 30 or len(parts) > 1
    torch.testing.assert_close(torch.cat([each for _, each in parts]), dense.weight.grad.flatten())
    others = Pattern.from_mask(~mask.flatten(1))
    torch.testing.assert_close(watch.at("weight", others), others.gather(dense.weight.grad.flatten(1)))
    torch.testing.assert_close(watch.at("weight", layer.pattern), layer.values.grad)
    nothing = Pattern.from_positions(torch.empty(0, dtype=torch.int64), matrix_shape(layer.shape))
    assert watch.at("weight", nothing).shape == (0,)


def test_nothing_is_hooked_or_held_after_a_stop():
    layer = convert(nn.Sequential(nn.Linear(3, 2)), {"0.weight": torch.ones(2, 3).bool()})[0]
    watch = Watch({"weight": [layer]}, {"weight": 1})
    watch.start()
    layer(torch.ones(1, 3)).sum().backward()
    assert len(layer._forward_hooks) == 1
    watch.stop()
    assert not layer._forward_hooks
    watch.start()  # of nothing
    with pytest.raises(ValueError, match="expected a backward through the layers, not compiled"):
        next(watch.strips("weight"))


def test_layers_that_share_values_are_summed():
    mask = torch.eye(3, dtype=torch.bool)
    one, two = (convert(nn.Sequential(nn.Linear(3, 3).double()), {"0.weight": mask})[0] for _ in range(2))
    two.values = one.values
    watch = Watch({"weight": [one, two]}, {"weight": 1})
    watch.start()
    two(one(torch.arange(6.0, dtype=torch.float64).view(2, 3))).square().sum().backward()
    torch.testing.assert_close(watch.at("weight", one.pattern), one.values.grad)

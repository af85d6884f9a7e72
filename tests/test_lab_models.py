from __future__ import annotations

import pytest
import torch
from torch import nn

from sparselottery.lab.models import lenet_300_100


def test_is_the_papers_net():
    model = lenet_300_100()
    assert list(dict(model.named_children())) == ["fc1", "relu1", "fc2", "relu2", "fc3"]
    assert sum(layer.weight.numel() for layer in model if isinstance(layer, nn.Linear)) == 266_200
    assert model(torch.zeros(2, 784)).shape == (2, 10)


def test_other_widths():
    model = lenet_300_100(5, 3, hidden=(7,))
    assert [tuple(p.shape) for p in model.parameters()] == [(7, 5), (7,), (3, 7), (3,)]
    assert list(dict(model.named_children())) == ["fc1", "relu1", "fc2"]


def test_gaussian_glorot_weights_and_zero_biases():
    torch.manual_seed(0)
    model = lenet_300_100()
    for layer in (model.fc1, model.fc2):
        std = (2 / (layer.in_features + layer.out_features)) ** 0.5
        assert layer.weight.std().item() == pytest.approx(std, rel=0.03)
        assert layer.weight.abs().max() > 3 * std  # not uniform
        assert not layer.bias.any()

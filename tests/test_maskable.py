"""Layers that are refused, with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from sparselottery import convert, prune
from sparselottery.convert import prunable
from sparselottery.maskable import unmaskable


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def tied(other, part="weight"):
    model = nn.Sequential(nn.Linear(4, 4), other)
    setattr(model[0], part, getattr(other, part))
    return model


def parametrized(part):
    model = nn.Sequential(nn.Linear(4, 4))
    nn.utils.parametrize.register_parametrization(model[0], part, nn.Identity())
    return model


def with_more():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].low_rank = nn.Parameter(torch.zeros(4, 1))
    return model


def with_another_forward():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = lambda x: x
    return model


class OwnLinear(nn.Linear):
    pass


UNMASKABLE = {
    "Bilinear": (lambda: nn.Sequential(nn.Bilinear(3, 4, 5)), "nn.Bilinear is neither nn.Linear nor nn.Conv2d"),
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 5)), "nn.Conv1d is neither"),
    "Conv3d": (lambda: nn.Sequential(nn.Conv3d(3, 4, 5)), "nn.Conv3d is neither"),
    "ConvTranspose2d": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 5)), "nn.ConvTranspose2d is neither"),
    "Doubled": (lambda: nn.Sequential(Doubled(3, 4, 5)), "a subclass of nn.Conv2d: its forward may"),
    "OwnLinear": (lambda: nn.Sequential(OwnLinear(3, 4)), "a subclass of nn.Linear: its forward may"),
    "tied to an embedding": (lambda: tied(nn.Embedding(4, 4)), "0.weight is also 1.weight, and .* untie them"),
    "tied to another linear layer": (lambda: tied(nn.Linear(4, 4)), "0.weight is also 1.weight"),
    "a tied bias": (lambda: tied(nn.Linear(4, 4), "bias"), "0.bias is also 1.bias"),
    "a parametrized weight": (lambda: parametrized("weight"), r"remove_parametrizations\(layer, 'weight'\)"),
    "a parametrized bias": (lambda: parametrized("bias"), "remove_parametrizations"),
    "another parameter": (with_more, "more than a weight and a bias: low_rank"),
    "another forward": (with_another_forward, "its forward was replaced"),
}


@pytest.mark.parametrize("name", UNMASKABLE)
def test_what_cannot_be_masked_is_not_prunable(name):
    make, why = UNMASKABLE[name]
    model = make()
    assert prunable(model) == {}
    with pytest.raises(ValueError, match=rf"masks\['0.weight'\]: expected a layer that can be masked, got .*{why}"):
        convert(model, {"0.weight": torch.ones(1, dtype=torch.bool)})


@pytest.mark.parametrize("shared", ["values", "bias"])
def test_masked_layers_that_share_a_parameter_are_not_masked_anew(shared):
    mask = torch.rand(4, 4) < 0.5
    converted = convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), {"0.weight": mask, "1.weight": mask})
    setattr(converted[0], shared, getattr(converted[1], shared))
    with pytest.raises(ValueError, match=f"0.{shared} is also 1.{shared}"):
        convert(converted, {"0.weight": mask})


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_what_torch_has_pruned_is_refused(part):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    torch_prune.l1_unstructured(model[0], part, 0.5)
    message = r"torch.nn.utils.prune: keep its weight_mask.* torch.nn.utils.prune.remove\(layer, 'weight'\)"
    for call in (lambda: convert(model, {"0.weight": torch.ones(4, 4, dtype=torch.bool)}), lambda: prune(model, 0.5)):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_way_from_a_model_that_torch_has_pruned():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    x, masks = torch.randn(3, 4), {"0.weight": model[0].weight_mask.bool()}
    torch_prune.remove(model[0], "weight")
    torch.testing.assert_close(convert(model, masks)(x), model(x))


def test_what_has_no_parameters_is_not_mentioned():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.LayerNorm(4))
    assert unmaskable(model) == {"3": "nn.LayerNorm is neither nn.Linear nor nn.Conv2d"}
    assert unmaskable(convert(model, prune(model, 0.5))) == unmaskable(model)

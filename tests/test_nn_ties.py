"""What torch would do by half to a masked layer: ties, prunings and parametrizations of its weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from sparselottery import MaskedConv2d, MaskedLinear


@pytest.fixture(params=["linear", "conv"])
def layer(request):
    if request.param == "linear":
        return MaskedLinear(5, 6, mask=torch.rand(6, 5) < 0.5)
    return MaskedConv2d(5, 6, (3, 2), mask=torch.rand(6, 5, 3, 2) < 0.5)


@pytest.mark.parametrize("state", ["trained", "no_grad", "frozen"])
def test_ties_after_conversion_are_refused(layer, state):
    """They would be copies that part at the first step, or a parameter that is none."""
    other, before = nn.Module(), layer.weight.detach().clone()
    other.weight = nn.Parameter(torch.randn(layer.shape))
    layer.requires_grad_(state != "frozen")
    with torch.set_grad_enabled(state != "no_grad"):
        for assign in (
            lambda: setattr(layer, "weight", other.weight),
            lambda: setattr(layer.weight, "data", other.weight),
        ):
            with pytest.raises(TypeError, match=r"weight: .*the parameter of a Module, which .* tie them, then"):
                assign()
        assert torch.equal(layer.weight, before)
        for into in (other, nn.Linear(5, 6), nn.ParameterList()):
            with pytest.raises(TypeError, match="weight: expected to stay with its masked layer"):
                into.register_parameter("weight", layer.weight)
        assert type(other.weight) is nn.Parameter
    layer.weight = other.weight.detach()
    assert torch.equal(layer.weight, other.weight * layer.mask)


def test_parametrizations_of_torch_are_refused(layer):
    """Each before anything of the layer has changed; those of the bias are torch's business."""
    state = {name: each.clone() for name, each in layer.state_dict().items()}
    with pytest.raises(TypeError, match="parametrize: expected a name other than 'values'"):
        parametrize.register_parametrization(layer, "values", nn.Identity())
    for context in (torch.enable_grad, torch.no_grad):
        with context(), pytest.raises(TypeError, match=r"prune by sparselottery\.prune"):
            prune.l1_unstructured(layer, "weight", 0.5)
    assert type(layer) in (MaskedLinear, MaskedConv2d)
    assert {name: each.tolist() for name, each in layer.state_dict().items()} == {
        n: e.tolist() for n, e in state.items()
    }
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    x = torch.randn(2, 5) if layer.weight.dim() == 2 else torch.randn(2, 5, 4, 4)
    layer(x).sum().backward()
    assert layer.values.grad is not None
    del layer.values

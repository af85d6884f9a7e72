from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparselottery.convert import convert, masks_of, to_dense
from sparselottery.lab.controls import reinit
from sparselottery.lab.masked_dense import masked_dense
from sparselottery.lab.models import lenet_300_100, resnet_18
from sparselottery.lab.training import stepper

factory = partial(lenet_300_100, 12, 4, hidden=(9, 7))


@pytest.fixture
def model():
    return reinit(factory, 0)


@pytest.fixture
def masks(model):
    generator = torch.Generator().manual_seed(0)
    weights = {name: weight for name, weight in model.named_parameters() if name in ("fc1.weight", "fc3.weight")}
    return {name: torch.rand(weight.shape, generator=generator) < 0.5 for name, weight in weights.items()}


def test_computes_weight_times_mask(model, masks):
    masked = masked_dense(model, masks)
    x = torch.randn(5, 12)
    h = F.relu(F.linear(x, model.fc1.weight * masks["fc1.weight"], model.fc1.bias))
    h = F.relu(model.fc2(h))
    torch.testing.assert_close(masked(x), F.linear(h, model.fc3.weight * masks["fc3.weight"], model.fc3.bias))
    assert type(masked.fc2) is nn.Linear  # not in the masks


def test_takes_a_converted_model(model, masks):
    converted = convert(model, masks)
    x = torch.randn(5, 12)
    torch.testing.assert_close(masked_dense(converted, masks_of(converted))(x), to_dense(converted)(x))


def test_leaves_the_model_alone_and_keeps_its_state_names(model, masks):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masked = masked_dense(model, masks)
    assert list(masked.state_dict()) == list(before)
    stepper(masked, 0.1)(torch.randn(3, 12), torch.tensor([0, 1, 2]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_pruned_weights_get_no_gradient(model, masks):
    masked = masked_dense(model, masks)
    masked(torch.randn(5, 12)).square().sum().backward()
    assert not masked.fc1.weight.grad[~masks["fc1.weight"]].any()
    assert masked.fc1.weight.grad[masks["fc1.weight"]].any()


def test_convolutions_too():
    model = resnet_18((3, 8, 8), 4, widths=(2, 3, 4)).eval()
    names = ("conv.weight", "block4.conv1.weight", "block4.shortcut.conv.weight")  # stride 1, 2, 2 and 1x1
    masks = {name: torch.rand(model.get_parameter(name).shape) < 0.5 for name in names}
    masked = masked_dense(model, masks)
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    torch.testing.assert_close(masked(x), model(x))
    masked(x).square().sum().backward()
    for name, mask in masks.items():
        assert not masked.get_parameter(name).grad[~mask].any()
        assert masked.get_parameter(name).grad[mask].any()


def test_trains_as_the_sparse_model_does(model, masks):
    models = [masked_dense(model, masks), convert(model, masks)]
    for each in models:
        generator = torch.Generator().manual_seed(1)
        step = stepper(each, 1e-2)
        for _ in range(20):
            step(torch.randn(6, 12, generator=generator), torch.randint(4, (6,), generator=generator))
    dense, sparse = models[0].state_dict(), to_dense(models[1]).state_dict()
    for name, tensor in sparse.items():
        torch.testing.assert_close(dense[name] * masks.get(name, 1), tensor, rtol=1e-3, atol=1e-5)


def test_wrong_masks(model):
    with pytest.raises(ValueError, match=r"'fc4.weight'.*fc1.weight"):
        masked_dense(model, {"fc4.weight": torch.ones(1, 1, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"\(3, 3\), expected \(9, 12\)"):
        masked_dense(model, {"fc1.weight": torch.ones(3, 3, dtype=torch.bool)})

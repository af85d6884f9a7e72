"""Which models train natively, and that it is the same training."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from sparselottery.convert import convert, dense_state
from sparselottery.kernels import native as library
from sparselottery.lab import training
from sparselottery.lab.controls import reinit
from sparselottery.lab.data import Dataset
from sparselottery.lab.masked_dense import masked_dense
from sparselottery.lab.models import lenet_300_100
from sparselottery.lab.native import native_trainer
from sparselottery.nn import MaskedLinear, MaskedSequential

pytestmark = pytest.mark.skipif(not library.available(), reason=library.status())
factory = partial(lenet_300_100, 40, 5, hidden=(30, 20))
X = torch.randn(100, 40)


def masked(density: float = 0.3) -> nn.Module:
    dense = reinit(factory, 0)
    generator = torch.Generator().manual_seed(0)
    weights = {name: p for name, p in dense.named_parameters() if p.dim() == 2}
    return convert(dense, {name: torch.rand(p.shape, generator=generator) < density for name, p in weights.items()})


@pytest.fixture(scope="module")
def data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 5
    x = torch.randn(300, 40, generator=generator) + 3 * torch.eye(40)[y]
    return Dataset("clouds", 5, x[:200], y[:200], x[200:250], y[200:250], x[250:], y[250:])


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize(("optimizer", "lr"), [("adam", 1e-2), ("sgd", 0.1)])
def test_the_training_of_autograd(data, optimizer, lr, density, monkeypatch):
    how = {"iterations": 100, "batch": 30, "lr": lr, "eval_every": 30, "optimizer": optimizer, "weight_decay": 1e-3}
    how |= {"drops": (0.5,), "warmup": 10, "start": 3, "stop": 95, "momentum": 0.8}
    ours, plain = masked(density), masked(density)
    record = training.train(ours, data, **how)
    monkeypatch.setattr(training, "native_trainer", lambda *_: None)
    expected = training.train(plain, data, **how)
    assert record.keys() == expected.keys()
    assert (record["steps"], expected["steps"]) == ("native", "eager")
    assert record["curves"]["iteration"] == expected["curves"]["iteration"]
    assert record["curves"]["val_loss"] == pytest.approx(expected["curves"]["val_loss"], rel=1e-3)
    assert expected["curves"]["val_loss"][-1] < 0.7 * expected["curves"]["val_loss"][0]
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_train_takes_native_steps_where_it_can(data, monkeypatch):
    monkeypatch.setattr(training, "stepper", None)
    training.train(masked(), data, iterations=5)
    with pytest.raises(TypeError, match="not callable"):
        training.train(reinit(factory, 0), data, iterations=5)


def test_the_same_twice_to_the_bit(data):
    states = []
    for _ in range(2):
        model = masked()
        training.train(model, data, iterations=60, eval_every=20)
        states.append(dense_state(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_when_it_evaluates_changes_nothing(data):
    often, once = masked(), masked()
    training.train(often, data, iterations=31, eval_every=5)
    training.train(once, data, iterations=31, eval_every=100)
    assert all(torch.equal(a, b) for a, b in zip(often.parameters(), once.parameters(), strict=True))


def with_hook(model: nn.Module) -> nn.Module:
    model.fc2.register_forward_hook(lambda *_: None)
    return model


def with_gradient_hook(model: nn.Module) -> nn.Module:
    model.fc2.values.register_hook(lambda gradient: gradient)
    return model


def with_execution(model: nn.Module) -> nn.Module:
    model.fc1.execution = "dense"
    return model


def with_frozen_bias(model: nn.Module) -> nn.Module:
    model.fc1.bias.requires_grad_(False)
    return model


def shared() -> nn.Module:
    layer = MaskedLinear(40, 40, mask=torch.rand(40, 40) < 0.3)
    return MaskedSequential(layer, nn.ReLU(), layer)


OTHERS = {
    "dense": lambda: reinit(factory, 0),
    "w * mask": lambda: masked_dense(reinit(factory, 0), {}),
    "partly dense": lambda: convert(reinit(factory, 0), {"fc1.weight": torch.rand(30, 40) < 0.3}),
    "dropout": lambda: MaskedSequential(*masked(), nn.Dropout()),
    "another nonlinearity": lambda: MaskedSequential(masked().fc1, nn.Tanh(), masked().fc2),
    "a ReLU at the end": lambda: MaskedSequential(masked().fc1, nn.ReLU()),
    "nothing": MaskedSequential,
    "within another module": lambda: nn.Sequential(masked()),
    "a shared layer": shared,
    "no outputs": lambda: MaskedSequential(MaskedLinear(40, 0)),
    "a hook": lambda: with_hook(masked()),
    "a hook of a gradient": lambda: with_gradient_hook(masked()),
    "an execution set": lambda: with_execution(masked()),
    "a frozen parameter": lambda: with_frozen_bias(masked()),
    "another dtype": lambda: masked().double(),
    "half precision": lambda: masked().bfloat16(),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", OTHERS)
def test_models_left_to_autograd(name):
    assert native_trainer(OTHERS[name](), X) is None


def test_data_left_to_autograd():
    model = masked()
    assert native_trainer(model, X) is not None
    assert native_trainer(model.double(), X.double()) is not None
    model.float()
    assert native_trainer(model, X[:, 1:]) is None
    assert native_trainer(model, X.view(100, 1, 8, 5)) is None
    assert native_trainer(model, X.to("meta")) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert native_trainer(model, X) is None


def test_an_unknown_optimizer_is_left_to_its_error(data):
    assert native_trainer(masked(), X, "lion") is None
    with pytest.raises(ValueError, match="expected adam or sgd"):
        training.train(masked(), data, iterations=5, optimizer="lion")


def test_without_a_native_library(monkeypatch):
    monkeypatch.setattr(library, "LIBRARY", None)
    assert native_trainer(masked(), X) is None


def test_a_copy_trains_apart(data):
    model = masked()
    other, before = copy.deepcopy(model), dense_state(model)
    training.train(other, data, iterations=5)
    assert all(torch.equal(before[name], state) for name, state in dense_state(model).items())

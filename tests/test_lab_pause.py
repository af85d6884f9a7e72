"""A training that is paused and goes on, against one that is not."""

from __future__ import annotations

import copy
import math
import shutil
from functools import partial

import pytest
import torch
from torch import nn

from sparselottery import convert, prune
from sparselottery.lab import graph, pause, training
from sparselottery.lab.controls import reinit
from sparselottery.lab.data import Dataset
from sparselottery.lab.models import conv_net, lenet_300_100, resnet_18
from sparselottery.lab.native import native_trainer
from sparselottery.lab.pause import Pause, Paused

SHAPE = (2, 8, 8)
NETS = {
    "dropout, adam": (partial(conv_net, (3,), SHAPE, 3, (8,), 0.5), {"optimizer": "adam", "weight_decay": 0.1}),
    "batchnorm, sgd": (partial(resnet_18, SHAPE, 3, (2, 2, 2)), {"optimizer": "sgd", "augment": True, "drops": (0.5,)}),
    "no momentum": (partial(resnet_18, SHAPE, 3, (2, 2, 2)), {"optimizer": "sgd", "momentum": 0.0}),
}
HOW = {"iterations": 12, "batch": 20, "lr": 1e-2, "eval_every": 3}


@pytest.fixture(scope="module")
def data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(90, *SHAPE, generator=generator), torch.arange(90) % 3
    return Dataset("noise", 3, x[:60], y[:60], x[60:75], y[60:75], x[75:], y[75:])


def net(factory) -> nn.Module:
    torch.manual_seed(1)
    model = reinit(factory, 0)
    return convert(model, prune(model, 0.5))


def interrupted(factory, data, path, evaluations: list[int], **how) -> tuple[nn.Module, dict]:
    """What a training comes to that stops after so many of its steps' parts, and once more each time it goes on."""
    for count in evaluations:
        with pytest.MonkeyPatch.context() as clock:
            clock.setattr(pause.time, "time", iter([0.0] * count + [1.0]).__next__)
            with pytest.raises(Paused):
                training.train(net(factory), data, **how, pause=Pause(1.0, path))
        assert path.exists()
        torch.rand(3)  # the process that goes on has drawn other numbers
    model = net(factory)
    return model, training.train(model, data, **how, pause=Pause(math.inf, path))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("graphed", [False, True])
def test_it_ends_in_the_same_bits(tmp_path, data, name, graphed):
    with pytest.MonkeyPatch.context() as stand_in:
        if graphed:
            stand_in.setattr(graph, "on_another_stream", lambda work, device: work())
            stand_in.setattr(graph, "captured", lambda work, device: work)
            stand_in.setattr(training, "_on_gpu", lambda parameters: True)
        factory, settings = NETS[name]
        how, whole = HOW | settings, net(factory)
        expected = training.train(whole, data, **how)
        path = tmp_path / "new" / "paused.safetensors"
        model, record = interrupted(factory, data, path, [1, 0, 2], **how)
    assert record["curves"] == expected["curves"]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True))
    assert min(record["train_seconds"], record["eval_seconds"]) > 0
    assert not path.exists()


def test_what_is_kept_of_another_training_is_left_alone(tmp_path, data):
    factory, settings = NETS["no momentum"]
    path, how = tmp_path / "paused.safetensors", HOW | settings
    with pytest.raises(Paused, match="at iteration 0 of 12"):
        training.train(net(factory), data, **how, pause=Pause(0.0, path))
    other = net(partial(resnet_18, SHAPE, 3, (3, 2, 2)))
    for model, changes in ((net(factory), {"lr": 0.5}), (net(factory), {"seed": 1}), (other, {})):
        expected = training.train(copy.deepcopy(model), data, **how | changes)
        shutil.copy(path, tmp_path / "copy")
        found = training.train(model, data, **how | changes, pause=Pause(math.inf, tmp_path / "copy"))
        assert found["curves"] == expected["curves"]


def test_a_damaged_state_is_refused(tmp_path, data):
    factory, settings = NETS["no momentum"]
    path = tmp_path / "paused.safetensors"
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{path}: not a safetensors file"):
        training.train(net(factory), data, **HOW | settings, pause=Pause(math.inf, path))


def test_native_steps_run_to_the_end(tmp_path):
    x, y = torch.randn(60, 6), torch.arange(60) % 3
    vectors = Dataset("noise", 3, x, y, x, y, x, y)
    factory, path = partial(lenet_300_100, 6, 3, hidden=(8,)), tmp_path / "paused.safetensors"
    if native_trainer(net(factory), x) is None:
        pytest.skip("no native steps here")
    with pytest.raises(Paused):
        training.train(net(factory), vectors, **HOW, pause=Pause(0.0, path))
    with pytest.MonkeyPatch.context() as clock:
        clock.setattr(pause.time, "time", iter([0.0, *[1.0] * 9]).__next__)
        record = training.train(net(factory), vectors, **HOW, pause=Pause(1.0, path))
    assert record["curves"]["iteration"][-1] == 12
    assert not path.exists()

"""Models as users write them: pruned to a fifth and converted, they learn what the masked dense ones do."""

from __future__ import annotations

import copy
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from newcomers import MODELS

from sparselottery import convert, execution, explain, prune, to_dense
from sparselottery.convert import masks_of
from sparselottery.nn import MaskedLayer

ROUNDING = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(params=MODELS)
def newcomer(request):
    """(model, masks, images, labels)"""
    make, weights, size = MODELS[request.param]
    model = make().double()
    masks = prune(model, 0.8)
    assert len(masks) == weights
    return model, masks, torch.randn(6, 3, size, size, dtype=torch.float64), torch.randint(5, (6,))


@pytest.fixture
def either(monkeypatch):
    """Layers are found faster in their default and in another execution in turns, without a clock."""
    verdicts = cycle([2.0, 0.5])

    def no_clock(default, *others, **_):
        for call in (default, *others):
            call()
        return [1.0, *(next(verdicts) for _ in others)]

    monkeypatch.setattr(execution, "_CACHE", {})
    monkeypatch.setattr(execution, "interleaved_ms", no_clock)


def masked_dense(model, masks):
    """The model with zeros written where pruned."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return model


def step(model, x, y):
    """The loss of one step of SGD, and the gradients and updated parameters, by name."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    return loss.detach(), gradients, {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same_step(converted, dense, masks, x, y):
    """Loss, gradients, updated parameters and running statistics."""
    loss, *sparse_tensors = step(converted, x, y)
    dense_loss, *dense_tensors = step(dense, x, y)
    torch.testing.assert_close(loss, dense_loss, **ROUNDING)
    for ours, theirs in zip(sparse_tensors, dense_tensors, strict=True):
        theirs = {name: tensor[masks[name]] if name in masks else tensor for name, tensor in theirs.items()}
        theirs = {_ours(name, masks): tensor for name, tensor in theirs.items()}
        torch.testing.assert_close(ours, theirs, **ROUNDING)
    for (name, ours), (_, theirs) in zip(statistics(converted).items(), statistics(dense).items(), strict=True):
        torch.testing.assert_close(ours, theirs, **ROUNDING, msg=name)


def _ours(name, masks):
    """The name in the converted model of a parameter of the dense one."""
    name = name.replace("in_proj_", "in_proj.")
    return name.removesuffix("weight") + "values" if name.replace("in_proj.", "in_proj_") in masks else name


def statistics(model):
    return {name: buffer for name, buffer in model.named_buffers() if "running" in name or "num_batches" in name}


def test_a_training_step(newcomer):
    model, masks, x, y = newcomer
    assert_same_step(convert(model, masks), masked_dense(model, masks), masks, x, y)


def test_channels_last():
    make, _, size = MODELS["resnet"]
    model = make().double().to(memory_format=torch.channels_last)
    masks, y = prune(model, 0.8), torch.randint(5, (6,))
    x = torch.randn(6, 3, size, size, dtype=torch.float64).to(memory_format=torch.channels_last)
    assert_same_step(convert(model, masks), masked_dense(model, masks), masks, x, y)


def test_evaluation(newcomer):
    model, masks, x, _ = newcomer
    model(x)  # statistics other than the initial ones
    model.eval()
    converted, dense = convert(model, masks), masked_dense(model, masks)
    torch.testing.assert_close(converted(x), dense(x), **ROUNDING)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), dense(x), **ROUNDING)
        torch.testing.assert_close(to_dense(converted)(x), dense(x), **ROUNDING)


def test_a_training_step_after_a_measurement(newcomer, either):
    model, masks, x, y = newcomer
    before = copy.deepcopy(model.state_dict())
    converted = convert(model, masks, x)
    rows = [row for row in explain(converted) if row["sparse_ms"]]
    assert len({row["execution"] for row in rows}) > 1
    assert len(rows) == len(masks)
    assert_same_step(converted, masked_dense(model, masks), masks, x, y)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_evaluation_after_a_measurement(newcomer, either):
    model, masks, x, _ = newcomer
    model.eval()
    converted, dense = convert(model, masks, x), masked_dense(model, masks)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), dense(x), **ROUNDING)


def test_a_copy_and_a_checkpoint(newcomer, tmp_path):
    model, masks, x, y = newcomer
    converted = convert(model, masks)
    twin = copy.deepcopy(converted)
    step(converted, x, y)
    torch.save(converted.state_dict(), tmp_path / "state.pt")
    other = convert(model, {name: mask.flip(0) for name, mask in masks.items()})
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(other).items())
    assert_same_step(twin, masked_dense(model, masks), masks, x, y)
    for mode in (True, False):
        torch.testing.assert_close(other.train(mode)(x), converted.train(mode)(x), rtol=0, atol=0)


def test_shared_blocks_stay_shared():
    make, _, size = MODELS["mixer"]
    model = make()
    converted = convert(model, prune(model, 0.8))
    assert converted.blocks[1] is converted.blocks[2]
    assert isinstance(converted.blocks[2].token_mlp[0], MaskedLayer)
    assert converted(torch.randn(2, 3, size, size)).shape == (2, 5)

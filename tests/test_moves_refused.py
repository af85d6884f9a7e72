"""set_masks: what it refuses, with nothing changed, and what is refused after it."""

from __future__ import annotations

import warnings

import pytest
import torch
from moving import X, assert_same, dense_net, layers, masked_net, random_masks, same_count, snapshot, train
from torch import nn

from sparselottery import MaskedConv2d, MaskedLinear, Pattern, SparseLotteryWarning, convert, prune, set_masks


@pytest.mark.parametrize("execution", ["sparse", "dense"])
@pytest.mark.parametrize("masks", [random_masks(1), same_count(1)], ids=["another-nnz", "the-same-nnz"])
def test_backward_through_calls_before_raises(masks, execution):
    model = masked_net(same_count(0))
    for layer in layers(model):
        layer.execution = execution
    y = model(X)
    set_masks(model, masks)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|after the last set_masks"):
        y.sum().backward()
    assert all(layer.values.grad is None for layer in layers(model))
    model(X).sum().backward()
    assert all(layer.values.grad.shape == layer.values.shape for layer in layers(model))


def test_whole_layers_refuse_gradients_of_the_old_size():
    layer = MaskedLinear(3, 2)
    y = layer(torch.randn(4, 3))  # keeps no values: x needs no gradient
    set_masks(layer, {"weight": torch.eye(2, 3, dtype=torch.bool)})
    with pytest.raises(RuntimeError, match="backward: expected a graph of calls after the last set_masks"):
        y.sum().backward()


class Odd(torch.optim.SGD):
    """Keeps something of another shape."""

    def step(self):
        super().step()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["history"] = [parameter.detach().clone()]


def other_optimizer(model):
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)


BAD = {
    "name": (lambda m, o: ({"fc.weight": m["3.weight"]}, o), ValueError, "expected names among"),
    "shape": (lambda m, o: ({**m, "5.weight": m["5.weight"].T}, o), ValueError, r"masks\['5.weight'\]: expected shape"),
    "dtype": (lambda m, o: ({**m, "5.weight": m["5.weight"].float()}, o), TypeError, "expected a bool tensor"),
    "pattern": (
        lambda m, o: ({**m, "5.weight": Pattern.from_mask(m["5.weight"].T)}, o),
        ValueError,
        r"expected a pattern of shape \(5, 7\), got \(7, 5\)",
    ),
    "invalid": (
        lambda m, o: ({**m, "5.weight": Pattern(torch.zeros(6).int(), torch.zeros(3).int(), (5, 7))}, o),
        ValueError,
        "crow_indices: expected to run from 0 to nnz",
    ),
    "lists": (
        lambda m, o: ({**m, "5.weight": Pattern([0] * 6, [], (5, 7))}, o),
        ValueError,
        r"masks\['5.weight'\]: crow_indices: expected an ordinary tensor with data, got list",
    ),
    "no data": (
        lambda m, o: ({**m, "5.weight": Pattern(torch.zeros(6).int(), torch.zeros(3, device="meta").int(), (5, 7))}, o),
        ValueError,
        r"masks\['5.weight'\]: col_indices: expected an ordinary tensor with data, got one on meta",
    ),
    "sparse indices": (
        lambda m, o: ({**m, "5.weight": Pattern(torch.zeros(6).int().to_sparse(), torch.zeros(0).int(), (5, 7))}, o),
        ValueError,
        "crow_indices: expected an ordinary tensor with data, got one on cpu, torch.sparse_coo",
    ),
    "a number": (
        lambda m, o: ({**m, "5.weight": Pattern(torch.tensor(0).int(), torch.zeros(0).int(), (5, 7))}, o),
        ValueError,
        "crow_indices: expected a 1-D int32 tensor",
    ),
    "meta": (lambda m, o: ({**m, "5.weight": m["5.weight"].to("meta")}, o), ValueError, "meta device"),
    "no optimizer": (lambda m, o: (m, None), ValueError, "expected all that train the layers, got no AdamW"),
    "another": (lambda m, o: (m, [o, other_optimizer(m)]), ValueError, "expected one of the model, got SGD of other"),
    "a class": (lambda m, o: (m, torch.optim.Adam), TypeError, "expected torch.optim.Optimizers, got type"),
    "no type": (lambda m, o: (m, [o, "adam"]), TypeError, "expected torch.optim.Optimizers, got str"),
}


@pytest.mark.parametrize(("ask", "error", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_refused_and_nothing_has_changed(ask, error, message):
    model = masked_net(random_masks(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer)
    before = snapshot(model, optimizer)
    masks, given_optimizer = ask(random_masks(1), optimizer)
    with pytest.raises(error, match=message):
        set_masks(model, masks, given_optimizer)
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize("make", [lambda p: Odd(p, lr=0.1), lambda p: torch.optim.LBFGS(p)], ids=["odd", "lbfgs"])
def test_state_that_nobody_can_move_is_refused(make):
    model = masked_net(random_masks(0))
    optimizer = make(model.parameters())
    model(X).sum().backward()
    optimizer.step(*([lambda: model(X).sum()] if isinstance(optimizer, torch.optim.LBFGS) else []))
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"optimizer: expected (Odd's 'history' to be of shape|state of each)"):
        set_masks(model, random_masks(1), optimizer)
    assert_same(snapshot(model, optimizer), before)


def test_a_plan_that_cannot_be_made_undoes_everything(monkeypatch):
    model = masked_net(random_masks(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    train(model, optimizer)
    before, y = snapshot(model, optimizer), model(X)

    def full_memory(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(MaskedLinear, "_compile", full_memory)  # the convolution before them has moved already
        with pytest.raises(MemoryError):
            set_masks(model, random_masks(1), optimizer)
    assert_same(snapshot(model, optimizer), before)
    assert torch.equal(model(X), y)
    train(model, optimizer)


def test_values_that_are_no_parameter_are_refused():
    layer = MaskedConv2d(2, 3, 3)
    del layer.values
    layer.values = torch.zeros(54)
    with pytest.raises(ValueError, match="expected a layer whose values are a Parameter, got a Tensor"):
        set_masks(layer, {"weight": torch.zeros(3, 2, 3, 3, dtype=torch.bool)})
    with pytest.raises(TypeError, match="fill: expected a number, got str"):
        set_masks(layer, {}, fill="zero")


def test_pruning_a_live_model_trains_on_while_a_copy_warns():
    model = masked_net(random_masks(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    convert(model, prune(model, 0.5))  # nobody trains it yet
    train(model, optimizer)
    masks = prune(model, 0.5)
    with pytest.warns(SparseLotteryWarning, match="will not train the copy .* set_masks"):
        convert(model, masks)
    convert(dense_net(), masks)
    set_masks(model, masks, optimizer)
    held = {id(each) for each in optimizer.param_groups[0]["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    y = model(X)
    train(model, optimizer)
    assert not torch.equal(model(X), y)
    optimizer.cycle = optimizer  # alive, but out of use
    del optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model, masks)
        set_masks(model, random_masks(1))


@pytest.mark.parametrize("model", [None, 3, {}, nn.Linear])
def test_what_is_no_model(model):
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got"):
        set_masks(model, {})

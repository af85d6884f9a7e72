"""Which execution a measurement chooses, and that it leaves everything else alone. No assertion on time."""

from __future__ import annotations

import copy
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from sparselottery import MaskedConv2d, MaskedLinear, MaskedSequential, convert, execution, ops, prune
from sparselottery.execution import choose_execution
from sparselottery.nn import Measured
from sparselottery.pattern import BLOCKS


class Clock:
    """In place of `interleaved_ms`: makes each call once; the first takes 1 ms, others what is next in `others_ms`."""

    def __init__(self):
        self.others_ms, self.counts, self.limits, self.gradients = [], [], [], []

    def __call__(self, *calls, limit_ms, **_):
        self.counts.append(len(calls))
        self.limits.append(limit_ms)
        for call in calls:
            call()
        return [1.0, *((self.others_ms or [2.0]).pop(0) for _ in calls[1:])]


@pytest.fixture
def clock(monkeypatch):
    """Notes for each call the shapes of the gradients it takes."""
    clock, grad = Clock(), torch.autograd.grad

    def noted(y, inputs, gy):
        clock.gradients.append([tuple(t.shape) for t in inputs])
        return grad(y, inputs, gy)

    monkeypatch.setattr(execution, "_CACHE", {})
    monkeypatch.setattr(execution, "interleaved_ms", clock)
    monkeypatch.setattr(torch.autograd, "grad", noted)
    return clock


def linears(*widths, between=nn.Tanh):
    """Linear layers, each in a native call of its own unless `between` is nn.ReLU."""
    layers = [nn.Linear(i, o) for i, o in pairwise(widths)]
    return nn.Sequential(*[child for layer in layers for child in (layer, between())][:-1])


def halves(model):
    """Masks of half of the weights, with survivors in every row and column."""
    return {
        f"{name}.weight": torch.stack(torch.meshgrid(*map(torch.arange, module.weight.shape), indexing="ij")).sum(0) % 2
        == 0
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def layers(model):
    return [module for module in model.modules() if isinstance(module, (MaskedLinear, MaskedConv2d))]


def executions(model):
    return [layer.execution for layer in layers(model)]


def test_dense_has_to_be_clearly_faster(clock):
    model = linears(5, 6, 7, 8, 9)
    clock.others_ms = [2.0, 0.96, 0.98, 0.5]
    converted = convert(model, halves(model), torch.randn(4, 5))
    assert executions(converted) == ["sparse", "dense", "sparse", "dense"]
    assert converted[2].measured == Measured({"sparse": 1.0, "dense": 0.96}, (4, 6), True)
    assert converted[2].why == "measured: sparse 1 ms, dense 0.96 ms for (4, 6), training"
    with torch.no_grad():
        torch.testing.assert_close(converted(torch.ones(4, 5)), convert(model, halves(model))(torch.ones(4, 5)))


@pytest.mark.parametrize(
    ("ms", "default", "expected"),
    [
        ({"sparse": 1.0, "dense": 1.0}, "sparse", "sparse"),
        ({"sparse": 1.0, "dense": 0.96}, "sparse", "dense"),
        ({"sparse": 1.0, "compact": 0.5, "dense": 0.52}, "sparse", "compact"),
        ({"sparse": 1.0, "compact": 0.5, "dense": 0.51}, "sparse", "dense"),
        ({"sparse": 1.0, "compact": 0.98, "dense": 2.0}, "sparse", "sparse"),
        ({"sparse": 1.0, "compact": 0.96, "dense": 0.98}, "sparse", "compact"),
        ({"sparse": 1.0, "compact": 0.94, "dense": 0.96}, "sparse", "dense"),
        ({"sparse": 0.9, "block": 1.0, "dense": 2.0}, "block", "sparse"),
        ({"sparse": 0.98, "block": 1.0, "dense": 2.0}, "block", "block"),
        ({"sparse": 0.9, "block": 1.0, "compact": 0.8, "dense": 0.7}, "block", "dense"),
    ],
)
def test_the_fastest_is_chosen_if_it_clearly_is(ms, default, expected):
    assert execution._fastest(ms, default) == expected
    assert ms[expected] <= min(ms.values()) / execution.MARGIN


def dead_rows(model):
    """Masks of `halves` with nothing in the first row."""
    masks = halves(model)
    for mask in masks.values():
        mask[0] = False
    return masks


def test_compact_is_timed_where_it_drops_something(clock):
    model = linears(5, 6, 7)
    clock.others_ms = [0.5, 0.8, 2.0]
    converted = convert(model, halves(model) | {"0.weight": dead_rows(model)["0.weight"]}, torch.randn(4, 5))
    assert clock.counts == [3, 2]
    assert clock.limits == [2 * execution.LIMIT_MS, execution.LIMIT_MS]
    assert executions(converted) == ["compact", "sparse"]
    assert converted[0].measured.ms == {"sparse": 1.0, "compact": 0.5, "dense": 0.8}
    assert converted[0].why == "measured: sparse 1 ms, compact 0.5 ms, dense 0.8 ms for (4, 5), training"


def test_masks_with_other_dead_rows_are_timed_anew(clock):
    """As many survivors, elsewhere."""
    for rows in ([0, 1], [2, 3], [0, 1, 2]):
        mask = torch.zeros(6, 6, dtype=torch.bool)
        mask[rows, : 6 // len(rows)] = True
        choose_execution(MaskedLinear(6, 6, mask=mask), torch.randn(4, 6))
    assert clock.counts == [3, 3]


def test_blocks_are_timed_against_all_others(clock, monkeypatch):
    monkeypatch.setattr(ops, "blocks_taken", lambda device, geometry=None: BLOCKS)
    model = linears(16, 16, 16, between=nn.ReLU)
    single = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    masks = {"0.weight": torch.eye(2).bool().repeat_interleave(8, 0).repeat_interleave(8, 1), "2.weight": single}
    clock.others_ms = [2.0, 0.5, 3.0]
    converted = convert(model, masks, torch.randn(4, 16))
    assert clock.counts == [4]  # one call of both, then the first sparse, the first dense, the second dense
    assert executions(converted) == ["dense", "sparse"]
    assert converted[0].measured.ms == {"sparse": 2.0, "block": 1.0, "dense": 0.5}
    assert converted[2].measured.ms == {"sparse": 1.0, "dense": 3.0}


def test_without_an_example_nothing_is_timed(clock):
    model = linears(5, 6, 7)
    converted = convert(model, halves(model))
    assert executions(converted) == ["sparse", "sparse"]
    assert converted[0].why == "not measured"
    assert not clock.counts


def test_gradients_that_training_takes_and_no_others(clock):
    model = linears(5, 6, 7)
    model[2].bias.requires_grad_(False)
    masks = {name: torch.ones_like(mask).tril(2) for name, mask in halves(model).items()}
    convert(model, masks, torch.randn(4, 5))
    assert clock.gradients == [[(27,), (6,)]] * 2 + [[(4, 6), (36,)]] * 2
    del clock.gradients[:]
    convert(model, masks, torch.randn(4, 5).requires_grad_())
    assert clock.gradients == [[(4, 5), (27,), (6,)]] * 2  # the other one is known
    convert(model.requires_grad_(False), masks, torch.randn(4, 5))
    convert(model.requires_grad_(True).eval(), masks, torch.randn(4, 5))
    assert len(clock.gradients) == 2
    assert clock.counts == [2] * 7


def test_evaluation_is_what_is_measured_in_evaluation_mode(clock):
    model = linears(5, 6).eval()
    with torch.enable_grad():
        converted = convert(model, halves(model), torch.randn(4, 5))
    assert converted[0].why == "measured: sparse 1 ms, dense 2 ms for (4, 5), inference"


def test_layers_that_are_alike_are_timed_once(clock):
    model = linears(6, 6, 6, 6)
    masks = halves(model)
    convert(model, masks, torch.randn(4, 6))
    assert clock.counts == [2, 2]  # the first one gets no gradient for its input
    convert(model, masks, torch.randn(4, 6))
    assert clock.counts == [2, 2]
    for change in (
        lambda: convert(model, masks, torch.randn(5, 6)),
        lambda: convert(model, masks, torch.randn(6, 4).t()),
        lambda: convert(model, prune(model, 0.4), torch.randn(4, 6)),
        lambda: convert(copy.deepcopy(model).double(), masks, torch.randn(4, 6, dtype=torch.float64)),
        lambda: convert(copy.deepcopy(model).eval(), masks, torch.randn(4, 6)),
        lambda: torch.set_num_threads(1) or convert(model, masks, torch.randn(4, 6)),
    ):
        before = len(clock.counts)
        change()
        assert len(clock.counts) > before
    before = len(clock.counts)
    with torch.autocast("cpu", torch.bfloat16):
        convert(model, masks, torch.randn(4, 6))
    assert len(clock.counts) > before


def test_a_chain_is_timed_as_the_one_call_it_is(clock):
    """Sparse, then with each layer dense in turn."""
    model = linears(5, 6, 7, 8, between=nn.ReLU)
    masks = halves(model)
    clock.others_ms = [2.0, 0.5, 3.0]
    converted = convert(model, masks, torch.randn(4, 5))
    assert clock.counts == [4]
    assert executions(converted) == ["sparse", "dense", "sparse"]
    assert [layer.measured.input_shape for layer in layers(converted)] == [(4, 5), (4, 6), (4, 7)]
    converted[2].register_forward_hook(lambda *_: None)  # which ends the native call
    choose_execution(converted, torch.randn(4, 5))
    assert clock.counts == [4, 2, 2, 2]


@pytest.mark.parametrize("training", [True, False])
def test_a_convolution_is_timed_with_what_its_call_includes(clock, training, monkeypatch):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.MaxPool2d(2)
    )
    seen, call = [], execution._call
    monkeypatch.setattr(execution, "_call", lambda run, x: seen.append([type(m) for m in run]) or call(run, x))
    convert(model.train(training), halves(model), torch.randn(2, 3, 9, 9))
    first = [MaskedConv2d] if training else [MaskedConv2d, nn.BatchNorm2d, nn.ReLU]
    second = [MaskedConv2d, nn.ReLU, nn.MaxPool2d]
    assert sorted(seen, key=str) == sorted([first] * 2 + [second] * 2, key=str)


class Everything(nn.Module):
    """Dropout, running statistics, other generators, a write to the input, a counter, uncalled and shared layers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.twin = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.dropout, self.unused, self.nobody = nn.Dropout(0.5), nn.Linear(6, 6), nn.Linear(6, 6)
        self.calls = 0

    def forward(self, x, scale, key=None):
        self.calls += 1
        x.mul_(scale["by"])
        self.nobody(x[:0])
        x = self.dropout(self.norm(self.first(input=x) if isinstance(self.first, MaskedLinear) else self.first(x)))
        return self.twin(self.twin(x)) * random.random() * np.random.rand() + torch.rand(())


def test_nothing_else_changes(clock):
    model = Everything()
    clock.others_ms = [0.5] * 9
    model(torch.randn(4, 6), {"by": 1}).sum().backward()
    model.first.register_forward_hook(lambda *_: seen.append(1))
    before = copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    masks, x, scale, seen = halves(model), torch.randn(4, 6), {"by": 2}, []
    example, states = x.clone(), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    converted = convert(model, masks, (example, scale, "key"))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert torch.equal(example, x)
    assert (model.calls, converted.calls, len(seen)) == (1, 1, 1)
    plain = convert(model, masks).state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in converted.state_dict().items())
    assert all(p.grad is None for layer in layers(converted) for p in layer.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None) or torch.equal(parameter.grad, gradient)
    whys = {
        name: layer.why.split(":")[0] for name, layer in converted.named_modules() if isinstance(layer, MaskedLinear)
    }
    assert whys == {"first": "measured", "twin": "measured", "unused": "not measured", "nobody": "not measured"}
    assert executions(converted) == ["dense", "dense", "sparse", "sparse"]
    assert clock.counts == [2, 2]


def test_a_whole_layer_needs_no_choice(clock):
    model = linears(5, 6, 7)
    converted = convert(model, prune(model, 0.5, ignore=["0.weight"]), torch.randn(4, 5))
    assert clock.counts == [2]
    assert (converted[0].why, converted[0].measured) == ("nothing is pruned", None)


def test_one_layer_alone(clock):
    layer = MaskedLinear(5, 6, mask=torch.rand(6, 5) < 0.5)
    clock.others_ms = [0.5]
    choose_execution(layer, torch.randn(3, 4, 5))
    assert layer.measured == Measured({"sparse": 1.0, "dense": 0.5}, (3, 4, 5), True)


def test_a_layer_that_is_shared_between_a_chain_and_others(clock):
    """Its first call is alone; the chain that it is also part of starts with a layer that is never called."""
    twin = MaskedLinear(6, 6, mask=torch.rand(6, 6) < 0.5)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = MaskedSequential(MaskedLinear(5, 6, mask=torch.rand(6, 5) < 0.5), nn.ReLU(), twin)

        def forward(self, x):
            return self.chain[2](x)

    model = Net()
    choose_execution(model, torch.randn(4, 6))
    assert [layer.why.split(":")[0] for layer in layers(model)] == ["not measured", "measured"]


@pytest.mark.parametrize(
    ("example", "got"), [([torch.ones(4, 5)], "tuple of .* got list"), ({0: torch.ones(4, 5)}, "got 0"), (3, "got int")]
)
def test_an_example_is_a_tensor_a_tuple_or_a_dict(example, got):
    model = linears(5, 6)
    with pytest.raises(TypeError, match=f"example_input: expected .*{got}"):
        convert(model, halves(model), example)


def test_an_example_that_the_model_refuses():
    model = linears(5, 6)
    with pytest.raises(ValueError, match=r"x: expected shape \(\*, 5\), got \(4, 6\)"):
        convert(model, halves(model), torch.randn(4, 6))


@pytest.mark.parametrize("x", [
    torch.randn(3, 4), torch.randn(4, 3).t(), torch.randn(3, 1).expand(3, 4), torch.randn(6, 8)[::2, 1::2],
    torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(3).bfloat16(), torch.randn(()),
    torch.randn(3, 4, dtype=torch.float64).requires_grad_(),
])  # fmt: skip
def test_inputs_are_imitated(x):
    like = execution._Like.of(x)
    other = like.random()
    assert execution._Like.of(other) == like
    assert other.is_leaf
    assert other.isfinite().all()


def test_a_measured_choice_goes_with_its_pattern(clock):
    model, x = linears(5, 6), torch.randn(4, 5)
    masks = halves(model)
    clock.others_ms = [0.5]
    converted = convert(model, masks, x)
    (layer,) = layers(converted)
    measured = layer.measured
    assert copy.deepcopy(layer).measured == measured
    assert list(layer.state_dict()) == ["values", "bias", "crow_indices", "col_indices"]
    converted.load_state_dict(convert(model, masks).state_dict())
    assert (layer.measured, layer.execution) == (measured, "dense")
    other = convert(model, {name: mask.logical_not() for name, mask in masks.items()})
    converted.load_state_dict(other.state_dict())
    assert (layer.measured, layer.execution, layer.why) == (None, "sparse", "not measured")
    torch.testing.assert_close(converted(x), other(x))


def test_what_is_set_by_hand_is_no_measurement(clock):
    model = linears(5, 6)
    masks = halves(model)
    converted = convert(model, masks, torch.randn(4, 5))
    converted[0].execution = "dense"
    assert (converted[0].measured, converted[0].why) == (None, "set by hand")
    converted.load_state_dict(convert(model, prune(model, 0.4)).state_dict())
    assert (converted[0].execution, converted[0].why) == ("dense", "set by hand")
    assert convert(converted, {}, torch.randn(4, 5))[0].why.startswith("measured")
    assert convert(converted, masks)[0].why == "not measured"


def test_on_the_clock():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    converted = convert(model, halves(model), torch.randn(2, 3, 4, 4))
    assert all(set(layer.measured.ms) >= {"sparse", "dense"} for layer in layers(converted))
    assert all(min(layer.measured.ms.values()) > 0 for layer in layers(converted))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    model = linears(5, 6).cuda()
    converted = convert(model, halves(model), torch.randn(4, 5, device="cuda"))
    assert min(converted[0].measured.ms.values()) > 0

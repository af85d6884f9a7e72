"""Whole models, dense to masked and back."""

from __future__ import annotations

import copy
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import distributed, nn

from sparselottery import MaskedConv2d, MaskedLinear, MaskedSequential, convert, prune, to_dense
from sparselottery.convert import dense_state, load_dense_state, masks_of, prunable


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Net(nn.Module):
    """Nested and subclassed containers, a layer used twice, a layer nobody prunes, and buffers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(30, 12), nn.ReLU(), nn.Sequential(nn.Linear(12, 12), nn.Tanh()))
        self.residual = Residual(nn.Linear(12, 12), nn.ReLU())
        self.norm = nn.BatchNorm1d(12)
        self.twin = nn.ModuleList([nn.Linear(12, 12)])
        self.twin.append(self.twin[0])
        self.head = nn.Linear(12, 5, bias=False)
        self.other = nn.Sequential(nn.Linear(5, 5))

    def forward(self, x):
        x = self.norm(self.residual(self.stem(x)))
        for layer in self.twin:
            x = torch.relu(layer(x))
        return self.other(self.head(x))


NAMES = ["stem.0.weight", "stem.2.0.weight", "residual.0.weight", "twin.0.weight", "head.weight"]


@pytest.fixture
def model():
    return Net().double().eval()


def random_masks(model, names=NAMES, density=0.4):
    weights = prunable(model)
    return {name: torch.rand(weights[name].shape) < density for name in names}


def masked_dense(model, masks):
    """The model with zeros written where pruned."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return model


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_computes_what_the_masked_dense_model_does(model):
    masks, before = random_masks(model), snapshot(model)
    converted, dense = convert(model, masks), masked_dense(model, masks)
    x = torch.randn(7, 30, dtype=torch.float64)
    torch.testing.assert_close(converted(x), dense(x))
    converted(x).square().sum().backward()
    dense(x).square().sum().backward()
    for name, mask in masks.items():
        weight = dense.get_parameter(name).grad
        torch.testing.assert_close(converted.get_submodule(name.removesuffix(".weight")).values.grad, weight[mask])
    assert same(snapshot(model), before)
    assert all(p.grad is None for p in model.parameters())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in converted.parameters()}


def test_only_what_is_named_is_masked(model):
    converted = convert(model, random_masks(model, NAMES[:2]))
    assert list(masks_of(converted)) == NAMES[:2]
    assert type(converted.head) is nn.Linear
    assert list(prunable(converted)) == list(prunable(model)) == [*NAMES, "other.0.weight"]


def test_containers(model):
    converted = convert(model, random_masks(model))
    assert type(converted) is Net
    assert type(converted.stem) is MaskedSequential
    assert type(converted.stem[2]) is MaskedSequential
    assert type(converted.residual) is Residual
    assert type(converted.other) is nn.Sequential
    assert [name for name, _ in converted.named_modules()] == [name for name, _ in model.named_modules()]
    assert type(to_dense(converted).stem) is nn.Sequential
    assert type(model.stem) is nn.Sequential


def test_shared_layers_stay_shared(model):
    converted = convert(model, random_masks(model))
    assert isinstance(converted.twin[0], MaskedLinear)
    assert converted.twin[0] is converted.twin[1]
    dense = to_dense(converted)
    assert dense.twin[0] is dense.twin[1]


def test_a_shared_layer_goes_by_its_first_name(model):
    mask = torch.rand(12, 12) < 0.4
    with pytest.raises(ValueError, match=r"expected names among .*'twin.0.weight'.*got 'twin.1.weight'"):
        convert(model, {"twin.1.weight": mask})


def test_one_layer_alone():
    linear, mask = nn.Linear(6, 4), torch.rand(4, 6) < 0.5
    converted = convert(linear, {"weight": mask})
    assert isinstance(converted, MaskedLinear)
    assert torch.equal(converted.weight, linear.weight * mask)
    assert list(masks_of(converted)) == list(prunable(converted)) == ["weight"]
    assert type(to_dense(converted)) is nn.Linear


def test_no_masks_is_a_copy(model):
    copied = convert(model, {})
    assert copied is not model
    assert same(copied.state_dict(), model.state_dict())


def test_there_and_back(model):
    masks = random_masks(model)
    dense = to_dense(convert(model, masks))
    assert same(dense.state_dict(), masked_dense(model, masks).state_dict())
    assert [type(m) for m in dense.modules()] == [type(m) for m in model.modules()]


def test_a_converted_model_is_pruned_further(model):
    first = random_masks(model)
    second = {name: mask & (torch.rand(mask.shape) < 0.5) for name, mask in first.items()}
    once = convert(model, first)
    before = snapshot(once)
    twice = convert(once, second)
    assert same(twice.state_dict(), convert(model, second).state_dict())
    assert same(masks_of(twice), second)
    assert same(snapshot(once), before)


def test_a_weight_that_returns_is_zero(model):
    none = {"head.weight": torch.zeros(5, 12, dtype=torch.bool)}
    again = convert(convert(model, none), {"head.weight": torch.ones(5, 12, dtype=torch.bool)})
    assert again.head.nnz == 60
    assert not again.head.values.any()


def test_freezing_and_mode_are_kept(model):
    model.head.weight.requires_grad_(False)
    model.stem[0].bias.requires_grad_(False)
    model.train()
    model.stem[0].eval()
    converted = convert(model, random_masks(model))
    for again in (converted, to_dense(converted)):
        assert [m.training for m in again.modules()] == [m.training for m in model.modules()]
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"head.bias": torch.ones(5, dtype=torch.bool)}, ValueError, "names among .*'head.weight'.*'head.bias'"),
        ({"nothing.weight": torch.ones(5, 5, dtype=torch.bool)}, ValueError, "got 'nothing.weight'"),
        ({"norm.weight": torch.ones(12, dtype=torch.bool)}, ValueError, "names among .*got 'norm.weight'"),
        ({"head.weight": torch.ones(12, 5, dtype=torch.bool)}, ValueError, r"expected shape \(5, 12\), got \(12, 5\)"),
        ({"head.weight": torch.ones(60, dtype=torch.bool)}, ValueError, r"expected shape \(5, 12\), got \(60,\)"),
        ({"head.weight": torch.ones(5, 12)}, TypeError, r"head.weight.*expected a bool tensor .* got Tensor"),
    ],
)  # fmt: skip
def test_wrong_masks_are_named_and_change_nothing(model, masks, error, message):
    before = snapshot(model)
    for given_model in (model, convert(model, random_masks(model))):
        with pytest.raises(error, match=message):
            convert(given_model, random_masks(model, NAMES[:1]) | masks)
    assert same(snapshot(model), before)
    assert type(model.stem) is nn.Sequential


class Watching(nn.Module):
    """Its own method is a hook of its layer; others are with arguments, before, and of the gradient."""

    def __init__(self, seen):
        super().__init__()
        self.layer, self.outputs = nn.Linear(4, 4), 0
        self.layer.register_forward_hook(self.count)
        self.layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        self.layer.register_forward_hook(lambda m, a, kwargs, y: seen.append("kwargs"), with_kwargs=True)
        self.layer.register_full_backward_hook(lambda module, gx, gy: seen.append(type(module)))

    def count(self, module, args, output):
        self.outputs += 1

    def forward(self, x):
        return self.layer(x)


def test_hooks_are_kept():
    seen = []
    model, mask, x = Watching(seen), torch.rand(4, 4) < 0.5, torch.randn(3, 4)
    converted = convert(model, {"layer.weight": mask})
    torch.testing.assert_close(converted(x), masked_dense(model, {"layer.weight": mask})(x))
    x.requires_grad_()
    converted(x).sum().backward()
    assert seen == ["kwargs"] * 3 + [MaskedLinear]
    assert (converted.outputs, model.outputs) == (2, 0)
    again = to_dense(convert(converted, {"layer.weight": mask}))
    again(x).sum().backward()
    assert seen[4:] == ["kwargs", nn.Linear]
    assert (again.outputs, converted.outputs) == (3, 2)


def test_the_random_state_is_kept(model):
    masks, state = random_masks(model), torch.get_rng_state()
    convert(model, masks)
    assert torch.equal(torch.get_rng_state(), state)


def test_dense_state_is_that_of_the_dense_model(model):
    masks = random_masks(model)
    converted, expected = convert(model, masks), masked_dense(model, masks).state_dict()
    state = dense_state(converted)
    assert same(state, expected)
    assert list(state) == list(expected)
    assert same(dense_state(model), model.state_dict())
    state["head.weight"].zero_()
    dense_state(model)["head.weight"].zero_()
    assert converted.head.weight.any()
    assert model.head.weight.any()


def test_load_dense_state_reads_the_values_at_the_masks(model):
    masks, other = random_masks(model), Net().double()
    converted = convert(model, masks)
    load_dense_state(converted, other.state_dict())
    assert same(dense_state(converted), masked_dense(other, masks).state_dict())
    assert same(masks_of(converted), masks)
    load_dense_state(model, other.state_dict())
    assert same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("head.weight"), r"missing \['head.weight'\], unexpected \[\]"),
        (lambda s: s.update(extra=torch.ones(1)), r"missing \[\], unexpected \['extra'\]"),
        (lambda s: s.update({"head.weight": torch.ones(12, 5)}), r"head.weight.*shape \(5, 12\), got \(12, 5\)"),
        (lambda s: s.update({"norm.bias": torch.ones(1)}), r"norm.bias.*expected shape \(12,\), got \(1,\)"),
    ],
)  # fmt: skip
def test_load_dense_state_is_all_or_nothing(model, damage, message):
    converted, state = convert(model, random_masks(model)), Net().double().state_dict()
    damage(state)
    for target in (model, converted):
        before = snapshot(target)
        with pytest.raises(ValueError, match=message):
            load_dense_state(target, state)
        assert same(snapshot(target), before)


def conv_net():
    """A stem, a strided, a grouped and a 1x1 convolution, and a head."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 6, 3, padding="same", bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        Residual(nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular", groups=2), nn.ReLU()),
        nn.Conv2d(6, 4, (1, 3), stride=(1, 2), dilation=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 5),
    ).double()


CONV_NAMES = ["0.0.weight", "1.0.weight", "2.weight", "5.weight"]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolutions(memory_format):
    model = conv_net().to(memory_format=memory_format)
    masks = random_masks(model, CONV_NAMES)
    converted, dense = convert(model, masks), masked_dense(model, masks)
    assert list(prunable(model)) == list(prunable(converted)) == list(masks_of(converted)) == CONV_NAMES
    assert same(masks_of(converted), masks)
    assert [type(converted[i]) for i in (0, 1, 2, 5)] == [MaskedSequential, Residual, MaskedConv2d, MaskedLinear]
    assert same(to_dense(converted).state_dict(), dense.state_dict())
    assert [repr(m) for m in to_dense(converted).modules()] == [repr(m) for m in model.modules()]
    x = torch.randn(3, 3, 8, 9, dtype=torch.float64).contiguous(memory_format=memory_format)
    for mode in (True, False):
        torch.testing.assert_close(converted.train(mode)(x), dense.train(mode)(x))
    other = conv_net()
    load_dense_state(converted, other.state_dict())
    assert same(dense_state(converted), masked_dense(other, masks).state_dict())
    again = convert(converted, {"2.weight": masks["2.weight"].flip(0)})
    assert torch.equal(again[2].mask, masks["2.weight"].flip(0))


def test_wrong_masks_of_a_convolution_are_named():
    for model in (conv_net(), convert(conv_net(), random_masks(conv_net(), CONV_NAMES))):
        with pytest.raises(ValueError, match=r"masks\['2.weight'\]: expected shape \(4, 6, 1, 3\), got \(4, 18\)"):
            convert(model, {"2.weight": torch.ones(4, 18, dtype=torch.bool)})


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=5), st.floats(0, 1), st.integers(0, 17), st.data())
def test_any_perceptron(widths, density, batch, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    layers = [nn.Linear(i, o, dtype=torch.float64) for i, o in pairwise(widths)]
    model = nn.Sequential(*[child for layer in layers for child in (layer, nn.ReLU())][:-1])
    masks = random_masks(model, data.draw(st.sets(st.sampled_from(list(prunable(model))))), density)
    converted, x = convert(model, masks), torch.randn(batch, widths[0], dtype=torch.float64)
    torch.testing.assert_close(converted(x), masked_dense(model, masks)(x))
    assert same(masks_of(converted), masks)
    assert same(dense_state(converted), masked_dense(model, masks).state_dict())


def test_data_parallel_sends_gradients_and_statistics_only(tmp_path):
    """Not the indices, in any forward: with the default arguments of DistributedDataParallel, also of a copy."""
    dense = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
    model = copy.deepcopy(convert(convert(dense, prune(dense, 0.5)), prune(dense, 0.7)))
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        replica = nn.parallel.DistributedDataParallel(model)
        sent = []
        hook = torch.futures.Future

        def count(_, bucket):
            sent.append(bucket.buffer().nbytes)
            done = hook()
            done.set_result(bucket.buffer())
            return done

        replica.register_comm_hook(None, count)
        replica(torch.randn(5, 2, 4, 4)).sum().backward()
    finally:
        distributed.destroy_process_group()
    assert sum(sent) == sum(parameter.nbytes for parameter in model.parameters())
    assert {id(buffer) for buffer in replica.modules_buffers} == {id(buffer) for buffer in model[1].buffers()}
    assert not hasattr(dense, "_ddp_params_and_buffers_to_ignore")

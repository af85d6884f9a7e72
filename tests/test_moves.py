"""set_masks: what survivors keep, who follows, and that nothing has changed where something raises."""

from __future__ import annotations

import copy
import pickle
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from sparselottery import MaskedConv2d, MaskedLinear, Pattern, SparseLotteryWarning, convert, ops, prune, set_masks
from sparselottery.convert import dense_state, masked_layers, masks_of

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}
MOMENTS = {"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "sum", "prev", "step_size"}
X = torch.linspace(-1, 1, 4 * 2 * 6 * 6, dtype=torch.float64).sin().view(4, 2, 6, 6)


def dense_net():
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU()
    )
    return net.double()


def random_masks(seed, density=0.5):
    generator = torch.Generator().manual_seed(seed)
    weights = {name: each for name, each in dense_net().named_parameters() if each.dim() > 1}
    return {name: torch.rand(each.shape, generator=generator) < density for name, each in weights.items()}


def same_count(seed):
    """Masks of equally many survivors, whatever the seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randperm(mask.numel(), generator=generator) < mask.numel() // 3).view(mask.shape)
        for name, mask in random_masks(0).items()
    }


def masked_net(masks):
    return convert(dense_net(), masks)


def train(model, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - X.mean()).square().mean().backward()
        optimizer.step()


def snapshot(model, optimizer):
    """All that a move could change, as copies."""
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return copy.deepcopy((model.state_dict(), grads, optimizer.state_dict(), [m.execution for m in layers(model)]))


def layers(model):
    return list(masked_layers(model).values())


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for each in zip(one, other, strict=True):
            assert_same(*each)
    else:
        assert one == other


class Simulated:
    """The same training on dense weights that are multiplied by masks, moments and gradients moved by hand."""

    def __init__(self, masks, make):
        self.model, self.masks = dense_net(), masks
        self.optimizer = make(self.model.parameters())
        self.apply()

    def apply(self):
        with torch.no_grad():
            for name, mask in self.masks.items():
                self.model.get_parameter(name).mul_(mask)

    def step(self):
        self.optimizer.zero_grad()
        (self.model(X) - X.mean()).square().mean().backward()
        for name, weight in self.model.named_parameters():
            if name in self.masks:
                weight.grad *= self.masks[name]
        self.optimizer.step()
        self.apply()

    def move(self, masks, fill):
        before, self.masks = self.masks, masks
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if name in masks:
                    new = masks[name] & ~before[name]
                    weight.masked_fill_(new, fill).mul_(masks[name])
                    for key, state in self.optimizer.state[weight].items():
                        if key in MOMENTS:
                            state[~(before[name] & masks[name])] = {"sum": 0.1, "step_size": 0.01}.get(key, 0.0)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@settings(max_examples=4, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 99), st.sampled_from([0.0, 0.2, 0.6, 1.0])), min_size=1, max_size=4))
def test_training_over_moves_is_that_of_masked_dense_weights(make, moves):
    masks = random_masks(0)
    model, simulated = masked_net(masks), Simulated(masks, make)
    optimizer = make(model.parameters())
    for number, (seed, density) in enumerate(moves):
        train(model, optimizer, 2)
        simulated.step()
        simulated.step()
        masks, fill = random_masks(seed, density), 0.01 * number
        set_masks(model, masks, optimizer, fill)
        simulated.move(masks, fill)
        assert {name: mask.tolist() for name, mask in masks_of(model).items()} == {
            name: mask.tolist() for name, mask in masks.items()
        }
    train(model, optimizer)
    simulated.step()
    for name, entry in dense_state(model).items():
        torch.testing.assert_close(entry, simulated.model.state_dict()[name], msg=name)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.data())
def test_survivors_keep_everything_and_newcomers_begin_anew(rows, columns, data):
    bools = st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns)
    before, after = (torch.tensor(data.draw(bools)).view(rows, columns) for _ in range(2))
    layer = MaskedLinear(columns, rows, mask=before)
    values, optimizer = layer.values, torch.optim.Adam(layer.parameters())
    layer(torch.randn(3, columns)).square().sum().backward()
    optimizer.step()

    def as_weights():
        tensors = layer.values, layer.values.grad, *optimizer.state[values].values()
        return [layer.pattern.scatter(each.detach()) for each in tensors if each.shape == values.shape and each.dim()]

    old = as_weights()
    set_masks(layer, {"weight": after}, optimizer, fill=0.5)
    assert layer.values is values
    assert values.shape == values.grad.shape == (int(after.sum()),)
    for number, (was, now) in enumerate(zip(old, as_weights(), strict=True)):
        assert torch.equal(now, torch.where(before, was, 0.5 if number == 0 else 0.0) * after)
    set_masks(layer, {"weight": before}, optimizer)
    for was, now in zip(old, as_weights(), strict=True):
        assert torch.equal(now, was * (before & after))


def test_a_pattern_of_positions_is_a_mask():
    mask = random_masks(3)["3.weight"]
    model = masked_net(random_masks(0))
    set_masks(model, {"3.weight": Pattern.from_positions(mask.flatten().nonzero()[:, 0], tuple(mask.shape))})
    assert torch.equal(model[3].mask, mask)
    pattern = Pattern.from_mask(mask)
    set_masks(model, {"3.weight": pattern})
    pattern.col_indices.zero_()  # the layer has its own
    assert torch.equal(model[3].mask, mask)


@pytest.mark.parametrize("execution", ["sparse", "dense", "compact"])
def test_forward_follows_under_each_execution(execution):
    masks, others = random_masks(0), random_masks(1)
    for each in (masks, others):
        for mask in each.values():
            mask[1] = False
    model = masked_net(masks)
    for layer in layers(model):
        layer.execution = execution
    model(X)
    set_masks(model, others)
    assert {layer.execution for layer in layers(model)} == {execution}
    torch.testing.assert_close(model(X), reference(model)(X))
    moved = {name: torch.ones_like(mask) for name, mask in masks.items()}
    set_masks(model, moved)
    assert {layer.execution for layer in layers(model)} == {"dense"}
    torch.testing.assert_close(model(X), reference(model)(X))
    set_masks(model, others)
    assert {layer.execution for layer in layers(model)} == {execution}
    torch.testing.assert_close(model(X), reference(model)(X))


def reference(model):
    net = dense_net()
    net.load_state_dict(dense_state(model))
    return net


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


def test_hooks_schedules_and_kept_losses_go_on():
    model = masked_net(random_masks(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    seen = []
    model[3].values.register_hook(lambda grad: seen.append(grad.shape))
    model[3].values.register_post_accumulate_grad_hook(lambda values: seen.append(values.grad.shape))
    for seed in range(1, 4):
        loss = model(X).square().sum()  # still there in the next round
        loss.backward()
        optimizer.step()
        schedule.step()
        assert seen == [model[3].values.shape] * 2
        seen.clear()
        set_masks(model, random_masks(seed), optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    assert loss.grad_fn is not None


def test_frozen_values_move_and_stay_frozen():
    model = masked_net(random_masks(0))
    model[3].values.requires_grad_(False)
    y = model(X)
    set_masks(model, random_masks(1))
    assert not model[3].values.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    torch.testing.assert_close(model(X), reference(model)(X))


def test_tied_layers_move_together():
    mask, other = torch.eye(4, dtype=torch.bool), torch.ones(4, 4).tril().bool()
    one, two = MaskedLinear(4, 4, mask=mask), MaskedLinear(4, 4, mask=mask)
    two.values = one.values
    both = nn.Sequential(one, two)
    set_masks(one, {"weight": other}, fill=2.0)
    assert torch.equal(two.mask, other)
    torch.testing.assert_close(both(torch.eye(4)), one(one(torch.eye(4))) - one.bias + two.bias)
    with pytest.raises(ValueError, match=r"masks\['1.weight'\]: expected the mask of the layer that it shares"):
        set_masks(both, {"0.weight": mask, "1.weight": other})
    three = MaskedLinear(4, 4, mask=other.T)
    three.values = one.values
    with pytest.raises(ValueError, match="layers that share their values to have one mask"):
        set_masks(one, {"weight": mask})
    assert torch.equal(one.mask, other)


def test_copies_pickles_and_checkpoints_of_a_moved_model():
    model = masked_net(random_masks(0))
    other = copy.deepcopy(model)
    set_masks(model, random_masks(1), fill=0.1)
    assert_same(masks_of(other), random_masks(0))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(X), model(X))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))


def test_compiled_steps_follow():
    model = masked_net(same_count(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    compiled = torch.compile(model, backend="eager")
    compiled(X).sum().backward()
    optimizer.step()
    for masks in (same_count(1), random_masks(2)):
        set_masks(model, masks, optimizer)
        torch.testing.assert_close(compiled(X), reference(model)(X))
        compiled(X).sum().backward()
        optimizer.step()


def test_a_gpu_plan_is_that_of_the_new_pattern(monkeypatch):
    compiled = []
    monkeypatch.setattr(ops, "compile_plan", lambda pattern, block: compiled.append(pattern) or torch.zeros(3).int())
    layer = MaskedLinear(4, 4, mask=torch.eye(4, dtype=torch.bool))
    set_masks(layer, {"weight": ~torch.eye(4, dtype=torch.bool)})
    assert torch.equal(compiled[-1].mask(), ~torch.eye(4, dtype=torch.bool))
    assert compiled[-1].col_indices is layer.col_indices


@pytest.mark.parametrize("masks", [same_count(1), random_masks(1)], ids=["the-same-nnz", "another-nnz"])
def test_data_parallel_goes_on(masks, tmp_path):
    model = masked_net(same_count(0))
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        replica = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        train(replica, optimizer)
        before = replica.reducer
        set_masks(model, masks, optimizer)
        assert (replica.reducer is before) == all(map(torch.equal, map(counts, masks.values()), FIRST_COUNTS))
        sent = []
        replica.register_comm_hook(None, lambda _, bucket: sent.append(bucket.buffer().numel()) or done(bucket))
        train(replica, optimizer, 2)
        assert sum(sent) == 2 * sum(parameter.numel() for parameter in model.parameters())
        with pytest.raises(ValueError, match="DistributedDataParallel without hooks where nnz changes"):
            set_masks(model, random_masks(7), optimizer)
        set_masks(model, {name: mask.roll(1) for name, mask in masks_of(model).items()}, optimizer)
    finally:
        distributed.destroy_process_group()


def counts(mask):
    return mask.sum()


FIRST_COUNTS = [counts(mask) for mask in same_count(0).values()]


def done(bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


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
    "meta": (lambda m, o: ({**m, "5.weight": m["5.weight"].to("meta")}, o), ValueError, "meta device"),
    "no optimizer": (lambda m, o: (m, None), ValueError, "expected all that train the layers, got no AdamW"),
    "another": (lambda m, o: (m, [o, other_optimizer(m)]), ValueError, "expected one of the model, got SGD of other"),
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


def test_parametrized_values_are_refused():
    layer = MaskedConv2d(2, 3, 3)
    nn.utils.parametrize.register_parametrization(layer, "values", nn.Identity())
    with pytest.raises(ValueError, match="expected a layer whose values are a Parameter, got a parametrized layer"):
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

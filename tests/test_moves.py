"""set_masks: what survivors keep, and who follows."""

from __future__ import annotations

import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from moving import X, assert_same, dense_net, layers, masked_net, random_masks, reference, same_count, train
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from sparselottery import MaskedLinear, Pattern, ops, set_masks
from sparselottery.convert import dense_state, masks_of

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
        for number in range(2):
            sent.clear()
            set_masks(model, random_masks(7 + number), optimizer)
            train(replica, optimizer, 2)
            assert sum(sent) == 2 * sum(parameter.numel() for parameter in model.parameters())
        replica._comm_hooks[0] = replica._comm_hooks[0][0], {"errors": torch.zeros(3)}
        with pytest.raises(ValueError, match="whose hooks have no state where nnz changes, got dict"):
            set_masks(model, random_masks(2), optimizer)
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

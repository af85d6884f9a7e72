"""MaskUpdater: what is dropped and grown, when, and that training goes on as that of w * mask does."""

from __future__ import annotations

import copy
import io
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from moving import X, adamw, assert_same, dense_net, random_masks, sgd, train, whole_net
from torch import nn

from sparselottery import convert, dynamic, prune, set_masks
from sparselottery.convert import dense_state, masked_layers, masks_of

NAMES = list(random_masks(0))
TOTALS = {name: mask.numel() for name, mask in random_masks(0).items()}


def run(make, steps, optimizer=sgd, watch=None):
    model = whole_net()
    chosen = optimizer(model.parameters())
    updater = make(model, chosen)
    for _ in range(steps):
        train(model, chosen)
        changed = updater.step()
        if watch:
            watch(updater, model, changed)
    return model, chosen, updater


def nnz(model):
    return [layer.nnz for layer in masked_layers(model).values()]


class Simulated:
    """The same on dense weights times masks. `moments` are the optimiser's tensors of a weight's shape."""

    def __init__(self, optimizer, masks):
        self.model, self.masks = dense_net(), masks
        self.weights = {name: self.model.get_parameter(name) for name in masks}
        self.optimizer = optimizer(self.model.parameters())
        self.apply()

    @torch.no_grad()
    def apply(self):
        for name, mask in self.masks.items():
            self.weights[name].mul_(mask)

    def step(self):
        self.optimizer.zero_grad()
        (self.model(X) - X.mean()).square().mean().backward()
        self.dense = {name: weight.grad.clone() for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            weight.grad *= self.masks[name]
        self.optimizer.step()
        self.apply()

    @torch.no_grad()
    def move(self, masks):
        for name, mask in masks.items():
            for key, state in self.optimizer.state[self.weights[name]].items():
                if key in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
                    state[~(self.masks[name] & mask)] = 0
        self.masks = masks
        self.apply()

    def rigl(self, density, drop_fraction):
        """By sorting: ties go by index."""
        masks = {}
        for name, weight in self.weights.items():
            target = round(density * weight.numel())
            stay = target - round(drop_fraction * target)
            scores = torch.where(self.masks[name], weight.detach().abs(), -1.0).flatten()
            mask = torch.zeros(weight.numel(), dtype=torch.bool)
            mask[scores.argsort(descending=True, stable=True)[:stay]] = True
            scores = torch.where(mask, -1.0, self.dense[name].abs().flatten())
            mask[scores.argsort(descending=True, stable=True)[: target - stay]] = True
            masks[name] = mask.view(weight.shape)
        self.move(masks)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_rigl_is_that_of_masked_dense_weights_with_dense_gradients(optimizer):
    model = whole_net()
    chosen = optimizer(model.parameters())
    updater = dynamic.rigl(model, chosen, 0.2, end=20, every=3, distribution="uniform")
    simulated = Simulated(optimizer, masks_of(model))
    moved = 0
    for step in range(1, 25):
        train(model, chosen)
        simulated.step()
        changed = updater.step()
        if step <= 20 and (step % 3 == 0 or step == 20):
            simulated.rigl(0.2, 0.15 * (1 + math.cos(math.pi * step / 20)))
        moved += changed
        for name, mask in masks_of(model).items():
            assert torch.equal(mask, simulated.masks[name])
        assert nnz(model) == [round(0.2 * total) for total in TOTALS.values()]
    assert moved >= 4
    for name, entry in dense_state(model).items():
        torch.testing.assert_close(entry, simulated.model.state_dict()[name], msg=name)


METHODS = {
    "gmp": lambda m, o: dynamic.gmp(m, o, 0.1, end=10, every=4),
    "set": lambda m, o: dynamic.set_training(m, o, 0.2, end=12, every=2),
    "rigl": lambda m, o: dynamic.rigl(m, o, 0.2, end=12, every=4),
    "rigl-sampled": lambda m, o: dynamic.rigl(m, o, 0.2, end=12, every=4, candidates=2),
    "rigl-global": lambda m, o: dynamic.rigl(m, o, 0.2, end=12, every=4, distribution="global"),
    "momentum": lambda m, o: dynamic.set_training(m, o, 0.2, end=12, every=4, grow="momentum", window=3),
    "topk": lambda m, o: dynamic.topk(m, o, 0.1, end=10),
    "dsd": lambda m, o: dynamic.dsd(m, o, 0.3, sparse_from=4, dense_from=9),
    "iht": lambda m, o: dynamic.iht(m, o, 0.2, end=11, sparse_steps=2, dense_steps=3),
    "single-cycle": lambda m, o: dynamic.single_cycle(m, o, 0.1, end=10, every=3),
    "saliency": lambda m, o: dynamic.gmp(m, o, 0.1, end=10, every=2, drop="saliency", distribution="global"),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_is_that_of_masked_dense_weights_with_its_decisions(method):
    simulated, optimizer = None, adamw

    def follow(updater, model, changed):
        before = simulated.masks
        simulated.step()
        now = masks_of(model)
        assert changed or all(torch.equal(now[name], before[name]) for name in now)
        simulated.move(now)

    def make(model, chosen):
        nonlocal simulated
        updater = method(model, chosen)
        simulated = Simulated(optimizer, masks_of(model))
        return updater

    model, *_ = run(make, 14, optimizer, follow)
    for name, entry in dense_state(model).items():
        torch.testing.assert_close(entry, simulated.model.state_dict()[name], msg=name)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_resumed_training_ends_in_the_same_bits(method):
    kept = {}

    def keep(updater, model, changed):
        if updater.steps in (5, 8):
            torch.save([each.state_dict() for each in (model, updater.optimizer, updater)], file := io.BytesIO())
            kept[updater.steps] = file

    expected, chosen, updater = run(method, 13, adamw, keep)
    for at, file in kept.items():
        file.seek(0)
        torch.manual_seed(99)
        model = whole_net()
        other = adamw(model.parameters())
        again = method(model, other)
        for each, state in zip((model, other, again), torch.load(file), strict=True):
            each.load_state_dict(state)
        for _ in range(13 - at):
            train(model, other)
            again.step()
        assert_same(model.state_dict(), expected.state_dict())
        assert_same(other.state_dict(), chosen.state_dict())
        assert_same(again.state_dict(), updater.state_dict())


def test_what_a_state_holds_stays():
    """Steps after it was taken, or loaded, do not write to it."""
    model = whole_net()
    optimizer = sgd(model.parameters())
    updater = dynamic.MaskUpdater(
        model, optimizer, dynamic.constant(0.5), drop_fraction=dynamic.constant(0.3), every=4, grow="momentum", window=3
    )
    for _ in range(2):
        train(model, optimizer)
        updater.step()
    state = updater.state_dict()
    before = copy.deepcopy(state)
    for _ in range(2):
        updater.load_state_dict(state)
        train(model, optimizer)
        updater.step()
        assert_same(state, before)
    assert before["momentum"]


def test_gmp_only_prunes_and_ends_exactly():
    seen = []
    before = {name: torch.ones(mask.shape, dtype=torch.bool) for name, mask in random_masks(0).items()}

    def watch(updater, model, changed):
        for name, mask in masks_of(model).items():
            assert not bool((mask & ~before[name]).any())
            before[name] = mask
        seen.append((updater.steps, changed, nnz(model)))

    run(METHODS["gmp"], 14, watch=watch)
    assert [step for step, changed, _ in seen if changed] == [4, 8, 10]
    for step, _, found in seen[3::4]:
        density = dynamic.cubic(0.1, 10)(step)
        assert found == [round(density * total) for total in TOTALS.values()]
    assert seen[-1][2] == [round(0.1 * total) for total in TOTALS.values()]


def test_dense_phases_grow_all_from_zero():
    seen = {}

    def watch(updater, model, changed):
        seen[updater.steps] = (changed, sum(nnz(model)), {n: w.clone() for n, w in dense_state(model).items()})

    run(METHODS["dsd"], 12, watch=watch)
    whole = sum(TOTALS.values())
    sparse = sum(round(0.3 * total) for total in TOTALS.values())
    assert [seen[step][1] for step in range(1, 13)] == [whole] * 3 + [sparse] * 5 + [whole] * 4
    assert [step for step in seen if seen[step][0]] == [4, 9]
    assert int((seen[9][2]["3.weight"] == 0).sum()) == round(0.7 * TOTALS["3.weight"])
    assert int((seen[10][2]["3.weight"] != 0).sum()) > round(0.3 * TOTALS["3.weight"])


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.37, 0.9, 1.0]), min_size=2, max_size=5),
    st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    st.sampled_from(["random", "gradient", "sampled", "momentum"]),
    st.sampled_from(["uniform", "erk", "global"]),
)
def test_counts_are_exact_from_empty_to_full(densities, drop_fraction, grow, distribution):
    how = {"grow": "gradient", "candidates": 1.5} if grow == "sampled" else {"grow": grow}

    def make(model, chosen):
        schedule, fraction = densities.__getitem__, dynamic.constant(drop_fraction)
        return dynamic.MaskUpdater(
            model, chosen, schedule, distribution=distribution, every=1, drop_fraction=fraction, **how
        )

    def watch(updater, model, changed):
        density = densities[updater.steps]
        if distribution == "global":
            assert sum(nnz(model)) == round(density * sum(TOTALS.values()))
            return
        shapes = {name: mask.shape for name, mask in random_masks(0).items()}
        shares = {"uniform": dynamic.uniform, "erk": dynamic.erk}[distribution](shapes, density)
        assert nnz(model) == [round(shares[name] * total) for name, total in TOTALS.items()]

    densities = [*densities, densities[-1]]  # the updater looks a step ahead
    run(make, len(densities) - 2, watch=watch)


def test_ties_go_by_index():
    layer = convert(nn.Sequential(nn.Linear(4, 2, bias=False)), {"0.weight": torch.ones(2, 4, dtype=torch.bool)})
    with torch.no_grad():
        layer[0].values.fill_(1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    updater = dynamic.MaskUpdater(layer, optimizer, dynamic.phases({0: 1.0, 1: 0.5, 2: 0.75}), every=1, grow="gradient")
    for expected in ([[0, 0, 0, 0], [1, 1, 1, 1]], [[1, 1, 0, 0], [1, 1, 1, 1]]):
        layer(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        assert updater.step()
        assert layer[0].mask.int().tolist() == expected


def test_accumulated_gradients_decide_together():
    results = []
    for parts in ([X], [X[:1], X[1:]]):
        model = whole_net()
        optimizer = sgd(model.parameters())
        updater = dynamic.rigl(model, optimizer, 0.3, end=9, every=2)
        for _ in range(8):
            optimizer.zero_grad()
            for part in parts:
                ((model(part) - X.mean()).square().sum() / X.numel()).backward()
            optimizer.step()
            updater.step()
        assert updater.steps == 8
        results.append(masks_of(model))
    assert_same(*results)


def test_own_scores_ignored_layers_and_schedules():
    asked = []

    def first_go(name, layer):
        asked.append(name)
        return torch.arange(layer.nnz)

    def make(model, chosen):
        schedule = dynamic.phases({0: 1.0, 1: 0.25})
        return dynamic.MaskUpdater(model, chosen, schedule, every=1, drop=first_go, ignore=["0.*"])

    model, *_ = run(make, 2)
    assert asked == NAMES[1:]
    for name in NAMES[1:]:
        mask = masks_of(model)[name].flatten()
        assert torch.equal(mask, torch.arange(len(mask)) >= len(mask) - round(0.25 * len(mask)))
    assert masks_of(model)[NAMES[0]].all()


def test_gradients_that_overflow_put_an_update_off():
    model = whole_net()
    optimizer = sgd(model.parameters())
    updater = dynamic.rigl(model, optimizer, 0.3, end=4, every=4, drop_fraction=0.5)
    updater.drop_fraction = dynamic.constant(0.5)
    for step in range(1, 7):
        before = masks_of(model)
        ((model(X) - X.mean()).square().mean() * (math.inf if step == 4 else 1)).backward()
        if step != 4:
            optimizer.step()
        optimizer.zero_grad()
        assert updater.step() == (step == 5)
        state, updater = updater.state_dict(), dynamic.rigl(model, optimizer, 0.3, end=4, every=4)
        updater.drop_fraction = dynamic.constant(0.5)
        updater.load_state_dict(state)
        assert all(map(torch.equal, before.values(), masks_of(model).values())) == (step != 5)


def test_mixed_precision_and_compiled_nets():
    model = convert(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), {
        "0.weight": torch.ones(6, 8).bool(), "2.weight": torch.ones(4, 6).bool()
    })  # fmt: skip
    optimizer = adamw(model.parameters())
    updater = dynamic.rigl(model, optimizer, 0.4, end=9, every=1, distribution="uniform")
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(5, 8)).square().sum()
        loss.backward()
        optimizer.step()
        updater.step()
        assert nnz(model) == [round(0.4 * 48), round(0.4 * 24)]
    compiled(torch.randn(5, 8)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="expected a backward through the layers, not compiled"):
        updater.step()


def test_hooks_are_there_in_steps_that_need_them_alone():
    hooked = []

    def watch(updater, model, changed):
        hooked.append(bool(model[3]._forward_hooks))

    run(METHODS["rigl"], 13, watch=watch)
    assert hooked == [step in (3, 7) for step in range(1, 14)]  # in steps 4, 8; at 12 nothing is exchanged
    hooked.clear()
    run(METHODS["momentum"], 13, watch=watch)
    assert hooked == [step % 4 != 0 and step < 12 for step in range(1, 14)]


def test_copies_of_a_net_are_left_alone():
    model = whole_net()
    other = copy.deepcopy(model)
    dynamic.set_training(model, sgd(model.parameters()), 0.2, end=4)
    assert sum(nnz(other)) == sum(TOTALS.values())


def test_a_pruned_net_is_pruned_on_from_its_density():
    model = whole_net()
    optimizer = sgd(model.parameters())
    set_masks(model, prune(model, 0.5), optimizer)
    updater, counts = dynamic.gmp(model, optimizer, 0.1, end=6, initial=0.5, every=1), []
    for _ in range(6):
        model(X).sum().backward()
        optimizer.step()
        updater.step()
        counts.append(sum(layer.nnz for layer in masked_layers(model).values()))
    assert counts == sorted(counts, reverse=True)

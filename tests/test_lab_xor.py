from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sparselottery.lab import xor
from sparselottery.lab.xor import INPUTS, TARGETS, Nets, Settings

SMALL = Settings(hidden=(6, 2), trials=60, iterations=800)


def nets(hidden=3, trials=5, seed=0):
    settings = replace(SMALL, trials=trials, deviation=1.0)
    start = xor.initial(hidden, settings, torch.Generator().manual_seed(seed))
    return start._replace(b1=torch.randn(start.b1.shape), b2=torch.randn(start.b2.shape))


def test_a_net_is_a_perceptron_with_one_hidden_layer():
    many = nets()
    for trial in range(5):
        w1, b1, w2, b2 = (tensor[..., trial] for tensor in many)
        expected = F.relu(INPUTS @ w1 + b1) @ w2.T + b2
        torch.testing.assert_close(many.logits()[:, trial], expected[:, 0])


def test_the_training_set_is_xor():
    assert [(int(a) ^ int(b)) for a, b in INPUTS.tolist()] == TARGETS.flatten().tolist()


def test_gradients_are_those_of_autograd():
    many = Nets(*(tensor.double().requires_grad_() for tensor in nets()))
    inputs, targets = xor.INPUTS, xor.TARGETS
    try:
        xor.INPUTS, xor.TARGETS = inputs.double(), targets.double()
        expected = torch.autograd.grad(many.losses().sum(), many)
        for gradient, other in zip(many.gradients(), expected, strict=True):
            torch.testing.assert_close(gradient, other)
    finally:
        xor.INPUTS, xor.TARGETS = inputs, targets


def test_trains_by_gradient_descent_with_momentum():
    start = nets(hidden=2, trials=4)
    settings = replace(SMALL, iterations=7, lr=0.3, momentum=0.5, zero_loss=1e-9)
    parameters = [tensor.clone().requires_grad_() for tensor in start]
    optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.5)
    for _ in range(7):
        optimizer.zero_grad()
        Nets(*parameters).losses().sum().backward()
        optimizer.step()
    for ours, other in zip(xor.train(start, settings), parameters, strict=True):
        torch.testing.assert_close(ours, other.detach())


def test_trials_do_not_touch_each_other(monkeypatch):
    """Neither in blocks of other sizes, nor when others are done earlier."""
    start = xor.initial(4, SMALL, torch.Generator().manual_seed(3))
    together = xor.train(start, SMALL)
    done = together.losses() < SMALL.zero_loss
    assert 0 < done.sum() < len(done)
    monkeypatch.setattr(xor, "BLOCK", 7)
    for ours, other in zip(xor.train(start, SMALL), together, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-4)


def test_training_leaves_its_start_alone():
    start = nets()
    before = [tensor.clone() for tensor in start]
    trained = xor.train(start, SMALL)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(start, before, strict=True))
    assert not torch.equal(trained.w1, start.w1)


def test_a_solution_is_recognised():
    """relu(x - y) + relu(y - x), minus a half."""
    w1 = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])[..., None]
    solved = Nets(w1, torch.zeros(1, 2, 1), torch.full((1, 2, 1), 20.0), torch.full((1, 1, 1), -10.0))
    assert solved.correct().all()
    assert solved.losses() < 1e-4
    assert not solved._replace(b2=torch.full((1, 1, 1), 1.0)).correct().any()  # (0, 0) and (1, 1) on the wrong side


def test_prunes_the_units_with_the_smallest_products_and_resets_the_others():
    start, trained = nets(hidden=4), nets(hidden=4, seed=1)
    w2 = torch.tensor([9.0, -1.0, 0.1, 3.0])
    w1 = torch.tensor([[0.0, 3.0, 8.0, 3.0], [0.0, 4.0, 6.0, 4.0]])  # norms 0, 5, 10, 5; products 0, 5, 1, 15
    trained = trained._replace(w1=w1[..., None].expand(2, 4, 5), w2=w2[None, :, None].expand(1, 4, 5))
    pruned = xor.prune_units(start, trained, 2)
    for kept, tensor in zip(pruned[:3], start[:3], strict=True):
        assert torch.equal(kept, tensor[:, [1, 3]])
    assert torch.equal(pruned.b2, start.b2)


def test_first_weights_have_the_deviation_and_bounds():
    start = xor.initial(10, replace(SMALL, trials=2000, deviation=0.5), torch.Generator().manual_seed(0))
    assert start.w1.abs().max() <= 1
    assert start.w1.std().item() == pytest.approx(0.5 * 0.88, rel=0.02)  # cut off at two deviations
    assert not start.b1.any()
    assert not start.b2.any()


def test_the_table():
    seen = []
    rows = xor.run(SMALL, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [row["hidden"] for row in rows] == [6, 2]
    large, small = rows
    assert small["boundary"] < small["boundary_high"] < large["boundary_low"]  # larger nets converge more often
    assert small["zero_loss_high"] < small["ticket_zero_loss_low"]  # and their best units as often
    assert large["ticket_boundary"] is None
    assert all(row["zero_loss"] <= row["boundary"] for row in rows)
    assert xor.run(SMALL) == rows
    assert xor.run(replace(SMALL, seed=1)) != rows


def test_intervals():
    low, high = xor.interval(50, 100)  # Wilson's score, from its closed form
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert xor.interval(0, 10)[0] == pytest.approx(0, abs=1e-12)
    assert xor.interval(10, 10)[1] == pytest.approx(1)
    assert xor.interval(0, 10)[1] == pytest.approx(0.2775, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": (2, 10)}, "hidden: .*the largest first"),
        ({"hidden": ()}, "hidden"),
        ({"trials": 0}, "trials: expected more than 0, got 0"),
        ({"lr": -1.0}, "lr"),
        ({"momentum": 1.0}, r"momentum: .*\[0, 1\), got 1.0"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)

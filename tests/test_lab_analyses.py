from __future__ import annotations

import pytest
import torch
from torch import nn

from sparselottery.lab import analyses
from sparselottery.ticket import Ticket


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def ticket(model, masks=None):
    weights = model.state_dict()
    masks = masks or {name: torch.ones_like(weights[name], dtype=torch.bool) for name in ("0.weight", "2.weight")}
    return Ticket(weights, masks, {})


def test_early_stop_is_the_first_minimum():
    curves = {"iteration": [0, 10, 20, 30], "val_loss": [3.0, 1.0, 1.0, 2.0], "test_accuracy": [0.1, 0.7, 0.8, 0.9]}
    assert analyses.early_stop(curves) == (10, 0.7)


@pytest.mark.parametrize("iterations", [[], [0, 1, 2]])
def test_early_stop_refuses_ragged_curves(iterations):
    with pytest.raises(ValueError, match="one length"):
        analyses.early_stop({"iteration": iterations, "val_loss": [1.0] * 2, "test_accuracy": [1.0] * 2})


def test_distributions_count_every_weight_where_it_is():
    theta = ticket(net())
    theta.weights["0.weight"].copy_(torch.tensor([[-4.0, -3.0, -0.5, 0.5], [3.0, 4.0, 0.1, 0.2], [0.0] * 4]))
    mask = theta.weights["0.weight"].abs() > 1
    found = analyses.distributions(theta, {"0.weight": mask}, bins=4)["0.weight"]
    assert found.edges.tolist() == [-4, -2, 0, 2, 4]
    assert found.initial.tolist() == [2, 1, 7, 2]
    assert found.survivors.tolist() == [2, 0, 0, 2]


def test_distributions_of_nothing():
    theta = ticket(net())
    found = analyses.distributions(theta, {"0.weight": torch.zeros(3, 4, dtype=torch.bool)})["0.weight"]
    assert found.survivors.sum() == 0
    assert found.initial.sum() == 12


def test_distributions_leave_out_what_was_pruned_before():
    model = net()
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in ticket(model).masks.items()}
    masks["0.weight"][0] = False
    found = analyses.distributions(ticket(model, masks), masks)["0.weight"]
    assert found.initial.sum() == 8


def test_movement_parts_what_the_next_pruning_keeps_and_takes():
    model = net()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model[0].weight += torch.arange(12.0).view(3, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0] = False  # pruned long ago: in neither group
    trained = ticket(model, {"0.weight": mask, "2.weight": torch.ones(2, 3, dtype=torch.bool)})
    kept = mask.clone()
    kept[1] = False
    found = analyses.movement(start, trained, {"0.weight": kept})["0.weight"]
    assert found.pruned.tolist() == pytest.approx([4, 5, 6, 7], abs=1e-5)
    assert found.kept.tolist() == pytest.approx([8, 9, 10, 11], abs=1e-5)


def test_movement_refuses_masks_that_grow():
    mask = torch.ones(3, 4, dtype=torch.bool)
    before = mask.clone()
    before[0, 0] = False
    trained = ticket(net(), {"0.weight": before, "2.weight": torch.ones(2, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="subset"):
        analyses.movement(net().state_dict(), trained, {"0.weight": mask})


def test_degrees_of_a_linear_layer():
    found = analyses.degrees(torch.tensor([[True, True, False], [True, False, False]]))
    assert found.into.tolist() == [2, 1]
    assert found.out_of.tolist() == [2, 1, 0]


def test_degrees_of_a_convolution_add_up_its_taps():
    mask = torch.zeros(2, 3, 3, 3, dtype=torch.bool)
    mask[1, 2, 0] = mask[1, 0, 1, 1] = True
    found = analyses.degrees(mask)
    assert found.into.tolist() == [0, 4]
    assert found.out_of.tolist() == [1, 0, 3]


def test_overlap():
    a = torch.tensor([True, True, False, False])
    b = torch.tensor([True, False, True, False])
    found = analyses.overlap({"w": a}, {"w": b})["w"]
    assert found.jaccard == pytest.approx(1 / 3)
    assert found.expected == pytest.approx(0.25 / 0.75)
    assert analyses.overlap({"w": a}, {"w": a})["w"].jaccard == 1
    empty = torch.zeros(4, dtype=torch.bool)
    assert analyses.overlap({"w": empty}, {"w": empty})["w"] == (1, 1)


def test_overlap_of_random_masks_is_the_expected_one():
    a, b = torch.rand(2, 200, 500) < torch.tensor([0.3, 0.1]).view(2, 1, 1)
    found = analyses.overlap({"w": a}, {"w": b})["w"]
    assert found.jaccard == pytest.approx(found.expected, rel=0.05)


def test_the_ends_of_the_line_are_the_two_nets():
    masks = {"0.weight": torch.rand(3, 4) < 0.5, "2.weight": torch.rand(2, 3) < 0.5}
    a, b = ticket(net(1), masks), ticket(net(2), masks)
    assert analyses.between(a, b, 0).same(a)
    assert analyses.between(a, b, 1).same(b)
    middle = analyses.between(a, b, 0.5).weights
    assert torch.allclose(middle["0.bias"], (a.weights["0.bias"] + b.weights["0.bias"]) / 2)
    assert not middle["0.weight"][~masks["0.weight"]].any()


def test_batchnorm_counters_are_not_averaged():
    models = [nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)) for _ in range(2)]
    models[0](torch.randn(4, 1, 5, 5))
    mask = {"0.weight": torch.ones(2, 1, 3, 3, dtype=torch.bool)}
    a, b = (Ticket(model.state_dict(), mask, {}) for model in models)
    found = analyses.between(a, b, 0.5).weights
    assert found["1.num_batches_tracked"] == 1
    assert torch.allclose(found["1.running_mean"], a.weights["1.running_mean"] / 2)


def test_connectivity_needs_one_mask():
    masks = {"0.weight": torch.zeros(3, 4, dtype=torch.bool), "2.weight": torch.ones(2, 3, dtype=torch.bool)}
    with pytest.raises(ValueError, match="same masks"):
        analyses.connectivity(ticket(net(1)), ticket(net(2), masks), net(), lambda _: (0.0, 0.0))


def test_connectivity_evaluates_each_step_of_the_way():
    a, b, model = ticket(net(1)), ticket(net(2)), net(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []

    def evaluate(each):
        seen.append(each[0].weight.detach().clone())
        return float(len(seen)), 0.5

    line = analyses.connectivity(a, b, model, evaluate, points=3)
    assert line == ([0, 0.5, 1], [1, 2, 3], [0.5] * 3)
    expected = [a.weights["0.weight"], (a.weights["0.weight"] + b.weights["0.weight"]) / 2, b.weights["0.weight"]]
    assert all(torch.allclose(*pair) for pair in zip(seen, expected, strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_instability():
    assert analyses.instability([0.1, 0.5, 0.3]) == pytest.approx(0.3)
    assert analyses.instability([0.2, 0.1, 0.2]) == pytest.approx(0)
    with pytest.raises(ValueError, match="two ends"):
        analyses.instability([0.1])

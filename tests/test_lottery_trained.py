"""What a training may do to the model it gets, and when a round takes what it needs of it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparselottery import SparseLotteryWarning, find_ticket


def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        x = torch.randn(16, 8)
        optimizer.zero_grad()
        F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()


def run(**changes):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    return find_ticket(net, **{"train": train, "rounds": 3, "fraction": 0.3, **changes})


@pytest.mark.parametrize("name", ["train", "retrain"])
def test_trainings_that_cannot_begin_at_a_step(name):
    def between(model, start, stop):
        train(model)

    told = rf"{name}: expected {name}\(model, start, stop\), as rewind_step is given: got an unexpected .* 'start'"
    with pytest.raises(TypeError, match=told):
        run(**{"train": between, name: train, "rewind_step": 3})
    assert run(train=between, retrain=between, rewind_step=3).density == run(retrain=train).density


def test_training_may_not_damage_the_indices():
    def damage(model):
        model[0].col_indices[0] = 99

    with pytest.raises(ValueError, match="col_indices: expected values in"):
        run(train=damage)


@pytest.mark.parametrize("change", ["moved", "loaded", "written"])
def test_training_may_renew_the_indices(change):
    """The same masks, in other tensors or written anew."""

    def renewing(model):
        result = train(model)
        if change == "moved":
            for layer in (model[0], model[2]):
                layer.col_indices = layer.col_indices.clone()
        elif change == "loaded":
            model.load_state_dict(copy.deepcopy(model).state_dict())
        else:
            model[0].crow_indices.copy_(model[0].crow_indices.clone())
        return result

    assert run(train=renewing).same(run())


@pytest.mark.parametrize("reset", [True, False])
def test_a_trained_model_that_is_changed_later_changes_nothing(reset):
    """Scores and starts are taken of the models' own values, before anybody else gets a turn."""
    models = []

    def keeping(model):
        models.append(model)
        return train(model)

    def spoil(_):
        with torch.no_grad():
            for parameter in models[-1].parameters():
                parameter.zero_()

    assert run(train=keeping, on_round=spoil, reset=reset).same(run(reset=reset))


def test_a_round_that_cannot_be_pruned_is_still_reported():
    records = []

    def diverging(model):
        with torch.no_grad():
            model[0].values[0] = torch.nan
        return {"loss": 1.0}

    with pytest.raises(ValueError, match="expected finite weights, got 1"):
        run(train=diverging, on_round=records.append)
    assert [record["round"] for record in records] == [0]


def test_a_layer_that_is_emptied_is_told():
    def shrinking(model):
        with torch.no_grad():
            model[0].values.mul_(1e-3)

    with pytest.warns(SparseLotteryWarning, match=r"no weight is left of 0\.weight: ") as warned:
        ticket = run(train=shrinking, rounds=2, fraction=0.75, scope="global")
    assert [warning.filename for warning in warned] == [__file__]
    assert not ticket.masks["0.weight"].any()

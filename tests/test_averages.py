"""Converted models under torch.optim.swa_utils."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparselottery import convert, prune, set_masks, to_dense
from sparselottery.convert import masks_of


def averaged(model, **how):
    """The average while the first layer's values, from 1 on, become 1 larger at a time."""
    average = AveragedModel(model, **how)
    with torch.no_grad():
        for number in (1.0, 2.0, 3.0):
            model[0].values.fill_(number)
            average.update_parameters(model)
    return average


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 4)).eval()
    return convert(net, prune(net, 0.5))


@pytest.mark.parametrize("use_buffers", [True, False])
def test_equal_weights_keep_the_indices(model, use_buffers):
    x, average = torch.randn(3, 30), averaged(model, use_buffers=use_buffers)
    y = average(x)
    for name in ("crow_indices", "col_indices"):
        assert torch.equal(getattr(average.module[0], name), getattr(model[0], name))
    with torch.no_grad():
        model[0].values.fill_(2.0)
    torch.testing.assert_close(y, model(x))


def test_exponential_weights_round_indices_down_and_are_refused(model):
    x, how = torch.randn(3, 30), {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}
    with pytest.raises(ValueError, match=r"or averaged \(AveragedModel: use_buffers=False\)"):
        averaged(model, use_buffers=True, **how)(x)
    y = averaged(model, **how)(x)
    with torch.no_grad():
        model[0].values.fill_(0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 3)
    torch.testing.assert_close(y, model(x))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_rounded_indices_that_are_some_pattern_are_refused(kind):
    """The column of one survivor, which becomes the one before."""
    layer = nn.Linear(64, 8) if kind == "linear" else nn.Conv2d(8, 8, 3)
    mask = torch.zeros(8, layer.weight[0].numel(), dtype=torch.bool)
    columns = torch.arange(1, 64, dtype=torch.int32)
    averages = (columns * 0.9 + columns * (1 - 0.9)).int()
    mask[0, columns[averages == columns - 1][0]] = True
    net = convert(nn.Sequential(layer), {"0.weight": mask.view_as(layer.weight)})
    x = torch.randn(3, 64) if kind == "linear" else torch.randn(2, 8, 5, 5)
    average = AveragedModel(net, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(net)
    torch.testing.assert_close(average(x), net(x))
    average.update_parameters(net)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"plan: .*or averaged \(AveragedModel: use_buffers=False\)"):
            average(x)
    average.module.load_state_dict(net.state_dict())
    torch.testing.assert_close(average(x), net(x))


@pytest.mark.parametrize("written", [False, True])  # as a broadcast writes them
def test_a_model_whose_masks_have_moved_is_refused_until_the_average_has_them_too(written):
    """Equally many survivors of all rows, so that buffers are of the same sizes."""
    rows = [torch.eye(8, dtype=torch.bool).roll(shift, 1) for shift in (0, 3)]
    net = convert(
        nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), {"0.weight": rows[0], "2.weight": rows[0]}
    )
    with torch.no_grad():
        for each in [*net.parameters(), *net.buffers()] if written else ():
            each.copy_(each.clone())
    x, average = torch.randn(3, 8), averaged(net)
    average(x)
    set_masks(net, {"0.weight": rows[1]})
    refused = copy.deepcopy(average)
    refused.update_parameters(net)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"set_masks\(average.module, masks\)"):
            refused(x)
    refused.module.load_state_dict(net.state_dict())
    torch.testing.assert_close(refused(x), net(x))
    set_masks(average.module, {"0.weight": rows[1]})
    average.update_parameters(net)
    average(x)
    for name in ("crow_indices", "col_indices"):
        assert torch.equal(getattr(average.module[0], name), getattr(net[0], name))


def test_all_buffers_written_in_place_with_those_of_a_like_model(model):
    """As a broadcast to other processes does."""
    x, other = torch.randn(3, 30), convert(nn.Sequential(*to_dense(model)), masks_of(model))
    with torch.no_grad():
        for ours, theirs in zip(
            [*model.parameters(), *model.buffers()], [*other.parameters(), *other.buffers()], strict=True
        ):
            ours.copy_(theirs)
    torch.testing.assert_close(model(x), other(x))

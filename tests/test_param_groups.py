"""Weight decay reaches the survivors, or its absence is said."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from torch import nn

from sparselottery import MaskedLinear, SparseLotteryWarning, convert, param_groups, prune, to_dense


def model():
    dense = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 8), nn.Linear(8, 4))
    masks = prune(dense, 0.5)
    del masks["4.weight"]
    return convert(dense, masks)


def test_lazy_parameters_are_refused():
    net = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"expected parameters with a shape, got the lazy '1\.weight': call it once"):
        param_groups(net, 0.1)
    net(torch.randn(2, 3))
    assert [len(group["params"]) for group in param_groups(net, 0.1)] == [2, 2]


def by_ndim(net):
    return [p for p in net.parameters() if p.ndim >= 2], [p for p in net.parameters() if p.ndim < 2]


def by_name(net):
    named = list(net.named_parameters())
    return [p for n, p in named if "weight" in n], [p for n, p in named if "weight" not in n]


def by_type(net):
    decayed = {p for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) for p in m.parameters(recurse=False)}
    return list(decayed), [p for p in net.parameters() if p not in decayed]


def step(optimizer, net):
    net(torch.randn(3, 2, 4, 4)).square().sum().backward()
    optimizer.step()


def optimizer_of(groups, decays=(0.1, 0.0)):
    options = [{"params": params, "weight_decay": decay} for params, decay in zip(groups, decays, strict=True)]
    return torch.optim.AdamW(options)


def test_groups():
    net = model()
    net[1].frozen, net[2].bias.requires_grad = nn.Parameter(torch.ones(2, 2), requires_grad=False), False
    net[1].again = net[4]
    decayed, other = param_groups(net, 0.1)
    names = {parameter: name for name, parameter in net.named_parameters()}
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.1, 0.0)
    assert [names[p] for p in decayed["params"]] == ["0.values", "1.again.weight", "3.values"]
    assert [names[p] for p in other["params"]] == ["0.bias", "1.again.bias", "2.weight", "3.bias"]


def test_decay_equals_that_of_the_dense_model():
    net = model()
    dense, mask = to_dense(net), net[3].mask
    for each, groups in ((net, param_groups(net, 0.5)), (dense, param_groups(dense, 0.5))):
        optimizer = torch.optim.SGD(groups, lr=0.1)
        for parameter in each.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = each[3].bias.clone()
        optimizer.step()
        assert torch.equal(each[3].bias, before)
    torch.testing.assert_close(net[3].weight, dense[3].weight * mask)
    assert not net[3].weight.equal(model()[3].weight)


@pytest.mark.parametrize("split", [by_ndim, by_name, by_type])
def test_the_usual_groups_are_warned_of_once(split):
    net = model()
    optimizer = optimizer_of(split(net))
    with pytest.warns(SparseLotteryWarning, match=r"of 2 masked layers .* sparselottery.param_groups") as caught:
        step(optimizer, net)
    assert caught[0].filename == __file__  # where the step is
    step(optimizer, net)  # warnings are errors


@pytest.mark.parametrize("make", [copy.deepcopy, lambda net: net.to("meta").to_empty(device="cpu")])
def test_copies_and_moved_layers_are_known(make):
    net = model()
    state = net.state_dict()
    net = make(net)
    net.load_state_dict(state, assign=True)
    with pytest.warns(SparseLotteryWarning):
        step(optimizer_of(by_ndim(net)), net)


def test_nothing_is_said_where_nothing_is_wrong():
    net = model()
    step(torch.optim.AdamW(param_groups(net, 0.1)), net)
    step(torch.optim.AdamW(net.parameters()), net)
    step(optimizer_of(by_ndim(net), (0.0, 0.0)), net)
    step(optimizer_of(by_ndim(net), (0.1, 0.2)), net)
    step(torch.optim.Rprop(net.parameters()), net)  # knows no decay
    dense = to_dense(net)
    step(optimizer_of(by_ndim(dense)), dense)


def test_the_warning_can_be_silenced():
    net = model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparseLotteryWarning)
        step(optimizer_of(by_ndim(net)), net)


def test_no_layer_or_optimizer_is_kept_alive():
    from sparselottery import weight_decay
    from sparselottery.nn import base

    gc.collect()
    before = len(base.layers_alive()), len(weight_decay._SEEN)
    layer = MaskedLinear(3, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer.step()
    assert (len(base.layers_alive()), len(weight_decay._SEEN)) == (before[0] + 1, before[1] + 1)
    del layer, optimizer
    gc.collect()
    assert (len(base.layers_alive()), len(weight_decay._SEEN)) == before

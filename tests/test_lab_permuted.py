"""Masks in the order of another net's units."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from sparselottery import prune
from sparselottery.convert import prunable
from sparselottery.files import read_json
from sparselottery.lab import experiment, permuted
from sparselottery.lab.controls import reinit
from sparselottery.lab.grid import Grid, work
from sparselottery.lab.models import conv_net, lenet_300_100, resnet_18
from sparselottery.lab.settings import preset

NETS = {
    "lenet": (partial(lenet_300_100, 12, 4, hidden=(16, 8)), (12,)),
    "conv": (partial(conv_net, (6,), (3, 8, 8), 4, (16, 8)), (3, 8, 8)),
}


def shuffled(net, factory, orders):
    """The same function: unit j of a layer is unit order[j] of `net`."""
    other, before = factory(), None
    weights = dict(net.state_dict())
    for name in prunable(net):
        weight, bias, order = weights[name], name.replace("weight", "bias"), orders.get(name)
        if order is not None:
            weight, weights[bias] = weight[order], weights[bias][order]
        if before is not None:
            weight = weight.view(len(weight), len(before), -1)[:, before].view_as(weight)
        weights[name], before = weight, order
    other.load_state_dict(weights)
    return other


@pytest.mark.parametrize(("factory", "shape"), NETS.values(), ids=NETS)
def test_units_in_another_order_are_found_and_the_mask_does_the_same(factory, shape):
    net, generator = reinit(factory, 0), torch.Generator().manual_seed(1)
    names = list(prunable(net))[:-1]
    orders = {name: torch.randperm(len(prunable(net)[name]), generator=generator) for name in names}
    other, x = shuffled(net, factory, orders), torch.randn(40, *shape, generator=generator)
    torch.testing.assert_close(other(x), net(x))
    found = permuted.matched(other, net, x)
    assert found.keys() == orders.keys()
    for name in names:  # units that never fire are any of those
        dead = (permuted.activations(other, x)[name] == 0).all(1)
        assert torch.equal(found[name][~dead], orders[name][~dead])
    masks = prune(net, 0.5)
    carried = permuted.carried(masks, orders, other)
    with torch.no_grad():
        for each, chosen in ((net, masks), (other, carried)):
            for name, mask in chosen.items():
                prunable(each)[name].mul_(mask)
    assert any(not torch.equal(carried[name], mask) for name, mask in masks.items())
    torch.testing.assert_close(other(x), net(x))


def test_layers_without_a_mask_and_nets_with_branches():
    factory, _ = NETS["lenet"]
    net, orders = reinit(factory, 0), {"fc1.weight": torch.arange(15, -1, -1)}
    ((name, mask),) = list(prune(net, 0.5).items())[1:2]
    carried = permuted.carried({name: mask}, orders, net)
    assert carried.keys() == {name}
    assert torch.equal(carried[name], mask.flip(1))
    with pytest.raises(ValueError, match="permuted: expected a net whose layers follow one another"):
        permuted.matched(*(resnet_18(widths=(2, 3, 4)) for _ in range(2)), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("rewind", [0, 10])
def test_it_is_trained_beside_the_ladder(rewind, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "step_ms", lambda *_: {})
    trained = []
    train = experiment.train
    monkeypatch.setattr(experiment, "train", lambda *a, **k: trained.append(k.get("stop")) or train(*a, **k))
    wanted = Grid(
        preset("digits", rounds=1, iterations=40, eval_every=20, fraction=0.5, rewind_step=rewind),
        controls=("permuted",),
    )
    for job in wanted.jobs:
        work(wanted, tmp_path, job, lambda _: None)
    ladder = [rewind, None, None] if rewind else [None, None]
    assert trained == ladder + ([rewind] if rewind else []) + [None, None]
    record = read_json(tmp_path / "trial-0/permuted/draw-0/round-01.json")
    assert record["final_test_accuracy"] > 0.5
    ticket = read_json(tmp_path / "trial-0/ticket/round-01.json")
    assert record["nnz"] == ticket["nnz"]

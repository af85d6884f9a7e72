"""Units that two layers have in common, and permutations folded into both."""

from __future__ import annotations

import pytest
import torch
from blocks import is_blocky
from torch import nn

from sparselottery import convert, fold, prune
from sparselottery.grids import orders_in
from sparselottery.links import Link, links
from sparselottery.nn import MaskedSequential
from sparselottery.orders import Order, Permuted


def chain(*between, outputs=16, inputs=16):
    return nn.Sequential(nn.Linear(8, outputs), *between, nn.Linear(inputs, 4))


def pairs(model):
    return [link[:2] for link in links(model)]


def test_units_pass_through_what_treats_them_alike():
    model = chain(nn.BatchNorm1d(16), nn.PReLU(16), nn.Dropout(), nn.Identity())
    assert links(model) == [Link("0.weight", "5.weight", ("1", "2", "3", "4"))]
    assert pairs(convert(model, prune(model, 0.5))) == [("0.weight", "5.weight")]


def test_channels_are_units():
    convs = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    assert pairs(convs) == [("0.weight", "4.weight"), ("4.weight", "7.weight")]
    assert pairs(nn.ModuleDict({"net": convs})) == [("net.0.weight", "net.4.weight"), ("net.4.weight", "net.7.weight")]


@pytest.mark.parametrize(
    "model",
    [
        chain(nn.Softmax(1)),
        chain(nn.LayerNorm(16)),
        chain(nn.Sequential(nn.ReLU())),
        chain(nn.Unflatten(1, (8, 2)), nn.Flatten()),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 4)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2)),
        nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]),
    ],
)
def test_others_are_left_alone(model):
    assert links(model) == []


def test_a_layer_that_is_used_twice_is_in_no_link():
    shared, norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
    tied = nn.Linear(8, 8)
    tied.weight = shared.weight
    for others in ([shared, nn.Linear(8, 8), nn.ReLU(), shared], [shared, nn.Linear(8, 8), tied]):
        assert links(nn.Sequential(*others)) == []
    assert links(nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 8), norm)) == []
    relu = nn.ReLU()
    assert len(links(nn.Sequential(nn.Linear(8, 8), relu, nn.Linear(8, 8), relu, nn.Linear(8, 8)))) == 2


class Own(nn.Sequential):
    def forward(self, x):
        return self[0](x) + super().forward(x)


def test_a_forward_of_its_own_may_read_units():
    assert links(Own(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))) == []


GRAINS = {"0.weight": (4, 4), "3.weight": (4, 4)}


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(24, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.PReLU(12), nn.Linear(12, 3)
    )
    model(torch.randn(9, 24))
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2)
        model[4].weight.uniform_(0.1, 0.9)
        for scaled in (0, 3):
            model[scaled].weight.mul_(torch.rand(model[scaled].weight.shape[0], 1) + 0.2)
    return model.eval()


def test_linked_layers_share_an_order():
    model, masks = net(), None
    grains = {name: Permuted(*block) for name, block in GRAINS.items()}
    for _ in range(3):
        masks = prune(model, 0.3, masks, granularity=GRAINS, permute=True)
        axes, orders = orders_in(masks, grains, links(model))
        assert axes[1][1] == axes[0][0]
        assert torch.equal(orders[0].rows, orders[1].columns)
        assert all(is_blocky(order.permuted(masks[name]), (4, 4)) for order, name in zip(orders, GRAINS, strict=True))
    assert not orders[0].is_natural


def test_weights_of_units_that_lead_nowhere_go_first():
    model = net()
    masks = {name: torch.ones_like(model.get_parameter(name), dtype=torch.bool) for name in (*GRAINS, "5.weight")}
    masks["3.weight"][:, [0, 5, 6, 11]] = False  # hidden units without outputs
    masks["5.weight"][:, :8] = False  # and 8 of the next layer
    with torch.no_grad():
        model[0].weight[[0, 5, 6, 11]] = 100
        model[3].weight[:8] = 100
    pruned = prune(model, 0.7, masks, granularity=GRAINS, permute=True)
    assert not pruned["0.weight"][[0, 5, 6, 11]].any()
    assert not pruned["3.weight"][:8].any()
    alone = prune(nn.ModuleDict(dict(model.named_children())), 0.7, masks, granularity=GRAINS, permute=True)
    assert alone["0.weight"][[0, 5, 6, 11]].all()


def test_masks_without_a_common_order_keep_their_own():
    model = net()
    masks = {}
    for seed, (name, block) in enumerate(GRAINS.items()):
        alone = {name: torch.ones(model.get_parameter(name).shape, dtype=torch.bool)}
        torch.manual_seed(seed)
        order = Order(*map(torch.randperm, alone[name].shape))
        grid = torch.rand(*(size // step for size, step in zip(alone[name].shape, block, strict=True))) < 0.5
        masks[name] = order.permuted(grid.repeat_interleave(4, 0).repeat_interleave(4, 1))
    grains = {name: Permuted(*block) for name, block in GRAINS.items()}
    axes, _ = orders_in(masks, grains, links(model))
    assert axes == [(0, 1), (2, 3)]
    pruned = prune(model, 0.4, masks, granularity=GRAINS, permute=True)
    assert not any((pruned[name] & ~mask).any() for name, mask in masks.items())


def test_folded_units_are_in_the_order_of_the_blocks(monkeypatch):
    monkeypatch.setattr("sparselottery.orders.BLOCKS", ((4, 4),))
    model = net()
    masked = convert(model, prune(model, 0.6, granularity=GRAINS, permute=True)).eval()
    folded = fold(masked)
    assert type(folded) is MaskedSequential
    assert not folded.training
    x = torch.randn(7, 24)
    torch.testing.assert_close(folded(x), masked(x))
    assert not is_blocky(masked[3].mask, (4, 4))
    assert is_blocky(folded[3].mask, (4, 4))
    rows = folded[0].mask.unflatten(0, (4, 4))
    assert torch.equal(rows.all(1), rows.any(1))  # its columns, the inputs of the net, stay where they are
    assert folded[0].nnz == masked[0].nnz
    torch.testing.assert_close(fold(folded)(x), folded(x))


def test_what_has_no_blocks_is_folded_into_nothing():
    model = net()
    masked = convert(model, prune(model, 0.5))
    folded = fold(masked)
    assert all(map(torch.equal, folded.state_dict().values(), masked.state_dict().values()))

"""Permutations folded into the layers on both sides of them."""

from __future__ import annotations

import operator

import pytest
import torch
from blocks import is_blocky
from branches import Branches
from torch import nn

from sparselottery import convert, fold, prune
from sparselottery.grids import orders_in
from sparselottery.links import links
from sparselottery.nn import MaskedSequential
from sparselottery.orders import Order, Permuted

LAYERS = {"enter", "one", "two", "leave"}  # of Branches
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
    folded = fold(masked, torch.randn(7, 24))
    assert type(folded) is MaskedSequential
    assert not folded.training
    x = torch.randn(7, 24)
    torch.testing.assert_close(folded(x), masked(x))
    assert not is_blocky(masked[3].mask, (4, 4))
    assert is_blocky(folded[3].mask, (4, 4))
    rows = folded[0].mask.unflatten(0, (4, 4))
    assert torch.equal(rows.all(1), rows.any(1))  # its columns, the inputs of the net, stay where they are
    assert folded[0].nnz == masked[0].nnz
    torch.testing.assert_close(fold(folded, x)(x), folded(x))


def test_what_has_no_blocks_is_folded_into_nothing():
    model = net()
    masked = convert(model, prune(model, 0.5))
    folded = fold(masked, torch.randn(7, 24))
    assert all(map(torch.equal, folded.state_dict().values(), masked.state_dict().values()))


class Skips(nn.Module):
    """Calls the children of a Sequential one by one, and returns what is between them: torch.fx cannot see it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x, twice=False):
        found = [] if len(x) else None
        for layer in self.layers:
            x = layer(x)
            found.append(2 * x if twice else x)
        return {"all": found}


@pytest.mark.parametrize("example", [torch.randn(5, 24), (torch.randn(5, 24), True), {"x": torch.randn(5, 24)}])
def test_an_example_shows_what_the_structure_does_not(example, monkeypatch):
    monkeypatch.setattr("sparselottery.orders.BLOCKS", ((2, 1),))
    torch.manual_seed(0)
    model = Skips()
    masks = {"layers.0.weight": (torch.rand(8, 24) < 0.5).repeat(2, 1), "layers.2.weight": torch.rand(3, 16) < 0.5}
    masked = convert(model, masks)
    with pytest.raises(ValueError, match="expected its children to be called as a whole"):
        fold(masked, example)
    assert masked.training
    folded = fold(masked.layers, torch.randn(5, 24))
    assert torch.equal(folded[0].mask[::2], folded[0].mask[1::2])


@pytest.mark.parametrize("between", [nn.BatchNorm1d(16), nn.PReLU(16)])
def test_a_norm_after_a_linear_layer_takes_an_example(between, monkeypatch):
    monkeypatch.setattr("sparselottery.orders.BLOCKS", ((2, 1),))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), between, nn.Linear(16, 3))
    with torch.no_grad():
        between.weight.uniform_(0.1, 0.9)
    kind = type(between).__name__
    natural = convert(model, {"0.weight": (torch.rand(8, 24) < 0.5).repeat_interleave(2, 0)})
    assert torch.equal(fold(natural)[0].mask, natural[0].mask)  # nothing moves
    masked = convert(model, {"0.weight": (torch.rand(8, 24) < 0.5).repeat(2, 1), "2.weight": torch.rand(3, 16) < 0.5})
    with pytest.raises(ValueError, match=f"example_input: expected one, as {kind} '1' follows a linear layer"):
        fold(masked)
    with pytest.raises(ValueError, match="folded it returns something else of the example"):
        fold(masked, torch.randn(4, 16, 24))
    folded, x = fold(masked, torch.randn(4, 24)).eval(), torch.randn(7, 24)
    torch.testing.assert_close(folded(x), masked.eval()(x))
    assert not torch.equal(folded[0].mask, masked[0].mask)


def test_channels_are_folded_through_norms_pools_and_flatten(monkeypatch):
    monkeypatch.setattr("sparselottery.orders.BLOCKS", ((2, 1),))
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 4),
    )  # fmt: skip
    x = torch.randn(9, 3, 12, 12)
    model(x)
    with torch.no_grad():
        for at in (1, 2, 7):
            model[at].weight.uniform_(0.1, 0.9)
    masks = {name: (torch.rand(half, *shape) < 0.6).repeat(2, 1, 1, 1) for name, half, shape in
             (("0.weight", 4, (3, 3, 3)), ("4.weight", 3, (8, 3, 3)))}  # fmt: skip
    masked = convert(model, masks | {"8.weight": torch.rand(4, 6) < 0.8}).eval()
    folded = fold(masked)
    torch.testing.assert_close(folded(x), masked(x))
    for at in (0, 4):
        pairs_of_rows = folded[at].mask.unflatten(0, (-1, 2))
        assert torch.equal(pairs_of_rows[:, 0], pairs_of_rows[:, 1])
        assert not torch.equal(folded[at].mask, masked[at].mask)


@pytest.mark.parametrize("pruned", [("enter", "two"), ("one", "two"), ("enter", "one", "two", "leave")])
def test_residual_nets_are_folded(pruned, monkeypatch):
    monkeypatch.setattr("sparselottery.orders.BLOCKS", ((2, 1),))
    torch.manual_seed(0)
    model, x = Branches(operator.add, nn.Sequential(nn.BatchNorm2d(6), nn.PReLU(6))), torch.randn(5, 3, 8, 8)
    model(x)
    with torch.no_grad():
        for norm in (model.norm, *model.between):
            norm.weight.uniform_(0.1, 0.9)
    grains = {f"{name}.weight": (2, 1) for name in pruned if name != "leave"}
    masks = prune(
        model, 0.5, granularity=grains, permute=True, ignore=[f"{name}.weight" for name in LAYERS - {*pruned}]
    )
    masked = convert(model, {f"{name}.weight": masks[f"{name}.weight"] for name in pruned}).eval()
    folded = fold(masked, x)
    torch.testing.assert_close(folded(x), masked(x))
    torch.testing.assert_close(fold(masked)(x), masked(x))
    for name in {*pruned} - {"leave"}:
        before, after = (getattr(each, name).mask.unflatten(0, (-1, 2)) for each in (masked, folded))
        assert not torch.equal(before[:, 0], before[:, 1])
        assert torch.equal(after[:, 0], after[:, 1])


def test_layers_that_write_the_same_units_share_an_order():
    torch.manual_seed(0)
    model = Branches(operator.add)
    grains = dict.fromkeys(["enter.weight", "two.weight"], (2, 1)) | {"one.weight": (2, 2)}
    masks = prune(model, 0.6, granularity=grains, permute=True)
    orders = dict(
        zip(grains, orders_in(masks, {n: Permuted(*g) for n, g in grains.items()}, links(model))[1], strict=True)
    )
    assert torch.equal(orders["enter.weight"].rows, orders["two.weight"].rows)
    assert torch.equal(orders["enter.weight"].rows, orders["one.weight"].columns)
    assert all(is_blocky(order.permuted(masks[name]), grains[name]) for name, order in orders.items())


def test_tied_weights_stay_where_they_are():
    model = nn.ModuleDict({"body": net(), "g": nn.Linear(8, 8), "h": nn.Linear(8, 8)})
    model["h"].weight = model["g"].weight
    masked = convert(model, prune(model, 0.5))
    assert masked["h"].values is masked["g"].values
    folded = fold(masked)
    assert folded["h"].values is folded["g"].values
    assert torch.equal(folded["g"].mask, masked["g"].mask)


def test_what_differs_is_not_taken_for_rounding_in_16_bits(monkeypatch):
    """A tensor that stands for others is no torch.Tensor: what depends on that does not show in a trace."""
    monkeypatch.setattr("sparselottery.orders.BLOCKS", ((2, 1),))

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            units = self.one(x)
            units = units * torch.linspace(1, 1.2, 16).to(x) if isinstance(units, torch.Tensor) else units
            return 5 * x + self.two(units)

    torch.manual_seed(0)
    masks = {"one.weight": (torch.rand(8, 8) < 0.5).repeat(2, 1)}
    masked = convert(Asks().bfloat16(), masks)
    with pytest.raises(ValueError, match="folded it returns something else"):
        fold(masked, torch.randn(4, 8).bfloat16())

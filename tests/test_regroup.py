"""Finished masks of single weights, put into blocks."""

from __future__ import annotations

import pytest
import torch
from blocks import blocky, is_blocky
from torch import nn

from sparselottery import Pattern, Ticket, convert, prune, regroup
from sparselottery.links import links
from sparselottery.orders import order_of


def scattered(shape, block, density, seed=0, keep=0.8, noise=0.02):
    """Survivors mostly in blocks of a shuffled matrix."""
    generator = torch.Generator().manual_seed(seed)
    mask = blocky(shape, block, seed, density)
    for dim, size in enumerate(shape[:2]):
        mask = mask.index_select(dim, torch.randperm(size, generator=generator))
    return torch.where(
        mask, torch.rand(shape, generator=generator) < keep, torch.rand(shape, generator=generator) < noise
    )


def test_survivors_are_gathered_and_their_blocks_filled():
    mask = scattered((64, 48), (8, 8), 0.2)
    before = {"weight": mask.clone()}
    masks, (row,) = regroup(before, (8, 8))
    assert torch.equal(before["weight"], mask)
    pattern = Pattern.from_mask(masks["weight"])
    assert order_of(pattern, pattern.shape, (8, 8)) is not None
    assert (row["layer"], row["block"]) == ("weight", (8, 8))
    assert row["before"] == pytest.approx(mask.float().mean().item())
    assert row["after"] == pytest.approx(masks["weight"].float().mean().item())
    assert abs(row["after"] - row["before"]) <= 0.5 / 48
    assert row["held"] == pytest.approx(((mask & masks["weight"]).sum() / mask.sum()).item())
    assert row["held"] > 0.75
    assert regroup(before, (8, 8), permute=False).report[0]["held"] < 0.45


def test_refill_says_how_many_weights_there_are_after():
    mask = {"weight": scattered((64, 48), (8, 8), 0.2)}
    held = []
    for refill in (0.5, 1.0, 1.5):
        (row,) = regroup(mask, (8, 8), refill=refill).report
        assert abs(row["after"] - refill * row["before"]) <= 0.5 / 48
        held.append(row["held"])
    assert held == sorted(held)
    assert held[2] > 0.9
    assert regroup(mask, (8, 8), refill=100).masks["weight"].all()
    assert regroup(mask, (8, 8), refill=1e-9).masks["weight"].sum() == 64


@pytest.mark.parametrize("permute", [False, True])
def test_weights_count_and_not_blocks_where_the_border_cuts_some_off(permute):
    mask = torch.zeros(33, 33, dtype=torch.bool)
    mask[:16] = torch.rand(16, 33, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, 32] = mask[32] = True  # blocks of a row or a column, which win
    for refill in (0.5, 1.0):
        (row,) = regroup({"weight": mask}, (16, 16), refill=refill, permute=permute).report
        assert abs(row["after"] - refill * row["before"]) <= 128 / 33**2


def test_plain_blocks_are_those_of_the_weight_as_it_is():
    mask = torch.zeros(6, 6, 2, dtype=torch.bool)
    mask[:2, 2:5, 1] = mask[5, 5, 0] = True
    masks, (row,) = regroup({"weight": mask}, (2, 2), permute=False)
    assert is_blocky(masks["weight"], (2, 2))
    assert masks["weight"].sum() == 8
    assert masks["weight"][:2, 2:6, 1].all()
    assert row["held"] == 6 / 7


def test_single_weights_and_empty_layers_stay_as_they_are():
    masks = {
        "a.weight": torch.rand(8, 8) < 0.3,
        "b.weight": torch.rand(8, 8) < 0.3,
        "c.weight": torch.ones(0, 4).bool(),
    }
    regrouped, report = regroup(masks, {"b.*": (4, 4), "c.*": (4, 4)})
    assert torch.equal(regrouped["a.weight"], masks["a.weight"])
    assert regrouped["a.weight"].data_ptr() != masks["a.weight"].data_ptr()
    assert [row["layer"] for row in report] == ["b.weight"]
    assert list(regrouped) == list(masks)


def test_of_a_ticket_and_with_links():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    theta = Ticket.from_model(convert(model, prune(model, 0)))
    ticket = Ticket(theta.weights, prune(model, 0.7), {})
    hidden = {"0.weight": (4, 4), "2.weight": (4, 4)}
    regrouped = regroup(ticket, hidden, links=links(model))
    again = theta.pruned(regrouped.masks, {})
    assert again.masks["4.weight"].equal(ticket.masks["4.weight"])
    for name in hidden:
        assert abs(again.masks[name].sum() - ticket.masks[name].sum()) <= 8
        assert torch.equal(again.weights[name] != 0, again.masks[name])  # what came back has its initial weight
    assert regroup(ticket.masks, hidden, links=links(model)).report == regrouped.report


def test_rows_beside_blocks_are_refused():
    masks = {name: torch.ones(8, 8, dtype=torch.bool) for name in ("a", "b")}
    with pytest.raises(ValueError, match="granularity: expected blocks, got rows for 'b'"):
        regroup(masks, {"a": (4, 4), "b": "rows"})


@pytest.mark.parametrize(
    ("granularity", "how", "message"),
    [
        ("2:4", {"permute": False}, "granularity: expected blocks, got 2:4 for 'weight'"),
        ({"*": "rows"}, {"permute": False}, "granularity: expected blocks, got rows for 'weight'"),
        ((8, 99), {}, "granularity: expected blocks smaller than 'weight', which is 8x8, got 8x99"),
        ((99, 99), {"permute": False}, "granularity: expected blocks smaller than 'weight', which is 8x8, got 99x99"),
        ((4, 4), {"refill": 0}, "refill: expected a positive number, got 0"),
        ((1, 1), {}, "permute: expected a granularity with blocks"),
    ],
)
def test_what_makes_no_sense(granularity, how, message):
    with pytest.raises(ValueError, match=message):
        regroup({"weight": torch.ones(8, 8, dtype=torch.bool)}, granularity, **how)

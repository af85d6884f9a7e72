"""Pruning by other scores than magnitudes, and N:M masks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparselottery import convert, find_ticket, prune
from sparselottery.n_of_m import NofM, fraction_of, n_of_m
from sparselottery.saliency import fisher, taylor


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def loss(model: nn.Module, batch: tuple) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(count: int = 3) -> list[tuple]:
    torch.manual_seed(1)
    return [(torch.randn(5, 6), torch.randint(0, 4, (5,))) for _ in range(count)]


def test_the_lowest_scores_go_whatever_the_weights_are():
    scores = {"0.weight": torch.arange(48.0).view(8, 6), "2.weight": -torch.arange(32.0).view(4, 8)}
    masks = prune(net(), 0.25, scores=scores)
    assert torch.equal(masks["0.weight"].flatten(), torch.arange(48) >= 12)
    assert torch.equal(masks["2.weight"].flatten(), torch.arange(32) < 24)


def test_scores_of_survivors_are_those_of_whole_weights():
    model = net()
    masks = prune(model, 0.5)
    dense = {name: torch.rand(mask.shape) for name, mask in masks.items()}
    alive = {name: dense[name][mask] for name, mask in masks.items()}
    one, other = (prune(model, 0.3, masks, scores=scores) for scores in (dense, lambda model: alive))
    for name, mask in one.items():
        assert torch.equal(mask, other[name])
        assert not (mask & ~masks[name]).any()
        assert int(mask.sum()) == len(alive[name]) - round(0.3 * len(alive[name]))


@pytest.mark.parametrize(
    ("scores", "error", "says"),
    [
        ({"0.weight": torch.rand(8, 6)}, ValueError, "scores: expected those of '2.weight', got those of"),
        (lambda model: None, TypeError, "scores: expected tensors by layer, got NoneType"),
        ({"0.weight": torch.rand(6, 8), "2.weight": torch.rand(4, 8)}, ValueError, r"shape \(8, 6\) or \(48,\), got"),
        ({"0.weight": [1.0], "2.weight": torch.rand(4, 8)}, TypeError, "expected a tensor of real numbers, got list"),
        (
            {"0.weight": torch.full((8, 6), torch.nan), "2.weight": torch.rand(4, 8)},
            ValueError,
            "expected finite scores, got 48 that are nan",
        ),
    ],
)
def test_scores_that_are_none_are_refused(scores, error, says):
    with pytest.raises(error, match=says):
        prune(net(), 0.5, scores=scores)


def test_scores_of_no_layer_are_refused():
    with pytest.raises(ValueError, match=r"scores: expected names among .* got '3.weight'"):
        prune(
            net(), 0.5, scores={"0.weight": torch.rand(8, 6), "2.weight": torch.rand(4, 8), "3.weight": torch.rand(2)}
        )


def test_scores_with_a_method_that_does_not_read_them_are_refused():
    with pytest.raises(ValueError, match="with method 'random'"):
        prune(net(), 0.5, scores={}, method="random")


@pytest.mark.parametrize("saliency", [taylor, fisher])
def test_saliency_of_a_masked_model_is_that_of_the_dense_one_at_the_mask(saliency):
    model = net().double()
    masks = prune(model, 0.5)
    converted = convert(model, masks)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    data = [(x.double(), y) for x, y in batches()]
    for name, scores in saliency(converted, data, loss).items():
        dense = saliency(model, data, loss)[name]
        torch.testing.assert_close(scores, dense[masks[name]], rtol=1e-10, atol=1e-14)
    assert all(parameter.grad is None for parameter in converted.parameters())


def test_saliencies_are_what_their_formulas_say():
    model, data = net().double(), [(x.double(), y) for x, y in batches()]
    each = [torch.autograd.grad(loss(model, batch), model[0].weight)[0] for batch in data]
    w = model[0].weight.detach()
    torch.testing.assert_close(taylor(model, data, loss)["0.weight"], (w * sum(each)).abs())
    torch.testing.assert_close(fisher(model, data, loss)["0.weight"], w**2 * sum(g * g for g in each))


@pytest.mark.parametrize("saliency", [taylor, fisher])
def test_no_batch_is_refused(saliency):
    with pytest.raises(ValueError, match="batches: expected at least one"):
        saliency(net(), [], loss)


def test_saliency_of_frozen_weights_is_refused():
    model = net()
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"weights that require gradients, got '2\.weight'"):
        taylor(model, batches(), loss)


def test_find_ticket_prunes_by_scores_of_the_trained_weights_and_goes_on_alike(tmp_path):
    def train(model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.rand_like(parameter))

    def scores(model):
        assert not any(parameter.grad is not None for parameter in model.parameters())
        return taylor(model, batches(), loss)

    def found(out, rounds):
        torch.manual_seed(3)
        return find_ticket(net(), train, rounds=rounds, fraction=0.5, scores=scores, out=out)

    whole = found(None, 3)
    found(tmp_path, 1)
    continued = found(tmp_path, 3)
    by_magnitude = found_by_magnitude(train)
    for name, mask in whole.masks.items():
        assert torch.equal(mask, continued.masks[name])
    assert any(not torch.equal(mask, by_magnitude.masks[name]) for name, mask in whole.masks.items())


def found_by_magnitude(train):
    torch.manual_seed(3)
    return find_ticket(net(), train, rounds=3, fraction=0.5)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 9), st.integers(1, 4), st.booleans(), st.integers(0, 2**31))
def test_n_of_m_keeps_the_highest_of_each_group(kept, more, columns, rows, taps, seed):
    draw = torch.Generator().manual_seed(seed)
    shape = (rows, columns, 2) if taps else (rows, columns)
    mask = torch.rand(shape, generator=draw) < 0.7
    scores = torch.randint(-2, 3, shape, generator=draw).float()  # with ties
    group = kept + more
    new = n_of_m(mask, scores[mask], NofM(kept, group))
    for row in range(rows):
        for tap in range(2 if taps else 1):
            at = (row, slice(None), tap) if taps else (row,)
            for first in range(0, columns, group):
                alive = [c for c in range(first, min(first + group, columns)) if mask[at][c]]
                best = sorted(alive, key=lambda c: (scores[at][c], c))[-kept:]
                assert [c for c in range(first, min(first + group, columns)) if new[at][c]] == sorted(best)


def test_ties_in_wide_groups_go_by_index():
    mask = torch.ones(1, 64, dtype=torch.bool)
    kept = n_of_m(mask, torch.arange(64.0) % 3, NofM(8, 64)).nonzero()[:, 1].tolist()
    assert kept == [column for column in range(64) if column % 3 == 2][-8:]


def test_the_fullest_group_decides_the_fraction():
    mask = torch.tensor([[1, 0, 0, 0, 1, 1, 1, 1, 1]]).bool()
    assert fraction_of(mask, NofM(2, 4)) == 0.5
    assert fraction_of(mask[:, :3], NofM(2, 4)) == 0.5  # of no whole group


def test_three_channels_are_a_group_that_the_border_cuts_off():
    masks = prune(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), 0.5, granularity="2:4")
    assert all((mask.sum(1) == 2).all() for mask in masks.values())


def test_2_of_4_then_1_of_4():
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 8))
    half = prune(model, 0.5, granularity="2:4")
    quarter = prune(model, 0.5, half, granularity={"0.weight": "1:4", "2.weight": "1:4"}, scope="global")
    for name, mask in half.items():
        assert (mask.unflatten(1, (-1, 4)).sum(2) == 2).all()
        assert (quarter[name].unflatten(1, (-1, 4)).sum(2) == 1).all()
        assert not (quarter[name] & ~mask).any()
    weight = model[2].weight.detach().abs().unflatten(1, (-1, 4))
    assert torch.equal(quarter["2.weight"].unflatten(1, (-1, 4)).int().argmax(2), weight.argmax(2))


def test_find_ticket_keeps_n_of_m_in_its_recipe():
    ticket = find_ticket(net(), lambda model: None, rounds=1, fraction=0.5, granularity={"2.weight": "2:4"})
    assert ticket.recipe["granularity"] == {"2.weight": "2:4"}
    assert (ticket.masks["2.weight"].unflatten(1, (-1, 4)).sum(2) == 2).all()


@pytest.mark.parametrize("granularity", ["4:4", "0:4", "2", "a:b", "2:4:8", {"*": "5:4"}])
def test_what_is_not_n_of_m_is_refused(granularity):
    with pytest.raises(ValueError, match="or 'N:M' with 1 <= N < M, got"):
        prune(net(), 0.5, granularity=granularity)


def test_a_fraction_that_leaves_something_else_is_refused():
    with pytest.raises(ValueError, match=r"expected the fraction 0\.5, which leaves 2:4, got 0\.3"):
        prune(net(), 0.3, granularity="2:4")


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        (
            {"rounds": 2, "fraction": 0.5, "granularity": "2:4"},
            ValueError,
            "rounds: expected 1, as one leaves 2:4 of 0.w",
        ),
        (
            {"rounds": 1, "fraction": 0.2, "granularity": "2:4"},
            ValueError,
            r"expected the fraction 0\.5, which leaves 2:4",
        ),
        ({"rounds": 1, "scores": {}}, TypeError, "scores: expected a function or None, got dict"),
    ],
)
def test_find_ticket_refuses_before_any_training(how, error, says):
    trained = []
    with pytest.raises(error, match=says):
        find_ticket(net(), trained.append, **how)
    assert not trained

"""Blocks of permuted weights: the order that a mask has, the order that is looked for, pruning in it."""

from __future__ import annotations

import json
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from blocks import blocky, is_blocky
from hypothesis import given, settings
from torch import nn

from sparselottery import Pattern, Ticket, convert, find_ticket, load_sparse, orders, prune
from sparselottery.arrange import Sought, find_orders
from sparselottery.grids import block_sums, grid_of
from sparselottery.masks import pools, prune_pools, rearrange, survivors, to_counts
from sparselottery.orders import Order, Permuted, order_of, permuted_block_of, permuted_pattern
from sparselottery.scores import at_random, by_magnitude


def shuffled(mask, seed, rows=True, columns=True):
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(size, generator=generator) for size in mask.shape[:2]]
    natural = [torch.arange(size) for size in mask.shape[:2]]
    return Order(*(order[i] if wanted else natural[i] for i, wanted in enumerate((rows, columns)))).permuted(mask)


def found(mask, block):
    return order_of(Pattern.from_mask(mask.flatten(1)), mask.shape, block)


def find_order(scores, alive, block, kept, start):
    return find_orders([Sought(scores, alive, block, kept)], [(0, 1)], [start])[0]


def natural(weight):
    return Order(*(torch.arange(size) for size in weight.shape[:2]))


@st.composite
def shuffled_masks(draw):
    block = draw(st.sampled_from([(2, 2), (4, 4), (3, 1), (1, 4), (4, 3), (9, 9)]))
    shape = (draw(st.integers(1, 17)), draw(st.integers(1, 17)), *draw(st.sampled_from([(), (2,), (2, 3)])))
    mask = blocky(shape, block, draw(st.integers(0, 99)), draw(st.sampled_from([0.0, 0.2, 0.7, 1.0])))
    return shuffled(mask, draw(st.integers(0, 99)), rows=block[0] > 1, columns=block[1] > 1), block


@settings(deadline=None)
@given(shuffled_masks())
def test_the_order_of_a_mask_is_found_in_it(drawn):
    mask, block = drawn
    order = found(mask, block)
    assert is_blocky(order.permuted(mask), block)
    assert torch.equal(order.restored(order.permuted(mask)), mask)
    for lines, size in zip(order, mask.shape, strict=False):
        assert torch.equal(lines.sort().values, torch.arange(size))


def test_the_order_of_a_mask_of_whole_blocks_is_the_natural_one():
    assert found(blocky((20, 24), (4, 4), 3, 0.5), (4, 4)).is_natural
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0]]).bool()
    order = found(mask, (2, 2))
    assert (order.rows.tolist(), order.columns.tolist()) == ([0, 2, 1, 3], [0, 3, 1, 2])
    assert not order.is_natural


@pytest.mark.parametrize("block", [(2, 2), (2, 1), (1, 2), (4, 4)])
def test_a_mask_of_single_weights_has_no_order(block):
    assert found(torch.rand(8, 8, generator=torch.Generator().manual_seed(1)) < 0.5, block) is None


def test_most_masks_of_single_weights_are_known_by_the_lengths_of_their_rows(monkeypatch):
    monkeypatch.setattr(orders, "_sums", pytest.fail)
    mask = torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    assert permuted_block_of(Pattern.from_mask(mask), mask.shape) == ((1, 1), None)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40, 2)])
def test_the_largest_blocks_are_found(shape):
    mask = shuffled(blocky(shape, (8, 8), 1, 0.5), 3)
    block, order = permuted_block_of(Pattern.from_mask(mask.flatten(1)), shape)
    assert block == (8, 8)
    assert is_blocky(order.permuted(mask), block)


def test_blocks_cut_off_by_the_border_stay_cut_off():
    mask = torch.zeros(5, 4, dtype=torch.bool)
    mask[[0, 2]] = torch.tensor([True, True, False, False])  # 2 + 2 + 1 rows: of three equal ones, two are a block
    mask[1] = ~mask[0]
    assert is_blocky(found(mask, (2, 2)).permuted(mask), (2, 2))
    mask[3] = mask[1]
    assert found(mask, (2, 2)).rows.tolist() == [0, 2, 1, 3, 4]
    mask[4] = torch.tensor([True, False, True, False])  # now columns 0 and 1 differ
    assert found(mask, (2, 2)) is None


@settings(deadline=None)
@given(shuffled_masks())
def test_the_permuted_pattern_is_that_of_the_permuted_mask(drawn):
    mask, block = drawn
    pattern, order = Pattern.from_mask(mask.flatten(1)), found(mask, block)
    values = torch.arange(pattern.nnz, dtype=torch.float32) + 1
    moved, index = permuted_pattern(pattern, mask.shape, order)
    weight = order.permuted(pattern.scatter(values).view(mask.shape)).flatten(1)
    assert torch.equal(moved.validate().scatter(values[index]), weight)


# the search


def held(weight, order, block, kept):
    """By the best blocks, of what as many single weights hold at most."""
    best = block_sums(order.permuted(weight), block).flatten().sort(descending=True).values[:kept]
    return float(best.sum() / weight.flatten().sort(descending=True).values[: kept * block[0] * block[1]].sum())


@pytest.mark.parametrize(
    ("shape", "block"), [((64, 48), (8, 8)), ((64, 48), (16, 1)), ((64, 48), (1, 8)), ((32, 32, 3, 3), (8, 8))]
)
@pytest.mark.parametrize("density", [0.1, 0.3])
def test_blocks_that_were_scattered_are_gathered(shape, block, density):
    generator = torch.Generator().manual_seed(0)
    planted = blocky(shape, block, 5, density)
    kept = int(planted.sum()) // (block[0] * block[1])
    scores = shuffled(planted, 7, rows=block[0] > 1, columns=block[1] > 1) + 0.2 * torch.rand(
        shape, generator=generator
    )
    alive = torch.ones(shape, dtype=torch.bool)
    order = find_order(scores, alive, block, kept, natural(scores))
    before, after = (held(scores, each, block, kept) for each in (natural(scores), order))
    assert after > 0.85
    assert after > before + 0.2


def test_what_later_rounds_keep_counts_from_the_first():
    weight = blocky((96, 96), (8, 8), 0, 0.05) + torch.rand(96, 96, generator=torch.Generator().manual_seed(2))
    masks, model = None, nn.Linear(96, 96, bias=False)
    with torch.no_grad():
        model.weight.copy_(shuffled(weight, 3))
    for _ in range(13):
        masks = prune(model, 0.2, masks, granularity=(8, 8), permute=True)
    assert masks["weight"].float().mean() < 0.06
    assert model.weight[masks["weight"]].mean() > 1.4  # 1.5 in what is planted, 1 without a look ahead


def test_the_search_is_deterministic_and_draws_nothing():
    weight = torch.randn(48, 40, generator=torch.Generator().manual_seed(0)).abs()
    alive = torch.ones(48, 40, dtype=torch.bool)
    state = torch.random.get_rng_state()
    first, second = (find_order(weight, alive, (8, 8), 6, natural(weight)) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (3, 5)])
def test_small_weights_have_an_order(shape):
    weight = torch.ones(shape)
    order = find_order(weight, torch.ones(shape, dtype=torch.bool), (4, 4), 0, natural(weight))
    assert [len(each) for each in order] == list(shape)


# pruning


@pytest.mark.filterwarnings("ignore:nothing is pruned", "ignore:no weight is left")
@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.sampled_from([0.1, 0.2, 0.5, 0.8]), min_size=1, max_size=5),
    st.sampled_from([(2, 2), (4, 4), (4, 1), (1, 4), (3, 2)]),
    st.sampled_from(["layer", "global"]),
    st.sampled_from(["magnitude", "random"]),
    st.integers(0, 9),
)
def test_exactly_k_blocks_go_and_none_returns(fractions, block, scope, method, seed):
    torch.manual_seed(seed)
    model, masks, names = nn.Sequential(nn.Conv2d(5, 7, (3, 2)), nn.Linear(13, 10)), None, ["0.weight", "1.weight"]
    for fraction in fractions:
        how = {"scope": scope, "granularity": block, "permute": True}
        pruned = prune(model, fraction, masks, method=method, **how)
        before = masks or {name: torch.ones_like(pruned[name]) for name in names}
        left = [[int(grid_of(each, name, Permuted(*block)).sum()) for name in names] for each in (before, pruned)]
        if scope == "global":
            assert sum(left[1]) == sum(left[0]) - round(fraction * sum(left[0]))
        else:
            assert left[1] == [n - round(fraction * n) for n in left[0]]
        assert not any((pruned[name] & ~before[name]).any() for name in names)
        masks = pruned


def test_more_is_kept_than_by_plain_blocks():
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    with torch.no_grad():
        model.weight.mul_(torch.rand(64, 1) ** 2).mul_(torch.rand(64) ** 2)  # some units and inputs matter more
    kept = {}
    for permute in (False, True):
        mask = prune(model, 0.9, granularity=(8, 8), permute=permute)["weight"]
        assert mask.sum() == 6 * 64
        kept[permute] = float(model.weight.detach()[mask].abs().sum())
    assert kept[True] > 1.5 * kept[False]


def test_a_mask_without_an_order_is_refused():
    torch.manual_seed(0)
    model = nn.Linear(16, 16)
    masks = prune(model, 0.5)
    message = r"masks\['weight'\]: expected whole 4x4 blocks in some order of its rows and columns"
    with pytest.raises(ValueError, match=message):
        prune(model, 0.5, masks, granularity=(4, 4), permute=True)
    with pytest.raises(ValueError, match=message):
        find_ticket(convert(model, masks), pytest.fail, rounds=1, granularity=(4, 4), permute=True)


@pytest.mark.parametrize("granularity", [(1, 1), "2:4", {"weight": (1, 1)}])
def test_permute_needs_blocks(granularity):
    with pytest.raises(ValueError, match="permute: expected a granularity with blocks to gather weights into, got "):
        prune(nn.Linear(8, 8), 0.5, granularity=granularity, permute=True)


def test_single_weights_beside_blocks_are_pruned_as_ever():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    masks = prune(model, 0.5, granularity={"0.*": (4, 4)}, permute=True)
    assert torch.equal(masks["1.weight"], prune(model, 0.5)["1.weight"])
    assert not is_blocky(masks["0.weight"], (4, 4))
    assert found(masks["0.weight"], (4, 4)) is not None


def test_rearranged_blocks_stay_permuted_blocks():
    masks = {"weight": shuffled(blocky((20, 21), (4, 4), 1, 0.4), 2)}
    moved = rearrange(masks, torch.Generator().manual_seed(0), Permuted(4, 4))["weight"]
    order = found(masks["weight"], (4, 4))
    assert is_blocky(order.permuted(moved), (4, 4))
    assert moved.sum() == masks["weight"].sum()
    assert not torch.equal(moved, masks["weight"])


def test_as_many_blocks_as_another_mask_has():
    torch.manual_seed(0)
    weights = {"weight": torch.randn(16, 16)}
    whole, like = ({"weight": mask} for mask in (torch.ones(16, 16).bool(), shuffled(blocky((16, 16), (4, 4)), 0)))
    exact = to_counts(whole, pools(["weight"], 0.1, granularity=(4, 4), permute=True), like)
    for score in (by_magnitude(weights, whole), at_random(whole)):
        assert survivors(prune_pools(whole, exact, score)) == survivors(like)


# tickets


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


BLOCKED = {"0.weight": (4, 4), "2.weight": (4, 1)}


def train(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(3):
        x = torch.randn(8, 24)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()


def test_a_ticket_of_permuted_blocks(tmp_path):
    how = {"granularity": BLOCKED, "permute": True}
    ticket = find_ticket(net(), train, rounds=3, fraction=0.3, out=tmp_path, **how)
    rounds = [Ticket.load(tmp_path / f"round-0{number}.safetensors") for number in range(4)]
    for earlier, later in pairwise(rounds):
        expected = prune(earlier.apply(net()), 0.3, **how)
        assert all(torch.equal(later.masks[name], mask) for name, mask in expected.items())
    assert all(found(ticket.masks[name], block) is not None for name, block in BLOCKED.items())
    assert not is_blocky(ticket.masks["0.weight"], (4, 4))
    assert ticket.recipe["granularity"] == {"0.weight": "4x4 permuted", "2.weight": "4x1 permuted"}
    again = find_ticket(net(), pytest.fail, rounds=3, fraction=0.3, out=tmp_path, **how)
    assert again.same(ticket)
    with pytest.raises(ValueError, match=r"granularity\.0\.weight: expected '4x4 permuted', got \[4, 4\]"):
        find_ticket(net(), pytest.fail, rounds=3, fraction=0.3, out=tmp_path, granularity=BLOCKED)


def test_a_ticket_of_permuted_blocks_computes_what_the_masked_net_does(tmp_path):
    ticket = find_ticket(net(), train, rounds=2, fraction=0.4, granularity=BLOCKED, permute=True)
    ticket.save(tmp_path / "ticket.safetensors")
    dense = net()
    dense.load_state_dict(ticket.weights)  # zeros where pruned
    x = torch.randn(5, 24)
    expected = dense(x)
    loaded = Ticket.load(tmp_path / "ticket.safetensors")
    torch.testing.assert_close(loaded.apply(net())(x), expected)
    torch.testing.assert_close(load_sparse(tmp_path / "ticket.safetensors")(x), expected)


def test_the_folder_names_blocks_and_no_order(tmp_path):
    find_ticket(net(), train, rounds=1, granularity=(4, 4), permute=True, ignore=["4.*"], out=tmp_path)
    told = json.loads((tmp_path / "settings.json").read_text())["granularity"]
    assert told == {"0.weight": "4x4 permuted", "2.weight": "4x4 permuted"}

"""Structured pruning: whole blocks, from `masks` to `find_ticket`."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import pairwise, product

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from blocks import blocky, is_blocky
from hypothesis import given, settings
from torch import nn

from sparselottery import Pattern, Ticket, find_ticket, prune, to_dense
from sparselottery.convert import convert
from sparselottery.export.dead import remove_dead
from sparselottery.grids import mask_of
from sparselottery.masks import pools, prune_pools, rearrange, survivors
from sparselottery.pattern import block_of
from sparselottery.scores import at_random, by_magnitude

SIDES = st.integers(1, 4)


def blocks_of(tensor, block):
    """Each block of an (O, C, ...) tensor, flattened, in order: index order of rows, then columns, then taps."""
    rows, cols = (range(0, size, step) for size, step in zip(tensor.shape, block, strict=False))
    taps = list(product(*map(range, tensor.shape[2:])))
    windows = [tensor[r : r + block[0], c : c + block[1]] for r in rows for c in cols]
    return [window[(..., *tap)].flatten() for window in windows for tap in taps]


@st.composite
def layers(draw):
    """Weights full of ties, masks of whole blocks with no relation to them, and the blocks."""
    weights, masks, granularity = {}, {}, {}
    for index in range(draw(st.integers(1, 3))):
        name, block = f"{index}.weight", draw(st.sampled_from([(1, 1), (2, 2), (3, 1), (1, 4), (4, 3), (9, 9)]))
        shape = draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=0, max_side=7))
        values = draw(hnp.arrays(np.int8, shape, elements=st.integers(-2, 2)))
        weights[name] = torch.from_numpy(values).float()
        masks[name] = blocky(shape, block, draw(st.integers(0, 99)), draw(st.sampled_from([0.2, 0.7, 1.0])))
        granularity[name] = block
    return weights, masks, granularity


@settings(deadline=None)
@given(
    layers(),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["layer", "global"]),
    st.sampled_from(["magnitude", "random"]),
)
def test_exactly_k_whole_blocks_go_and_none_returns(layers, fraction, scope, method):
    weights, masks, granularity = layers
    before = {name: mask.clone() for name, mask in masks.items()}
    chosen = pools(list(weights), fraction, scope=scope, granularity=granularity)
    score = by_magnitude(weights, masks) if method == "magnitude" else at_random(masks)
    pruned = prune_pools(masks, chosen, score)
    assert list(pruned) == list(masks)
    for names, _, block in chosen:
        old, new, means = [], [], []
        for name in names:
            old += [bool(part.any()) for part in blocks_of(masks[name], block)]
            new += [bool(part.any()) for part in blocks_of(pruned[name], block)]
            parts = blocks_of(weights[name].abs(), block)
            means += [Fraction(int(part.sum()), part.numel()) for part in parts]
            assert is_blocky(pruned[name], block)
        order = sorted((index for index, alive in enumerate(old) if alive), key=lambda index: means[index])  # stable
        k = round(fraction * len(order))
        assert sum(old) - sum(new) == k
        assert not any(after and not alive for alive, after in zip(old, new, strict=True))
        if method == "magnitude":
            gone = [index for index, (alive, after) in enumerate(zip(old, new, strict=True)) if alive > after]
            assert gone == sorted(order[:k])
    for name, mask in masks.items():
        assert torch.equal(mask, before[name])
        assert pruned[name].data_ptr() != mask.data_ptr() or mask.numel() == 0


@pytest.mark.filterwarnings("ignore:nothing is pruned", "ignore:no weight is left")
@settings(deadline=None)
@given(st.lists(st.floats(0, 0.9), max_size=5), st.tuples(SIDES, SIDES), st.sampled_from(["magnitude", "random"]))
def test_pruned_again_and_again(fractions, block, method):
    torch.manual_seed(0)
    model, masks = nn.Sequential(nn.Conv2d(5, 7, (3, 2)), nn.Flatten(), nn.Linear(7, 5)), None
    for fraction in fractions:
        pruned = prune(model, fraction, masks, granularity=block, method=method)
        assert all(is_blocky(mask, block) for mask in pruned.values())
        assert all(not (pruned[name] & ~mask).any() for name, mask in (masks or {}).items())
        masks = pruned


@settings(deadline=None)
@given(layers(), st.floats(0, 1, exclude_max=True), st.integers(0, 99))
def test_single_weights_are_as_without_a_granularity(layers, fraction, seed):
    weights, masks, _ = layers
    single = pools(list(weights), fraction, granularity={"*": (1, 1)})
    assert single == pools(list(weights), fraction)
    kept = prune_pools(masks, single, by_magnitude(weights, masks))
    for name, mask in masks.items():
        scores = weights[name].abs().masked_fill(~mask, torch.inf).flatten()
        expected = mask.flatten().clone()
        expected[scores.argsort(stable=True)[: round(fraction * int(mask.sum()))]] = False
        assert torch.equal(kept[name].flatten(), expected)
        order = torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(seed))
        moved = rearrange({name: mask}, torch.Generator().manual_seed(seed))[name]
        assert torch.equal(moved.flatten(), mask.flatten()[order])


def prune_one(weight, fraction, block, mask=None):
    masks = {"weight": torch.ones_like(weight, dtype=torch.bool) if mask is None else mask}
    chosen = pools(["weight"], fraction, granularity=block)
    return prune_pools(masks, chosen, by_magnitude({"weight": weight}, masks))["weight"]


def test_the_block_with_the_smallest_mean_goes():
    weight = torch.tensor(
        [[9.0, 0, 2, -2], [0, 0, 2, -2]]
    )  # means 2.25 and 2, though it has the three smallest weights
    assert prune_one(weight, 0.5, (2, 2)).tolist() == [[True, True, False, False]] * 2


def test_being_cut_off_is_no_disadvantage():
    weight = torch.full((3, 3), 1.0)
    weight[2] = weight[:, 2] = 1.5  # blocks of 4, 2, 2 and 1 weights; sums 4, 3, 3 and 1.5
    assert prune_one(weight, 0.25, (2, 2)).int().tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_blocks_of_equal_weights_tie_whatever_their_sizes(dtype):
    mask = prune_one(torch.full((8, 8), 0.1, dtype=dtype), 4 / 9, (3, 3))
    assert mask.int().tolist() == [[0] * 8] * 3 + [[0] * 3 + [1] * 5] * 3 + [[1] * 8] * 2


def test_a_block_of_large_half_precision_weights_has_a_finite_mean():
    weight = torch.full((4, 8), 60_000.0, dtype=torch.float16)
    weight[:, :4] = 50_000
    assert prune_one(weight, 0.5, (4, 4)).int().tolist() == [[0] * 4 + [1] * 4] * 4


def test_blocks_of_a_convolution_are_filters_by_channels_at_one_tap():
    weight = torch.full((4, 4, 3, 3), 5.0)
    weight[2:, :2, 1, 2] = 0.1
    mask = prune_one(weight, 1 / 36, (2, 2))
    assert torch.equal(mask, weight == 5)


def test_a_block_larger_than_the_matrix_is_all_of_it():
    weight = torch.randn(3, 5)
    assert prune_one(weight, 0.4, (16, 16)).all()
    assert not prune_one(weight, 0.6, (2**40, 2**40)).any()
    columns = prune_one(weight, 0.4, (64, 1))
    assert columns.sum() == 9
    assert torch.equal(columns.all(0), columns.any(0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_where_they_survive(bad):
    weight = torch.ones(4, 4)
    weight[0, 3] = bad
    with pytest.raises(ValueError, match="weight: expected finite weights, got 1 "):
        prune_one(weight, 0.5, (2, 2))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[:2, 2:] = False
    assert prune_one(weight, 1 / 3, (2, 2), mask).sum() == 8


def test_layers_of_another_granularity_do_not_compete():
    weights = {"a.weight": torch.full((4, 4), 0.1), "b.weight": torch.full((4, 4), 5.0), "c.weight": torch.ones(4, 4)}
    masks = {name: torch.ones(4, 4, dtype=torch.bool) for name in weights}
    chosen = pools(list(weights), 0.5, scope="global", granularity={"c.*": (2, 2)})
    pruned = prune_pools(masks, chosen, by_magnitude(weights, masks))
    assert [survivors({name: mask}) for name, mask in pruned.items()] == [0, 16, 8]
    together = pools(list(weights), 1 / 3, scope="global", granularity=(2, 2))
    pruned = prune_pools(masks, together, by_magnitude(weights, masks))
    assert [survivors({name: mask}) for name, mask in pruned.items()] == [0, 16, 16]


def test_random_pruning_picks_blocks_uniformly():
    masks = {"weight": torch.ones(4, 5, dtype=torch.bool)}
    masks["weight"][:2, :2] = False
    chosen, counts = pools(["weight"], 0.4, granularity=(2, 2)), torch.zeros(4, 5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2000):
        counts += prune_pools(masks, chosen, at_random(masks, generator))["weight"]
    assert not counts[:2, :2].any()
    assert ((counts[masks["weight"]] - 1200).abs() < 5 * (2000 * 0.6 * 0.4) ** 0.5).all()


@settings(deadline=None)
@given(layers(), st.integers(0, 99))
def test_rearranged_blocks_stay_whole_and_as_many(layers, seed):
    _, masks, granularity = layers
    before = {name: mask.clone() for name, mask in masks.items()}
    moved, again = (rearrange(masks, torch.Generator().manual_seed(seed), granularity) for _ in range(2))
    for name, mask in masks.items():
        assert moved[name].shape == mask.shape
        assert moved[name].sum() == mask.sum()
        assert is_blocky(moved[name], granularity[name])
        assert torch.equal(moved[name], again[name])
        assert torch.equal(mask, before[name])


def test_rearrange_moves_blocks_everywhere():
    mask = torch.zeros(20, 21, dtype=torch.bool)
    mask[:8] = True
    counts, generator = torch.zeros(20, 21), torch.Generator().manual_seed(0)
    for _ in range(1000):
        counts += rearrange({"weight": mask}, generator, (4, 4))["weight"]
    assert ((counts - 400).abs() < 5 * (1000 * 0.4 * 0.6) ** 0.5).all()  # 2 of 5 blocks of either size
    with pytest.raises(ValueError, match=r"masks\['weight'\]: expected whole 5x4 blocks, got 6 that are partly pruned"):
        rearrange({"weight": mask}, generator, (5, 4))


def test_mask_of_takes_apart_what_a_grid_put_together():
    grid = torch.tensor([[True, False], [False, True]])
    assert mask_of(grid, (2, 3), (3, 4)).int().tolist() == [[1, 1, 1, 0]] * 2 + [[0, 0, 0, 1]]


# whole rows


def test_whole_rows_go_by_their_mean():
    weight = torch.full((4, 3, 2, 2), 2.0)
    weight[1], weight[2], weight[3, 0, 0, 0] = 0.5, 1.0, 100.0
    assert prune_one(weight, 0.5, "rows").flatten(1).all(1).tolist() == [True, False, False, True]
    assert prune_one(weight, 0.5, "rows").sum() == 2 * 12
    mask = prune_one(weight, 0.25, "rows")
    assert prune_one(weight, 1 / 3, "rows", mask).flatten(1).any(1).tolist() == [True, False, False, True]


def test_rows_are_refused_where_a_part_is_gone():
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2, 1] = False
    with pytest.raises(ValueError, match=r"masks\['weight'\]: expected whole rows, got 1 that are partly pruned"):
        prune_one(torch.rand(4, 4), 0.5, "rows", mask)


def test_rearranged_rows_stay_rows():
    mask = torch.zeros(6, 3, 2, dtype=torch.bool)
    mask[:2] = True
    moved = [rearrange({"w": mask}, torch.Generator().manual_seed(seed), "rows")["w"] for seed in range(9)]
    assert all(each.flatten(1).all(1).sum() == each.flatten(1).any(1).sum() == 2 for each in moved)
    assert len({tuple(each.flatten(1).any(1).tolist()) for each in moved}) > 1


def test_a_ticket_of_rows_is_a_smaller_dense_net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                          nn.Linear(32, 12), nn.Tanh(), nn.Linear(12, 3))  # fmt: skip
    ticket = find_ticket(model, no_training, rounds=2, fraction=0.5, granularity={"0.*": "rows", "5.*": "rows"},
                         ignore=["7.*"])  # fmt: skip
    assert ticket.recipe["granularity"] == {"0.weight": "rows", "5.weight": "rows"}
    small, removed = remove_dead(ticket)
    assert removed.units == {"0": 6, "5": 9}
    assert small.shapes == {"0.weight": (2, 3, 3, 3), "5.weight": (3, 8), "7.weight": (3, 3)}
    assert small.density == 1
    x, net = torch.randn(4, 3, 6, 6), to_dense(small.apply()).train()
    torch.testing.assert_close(net.eval()(x), ticket.apply(model).eval()(x))
    optimizer = torch.optim.SGD(net.train().parameters(), lr=0.1)
    net(x).square().sum().backward()
    optimizer.step()
    assert all(parameter.grad.abs().sum() > 0 for parameter in net[5].parameters())


# of a model


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(6, 10, 3), nn.ReLU(), nn.Flatten(), nn.Linear(40, 12), nn.ReLU(), nn.Linear(12, 3))


BLOCKED = {"0.weight": (4, 4), "3.weight": (8, 8)}


def train(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    for _ in range(3):
        x = torch.randn(8, 6, 4, 4)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :3, 0, 0].argmax(1)).backward()
        optimizer.step()


def no_training(model):
    return None


def test_prune_by_name():
    masks = prune(net(), 0.5, granularity={"0.*": (4, 4), "3.weight": (8, 8)})
    assert [is_blocky(masks[name], block) for name, block in BLOCKED.items()] == [True, True]
    assert [sum(bool(part.any()) for part in blocks_of(masks[name], block)) for name, block in BLOCKED.items()] == [
        27,
        5,
    ]
    assert masks["5.weight"].sum() == 18
    assert not is_blocky(masks["5.weight"], (2, 2))


def test_what_is_pruned_in_blocks_is_found_to_have_them():
    masks = prune(net(), 0.5, granularity={"0.weight": (8, 8), "3.weight": (16, 1)})
    found = {name: block_of(Pattern.from_mask(mask.flatten(1)), mask.shape) for name, mask in masks.items()}
    assert found == {"0.weight": (8, 8), "3.weight": (128, 1), "5.weight": (1, 1)}  # 12 rows: any column is whole


def test_a_mask_of_no_whole_blocks_is_refused_where_it_is_pruned():
    masks = prune(net(), 0.5)
    message = r"masks\['3\.weight'\]: expected whole 8x8 blocks, got \d+ that are partly pruned"
    with pytest.raises(ValueError, match=message):
        prune(net(), 0.5, masks, granularity={"3.*": (8, 8)})
    with pytest.raises(ValueError, match=message):
        prune(net(), 0.5, masks, granularity={"3.*": (8, 8)}, method="random")
    with pytest.raises(ValueError, match=message):
        find_ticket(convert(net(), masks), pytest.fail, rounds=1, granularity={"3.*": (8, 8)})
    kept = prune(net(), 0.5, masks, granularity={"3.*": (8, 8)}, ignore=["3.*"])
    assert torch.equal(kept["3.weight"], masks["3.weight"])


def test_a_ticket_of_blocks(tmp_path):
    ticket = find_ticket(net(), train, rounds=2, fraction=0.3, granularity=BLOCKED, out=tmp_path)
    rounds = [Ticket.load(tmp_path / f"round-0{number}.safetensors") for number in range(3)]
    for earlier, later in pairwise(rounds):
        expected = prune(earlier.apply(net()), 0.3, granularity=BLOCKED)
        assert all(torch.equal(later.masks[name], mask) for name, mask in expected.items())
    assert all(is_blocky(ticket.masks[name], block) for name, block in BLOCKED.items())
    assert ticket.recipe["granularity"] == {"0.weight": [4, 4], "3.weight": [8, 8]}
    plain = find_ticket(net(), train, rounds=2, fraction=0.3)
    assert not plain.same(ticket)


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        ((1, 1), r"granularity\.0\.weight: expected \[4, 4\], got None"),
        ({**BLOCKED, "0.weight": (4, 8)}, r"granularity\.0\.weight: expected \[4, 4\], got \[4, 8\]$"),
        ({**BLOCKED, "5.weight": (2, 2)}, r"granularity\.5\.weight: expected None, got \[2, 2\]$"),
    ],
)
def test_another_granularity_does_not_go_on(tmp_path, granularity, message):
    find_ticket(net(), no_training, rounds=1, granularity=BLOCKED, out=tmp_path)
    with pytest.raises(ValueError, match=message):
        find_ticket(net(), pytest.fail, rounds=1, granularity=granularity, out=tmp_path)


def test_the_same_granularity_in_other_words_goes_on(tmp_path):
    ticket = find_ticket(net(), no_training, rounds=1, granularity=BLOCKED, ignore=["5.*"], out=tmp_path)
    words = {"0.*": [4, 4], "*": (8, 8)}  # the output layer is ignored, so its blocks are nobody's business
    again = find_ticket(net(), pytest.fail, rounds=1, granularity=words, ignore=["5.*"], out=tmp_path)
    assert again.same(ticket)


def test_a_folder_of_single_weights_does_not_mention_blocks(tmp_path):
    find_ticket(net(), no_training, rounds=1, out=tmp_path)
    assert "granularity" not in json.loads((tmp_path / "settings.json").read_text())
    find_ticket(net(), pytest.fail, rounds=1, granularity={"*": (1, 1)}, out=tmp_path)
    with pytest.raises(ValueError, match=r"granularity\.0\.weight: expected None, got \[4, 4\]"):
        find_ticket(net(), pytest.fail, rounds=1, granularity=BLOCKED, out=tmp_path)

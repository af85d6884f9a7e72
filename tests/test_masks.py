import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from sparselottery.lowest import lowest
from sparselottery.masks import as_mask, check, pools, prune_pools, rearrange, survivors
from sparselottery.scores import at_random, by_magnitude

LENET = {"fc1.weight": (300, 784), "fc2.weight": (100, 300), "fc3.weight": (10, 100)}
NAMES = ["conv.fc1.weight", "conv.fc2.weight", "head.weight"]


def whole(shapes):
    return {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}


@st.composite
def layers(draw):
    """Weights full of ties, and masks with no relation to them."""
    weights, masks = {}, {}
    for index in range(draw(st.integers(1, 3))):
        shape = draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=0, max_side=4))
        values = draw(hnp.arrays(np.int8, shape, elements=st.integers(-2, 2)))
        weights[f"{index}.weight"] = torch.from_numpy(values).float()
        masks[f"{index}.weight"] = torch.from_numpy(draw(hnp.arrays(bool, shape)))
    return weights, masks


@settings(deadline=None)
@given(hnp.arrays(np.int8, st.integers(0, 40), elements=st.integers(-3, 3)), st.data())
def test_lowest_is_the_head_of_a_stable_sort(scores, data):
    scores = torch.from_numpy(scores).float()
    k = data.draw(st.integers(0, len(scores)))
    expected = torch.zeros(len(scores), dtype=torch.bool)
    expected[torch.argsort(scores, stable=True)[:k]] = True
    assert torch.equal(lowest(scores, k), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_lowest_takes_exactly_k_of_equal_scores_the_first_by_index(dtype):
    assert lowest(torch.full((1000,), 0.5, dtype=dtype), 200).nonzero().flatten().tolist() == list(range(200))


@settings(deadline=None)
@given(layers(), st.floats(0, 1, exclude_max=True), st.sampled_from(["layer", "global"]))
def test_pruning_removes_exactly_k_of_the_smallest_survivors(layers, fraction, scope):
    weights, masks = layers
    before = {name: mask.clone() for name, mask in masks.items()}
    chosen = pools(list(weights), fraction, scope=scope)
    pruned = prune_pools(masks, chosen, by_magnitude(weights, masks))
    assert list(pruned) == list(masks)
    for names, *_ in chosen:
        old = torch.cat([masks[name].flatten() for name in names])
        new = torch.cat([pruned[name].flatten() for name in names])
        size = torch.cat([weights[name].flatten() for name in names]).abs()
        removed = old & ~new
        assert not (new & ~old).any()
        assert removed.sum() == round(fraction * int(old.sum()))
        if removed.any() and new.any():
            assert size[removed].max() <= size[new].min()
    for name, mask in masks.items():
        assert torch.equal(mask, before[name])
        assert pruned[name].data_ptr() != mask.data_ptr() or mask.numel() == 0


def test_negative_weights_are_as_large_as_positive_ones():
    weights, masks = {"weight": torch.tensor([[-3.0, 1.0, -2.0, 0.5]])}, whole({"weight": (1, 4)})
    pruned = prune_pools(masks, pools(["weight"], 0.5), by_magnitude(weights, masks))
    assert pruned["weight"].tolist() == [[True, False, True, False]]


def test_zeros_among_the_survivors_are_survivors():
    weights, masks = {"weight": torch.zeros(10, 10)}, whole({"weight": (10, 10)})
    assert survivors(prune_pools(masks, pools(["weight"], 0.2), by_magnitude(weights, masks))) == 80


def test_pruned_weights_do_not_count_and_do_not_return():
    weights = {"weight": torch.tensor([[9.0, 1.0, 2.0, 3.0]])}
    masks = {"weight": torch.tensor([[False, True, True, True]])}
    pruned = prune_pools(masks, pools(["weight"], 1 / 3), by_magnitude(weights, masks))
    assert pruned["weight"].tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_where_they_survive(bad):
    weights, masks = {"a.weight": torch.tensor([[1.0, bad]])}, {"a.weight": torch.tensor([[True, True]])}
    with pytest.raises(ValueError, match=r"a\.weight: expected finite weights, got 1 "):
        prune_pools(masks, pools(["a.weight"], 0.5), by_magnitude(weights, masks))
    masks = {"a.weight": torch.tensor([[True, False]])}
    prune_pools(masks, pools(["a.weight"], 0.5), by_magnitude(weights, masks))


def test_the_ladder_of_the_paper():
    masks, left = whole(LENET), {}
    chosen = pools(list(LENET), 0.2, output_fraction=0.1)
    generator = torch.Generator().manual_seed(0)
    for number in range(1, 17):
        masks = prune_pools(masks, chosen, at_random(masks, generator))
        left[number] = round(100 * survivors(masks) / 266_200, 1)
    assert [left[number] for number in (3, 7, 9, 15, 16)] == [51.3, 21.1, 13.5, 3.6, 2.9]


def test_global_pruning_compares_across_layers():
    weights = {"a.weight": torch.full((2, 4), 0.1), "b.weight": torch.full((2, 4), 5.0)}
    masks = whole({"a.weight": (2, 4), "b.weight": (2, 4)})
    pruned = prune_pools(masks, pools(list(masks), 0.5, scope="global"), by_magnitude(weights, masks))
    assert [survivors({name: mask}) for name, mask in pruned.items()] == [0, 8]


def test_random_scores_pick_uniformly_and_repeat_with_the_generator():
    masks = {"weight": torch.tensor([[True, False, True, True, True]])}
    counts, generator = torch.zeros(5), torch.Generator().manual_seed(1)
    for _ in range(2000):
        counts += prune_pools(masks, pools(["weight"], 0.5), at_random(masks, generator))["weight"][0]
    assert counts[1] == 0
    assert ((counts[masks["weight"][0]] - 1000).abs() < 5 * 500**0.5).all()
    first, again = (at_random(masks, torch.Generator().manual_seed(3))("weight") for _ in range(2))
    assert torch.equal(first, again)


def test_pools_by_scope():
    assert pools(NAMES, 0.2) == [((name,), 0.2, (1, 1)) for name in NAMES]
    assert pools(NAMES, 0.2, scope="global") == [(tuple(NAMES), 0.2, (1, 1))]
    assert pools(["weight"], 0.2, scope="global", output_fraction=0.1) == [(("weight",), 0.1, (1, 1))]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pools_of_their_own(scope):
    rates = {"conv.fc1.weight": 0.5, "conv.*": 0.4, "head.weight": 0.3}
    chosen = pools(NAMES, 0.2, scope=scope, rates=rates, output_fraction=0.1, ignore=["*fc2*"])
    assert {names: fraction for names, fraction, _ in chosen} == {
        ("conv.fc1.weight",): 0.5,  # the first pattern that matches
        ("conv.fc2.weight",): 0.0,  # ignore is above rates
        ("head.weight",): 0.1,  # output_fraction is above rates
    }


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fraction": 1.0}, ValueError, r"fraction: expected a value in \[0, 1\), got 1.0"),
        ({"fraction": -0.1}, ValueError, "fraction: expected"),
        ({"fraction": float("nan")}, ValueError, "fraction: expected"),
        ({"fraction": "0.2"}, TypeError, "fraction: expected a number, got '0.2'"),
        ({"output_fraction": 20}, ValueError, "output_fraction: expected"),
        ({"rates": {"head.weight": 2}}, ValueError, "head.weight.*: expected a value"),
        ({"rates": {"tail*": 0.1}}, ValueError, r"rates: .*'tail\*', which matches none"),
        ({"ignore": ["head"]}, ValueError, "ignore: .*'head', which matches none"),
        ({"ignore": "head.weight"}, TypeError, "ignore: expected a sequence of names"),
        ({"scope": "block"}, ValueError, "scope: expected one of .*'block'"),
        (
            {"granularity": "16x16"},
            ValueError,
            r"granularity: expected \(rows, columns\), 'rows' or 'N:M' with .* got '16x16'",
        ),
        ({"granularity": 16}, TypeError, "granularity: expected"),
        ({"granularity": (16, 16, 1)}, TypeError, "granularity: expected"),
        ({"granularity": {"head*": (4, 1.5)}}, TypeError, r"granularity\['head\*'\]: expected .*got \(4, 1\.5\)"),
        ({"granularity": (0, 16)}, ValueError, r"granularity: expected at least \(1, 1\), got \(0, 16\)"),
        ({"granularity": {"tail*": (4, 4)}}, ValueError, r"granularity: .*'tail\*', which matches none"),
    ],
)
def test_pools_refuse(arguments, error, message):
    with pytest.raises(error, match=message):
        pools(NAMES, **{"fraction": 0.2, **arguments})


def test_pools_by_granularity():
    granularity = {"conv.fc1.weight": [4, 4], "conv.*": (8, 1)}  # the first pattern that matches; lists as in JSON
    assert [pool.block for pool in pools(NAMES, 0.2, granularity=granularity)] == [(4, 4), (8, 1), (1, 1)]
    assert {pool.block for pool in pools(NAMES, 0.2, granularity=(3, 2), rates={"conv.*": 0.1})} == {(3, 2)}
    blocks = {"*fc2*": (4, 4)}
    assert pools(NAMES, 0.2, scope="global", granularity=blocks) == [
        (("conv.fc1.weight", "head.weight"), 0.2, (1, 1)),
        (("conv.fc2.weight",), 0.2, (4, 4)),
    ]
    assert pools(NAMES, 0.2, scope="global", granularity=(4, 4)) == [(tuple(NAMES), 0.2, (4, 4))]


def test_rearrange_moves_the_survivors_of_each_layer():
    masks = {"a.weight": torch.arange(200).view(10, 20) < 60, "b.weight": torch.ones(3, 4, dtype=torch.bool)}
    before = {name: mask.clone() for name, mask in masks.items()}
    moved, again = (rearrange(masks, torch.Generator().manual_seed(0)) for _ in range(2))
    assert survivors({"a": moved["a.weight"]}) == 60
    assert not torch.equal(moved["a.weight"], masks["a.weight"])  # a control that moves nothing controls nothing
    assert moved["a.weight"].any(1).all()
    assert moved["a.weight"].shape == (10, 20)
    for name, mask in masks.items():
        assert torch.equal(moved[name], again[name])
        assert torch.equal(mask, before[name])
    assert not torch.equal(rearrange(masks)["a.weight"], rearrange(masks)["a.weight"])
    assert rearrange({}) == {}


def test_check():
    weights = {"a.weight": torch.zeros(2, 3)}
    check({}, weights)
    check(whole({"a.weight": (2, 3)}), weights)
    with pytest.raises(ValueError, match=r"expected names among \['a.weight'\], got 'b.weight'"):
        check(whole({"b.weight": (2, 3)}), weights)
    with pytest.raises(ValueError, match=r"expected shape \(2, 3\), got \(3, 2\)"):
        check(whole({"a.weight": (3, 2)}), weights)
    with pytest.raises(TypeError, match="expected a bool tensor or bool NumPy array, got Tensor of torch"):
        check({"a.weight": torch.zeros(2, 3)}, weights)


@pytest.mark.parametrize("kind", ["as it is", "read only", "reversed"])
def test_numpy_masks(kind):
    array = np.random.default_rng(0).random((4, 5)) < 0.5
    array = array[::-1] if kind == "reversed" else array
    array.flags.writeable = kind != "read only"
    assert np.array_equal(as_mask("weight", array).numpy(), array)

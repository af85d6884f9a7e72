"""Passes in pieces equal one pass over the whole."""

import pytest
import torch

from sparselottery import Pattern, pieces
from sparselottery.lowest import lowest
from sparselottery.masks import pools, prune_pools
from sparselottery.pieces import divisible, keep, put, spans, take
from sparselottery.scores import by_magnitude


@pytest.fixture(autouse=True, params=[1, 7, 40])
def small(request, monkeypatch):
    """Pieces of a few weights, so that small tensors have several."""
    monkeypatch.setattr(pieces, "SIZE", request.param)


MASKS = {
    "some": torch.rand(11, 9, generator=torch.Generator().manual_seed(0)) < 0.4,
    "none": torch.zeros(5, 3, dtype=torch.bool),
    "all": torch.ones(5, 3, dtype=torch.bool),
    "last": torch.eye(6, dtype=torch.bool)[:, [1, 2, 3, 4, 5, 0]],
    "no rows": torch.ones(0, 3, dtype=torch.bool),
    "no columns": torch.ones(3, 0, dtype=torch.bool),
    "transposed": (torch.rand(9, 11, generator=torch.Generator().manual_seed(1)) < 0.4).t(),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_pass(mask):
    weight = torch.randn(mask.shape, dtype=torch.float64)
    weight[..., :1] = -0.0  # keeps its sign
    pattern, values = Pattern.from_mask(mask), weight[mask]
    assert pattern.validate().nnz == len(values)
    assert torch.equal(pattern.col_indices.long(), mask.nonzero()[:, 1])
    for found in (pattern.gather(weight), take(weight, mask)):
        assert torch.equal(found, values)
        assert torch.equal(found.signbit(), values.signbit())
        assert found.stride() == (1,)
    found, taken = Pattern.of_survivors(mask, weight)
    assert torch.equal(found.crow_indices, pattern.crow_indices)
    assert torch.equal(found.col_indices, pattern.col_indices)
    assert torch.equal(taken, values)
    assert torch.equal(taken.signbit(), values.signbit())
    dense = pattern.scatter(values)
    assert torch.equal(dense, weight.masked_fill(~mask, 0))
    assert torch.equal(dense[mask].signbit(), values.signbit())
    assert torch.equal(pattern.mask(), mask)
    chosen = torch.arange(len(values)) % 3 > 0
    expected = mask.clone()
    expected[mask] = chosen
    assert torch.equal(put(mask, chosen), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own, of jvp
def test_passes_that_somebody_follows_are_one():
    weight, mask = torch.randn(11, 9, dtype=torch.float64, requires_grad=True), MASKS["some"]
    pattern = Pattern.from_mask(mask)
    pattern.gather(weight).square().sum().backward()
    assert torch.equal(weight.grad, (2 * weight * mask).detach())
    values = weight.detach()[mask]
    batch = torch.stack([values, 2 * values])
    assert torch.equal(torch.vmap(pattern.scatter)(batch)[1], 2 * pattern.scatter(values))
    _, tangent = torch.func.jvp(pattern.scatter, (values,), (values,))
    assert torch.equal(tangent, pattern.scatter(values))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(values, values)
        assert not divisible(dual)
        found = torch.autograd.forward_ad.unpack_dual(pattern.scatter(dual)).tangent
    assert torch.equal(found, pattern.scatter(values))
    compiled = torch.compile(pattern.scatter, backend="eager", fullgraph=True)
    assert torch.equal(compiled(values), pattern.scatter(values))


def test_pruning_in_pieces():
    """Ties across pieces go by index."""
    weights, some = {"weight": torch.full((11, 9), -0.5)}, {"weight": MASKS["some"]}
    pruned = prune_pools(some, pools(["weight"], 0.5), by_magnitude(weights, some))["weight"]
    count = int(MASKS["some"].sum())
    assert pruned[MASKS["some"]].tolist() == [index >= round(0.5 * count) for index in range(count)]
    assert (weights["weight"] == -0.5).all()
    assert lowest(torch.full((99,), 2.0), 40).nonzero().flatten().tolist() == list(range(40))


@pytest.mark.parametrize("of", ["few", "repeated", "ties", "all"])
def test_a_sample_that_misleads_finds_the_same(of, monkeypatch):
    """Where every fifth score is seen, and these are the smallest, the largest, equal or as all are."""
    monkeypatch.setattr("sparselottery.lowest.SAMPLE", 40)
    scores = torch.randn(200, generator=torch.Generator().manual_seed(0))
    scores[::5] += {"few": -9, "repeated": 9, "ties": 0, "all": 0}[of]
    if of == "ties":
        scores[::5] = 0.25
    for k in (1, 2, 39, 40, 41, 100, 159, 160, 161, 199, 200):
        expected = torch.zeros(200, dtype=torch.bool)
        expected[torch.argsort(scores, stable=True)[:k]] = True
        assert torch.equal(lowest(scores, k), expected)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_kept_is_zero_to_the_bit(dtype):
    mask = torch.tensor([[True, False, False], [False, True, False]])
    values = torch.tensor([[-2.0, -2.0, -0.0], [1.0, 1.0, 3.0]]).to(dtype)
    if dtype.is_floating_point:
        values[0, 1], values[1, 0] = torch.nan, -torch.inf
    expected = torch.where(mask, values, torch.zeros((), dtype=dtype))
    for each in (values.clone(), values.t().clone().t()):
        keep(each, mask)
        bits = each.contiguous().view(torch.uint8)
        assert torch.equal(bits, expected.view(torch.uint8))


def test_spans_cover_all_rows():
    for rows, columns in ((0, 3), (1, 1), (10, 0), (10, 3), (5, 100)):
        covered = [row for span in spans(rows, columns) for row in range(rows)[span]]
        assert covered == list(range(rows))


@pytest.mark.parametrize("right", [False, True])
def test_places_among_ascending_numbers(right):
    ascending, values = torch.tensor([0, 2, 2, 5]), torch.tensor([-1, 0, 1, 2, 5, 6])
    expected = torch.tensor([0, 1, 1, 3, 4, 4] if right else [0, 0, 1, 1, 3, 4])
    found = pieces.places_in(ascending, values, right=right)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)
    assert torch.equal(torch.vmap(lambda each: pieces.places_in(ascending, each, right=right))(values), expected)

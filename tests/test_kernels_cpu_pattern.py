"""Native patterns against those of NumPy and torch, which run where no native library is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparselottery import MaskedLinear, Pattern, moves, set_masks
from sparselottery.kernels import cpu_pattern, native
from sparselottery.moves import carried
from sparselottery.nn import dense

pytestmark = pytest.mark.skipif(not native.available(), reason=native.status())
SHAPES = [(1, 1), (3, 64), (7, 63), (5, 200), (0, 4), (4, 0), (900, 900)]  # the last is for two threads


def masks(shape):
    """Two that share rows, with an empty row and a full one."""
    generator = torch.Generator().manual_seed(sum(shape))
    one, other = (torch.rand(shape, generator=generator) < density for density in (0.3, 0.4))
    one[1:2], other[2:3] = False, True
    other[3:] = one[3:]
    return one, other


def both(monkeypatch, compute):
    """The results of native code and without it."""
    results = [compute()]
    with monkeypatch.context() as patch:
        patch.setattr(native, "LIBRARY", None)
        results.append(compute())
    return results


def same(one, other):
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_patterns_of_masks(shape, density, monkeypatch):
    mask = torch.rand(shape) < density
    for each in (mask, mask.t(), mask.to(torch.uint8).mul_(200).view(torch.bool)):
        ours, theirs = both(monkeypatch, lambda each=each: Pattern.from_mask(each))
        assert ours.shape == theirs.shape
        assert all(map(same, ours.indices, theirs.indices))


@pytest.mark.parametrize("shape", SHAPES)
def test_indices_in_another_pattern(shape, monkeypatch):
    one, other = map(Pattern.from_mask, masks(shape))
    for ours, theirs in ((one, other), (other, one), (one, one), (one, Pattern.from_mask(torch.zeros(shape).bool()))):
        assert same(*both(monkeypatch, lambda ours=ours, theirs=theirs: ours.indices_in(theirs)))


@pytest.mark.parametrize("shape", SHAPES)
def test_positions_there_and_back(shape, monkeypatch):
    for mask in (*masks(shape), torch.zeros(shape).bool(), torch.ones(shape).bool()):
        pattern = Pattern.from_mask(mask)
        positions = mask.flatten().nonzero().squeeze(1)
        assert all(same(each, positions) for each in both(monkeypatch, pattern.positions))
        for each in both(monkeypatch, lambda at=positions: Pattern.from_positions(at, shape)):
            assert all(map(same, each.indices, pattern.indices))


@pytest.mark.parametrize("positions", [[-1, 2], [2, 2], [3, 2], [2, 12], [12], [11, 0]])
def test_positions_that_are_none(positions, monkeypatch):
    def refused():
        with pytest.raises(ValueError, match=r"positions: expected strictly ascending positions in \[0, 12\)"):
            Pattern.from_positions(torch.tensor(positions), (3, 4))

    both(monkeypatch, refused)


@pytest.mark.parametrize("shape", SHAPES)
def test_indices_that_are_valid(shape):
    rows, columns = shape
    for mask in masks(shape):
        crow_indices, col_indices = Pattern.from_mask(mask).indices
        assert cpu_pattern.is_valid(crow_indices, col_indices, shape)
        assert not cpu_pattern.is_valid(crow_indices + 1, col_indices, shape)
        assert not cpu_pattern.is_valid(crow_indices, torch.cat([col_indices, torch.zeros(1).int()]), shape)
        if mask.any():
            highest = int(col_indices.max())
            assert not cpu_pattern.is_valid(crow_indices, col_indices, (rows, highest))
            assert not cpu_pattern.is_valid(crow_indices, col_indices - int(col_indices.min()) - 1, shape)
        if rows > 2 and columns > 1:  # the third row is full
            twice, last = col_indices.clone(), int(crow_indices[3]) - 1
            if bool(mask[2].all()):
                twice[last] -= 1
                assert not cpu_pattern.is_valid(crow_indices, twice, shape)
            falling = crow_indices.clone()
            falling[1] = len(col_indices) + 1
            assert not cpu_pattern.is_valid(falling, col_indices, shape)


def test_indices_of_which_one_alone_is_wrong():
    begins_late, falls = torch.tensor([1, 2]).int(), torch.tensor([0, 2, 1, 3]).int()
    assert not cpu_pattern.is_valid(begins_late, torch.tensor([0, 1]).int(), (1, 2))
    assert not cpu_pattern.is_valid(falls, torch.tensor([0, 1, 2]).int(), (3, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fill", [0.0, 3.0])
def test_elements_that_are_carried(shape, dtype, fill, monkeypatch):
    one, other = map(Pattern.from_mask, masks(shape))
    for before, after in ((one, other), (other, one), (Pattern.from_mask(torch.zeros(shape).bool()), one)):
        elements = torch.randn(2 * before.nnz).mul(9).to(dtype)
        halves = elements[: before.nnz], elements[before.nnz :].requires_grad_(dtype.is_floating_point)
        tensors, fills = [*halves, elements.detach()[::2]], [fill, 0.0, fill]
        ours, theirs = both(monkeypatch, lambda b=before, a=after, t=tensors, f=fills: carried(b, a, t, f))
        assert all(map(same, ours, theirs))


@pytest.mark.parametrize("densities", [(0.98, 0.02), (0.02, 0.98), (0.9, 0.95), (0.5, 0.5), (0.1, 0.11), (1.0, 0.3)])
def test_elements_near_and_far_from_each_other(densities, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    for shape in (1, 16), (1, 47), (40, 90):
        near = torch.rand(shape, generator=generator)
        for other in near, torch.rand(shape, generator=generator):  # a mask within the other one, and two of their own
            before, after = (Pattern.from_mask(x < d) for x, d in zip((near, other), densities, strict=True))
            tensors, fills = [torch.randn(before.nnz), torch.randn(before.nnz).double()], [2.0, 0.0]
            ours, theirs = both(monkeypatch, lambda b=before, a=after, t=tensors, f=fills: carried(b, a, t, f))
            assert all(map(same, ours, theirs))


def test_what_native_code_carries_and_what_it_leaves_to_torch(monkeypatch):
    before, after = map(Pattern.from_mask, masks((7, 63)))
    sources, count = after.indices_in(before), before.nnz
    by_torch, cat = [], torch.cat
    monkeypatch.setattr(moves.torch, "cat", lambda each: by_torch.append(each[0]) or cat(each))
    for elements in (torch.randn(count), torch.randn(count, dtype=torch.complex64).imag):
        (moved,) = carried(before, after, [elements], [2.0])
        assert same(moved, cat([elements, torch.tensor([2.0])])[sources])
    assert not by_torch
    turned = torch.randn(count, dtype=torch.complex64).conj().imag  # a negative that is still to be taken
    for elements in (turned, torch.randn(count, dtype=torch.complex128), torch.ones(count, dtype=torch.bool)):
        (moved,) = carried(before, after, [elements], [0.0])
        assert same(moved, cat([elements, elements.new_zeros(1)])[sources])
    assert len(by_torch) == 3


def test_the_dense_weight_moves_in_its_buffer(monkeypatch):
    one, other = masks((7, 63))
    layer = MaskedLinear(63, 7, mask=one)
    layer.execution = "dense"
    x = torch.randn(3, 63)
    layer(x)
    weight = layer._dense._state.weight
    monkeypatch.setattr(dense.torch, "zeros", None)  # no other is made
    set_masks(layer, {"weight": other})
    assert layer._dense._state.weight is weight
    y = layer(x)
    monkeypatch.undo()
    torch.testing.assert_close(y, layer.to_dense()(x))


def test_a_failed_move_leaves_the_dense_weight(monkeypatch):
    one, other = masks((7, 63))
    layers = [MaskedLinear(63, 7, mask=one) for _ in range(2)]
    layers[0].execution = "dense"
    x = torch.randn(3, 63)
    with torch.no_grad():
        y = layers[0](x)

    def full_memory(*_):
        raise MemoryError

    monkeypatch.setattr(layers[1], "_compile", full_memory)  # the dense layer has moved already
    both = {f"{index}.weight": other for index in range(2)}
    with pytest.raises(MemoryError):
        set_masks(nn.Sequential(*layers), both)
    with torch.no_grad():
        assert torch.equal(layers[0](x), y)

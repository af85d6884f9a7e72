"""Compact execution: layers without the rows and columns in which nothing survived, against nn.Linear and nn.Conv2d."""

from __future__ import annotations

import copy

import pytest
import torch
from convs import FORMATS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparselottery import MaskedConv2d, MaskedLinear, MaskedSequential
from sparselottery.nn.compact import live, live_indices, live_shape
from sparselottery.pattern import Pattern

# Dead rows and dead columns of a mask (8, 6, ...).
DEAD = {
    "rows": ([0, 3, 7], []),
    "columns": ([], [0, 5]),
    "both": ([2, 3], [1, 2]),
    "all but one": ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4]),
    "all": (list(range(8)), []),
}


def mask_of(name, *taps):
    rows, columns = DEAD[name]
    mask = torch.rand(8, 6, *taps) < 0.7
    mask.view(8, 6, -1)[:, :, 0] = True  # every other row and column is live
    mask[rows], mask[:, columns] = False, False
    return mask


def pair(make, mask, **options):
    """A dense layer with zeros where pruned, and the masked one, executed compactly."""
    dense = make(6, 8, *mask.shape[2:][:1], **options, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.mul_(mask)
    masked = {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d}[make].from_dense(dense, mask)
    masked.execution = "compact"
    return dense, masked


def step(module, x):
    """y and the gradients of x, weight and bias for a gradient of y that is different everywhere."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    weight = module.values if hasattr(module, "values") else module.weight
    inputs = [x, weight, *([] if module.bias is None else [module.bias])]
    gy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad(y, inputs, gy)]


def assert_equal(dense, masked, x):
    for index, (ours, theirs) in enumerate(zip(step(masked, x), step(dense, x), strict=True)):
        torch.testing.assert_close(ours, theirs[masked.mask] if index == 2 else theirs)
        assert index == 2 or ours.stride() == theirs.stride()


@pytest.mark.parametrize("shape", [(6,), (5, 6), (0, 6), (2, 3, 6)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", DEAD)
def test_equals_linear(name, bias, shape):
    assert_equal(*pair(nn.Linear, mask_of(name), bias=bias), torch.randn(shape, dtype=torch.float64))


OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "stride and padding": {"stride": 2, "padding": (1, 2)},
    "dilated": {"dilation": 2, "padding": "same"},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
}


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", DEAD)
def test_equals_conv2d(name, options, memory_format):
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64).contiguous(memory_format=FORMATS[memory_format])
    dense, masked = pair(nn.Conv2d, mask_of(name, 3, 3), **OPTIONS[options])
    assert_equal(dense, masked, x)
    torch.testing.assert_close(masked(x[0]), dense(x[0]))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.floats(0, 1), st.integers(0, 2**31))
def test_what_is_live(rows, columns, taps, density, seed):
    torch.manual_seed(seed)
    mask = torch.rand(rows, columns, taps) < density
    pattern, shape = Pattern.from_mask(mask.flatten(1)), tuple(mask.shape)
    live_rows, live_columns = live(pattern, shape)
    index, channels, positions = live_indices(pattern, shape)
    assert live_shape(pattern, shape) == (len(index), len(channels), taps)
    assert torch.equal(live_rows.nonzero().flatten(), index)
    assert torch.equal(live_columns.nonzero().flatten(), channels)
    if mask.any():
        assert torch.equal(live_rows, mask.any(2).any(1))
        assert torch.equal(live_columns, mask.any(2).any(0))
        assert torch.equal(mask[index][:, channels].flatten().nonzero().flatten(), positions)
    else:
        assert (index.tolist(), channels.tolist(), positions.tolist()) == ([0], [0], [])


def test_it_is_offered_where_it_drops_something():
    whole_rows = torch.eye(6, dtype=torch.bool)
    assert MaskedLinear(6, 6, mask=whole_rows).executions == ("sparse", "dense")
    for name in DEAD:
        assert MaskedLinear(6, 8, mask=mask_of(name)).executions == ("sparse", "compact", "dense")
        assert MaskedConv2d(6, 8, 3, mask=mask_of(name, 3, 3)).executions == ("sparse", "compact", "dense")
    with pytest.raises(ValueError, match=r"expected one of \('sparse', 'dense'\), got 'compact': every row and every"):
        MaskedLinear(6, 6, mask=whole_rows).execution = "compact"
    with pytest.raises(ValueError, match="got 'compact': its channels are in groups"):
        MaskedConv2d(12, 8, 3, groups=2, mask=mask_of("both", 3, 3)).execution = "compact"


@pytest.mark.parametrize("shape", [(5,), (2, 7), ()])
def test_wrong_features_are_named(shape):
    with pytest.raises(ValueError, match=r"x: expected shape \(\*, 6\), got"):
        pair(nn.Linear, mask_of("columns"))[1](torch.randn(shape, dtype=torch.float64))


def test_wrong_channels_are_named():
    with pytest.raises(ValueError, match=r"x: expected shape \(N, 6, H, W\) or \(6, H, W\), got \(2, 7, 5, 5\)"):
        pair(nn.Conv2d, mask_of("columns", 3, 3))[1](torch.randn(2, 7, 5, 5, dtype=torch.float64))


@pytest.mark.parametrize("make", [nn.Linear, nn.Conv2d])
def test_copies_casts_and_autocast(make):
    x = torch.randn(2, 6) if make is nn.Linear else torch.randn(2, 6, 5, 5)
    dense, masked = pair(make, mask_of("both", *[3, 3] * (make is nn.Conv2d)))
    dense, masked = dense.float(), copy.deepcopy(masked).float()
    assert masked.execution == "compact"
    torch.testing.assert_close(masked(x), dense(x))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = masked(x), dense(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    assert list(masked.state_dict()) == ["values", "bias", "crow_indices", "col_indices"]


def test_gradients_of_any_order_and_other_values():
    _, masked = pair(nn.Linear, mask_of("both"))
    x, values = torch.randn(3, 6, dtype=torch.float64, requires_grad=True), masked.values

    def call(x, values):
        return torch.func.functional_call(masked, {"values": values}, (x,))

    assert torch.autograd.gradgradcheck(call, (x, values))
    per_sample = torch.func.vmap(torch.func.grad(lambda x: masked(x).square().sum()))(x.detach())
    (whole,) = torch.autograd.grad(masked(x).square().sum(), x)
    torch.testing.assert_close(per_sample, whole)


def test_compiles_whole():
    model = MaskedSequential(
        pair(nn.Conv2d, mask_of("both", 3, 3))[1], nn.ReLU(), nn.Flatten(1, 2), nn.Linear(7, 6).double(),
        pair(nn.Linear, mask_of("rows"))[1],
    )  # fmt: skip
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))

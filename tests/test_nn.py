"""MaskedLinear and MaskedSequential against nn.Linear and nn.Sequential."""

from __future__ import annotations

import copy
import warnings

import hypothesis.strategies as st
import pytest
import torch
from chains import assert_close
from hypothesis import given, settings
from torch import nn

from sparselottery import MaskedConv2d, MaskedLinear, MaskedSequential
from sparselottery.kernels import native

MASKS = {
    "random": lambda mask: mask.copy_(torch.rand(mask.shape) < 0.3),
    "none": lambda mask: mask.zero_(),
    "all": lambda mask: mask.fill_(True),
    "all but one": lambda mask: mask.fill_(True)[0, 0].fill_(False),
    "an empty row and an empty column": lambda mask: mask.fill_(True)[0].fill_(False) + mask[:, 0].fill_(False).any(),
}


def mask_of(name, out_features=20, in_features=30):
    mask = torch.empty(out_features, in_features, dtype=torch.bool)
    MASKS[name](mask)
    return mask


def pair(name="random", out_features=20, in_features=30, dtype=torch.float32, bias=True):
    """An nn.Linear with zeros where pruned, and the MaskedLinear of its survivors."""
    mask = mask_of(name, out_features, in_features)
    linear = nn.Linear(in_features, out_features, bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.mul_(mask)
    return linear, MaskedLinear.from_dense(linear, mask)


def step(module, x):
    """y and the gradients of a forward and backward pass: of x, of the weight (at the mask) and of the bias."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    y = module(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)).sum().backward()
    weight = module.values if isinstance(module, MaskedLinear) else module.weight
    return y.detach(), x.grad, weight.grad, None if module.bias is None else module.bias.grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MASKS)
def test_equals_linear(name, dtype, bias):
    linear, masked = pair(name, dtype=dtype, bias=bias)
    true = copy.deepcopy(linear).double()
    x = torch.randn(17, 30, dtype=dtype)
    for ours, theirs, truth, what in zip(
        step(masked, x), step(linear, x), step(true, x.double()), ["y", "x", "weight", "bias"], strict=True
    ):
        if ours is not None:
            assert ours.dtype == dtype
            at = masked.mask if what == "weight" else ...
            assert_close(ours, theirs[at].view_as(ours), truth[at].view_as(ours))


@pytest.mark.parametrize("shape", [(30,), (0, 30), (1, 30), (4, 30), (2, 3, 30), (2, 0, 30), (0, 2, 30), (2, 1, 3, 30)])
def test_inputs_of_any_dimension(shape):
    linear, masked = pair()
    x = torch.randn(shape)
    for ours, theirs in zip(step(masked, x)[:2], step(linear, x)[:2], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("x", [torch.randn(30, 8).t(), torch.randn(8, 60)[:, ::2], torch.randn(1, 30).expand(8, 30),
                               torch.randn(30, 4, 2).permute(2, 1, 0), torch.randn(30, 1).t(), torch.randn(30, 3)[:, :1].t()])  # fmt: skip # noqa: E501
def test_inputs_of_any_strides(x):
    linear, masked = pair()
    torch.testing.assert_close(masked(x), linear(x))
    torch.testing.assert_close(masked.requires_grad_(False)(x), linear(x).detach())


@pytest.mark.parametrize(("in_features", "out_features"), [(0, 5), (5, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("shape", [(3,), (2, 3), ()])
def test_no_features(in_features, out_features, shape):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)
        linear, masked = pair("all", out_features, in_features)
    x = torch.randn(*shape, in_features)
    torch.testing.assert_close(masked(x), linear(x))


def test_a_gradient_expanded_from_one_number():
    linear, masked = pair()
    x = torch.randn(17, 30)
    masked(x).sum().backward()
    linear(x).sum().backward()
    torch.testing.assert_close(masked.values.grad, linear.weight.grad[masked.mask])
    torch.testing.assert_close(masked.bias.grad, linear.bias.grad)


@pytest.mark.parametrize("shape", [(29,), (4, 31), (30, 4), (2, 30, 1), ()])
def test_wrong_features_are_named(shape):
    with pytest.raises(ValueError, match=r"x: expected shape \(\*, 30\), got"):
        pair()[1](torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_wrong_dtypes_are_named(dtype):
    with pytest.raises(TypeError, match=f"expected torch.float32.*got {dtype}"):
        pair()[1](torch.ones(4, 30, dtype=dtype))


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(20, 30), TypeError),
        (torch.ones(30, 20, dtype=torch.bool), ValueError),
        (torch.ones(600, dtype=torch.bool), ValueError),
    ],
)
def test_wrong_masks_are_named(mask, error):
    for make in (lambda: MaskedLinear(30, 20, mask=mask), lambda: MaskedLinear.from_dense(nn.Linear(30, 20), mask)):
        with pytest.raises(error, match="mask: expected"):
            make()


def test_says_what_it_is():
    mask = mask_of("random")
    layer = MaskedLinear(30, 20, mask=mask)
    assert torch.equal(layer.mask, mask)
    assert (layer.nnz, layer.density, layer.shape) == (int(mask.sum()), float(mask.double().mean()), (20, 30))
    assert torch.equal(layer.weight[mask], layer.values)
    assert not layer.weight[~mask].any()
    assert f"in_features=30, out_features=20, bias=True, density={layer.density:.4g}, nnz={layer.nnz}" in repr(layer)
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias"]
    assert list(layer.state_dict()) == ["values", "bias", "crow_indices", "col_indices"]
    assert MaskedLinear(30, 20, bias=False).bias is None
    assert MaskedLinear(30, 20).density == 1
    assert MaskedLinear(30, 20, dtype=torch.float64).values.dtype == torch.float64


def test_starts_as_linear_does():
    values = MaskedLinear(100, 400).values
    linear = nn.Linear(100, 400).weight
    assert values.abs().max() <= 0.1
    assert abs(values.std() / linear.std() - 1) < 0.02


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", ["weight", "bias", None])
def test_from_dense_and_to_dense_keep_everything(frozen, training):
    linear, _ = pair()
    linear.train(training)
    if frozen:
        getattr(linear, frozen).requires_grad_(False)
    masked = MaskedLinear.from_dense(linear, linear.weight != 0)
    again = masked.to_dense()
    assert masked.training == again.training == training
    assert masked.values.requires_grad == again.weight.requires_grad == linear.weight.requires_grad
    assert masked.bias.requires_grad == again.bias.requires_grad == linear.bias.requires_grad
    assert torch.equal(again.weight, linear.weight)
    assert torch.equal(again.bias, linear.bias)
    again.bias.data.zero_()
    masked.values.data.zero_()
    assert linear.weight.any()
    assert masked.bias.any()


def test_moves_copies_and_casts():
    linear, masked = pair()
    x = torch.randn(5, 30)
    twin = copy.deepcopy(masked)
    twin.values.data.zero_()
    torch.testing.assert_close(masked(x), linear(x))
    assert masked.to("cpu") is masked
    double = copy.deepcopy(masked).double()
    assert double.crow_indices.dtype == double.col_indices.dtype == torch.int32
    torch.testing.assert_close(double(x.double()), copy.deepcopy(linear).double()(x.double()))
    assert masked.half()(x.half()).dtype == torch.float16


def test_autocast():
    linear, masked = pair()
    x = torch.randn(17, 30)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = masked(x), linear(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert_close(ours.detach(), theirs.detach(), linear(x).detach().double())
    ours.float().sum().backward()
    assert masked.values.grad.dtype == torch.float32


@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.Adam(p, fused=True), lambda p: torch.optim.Adam(p, foreach=True),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01), lambda p: torch.optim.AdamW(p),
])  # fmt: skip
def test_trains_as_the_masked_dense_layer(optimizer):
    linear, masked = pair(dtype=torch.float64)
    mask, x = masked.mask, torch.randn(17, 30, dtype=torch.float64)
    ours, theirs = optimizer(masked.parameters()), optimizer(linear.parameters())
    for _ in range(5):
        for module, opt in ((masked, ours), (linear, theirs)):
            opt.zero_grad()
            module(x).square().sum().backward()
            opt.step()
        linear.weight.data.mul_(mask)
    torch.testing.assert_close(masked.weight, linear.weight)
    torch.testing.assert_close(masked.bias, linear.bias)
    assert all(t.shape in {(), masked.values.shape, (20,)} for state in ours.state.values() for t in state.values()
               if isinstance(t, torch.Tensor))  # fmt: skip


def test_parameters_as_a_vector_and_functional_call():
    _, masked = pair()
    x = torch.randn(5, 30)
    vector = nn.utils.parameters_to_vector(masked.parameters())
    assert len(vector) == masked.nnz + 20
    expected = masked(x)
    values, bias = (vector * 2).split([masked.nnz, 20])
    doubled = torch.func.functional_call(masked, {"values": values, "bias": bias}, (x,))
    torch.testing.assert_close(doubled, 2 * expected)
    nn.utils.vector_to_parameters(2 * vector, masked.parameters())
    torch.testing.assert_close(masked(x), 2 * expected)


class Doubled(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


def test_a_parametrized_bias():
    linear, masked = pair()
    x = torch.randn(5, 30)
    nn.utils.parametrize.register_parametrization(masked, "bias", Doubled())
    torch.testing.assert_close(masked(x), linear(x) + linear.bias)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 20), st.floats(0, 1), st.integers(0, 2**31))
def test_any_mask(out_features, in_features, batch, density, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(in_features, out_features, dtype=torch.float64)
    mask = torch.rand(out_features, in_features) < density
    masked = MaskedLinear.from_dense(linear, mask)
    with torch.no_grad():
        linear.weight.mul_(mask)
    x = torch.randn(batch, in_features, dtype=torch.float64)
    torch.testing.assert_close(masked(x), linear(x))
    torch.testing.assert_close(MaskedSequential(masked)(x), linear(x))


LAYERS = {
    "linear": lambda mask: MaskedLinear(30, 20, mask=mask),
    "conv": lambda mask: MaskedConv2d(6, 20, (1, 5), mask=mask.view(20, 6, 1, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_an_execution_is_set(name):
    mask = torch.rand(20, 30) < 0.4
    layer, x = LAYERS[name](mask).double(), torch.randn(2, 6, 1, 5, dtype=torch.float64)
    x = x.flatten(1) if name == "linear" else x

    def gradients(layer):
        return torch.autograd.grad(layer(x).square().sum(), [layer.values, layer.bias])

    expected = layer(x), *gradients(layer)
    layer.execution = "dense"
    twin = copy.deepcopy(layer)
    assert layer.execution == twin.execution == "dense"
    assert "execution=dense" in repr(layer)
    assert list(layer.state_dict()) == ["values", "bias", "crow_indices", "col_indices"]
    for dense in (layer, twin):
        for got, wanted in zip((dense(x), *gradients(dense)), expected, strict=True):
            torch.testing.assert_close(got, wanted)
    torch.autograd.gradcheck(lambda values: torch.func.functional_call(layer, {"values": values}, (x,)), layer.values)
    layer.load_state_dict(LAYERS[name](torch.rand(20, 30) < 0.6).state_dict())  # another mask
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    layer.execution = "sparse"
    assert layer.execution == "sparse"
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    assert LAYERS[name](torch.ones(20, 30, dtype=torch.bool)).execution == "dense"


@pytest.mark.skipif(native.LIBRARY is None, reason="no native library")
def test_more_dimensions_take_the_short_way(monkeypatch):
    layer = MaskedLinear(20, 30, mask=torch.rand(30, 20) < 0.4)
    x = torch.randn(2, 3, 20, requires_grad=True)
    expected = layer.to_dense()(x)
    expected.sum().backward()
    expected_gx, x.grad = x.grad, None
    monkeypatch.setattr("sparselottery.nn.linear._chain", None)
    strided = (
        x.transpose(0, 1),
        x[:, -1:],
        x[:1].expand(3, 3, 20),
        torch.randn(4, 3, 2, 20)[:, :, 0],
        x[:, :, None, None],
    )
    strided = *strided, torch.randn(2, 3, 40)[..., ::2], torch.randn(2, 5, 20)[:, :3], torch.randn(1, 1, 20).mT.mT
    with torch.no_grad():
        wanted = [layer.to_dense()(each) for each in strided]
        with monkeypatch.context() as without:
            without.setattr(torch.Tensor, "flatten", None)  # the native call reads them as they are
            torch.testing.assert_close(layer(x), expected)
            found = [layer(each) for each in strided]
        torch.testing.assert_close(found, wanted)
        assert all(each.is_contiguous() for each in found)
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, expected_gx)

"""MaskedConv2d against nn.Conv2d."""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import contextmanager

import hypothesis.strategies as st
import pytest
import torch
from chains import assert_close as assert_about
from convs import FORMATS, assert_close
from hypothesis import assume, given, settings
from torch import nn

from sparselottery import MaskedConv2d
from sparselottery.nn.conv import run_conv


@contextmanager
def no_warning_of_copies():
    """nn.Conv2d says that 'same' padding around an even kernel copies its input."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same'", UserWarning)
        yield


def pair(density=0.4, **options):
    """An nn.Conv2d with zeros where pruned, and the MaskedConv2d of its survivors."""
    conv = nn.Conv2d(**({"in_channels": 4, "out_channels": 6, "kernel_size": 3} | options))
    mask = torch.rand(conv.weight.shape) < density
    with torch.no_grad():
        conv.weight.mul_(mask)
    return conv, MaskedConv2d.from_dense(conv, mask)


def step(module, x, call=None, least=-1):
    """y and the gradients of a forward and backward pass, for gy from `least` to 1: of x, weight and bias."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    with no_warning_of_copies():
        y = (call or module)(x)
    y.backward(gradient_of(y, least))
    weight = module.values if isinstance(module, MaskedConv2d) else module.weight
    return y.detach(), x.grad, weight.grad, None if module.bias is None else module.bias.grad


def gradient_of(y, least=-1):
    return torch.linspace(least, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)


def sums_of_channels(gy):
    """Exactly rounded: (C,) of (N, C, H, W) or (C, H, W)."""
    return torch.tensor([math.fsum(each.flatten().tolist()) for each in gy.unbind(-3)], dtype=gy.dtype)


def absolute(conv):
    conv = copy.deepcopy(conv).double()
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.abs_()
    return conv


def strides(tensor):
    """Of the dimensions that have any."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def assert_equals_conv2d(conv, masked, x, call=None):
    """y and all gradients, at most twice as far from the truth as nn.Conv2d, and y in its memory format."""
    ours, theirs = step(masked, x, call), step(conv, x)
    truth, sums = step(copy.deepcopy(conv).double(), x.double()), step(absolute(conv), x.double().abs(), least=1)
    assert ours[0].shape == theirs[0].shape
    assert strides(ours[0]) == strides(theirs[0]) or not ours[0].numel()
    if truth[3] is not None and x.dtype == torch.float64:  # torch's own sum in fp64 is no truth for ours
        truth = *truth[:3], sums_of_channels(gradient_of(truth[0]))
    for index, (our, their, true, total) in enumerate(zip(ours, theirs, truth, sums, strict=True)):
        if our is not None:
            at = masked.mask if index == 2 else ...
            assert_close(our, *(t[at].view_as(our) for t in (their, true, total)))


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "rows apart": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "images apart": lambda x: torch.stack([x, x], 0)[0],
}


@st.composite
def problems(draw):
    """The arguments of nn.Conv2d and an x that it takes."""
    groups = draw(st.sampled_from([1, 1, 2, 3, 4]))
    kernel, dilation = (draw(st.tuples(st.integers(1, most), st.integers(1, most))) for most in (5, 3))
    padding = draw(st.sampled_from(["same", "valid", 0, 1, 2, (1, 0), (0, 3)]))
    arguments = {
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": kernel if draw(st.booleans()) else kernel[0],
        "stride": 1 if padding == "same" else draw(st.sampled_from([1, 2, (1, 2), (3, 1)])),
        "padding": padding,
        "dilation": dilation if draw(st.booleans()) else dilation[0],
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
    }
    torch.manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    batch = draw(st.sampled_from([None, 0, 1, 3]))
    x = torch.randn(*(() if batch is None else (batch,)), arguments["in_channels"], *size, dtype=arguments["dtype"])
    return arguments, LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](x)


@settings(max_examples=400, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.2, 0.7, 1.0]))
def test_equals_conv2d(problem, density):
    arguments, x = problem
    conv, masked = pair(density, **arguments)
    try:
        with no_warning_of_copies():
            conv(x)
    except RuntimeError:
        with pytest.raises((RuntimeError, ValueError)):
            run_conv(x, masked)
        assume(False)
    assert_equals_conv2d(conv, masked, x)
    assert_equals_conv2d(conv, masked, x, lambda x: run_conv(x, masked))
    for execution in set(masked.executions) - {"sparse"}:
        masked.execution = execution
        assert_equals_conv2d(conv, masked, x)


@pytest.mark.parametrize("size", [(1, 2), (2, 1)])
def test_padding_may_change_the_format(size):
    """A compact execution writes images in the format that the padded ones have."""
    conv, masked = pair(kernel_size=1, padding=1, padding_mode="circular")
    masked.execution = "compact"
    x = torch.randn(3, 4, *size).to(memory_format=torch.channels_last)
    assert masked(x).stride() == conv(x).stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"padding": "same"}, {"groups": 2, "stride": 2, "bias": False}])
def test_half_precisions(dtype, options):
    conv, masked = pair(dtype=dtype, **options)
    x = torch.randn(3, 4, 12, 17).to(dtype)
    for ours, theirs, truth in zip(step(masked, x), step(conv, x), step(copy.deepcopy(conv).double(), x.double()),
                                   strict=True):  # fmt: skip
        if ours is not None:
            assert ours.dtype == dtype
            at = masked.mask if theirs.shape == conv.weight.shape else ...
            assert_about(ours, theirs[at].view_as(ours), truth[at].view_as(ours))


@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"kernel_size": 1}, {"stride": 2, "padding": "valid"}])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("execution", ["sparse", "dense"])
def test_keeps_the_memory_format(execution, memory_format, options):
    conv, masked = pair(**options)
    masked.execution = execution
    x = torch.randn(2, 4, 9, 8).contiguous(memory_format=FORMATS[memory_format])
    y, gx, *_ = step(masked, x)
    expected_y, expected_gx, *_ = step(conv, x)
    assert y.stride() == expected_y.stride()
    assert gx.stride() == expected_gx.stride()


@pytest.mark.parametrize("shape", [(4, 9), (9,), (2, 5, 9, 9), (5, 9, 9), (1, 2, 4, 9, 9), ()])
def test_wrong_shapes_are_named(shape):
    with pytest.raises(ValueError, match=r"x: expected shape \(N, 4, H, W\) or \(4, H, W\), got"):
        pair()[1](torch.randn(shape))


@pytest.mark.parametrize("shape", [(2, 4, 2, 9), (4, 9, 2)])
def test_images_smaller_than_the_kernel_are_named(shape):
    with pytest.raises(ValueError, match="x: expected an image that the kernel fits into"):
        pair()[1](torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_wrong_dtypes_are_named(dtype):
    with pytest.raises(TypeError, match=f"expected torch.float32.*got {dtype}"):
        pair()[1](torch.ones(2, 4, 9, 9, dtype=dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 3}, {"out_channels": 5, "groups": 2}, {"groups": 0}, {"padding": "full"}, {"padding_mode": "mirror"},
        {"padding": "same", "stride": 2}, {"in_channels": -4}, {"kernel_size": 2.5},
    ],
)  # fmt: skip
def test_refuses_what_conv2d_refuses(options):
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options}
    with pytest.raises((ValueError, RuntimeError, TypeError)) as theirs:
        nn.Conv2d(**arguments)
    with pytest.raises(theirs.type) as ours:
        MaskedConv2d(**arguments)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 0}, r"kernel_size: expected two numbers of at least 1, got \(0, 0\)"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size: expected two numbers .* got \(3, 3, 3\)"),
        ({"stride": (1, 0)}, r"stride: expected two numbers of at least 1, got \(1, 0\)"),
        ({"dilation": 0}, "dilation: expected two numbers of at least 1"),
        ({"padding": -1}, r"padding: expected two numbers of at least 0, got \(-1, -1\)"),
        ({"out_channels": 0}, "in_channels, out_channels: expected at least 1, got 4, 0"),
    ],
)
def test_refuses_what_conv2d_cannot_compute(options, message):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)
        with pytest.raises(ValueError, match=message):
            MaskedConv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options})


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(6, 4, 3, 3), TypeError),
        (torch.ones(6, 36, dtype=torch.bool), ValueError),
        (torch.ones(4, 6, 3, 3, dtype=torch.bool), ValueError),
    ],
)
def test_wrong_masks_are_named(mask, error):
    for make in (lambda: MaskedConv2d(4, 6, 3, mask=mask), lambda: MaskedConv2d.from_dense(nn.Conv2d(4, 6, 3), mask)):
        with pytest.raises(error, match="mask: expected"):
            make()


def test_says_what_it_is():
    mask = torch.rand(6, 2, 3, 5) < 0.4
    layer = MaskedConv2d(4, 6, (3, 5), groups=2, mask=mask)
    assert torch.equal(layer.mask, mask)
    assert (layer.nnz, layer.density, layer.shape) == (int(mask.sum()), float(mask.double().mean()), (6, 2, 3, 5))
    assert torch.equal(layer.weight[mask], layer.values)
    assert not layer.weight[~mask].any()
    assert layer.pattern.shape == (6, 30)
    assert "in_channels=4, out_channels=6, kernel_size=(3, 5), stride=(1, 1)" in repr(layer)
    assert f"groups=2, padding_mode='zeros', bias=True, density={layer.density:.4g}, nnz={layer.nnz}" in repr(layer)
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias"]
    assert list(layer.state_dict()) == ["values", "bias", "crow_indices", "col_indices"]
    assert MaskedConv2d(4, 6, 3, bias=False).bias is None
    assert MaskedConv2d(4, 6, 3).density == 1
    assert MaskedConv2d(4, 6, 3, dtype=torch.float64).values.dtype == torch.float64
    conv = nn.Conv2d(4, 6, (3, 5), groups=2)
    for name in MaskedConv2d.arguments:
        assert getattr(layer, name) == getattr(conv, name)


def test_starts_as_conv2d_does():
    values, weight = MaskedConv2d(16, 400, 3).values, nn.Conv2d(16, 400, 3).weight
    assert values.abs().max() <= weight.abs().max() * 1.01
    assert abs(values.std() / weight.std() - 1) < 0.02


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", ["weight", "bias", None])
def test_from_dense_and_to_dense_keep_everything(frozen, training):
    conv, _ = pair(kernel_size=(3, 2), stride=2, padding=(1, 0), dilation=2, groups=2, padding_mode="reflect")
    conv.train(training)
    if frozen:
        getattr(conv, frozen).requires_grad_(False)
    masked = MaskedConv2d.from_dense(conv, conv.weight != 0)
    again = masked.to_dense()
    assert masked.training == again.training == training
    assert masked.values.requires_grad == again.weight.requires_grad == conv.weight.requires_grad
    assert masked.bias.requires_grad == again.bias.requires_grad == conv.bias.requires_grad
    assert torch.equal(again.weight, conv.weight)
    assert torch.equal(again.bias, conv.bias)
    assert repr(again) == repr(conv)
    again.bias.data.zero_()
    masked.values.data.zero_()
    assert conv.weight.any()
    assert masked.bias.any()


def test_a_dense_layer_in_channels_last():
    conv, x = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), torch.randn(2, 4, 9, 9)
    mask = (torch.rand(6, 4, 3, 3) < 0.4).contiguous(memory_format=torch.channels_last)
    masked = MaskedConv2d.from_dense(conv, mask)
    assert torch.equal(masked.weight, conv.weight * mask)
    torch.testing.assert_close(masked(x), masked.to_dense()(x))


def test_moves_copies_and_casts():
    conv, masked = pair(padding=1)
    x = torch.randn(2, 4, 5, 7)
    twin = copy.deepcopy(masked)
    twin.values.data.zero_()
    torch.testing.assert_close(masked(x), conv(x))
    assert masked.to("cpu") is masked
    assert masked.to(memory_format=torch.channels_last) is masked
    double = copy.deepcopy(masked).double()
    assert double.crow_indices.dtype == double.col_indices.dtype == torch.int32
    torch.testing.assert_close(double(x.double()), copy.deepcopy(conv).double()(x.double()))
    assert masked.half()(x.half()).dtype == torch.float16


@pytest.mark.parametrize("execution", ["sparse", "dense"])
def test_autocast(execution):
    conv, masked = pair()
    masked.execution = execution
    x = torch.randn(2, 4, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = masked(x), conv(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert_about(ours.detach(), theirs.detach(), conv(x).detach().double())
    ours.float().sum().backward()
    assert masked.values.grad.dtype == torch.float32


def test_trains_as_the_masked_dense_layer():
    conv, masked = pair(dtype=torch.float64)
    mask, x = masked.mask, torch.randn(2, 4, 9, 9, dtype=torch.float64)
    ours, theirs = (torch.optim.AdamW(module.parameters()) for module in (masked, conv))
    for _ in range(5):
        for module, optimizer in ((masked, ours), (conv, theirs)):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
        conv.weight.data.mul_(mask)
    torch.testing.assert_close(masked.weight, conv.weight)
    torch.testing.assert_close(masked.bias, conv.bias)


def test_the_weight_is_differentiable_in_the_values():
    _, masked = pair()
    (grad,) = torch.autograd.grad((masked.weight * torch.arange(216.0).view(6, 4, 3, 3)).sum(), masked.values)
    assert torch.equal(grad, torch.arange(216.0).view(6, 4, 3, 3)[masked.mask])

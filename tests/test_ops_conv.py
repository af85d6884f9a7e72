"""The sparse convolution through autograd, native and by the reference."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from chains import spy
from convs import FORMATS, assert_accurate, assert_exact, convs, dense, geometry, make, results
from hypothesis import HealthCheck, given, settings
from torch.autograd import gradcheck, gradgradcheck

from sparselottery import Pattern, ops
from sparselottery.kernels import cpu, native, reference

BACKENDS = ["native", "reference"]
HAND_MADE = {
    "1x1": lambda: make(geometry(5, (1, 1)), 7),
    "one pixel": lambda: make(geometry(3, (1, 1)), 2, size=(1, 1)),
    "3x3, padded": lambda: make(geometry(3, (3, 3), sides=(1, 1, 1, 1)), 5, size=(32, 32)),
    "more padding than image": lambda: make(geometry(2, (3, 3), sides=(5, 4, 6, 3)), 3, size=(2, 1)),
    "padded on one side": lambda: make(geometry(2, (2, 4), sides=(0, 1, 1, 2)), 3),
    "stride beyond the kernel": lambda: make(geometry(2, (1, 2), (3, 4)), 3, size=(10, 11)),
    "rows left over by the stride": lambda: make(geometry(2, (3, 3), (2, 3), (1, 0, 0, 1)), 3, size=(8, 12)),
    "dilation": lambda: make(geometry(2, (3, 3), (1, 2), (2, 2, 3, 3), (2, 3)), 3, size=(9, 14)),
    "kernel as large as the image": lambda: make(geometry(3, (7, 9)), 4),
    "a row of pixels": lambda: make(geometry(3, (1, 5), sides=(0, 0, 2, 2)), 4, size=(1, 100)),
    "a column of pixels": lambda: make(geometry(3, (5, 1), sides=(2, 2, 0, 0)), 4, size=(100, 1)),
    "groups": lambda: make(geometry(6, groups=3), 9),
    "depthwise": lambda: make(geometry(35, sides=(1, 1, 1, 1), groups=35), 35),
    "depthwise, two each": lambda: make(geometry(5, (5, 5), groups=5), 10),
    "many channels": lambda: make(geometry(70, sides=(1, 1, 1, 1)), 65, size=(4, 5), density=0.05),
    "many images": lambda: make(geometry(2), 3, batch=70, size=(5, 5)),
    "no images": lambda: make(geometry(2), 3, batch=0),
    "no survivors": lambda: make(geometry(2), 3, density=0.0),
    "all survivors": lambda: make(geometry(2), 3, density=1.0),
    "ReLU": lambda: make(geometry(3, sides=(1, 1, 1, 1)), 17, relu=True),
    "pooled": lambda: make(geometry(3, sides=(1, 1, 1, 1)), 17, relu=True, pool=2),
    "pooled, many images": lambda: make(geometry(3, stride=(1, 2)), 5, batch=37, size=(11, 23), pool=3),
    "no bias": lambda: make(geometry(3, sides=(1, 1, 1, 1)), 4, bias=False, relu=True),
}


def gaussian(*shape):
    return torch.randn(shape)


@contextmanager
def on(backend):
    with pytest.MonkeyPatch.context() as patch:
        if backend == "reference":
            patch.setattr(native, "LIBRARY", None)
        elif not cpu.available():
            pytest.skip(cpu.status())
        yield


@pytest.fixture(params=BACKENDS)
def backend(request):
    with on(request.param):
        yield


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", HAND_MADE)
def test_hand_made(backend, name, memory_format):
    made = HAND_MADE[name]()
    for dtype in (torch.float32, torch.float64):
        conv = replace(made, x=made.x.contiguous(memory_format=FORMATS[memory_format])).to(dtype)
        assert_exact(results(conv), conv)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(convs(), st.sampled_from([torch.float32, torch.float64]))
def test_any_convolution(name, conv, dtype):
    conv = conv.to(dtype)
    with on(name):
        got = results(conv)
    assert_exact(got, conv)
    for tensor in (got["y"], got["gx"]):
        assert tensor.is_contiguous(memory_format=reference.image_format(conv.x))


@settings(max_examples=100, deadline=None)
@given(convs(entries=gaussian, relu=False, pool=1), st.sampled_from([torch.float32, torch.float64]))
def test_accuracy(conv, dtype):
    conv = conv.to(dtype)
    assert_accurate(results(conv), conv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["3x3, padded", "dilation", "depthwise", "many channels", "padded on one side"])
def test_half_precision(backend, name, dtype):
    like = HAND_MADE[name]()
    conv = make(like.geometry, len(like.mask), size=(20, 20), entries=gaussian).to(dtype)
    assert_accurate(results(conv), conv)


STRIDES = {
    "sliced": lambda x: torch.stack([x, x + 1], 4)[..., 0],
    "rows apart": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "sliced channels_last": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, : x.shape[1]],
}


@pytest.mark.parametrize("name", STRIDES)
def test_images_and_gradients_of_any_strides(backend, name):
    conv = make(geometry(3, sides=(1, 1, 1, 1)), 5, relu=True)
    expected = dense(conv.to(torch.float64))
    x, values, bias = conv.leaves()
    y = conv.function()(STRIDES[name](x), values, bias)
    grads = torch.autograd.grad(y, [x, values, bias], STRIDES[name](conv.gy))
    for tensor, truth in zip((y, *grads), expected.values(), strict=True):
        assert torch.equal(tensor.double(), truth)


def test_a_gradient_expanded_from_one_number(backend):
    conv = make(geometry(3, sides=(1, 1, 1, 1)), 5)
    inputs = conv.leaves()
    grads = torch.autograd.grad(conv.function()(*inputs).sum(), inputs)
    expected = torch.autograd.grad(conv.function()(*inputs), inputs, torch.ones_like(conv.gy))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_gradients_and_their_gradients(backend, relu, bias):
    shape = geometry(4, (2, 3), (2, 1), (1, 0, 1, 2), (1, 2), 2)
    conv = make(shape, 4, size=(5, 4), entries=gaussian, bias=bias, relu=relu).to(torch.float64)
    assert gradcheck(conv.function(), conv.leaves())
    assert gradgradcheck(conv.function(), conv.leaves())


def test_frozen_inputs_get_no_gradient(backend):
    conv = make(geometry(3, sides=(1, 1, 1, 1)), 5, relu=True)
    call, inputs = conv.function(), conv.leaves()
    expected = torch.autograd.grad(call(*inputs), inputs, conv.gy)
    for frozen in range(8):
        some = [t.detach().requires_grad_(bool(frozen >> i & 1)) for i, t in enumerate(inputs)]
        y = call(*some)
        assert y.requires_grad == bool(frozen)
        if frozen:
            y.backward(conv.gy)
        for tensor, grad in zip(some, expected, strict=True):
            assert torch.equal(tensor.grad, grad) if tensor.requires_grad else tensor.grad is None


def test_one_layer_applied_twice_has_one_gradient(backend):
    """Whether or not the graph of the gradient is kept: its inputs are not followed past the layer."""
    conv = make(geometry(4, sides=(1, 1, 1, 1)), 4, relu=True).to(torch.float64)
    call = conv.function()

    def loss(x, values, bias):
        return call(call(x, values, bias), values, bias).square().sum()

    once = torch.autograd.grad(loss(*(inputs := conv.leaves())), inputs)
    twice = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b)


def test_backward_twice_and_not_thrice(backend):
    conv = make(geometry(3))
    inputs = conv.leaves()
    y = conv.function()(*inputs)
    first = torch.autograd.grad(y, inputs, conv.gy, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(y, inputs, conv.gy), strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, inputs, conv.gy)


@pytest.mark.parametrize("changed", ["x", "values", "y"])
def test_what_is_changed_in_place_is_noticed(backend, changed):
    conv = make(geometry(3), relu=True)
    x, values, bias = conv.leaves()
    y = conv.function()(x, values, bias)
    with torch.no_grad():
        {"x": x, "values": values, "y": y}[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_y_may_be_changed_in_place(backend):
    conv = make(geometry(3))
    inputs = conv.leaves()
    y = conv.function()(*inputs).mul_(2)
    expected = torch.autograd.grad(conv.function()(*inputs), inputs, 2 * conv.gy)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y, inputs, conv.gy), expected, strict=True))


@pytest.mark.parametrize("name", ["values", "bias"])
def test_parameters_of_any_strides(backend, name):
    conv = make(geometry(3, sides=(1, 1, 1, 1)), 5)
    inputs = {"x": conv.x, "values": conv.values, "bias": conv.bias}
    expected = conv.function()(**inputs)
    inputs[name] = torch.stack([inputs[name], inputs[name] + 1], 1)[:, 0]
    assert torch.equal(conv.function()(**inputs), expected)


@pytest.mark.parametrize("relu", [True, False])
def test_a_number_that_is_none_stays_where_it_is(backend, relu):
    """One pixel of nan reaches what reads it, and no other image."""
    conv = make(geometry(2, sides=(1, 1, 1, 1)), 3, density=1.0, relu=relu)
    conv.x[0, 0, 3, 3] = torch.nan
    y = conv.function()(conv.x, conv.values.abs() + 1, conv.bias)
    assert y[0, :, 2:5, 2:5].isnan().all()
    assert int(y.isnan().sum()) == 27


@pytest.mark.parametrize("wrong", ["x", "values", "bias"])
def test_one_dtype_for_all(backend, wrong):
    conv = make(geometry(3))
    inputs = {"x": conv.x, "values": conv.values, "bias": conv.bias}
    with pytest.raises(TypeError, match=r"expected torch.float\d\d, .*got torch.float\d\d"):
        conv.function()(**(inputs | {wrong: inputs[wrong].double()}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.ones(2, 4, 7, 9)}, r"x: expected shape \(N, 3, H, W\), got \(2, 4, 7, 9\)"),
        ({"x": torch.ones(3, 7, 9)}, r"x: expected shape \(N, 3, H, W\), got \(3, 7, 9\)"),
        ({"x": torch.ones(2, 3, 2, 9)}, r"x: expected an image that the kernel fits into, got \(2, 3, 2, 9\)"),
        ({"x": torch.ones(2, 3, 7, 1)}, r"x: expected an image that the kernel fits into, got \(2, 3, 7, 1\)"),
        ({"values": torch.ones(5)}, r"values: expected shape \(\d+,\), got \(5,\)"),
        ({"values": torch.ones(5, 1)}, r"values: expected shape \(\d+,\), got \(5, 1\)"),
        ({"bias": torch.ones(5)}, r"bias: expected shape \(4,\), got \(5,\)"),
        ({"bias": torch.ones(1)}, r"bias: expected shape \(4,\), got \(1,\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(backend, wrong, message):
    """They would be read out of bounds."""
    conv = make(geometry(3))
    with pytest.raises(ValueError, match=message):
        conv.function()(**({"x": conv.x, "values": conv.values, "bias": conv.bias} | wrong))


def test_sizes_that_do_not_fit_a_transposed_convolution_are_refused(backend):
    """They too would be read out of bounds."""
    conv = make(geometry(3))
    indices = conv.indices()
    gy, size = conv.gy, conv.x.shape[2:]
    assert ops.conv_transpose2d(gy, conv.values, None, *indices, conv.geometry, size).shape == conv.x.shape
    with pytest.raises(ValueError, match=r"values: expected shape \(\d+,\), got \(5,\)"):
        ops.conv_transpose2d(gy, torch.ones(5), None, *indices, conv.geometry, size)
    with pytest.raises(ValueError, match=r"bias: expected shape \(3,\), got \(5,\)"):
        ops.conv_transpose2d(gy, conv.values, torch.ones(5), *indices, conv.geometry, size)


def test_autocast_is_that_of_conv2d(backend):
    conv = make(geometry(3), entries=gaussian)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        typed = conv.to(dtype)
        weight = torch.zeros(conv.mask.shape, dtype=dtype).masked_scatter(conv.mask, typed.values)
        with torch.autocast("cpu", torch.bfloat16):
            expected = torch.nn.functional.conv2d(typed.x, weight, typed.bias)
            y = conv.function()(*(inputs := typed.leaves()))
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected)
        grads = torch.autograd.grad(y.double().sum(), inputs)
        assert all(g.dtype == dtype for g in grads)


def test_functorch_grad(backend):
    conv = make(geometry(3, sides=(1, 1, 1, 1)), relu=True)
    call, inputs = conv.function(), conv.leaves()
    expected = torch.autograd.grad(call(*inputs).sum(), inputs)
    plain = [t.detach() for t in inputs]
    grads = torch.func.grad(lambda *args: call(*args).sum(), argnums=(0, 1, 2))(*plain)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_functorch_vmap(backend):
    conv = make(geometry(3), relu=True)
    call, inputs = conv.function(), [t.detach() for t in conv.leaves()]
    stacked = [torch.stack([t, 2 * t, -t]) for t in inputs]
    expected = torch.stack([call(*(t[i] for t in stacked)) for i in range(3)])
    assert torch.equal(torch.func.vmap(call)(*stacked), expected)


@settings(max_examples=50, deadline=None)
@given(convs(relu=False, bias=False, pool=1), st.integers(0, 2**31))
def test_laws(conv, seed):
    """Linear in x and in the values; gradients are adjoint; permutations of images and filters pass through."""
    torch.manual_seed(seed)
    call, (x, values) = conv.function(), conv.leaves()
    y, other = call(x, values), torch.randn_like(values).round()
    assert torch.equal(call(3 * x, values), 3 * y)
    assert torch.equal(call(x, values + 2 * other), y + 2 * call(x, other))
    gx, gvalues = torch.autograd.grad(y, [x, values], conv.gy)
    assert (y * conv.gy).double().sum() == (x * gx).double().sum() == (values * gvalues).double().sum()
    images = torch.randperm(len(x))
    assert torch.equal(call(x[images], values), y[images])


def test_no_native_library_no_plan(monkeypatch):
    pattern, shape = Pattern.from_mask(torch.ones(2, 9, dtype=torch.bool)), geometry()
    assert ops.compile_conv_plan(pattern, shape).dtype == torch.int32
    monkeypatch.setattr(native, "LIBRARY", None)
    assert ops.compile_conv_plan(pattern, shape).numel() == 0


def test_a_row_too_large_for_the_native_kernel_runs_on_the_reference(monkeypatch):
    conv = make(geometry(3, sides=(1, 1, 1, 1)), 5, relu=True, pool=2)
    expected = results(conv)
    for name in ("conv_forward", "conv_backward", "conv_gradients"):
        spy(monkeypatch, name, lambda function, *arguments: None)
    assert all(torch.equal(got, expected[name]) for name, got in results(conv).items())

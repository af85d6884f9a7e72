"""The algebra through autograd, native and by the reference."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from chains import assert_accurate, assert_exact, integers, make, of_masks
from hypothesis import given, settings
from torch.autograd import gradcheck, gradgradcheck

from sparselottery import Pattern, ops
from sparselottery.kernels import cpu, native, reference

BATCHES = [0, 1, 2, 15, 16, 17, 60, 128, 129, 240, 256, 300]


@pytest.fixture(params=["native", "reference"])
def backend(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(native, "LIBRARY", None)
    elif not cpu.available():
        pytest.skip(cpu.status())


def gaussian(*shape):
    return torch.randn(shape)


def compiled(chain):
    """The index arguments of ops.chain."""
    patterns = chain.patterns
    plans = [ops.compile_plan(p) for p in patterns]
    return [p.crow_indices for p in patterns], [p.col_indices for p in patterns], plans


def leaves(chain):
    """x, values and biases that require gradients, as one flat list of leaves, biases None left out."""
    return [t.detach().clone().requires_grad_() for t in (chain.x, *chain.values, *chain.biases) if t is not None]


def function(chain, **options):
    """ops.chain as a function of its flat leaves."""
    indices, layers = compiled(chain), len(chain.values)

    def call(x, *params):
        biases = params[layers:] or [None] * layers
        return ops.chain(x, params[:layers], biases, *indices, **options)

    return call


def results(chain, **options):
    """y and all gradients by autograd over ops.chain."""
    inputs, layers = leaves(chain), len(chain.values)
    y = function(chain, **options)(*inputs)
    gx, *grads = torch.autograd.grad(y, inputs, chain.gy)
    named = {"y": y.detach(), "gx": gx}
    named |= {f"gvalues {layer}": g for layer, g in enumerate(grads[:layers])}
    return named | {f"gbias {layer}": g for layer, g in enumerate(grads[layers:])}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("batch_minor", [False, True])
def test_batch_sizes(backend, batch, batch_minor):
    for dtype in (torch.float32, torch.float64):
        chain = make(batch, [30, 20, 10]).to(dtype)
        assert_exact(results(chain, batch_minor=batch_minor), chain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_accuracy(backend, dtype):
    chain = make(60, [100, 60], entries=gaussian).to(dtype)
    assert_accurate(results(chain), chain)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_no_features(backend, shape):
    chain = of_masks(3, [torch.ones(shape, dtype=torch.bool)])
    assert_exact(results(chain), chain)


def test_no_native_library_no_plan(monkeypatch):
    pattern = Pattern.from_mask(torch.ones(2, 3, dtype=torch.bool))
    assert ops.compile_plan(pattern).dtype == torch.int32
    assert bool(ops.compile_plan(pattern).numel()) == cpu.available()
    monkeypatch.setattr(native, "LIBRARY", None)
    assert ops.compile_plan(pattern).numel() == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_gradients_and_their_gradients(backend, depth):
    chain = make(3, [4, 3, 2][: depth + 1], density=0.5, entries=gaussian).to(torch.float64)
    for options in ({}, {"batch_minor": True}):
        assert gradcheck(function(chain, **options), leaves(chain))
        assert gradgradcheck(function(chain, **options), leaves(chain), fast_mode=True)


def test_frozen_inputs_get_no_gradient(backend):
    chain = make(17, [30, 20, 10])
    expected = torch.autograd.grad(function(chain)(*(inputs := leaves(chain))), inputs, chain.gy)
    for frozen in range(len(inputs)):
        some = [t.detach().requires_grad_(i != frozen) for i, t in enumerate(inputs)]
        function(chain)(*some).backward(chain.gy)
        assert some[frozen].grad is None
        assert all(torch.equal(t.grad, g) for t, g in zip(some, expected, strict=True) if t.grad is not None)
    assert not function(chain)(*(t.detach() for t in inputs)).requires_grad


def test_one_layer_applied_twice_has_one_gradient(backend):
    """Whether or not the graph of the gradient is kept: its inputs are not followed past the layer."""
    chain = make(5, [6, 6], density=0.5).to(torch.float64)
    call = function(chain)

    def loss(x, values, bias):
        return call(call(x, values, bias), values, bias).square().sum()

    once = torch.autograd.grad(loss(*(inputs := leaves(chain))), inputs)
    twice = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_one_layer_twice_in_a_chain_has_one_gradient(backend):
    chain = make(5, [6, 6], density=0.5).to(torch.float64)
    x, values, bias = leaves(chain)
    indices = [index * 2 for index in compiled(chain)]

    def loss():
        return ops.chain(x, [values] * 2, [bias] * 2, *indices).square().sum()

    once = torch.autograd.grad(loss(), [x, values, bias])
    twice = torch.autograd.grad(loss(), [x, values, bias], create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_backward_twice_and_not_thrice(backend):
    chain = make(5, [6, 4])
    inputs = leaves(chain)
    y = function(chain)(*inputs)
    first = torch.autograd.grad(y, inputs, chain.gy, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(y, inputs, chain.gy), strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, inputs, chain.gy)


def test_an_input_changed_in_place_is_noticed(backend):
    chain = make(5, [6, 4])
    x, values, bias = leaves(chain)
    y = function(chain)(x, values, bias)
    with torch.no_grad():
        values.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_without_gradients_nothing_is_saved(backend, monkeypatch):
    """And so a single sample takes the short way."""
    chain, saves = make(1, [6, 4]), []
    for module in (cpu, reference):
        forward = module.chain_forward
        monkeypatch.setattr(module, "chain_forward", lambda *a, f=forward: saves.append(a[-1]) or f(*a))
    with torch.no_grad():
        function(chain)(*leaves(chain))
    with torch.inference_mode():
        function(chain)(*leaves(chain))
    assert saves == [False, False]


@pytest.mark.parametrize("name", ["values", "bias"])
def test_parameters_of_any_strides(backend, name):
    chain = make(17, [30, 20])
    x, values, bias = chain.x, *chain.values, *chain.biases
    expected = function(chain)(x, values, bias)
    if name == "values":
        values = torch.stack([values, values + 1], 1)[:, 0]
    else:
        bias = torch.stack([bias, bias + 1], 1)[:, 0]
    assert torch.equal(function(chain)(x, values, bias), expected)


@pytest.mark.parametrize("wrong", range(5))
def test_one_dtype_for_all(backend, wrong):
    chain = make(3, [6, 5, 4])
    inputs = [chain.x, *chain.values, *chain.biases]
    inputs[wrong] = inputs[wrong].double()
    with pytest.raises(TypeError, match=r"expected torch.float\d\d, .*got torch.float\d\d"):
        function(chain)(*inputs)


@pytest.mark.parametrize("wrong", range(1, 5))
def test_sizes_that_do_not_fit_are_refused(backend, wrong):
    """They would be read out of bounds."""
    chain = make(3, [6, 5, 4], density=0.5)
    inputs = [chain.x, *chain.values, *chain.biases]
    inputs[wrong] = inputs[wrong][..., :-1]
    with pytest.raises(ValueError, match="expected"):
        function(chain)(*inputs)


def test_autocast_is_that_of_linear(backend):
    chain = make(17, [30, 20])
    weight = chain.patterns[0].scatter(chain.values[0])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, values, bias = (t.to(dtype) for t in (chain.x, *chain.values, *chain.biases))
        with torch.autocast("cpu", torch.bfloat16):
            expected = torch.nn.functional.linear(x, weight.to(dtype), bias)
            y = function(chain)(x, values, bias)
        assert y.dtype == expected.dtype
        assert torch.equal(y, expected)


def test_autocast_keeps_the_dtypes_of_gradients(backend):
    chain = make(17, [30, 20])
    inputs = leaves(chain)
    with torch.autocast("cpu", torch.bfloat16):
        y = function(chain)(*inputs)
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), inputs))


def test_functorch_grad(backend):
    chain = make(5, [6, 4])
    call, inputs = function(chain), leaves(chain)
    expected = torch.autograd.grad(call(*inputs).sum(), inputs)
    plain = [t.detach() for t in inputs]
    grads = torch.func.grad(lambda *args: call(*args).sum(), argnums=(0, 1, 2))(*plain)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_functorch_vmap(backend):
    chain = make(5, [6, 4])
    call, inputs = function(chain), [t.detach() for t in leaves(chain)]
    stacked = [torch.stack([t, 2 * t, -t]) for t in inputs]
    expected = torch.stack([call(*(t[i] for t in stacked)) for i in range(3)])
    assert torch.equal(torch.func.vmap(call)(*stacked), expected)


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(1, 30), st.floats(0, 1), st.integers(0, 2**31))


@settings(max_examples=50, deadline=None)
@given(SIZES)
def test_laws(sizes):
    """Linear in x and in the values; gradients are adjoint; permutations pass through."""
    batch, inputs, outputs, density, seed = sizes
    torch.manual_seed(seed)
    chain = make(batch, [inputs, outputs], density, bias=False)
    call, (x, values), v, gy = function(chain), leaves(chain), integers(batch, outputs), integers(batch, inputs)
    other = torch.randn_like(chain.values[0]).round()
    y = call(x, values)
    assert torch.equal(call(2 * x - gy, values), 2 * y - call(gy, values))
    assert torch.equal(call(x, values + 3 * other), y + 3 * call(x, other))
    gx, gvalues = torch.autograd.grad(y, [x, values], v)
    assert (y * v).sum() == (x * gx).sum() == (values * gvalues).sum()
    samples, columns, rows = torch.randperm(batch), torch.randperm(inputs), torch.randperm(outputs)
    weight, mask = chain.patterns[0].scatter(values), chain.masks[0]
    shuffled = Pattern.from_mask(mask[rows][:, columns])
    index = [shuffled.crow_indices], [shuffled.col_indices], [ops.compile_plan(shuffled)]
    got = ops.chain(x[samples][:, columns], [shuffled.gather(weight[rows][:, columns])], [None], *index)
    assert torch.equal(got, y[samples][:, rows])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 24), min_size=2, max_size=4), st.integers(0, 40), st.floats(0, 0.3), st.integers(0, 2**31)
)
def test_any_chain(widths, batch, density, seed):
    torch.manual_seed(seed)
    chain = make(batch, widths, density)
    assert_exact(results(chain), chain)

"""What a chain keeps for its backward: the first activation once, packed or as it is."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from chains import make
from test_ops import compiled, function

from sparselottery.kernels import cpu, native, reference
from sparselottery.ops import linear

BATCHES = [1, 17, 32]


@pytest.fixture(autouse=True, params=["native", "reference"])
def _backend(request, monkeypatch):
    """And no activation is too small to care."""
    monkeypatch.setattr(linear, "LARGE", 0)
    if request.param == "reference":
        monkeypatch.setattr(native, "LIBRARY", None)
    elif not cpu.available():
        pytest.skip(cpu.status())


def problem(batch, depth=2):
    """A function of an activation, its values and biases; the dense weights' indices at hand."""
    chain = make(batch, [6, 5, 4][: depth + 1], density=0.6).to(torch.float64)
    return chain, [t.clone().requires_grad_() for t in (*chain.values, *chain.biases)]


def activation(chain):
    """Nobody else's: x is freed unless the chain keeps it."""
    base = chain.x.clone().requires_grad_()
    return base, base * 1


def expected(chain, base, params):
    indices = compiled(chain)
    layers = len(params) // 2
    return reference.chain_forward(base * 1, params[:layers], params[layers:], *indices, False, False)[0]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("batch", BATCHES)
def test_x_is_kept_as_its_packed_copy_alone(batch, depth):
    chain, params = problem(batch, depth)
    base, x = activation(chain)
    y, kept = function(chain)(x, *params), weakref.ref(x)
    del x
    assert kept() is None
    wanted = torch.autograd.grad(expected(chain, base, params), [base, *params], chain.gy)
    torch.testing.assert_close(torch.autograd.grad(y, [base, *params], chain.gy), wanted)


@pytest.mark.parametrize("batch", BATCHES)
def test_gradients_of_gradients_reach_it(batch):
    chain, params = problem(batch)
    base, x = activation(chain)
    results = []
    for y in (function(chain)(x, *params), expected(chain, base, params)):
        grads = torch.autograd.grad(y.square().sum(), [base, *params], create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), [base, *params]))
    torch.testing.assert_close(*results)


def test_a_packed_x_is_kept():
    """It is no copy."""
    chain, params = problem(32)
    base, x = activation(chain)
    x = reference.unpack(reference.pack(x), 32)
    assert reference.is_packed(x)
    y, kept = function(chain)(x, *params), weakref.ref(x)
    del x
    assert kept() is not None
    y.sum().backward()
    assert base.grad is not None


@pytest.mark.parametrize("create_graph", [True, False])
def test_what_becomes_of_x_later_changes_no_gradient(create_graph):
    chain, params = problem(17)
    wanted = torch.autograd.grad(expected(chain, chain.x, params), params, chain.gy)
    x = chain.x.clone()
    y = function(chain)(x, *params)
    x.zero_()
    torch.testing.assert_close(torch.autograd.grad(y, params, chain.gy, create_graph=create_graph), wanted)


def test_hooks_of_the_caller_decide():
    """As those that keep activations elsewhere, or compute them anew."""
    chain, params = problem(17)
    base, x = activation(chain)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t.clone(), lambda t: t):
        y = function(chain)(x, *params)
    assert x.shape in seen
    wanted = torch.autograd.grad(expected(chain, base, params), [base, *params], chain.gy)
    torch.testing.assert_close(torch.autograd.grad(y, [base, *params], chain.gy), wanted)
    base, x = activation(chain)
    again = torch.utils.checkpoint.checkpoint(function(chain), x, *params, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, [base, *params], chain.gy), wanted)


@pytest.mark.parametrize("backward", ["none", "kept", "higher"])
def test_a_graph_that_nobody_walks_to_its_end_is_freed(backward):
    chain, params = problem(17)
    base, x = activation(chain)
    y, kept = function(chain)(x, *params), weakref.ref(params[0])
    if backward != "none":
        torch.autograd.grad(y.sum(), [base, *params], retain_graph=True, create_graph=backward == "higher")
    del chain, params, base, x, y
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_batch_of_gradients(batch, depth):
    """As of torch.autograd.functional.jacobian(vectorize=True)."""
    chain, params = problem(batch, depth)
    base, x = activation(chain)
    gys = torch.stack([chain.gy, chain.gy.flip(0), torch.zeros_like(chain.gy)])
    results = [
        torch.autograd.grad(y, [base, *params], gys, is_grads_batched=True, create_graph=True)
        for y in (function(chain)(x, *params), expected(chain, base, params))
    ]
    torch.testing.assert_close(*results)
    leaves = [base, *params[:depth]]
    higher = [torch.autograd.grad(sum(g.square().sum() for g in grads), leaves) for grads in results]
    torch.testing.assert_close(*higher)

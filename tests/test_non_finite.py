"""NaN and infinities, forward and backward: the reference and every native level give what torch's dense ops give.

Masks are full: where weights are pruned, 0 * inf of a dense product has no counterpart.
"""

from __future__ import annotations

from math import inf, nan

import chains
import convs
import pytest
import torch
from convs import FORMATS, geometry

from sparselottery import ops
from sparselottery.kernels import native, reference

LEVELS = native.LEVELS.get(torch.backends.cpu.get_cpu_capability(), ("base",))
NUMBERS = [nan, inf, -inf]


@pytest.fixture(params=[*LEVELS, "reference"], autouse=True)
def _backend(request, monkeypatch):
    """What the ops run on."""
    paths = sorted(native.Path(native.__file__).parent.glob(f"_native_{request.param}.*"))
    if not paths and request.param != "reference":
        pytest.skip(f"{request.param} was not built")
    monkeypatch.setattr(native, "LIBRARY", native.load(paths[0]) if paths else None)


def nonzero(*shape):
    return torch.randint(1, 4, shape) * (2.0 * torch.randint(0, 2, shape) - 1)


def assert_same(got, expected):
    for name, result in expected.items():
        torch.testing.assert_close(got[name], result, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("where", ["x", "gy"])
@pytest.mark.parametrize("batch", [1, 17, 60])
def test_chains(batch, where, number):
    """The hidden layer has NaN, infinities and zeros, before and behind its ReLU."""
    chain = chains.make(batch, [5, 24, 3], density=1.1, entries=nonzero)
    getattr(chain, where)[0, 1] = number
    x, *params = (t.clone().requires_grad_() for t in (chain.x, *chain.values, *chain.biases))
    crow_indices, col_indices = zip(*((p.crow_indices, p.col_indices) for p in chain.patterns), strict=True)
    plans = [ops.compile_plan(pattern) for pattern in chain.patterns]
    y = ops.chain(x, params[:2], params[2:], crow_indices, col_indices, plans)
    grads = torch.autograd.grad(y, [x, *params], chain.gy)
    expected = chains.dense(chain)
    assert_same(dict(zip(expected, (y, *grads), strict=True)), expected)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("where", ["x", "gy"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("batch", [1, 20])
def test_convolutions(batch, pool, memory_format, where, number):
    """Filters of one weight a channel: of each window at most one number is none."""
    conv = convs.make(geometry(2, kernel=(1, 1)), 5, batch, (6, 8), density=1.1, entries=nonzero, relu=True, pool=pool,
                      memory_format=memory_format)  # fmt: skip
    getattr(conv, where)[0, 1, 2, 1] = number
    assert_same(convs.results(conv), convs.dense(conv))


@pytest.mark.parametrize("gy", [*NUMBERS, 1.0])
def test_the_gradient_of_a_relu_is_torchs(gy):
    x = torch.tensor([nan, inf, -inf, 0.0, -0.0, 2.0, -2.0], requires_grad=True)
    y, gy = torch.relu(x), torch.full((7,), gy)
    (expected,) = torch.autograd.grad(y, x, gy)
    torch.testing.assert_close(reference.relu_gradient(gy, y.detach()), expected, rtol=0, atol=0, equal_nan=True)

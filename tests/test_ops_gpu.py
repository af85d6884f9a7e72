"""The ops on the GPU kernels, through autograd: on the GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import convs
import pytest
import torch
from chains import assert_exact, make
from gpus import DEVICE

from sparselottery import ops
from sparselottery.kernels import gpu

pytestmark = pytest.mark.usefixtures("on_gpu", "poison")

TESTS = ["test_schema", "test_faketensor", "test_autograd_registration"]


@pytest.fixture
def on_gpu(monkeypatch):
    """CPU tensors take the GPU's kernels where there is no GPU."""
    monkeypatch.setattr(gpu, "DEVICES", (DEVICE,))


def compiled(chain):
    patterns = [type(p)(p.crow_indices.to(DEVICE), p.col_indices.to(DEVICE), p.shape) for p in chain.patterns]
    plans = [ops.compile_plan(p) for p in patterns]
    return [p.crow_indices for p in patterns], [p.col_indices for p in patterns], plans


def leaves(chain):
    tensors = (chain.x, *chain.values, *(b for b in chain.biases if b is not None))
    return [t.to(DEVICE).requires_grad_() for t in tensors]


@pytest.mark.parametrize("batch_minor", [False, True])
@pytest.mark.parametrize("batch", [0, 2, 20])
def test_chain(batch, batch_minor):
    chain = make(batch, [9, 12, 5], 0.4)
    x, *rest = leaves(chain)
    indices = compiled(chain)
    assert all(plan.numel() for plan in indices[2])
    y = ops.chain(x, rest[:2], rest[2:], *indices, batch_minor)
    gx, *grads = torch.autograd.grad(y, [x, *rest], chain.gy.to(DEVICE))
    got = {"y": y.detach(), "gx": gx}
    got |= {f"gvalues {layer}": g for layer, g in enumerate(grads[:2])}
    got |= {f"gbias {layer}": g for layer, g in enumerate(grads[2:])}
    assert_exact({name: t.cpu() for name, t in got.items()}, chain)


def test_double_backward_runs_on_the_reference():
    chain = make(4, [5, 3], 0.5)
    x, values, bias = leaves(chain)
    indices = compiled(chain)
    y = ops.chain(x, [values], [bias], *indices)
    (gx,) = torch.autograd.grad(y.square().sum(), [x], create_graph=True)
    (second,) = torch.autograd.grad(gx.sum(), [values])
    weight = torch.zeros(3, 5).masked_scatter(chain.masks[0], chain.values[0]).requires_grad_()
    dense = chain.x.clone().requires_grad_()
    (gx,) = torch.autograd.grad((dense @ weight.t() + chain.biases[0]).square().sum(), [dense], create_graph=True)
    (expected,) = torch.autograd.grad(gx.sum(), [weight])
    torch.testing.assert_close(second.cpu(), expected[chain.masks[0]])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch_minor", [False, True])
def test_fakes_of_the_chain(batch_minor, packed):
    chain = make(16, [6, 5, 4], density=0.5)
    x, *rest = leaves(chain)
    if packed:
        x = x.detach().t().contiguous().t().requires_grad_()
    arguments = x, rest[:2], rest[2:], *compiled(chain), [1, 1] * 2, batch_minor
    torch.library.opcheck(torch.ops.sparselottery.chain.default, (*arguments, True), test_utils=TESTS)
    _, saved = torch.ops.sparselottery.chain(*arguments, True)
    arguments = chain.gy.to(DEVICE), x, saved, rest[:2], *compiled(chain), [1, 1] * 2, True, [True] * 2, [True, False]
    torch.library.opcheck(torch.ops.sparselottery.chain_backward.default, arguments, test_utils=TESTS[:2])


@pytest.mark.parametrize(("relu", "pool"), [(True, 1), (False, 1), (True, 2)])
@pytest.mark.parametrize("memory_format", convs.FORMATS)
def test_conv(memory_format, relu, pool):
    shape = convs.geometry(2, sides=(0, 1, 1, 2), stride=(1, 2))
    conv = convs.make(shape, 3, 2, (6, 8), relu=relu, pool=pool, memory_format=memory_format)
    pattern = type(conv.pattern)(*(t.to(DEVICE) for t in conv.indices()[:2]), conv.pattern.shape)
    indices = pattern.crow_indices, pattern.col_indices, ops.compile_conv_plan(pattern, shape)
    assert indices[2].numel()
    inputs = [t.to(DEVICE).requires_grad_() for t in (conv.x, conv.values, conv.bias)]
    y = ops.conv2d(*inputs, *indices, shape, relu, pool)
    grads = torch.autograd.grad(y, inputs, conv.gy.to(DEVICE))
    got = dict(zip(("y", "gx", "gvalues", "gbias"), (y.detach(), *grads), strict=True))
    convs.assert_exact({name: t.cpu() for name, t in got.items()}, conv)
    settings = (1, 1), shape, relu, pool
    torch.library.opcheck(torch.ops.sparselottery.conv2d.default, (*inputs, *indices, *settings), test_utils=TESTS)

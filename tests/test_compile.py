"""The two registered ops under torch.library.opcheck, torch.compile and torch.export."""

from __future__ import annotations

import warnings

import pytest
import torch
from chains import make
from torch import nn

from sparselottery import MaskedLinear, MaskedSequential, ops
from sparselottery.kernels import reference


def layer(in_features, out_features, **options):
    return MaskedLinear(in_features, out_features, mask=torch.rand(out_features, in_features) < 0.5, **options)


def gradients(model, x):
    """y, gx (None where not wanted) and the gradients of all parameters."""
    y = model(x)
    wanted = [t for t in (x, *model.parameters()) if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]


MODELS = {
    "one layer": lambda: layer(30, 20),
    "no bias": lambda: layer(30, 20, bias=False),
    "fused": lambda: MaskedSequential(layer(30, 20), nn.ReLU(), layer(20, 10)),
    "fused, one bias": lambda: MaskedSequential(layer(30, 20, bias=False), nn.ReLU(), layer(20, 10)),
    "batch-minor": lambda: MaskedSequential(layer(30, 20), nn.Tanh(), layer(20, 10)),
    "frozen values": lambda: layer(30, 20).train().requires_grad_(False),
    "bfloat16": lambda: MaskedSequential(layer(30, 20), nn.Tanh(), layer(20, 10)).bfloat16(),
}


@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("batch", [1, 17, 256])
@pytest.mark.parametrize("name", MODELS)
def test_compiles_whole(name, batch, need_x):
    if name == "frozen values" and not need_x:
        pytest.skip("nothing to differentiate")
    model = MODELS[name]()
    x = torch.randn(batch, 30, dtype=next(model.parameters()).dtype, requires_grad=need_x)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    for ours, theirs in zip(gradients(compiled, x), gradients(model, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiles_once_for_all_batch_sizes():
    model, compiles = layer(30, 20), []

    def counting(graph, _inputs):
        compiles.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, backend=counting, fullgraph=True, dynamic=True)
    for batch in (2, 17, 256, 48):
        x = torch.randn(batch, 30)
        assert torch.equal(compiled(x), model(x))
    assert len(compiles) == 1


def test_compiles_with_inductor():
    model = MaskedSequential(layer(30, 20), nn.ReLU(), layer(20, 10), nn.Tanh(), layer(10, 10))
    x = torch.randn(17, 30)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        got = gradients(torch.compile(model, fullgraph=True), x)
    for ours, theirs in zip(got, gradients(model, x), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["one layer", "no bias", "fused", "batch-minor"])
def test_exports_with_a_dynamic_batch(name):
    model = MODELS[name]().eval()
    shapes = ({0: torch.export.Dim("batch", min=2, max=4096)},)
    exported = torch.export.export(model, (torch.randn(5, 30),), dynamic_shapes=shapes).module()
    for batch in (2, 5, 16, 17, 256):
        x = torch.randn(batch, 30)
        torch.testing.assert_close(exported(x), model(x))


def compiled(chain):
    patterns = chain.patterns
    plans = [ops.compile_plan(p) for p in patterns]
    return [p.crow_indices for p in patterns], [p.col_indices for p in patterns], plans, [1, 1] * len(plans)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch_minor", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 16, 17, 256])
def test_opcheck_chain(batch, dtype, batch_minor, packed):
    chain = make(batch, [6, 5, 4], density=0.5).to(dtype)
    x = reference.unpack(reference.pack(chain.x), batch) if packed else chain.x
    op, indices = torch.ops.sparselottery.chain.default, compiled(chain)
    inputs = [t.detach().requires_grad_() for t in (x, *chain.values, *chain.biases)]
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if dtype == torch.float32 and batch in (16, 17):
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(op, (inputs[0], inputs[1:3], inputs[3:], *indices, batch_minor, True), test_utils=tests)
    plain = (x, chain.values, chain.biases, *indices, batch_minor, False)
    torch.library.opcheck(op, plain, test_utils=tests[:2])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 16, 17, 256])
def test_opcheck_chain_backward(batch, dtype, packed):
    chain = make(batch, [6, 5, 4], density=0.5).to(dtype)
    x = reference.unpack(reference.pack(chain.x), batch) if packed else chain.x
    op, indices = torch.ops.sparselottery.chain_backward.default, compiled(chain)
    _, saved = torch.ops.sparselottery.chain(x, chain.values, chain.biases, *indices, False, True)
    for needs in (
        (True, [True] * 2, [True] * 2),
        (True, [False] * 2, [False] * 2),
        (False, [False, True], [True, False]),
    ):
        arguments = (chain.gy, x, saved, chain.values, *indices, *needs)
        torch.library.opcheck(op, arguments, test_utils=["test_schema", "test_faketensor"])

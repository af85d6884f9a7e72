"""FlopCounterMode counts 2 nnz N, forward and backward, whichever of the two modules is imported first."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparselottery import convert, explain, load_sparse, prune
from sparselottery.convert import masked_layers
from sparselottery.export import export


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def nnz(model) -> list[int]:
    return [layer.nnz for layer in masked_layers(model).values()]


@pytest.fixture
def chain():
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 40, bias=False), nn.ReLU(), nn.Linear(40, 5))
    return convert(model, prune(model, 0.8))


@pytest.mark.parametrize("shape", [(6, 20), (2, 3, 20)])
@pytest.mark.parametrize("apart", [False, True])
def test_linear_layers(chain, shape, apart):
    model = nn.Sequential(*[each for layer in chain for each in (layer, nn.Identity())]) if apart else chain
    x, survivors = torch.randn(shape), sum(nnz(chain))
    with torch.no_grad():
        assert counted(lambda: model(x)) == 2 * 6 * survivors
    assert counted(lambda: model(x)) == 2 * 6 * survivors
    y = model(x).sum()
    assert counted(y.backward) == 2 * 6 * (2 * survivors - nnz(chain)[0])  # nobody wants the gradient of x
    x.requires_grad_()
    y = model(x).sum()
    assert counted(y.backward) == 2 * 6 * 2 * survivors


def test_frozen_weights(chain):
    """Gradients of values that are frozen are not made, nor those of what lies below all trained ones."""
    first, second, third = nnz(chain)
    for layer in (chain[0], chain[2]):
        layer.requires_grad_(False)
    y = chain(torch.randn(6, 20)).sum()
    assert counted(y.backward) == 2 * 6 * third
    chain[0].bias.requires_grad_(True)
    y = chain(torch.randn(6, 20)).sum()
    assert counted(y.backward) == 2 * 6 * (2 * third + second)
    assert first > 0


@pytest.mark.parametrize("arguments", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2}])
def test_convolutions(arguments):
    model = nn.Sequential(nn.Conv2d(4, 8, 3, **arguments), nn.ReLU(), nn.MaxPool2d(2))
    sparse = convert(model, prune(model, 0.5))
    x = torch.randn(3, 4, 12, 10, requires_grad=True)
    dense = counted(lambda: model[0](x))
    assert counted(lambda: sparse(x)) == dense * nnz(sparse)[0] / model[0].weight.numel()
    y = sparse(x).sum()
    assert counted(y.backward) == 2 * dense * nnz(sparse)[0] / model[0].weight.numel()


def test_transposed_convolutions():
    model = nn.Sequential(nn.ConvTranspose2d(4, 8, 3, stride=2))
    sparse = convert(model, prune(model, 0.5))
    x = torch.randn(3, 4, 6, 5, requires_grad=True)
    dense = counted(lambda: model(x))
    assert counted(lambda: sparse(x)) == dense / 2
    y = sparse(x).sum()
    assert counted(y.backward) == dense


def test_dense_execution_is_counted_as_dense(chain):
    masked_layers(chain)["0.weight"].execution = "dense"
    with torch.no_grad():
        assert counted(lambda: chain(torch.randn(6, 20))) == 2 * 6 * (600 + sum(nnz(chain)[1:]))


def test_frozen_models(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 5 * 4, 6)).eval()
    sparse = convert(model, prune(model, 0.7))
    export(sparse, tmp_path / "net.safetensors", format="safetensors")
    frozen, x = load_sparse(tmp_path / "net.safetensors"), torch.randn(3, 4, 12, 10)
    conv, linear = nnz(sparse)
    for _ in range(2):
        assert counted(lambda: frozen(x)) == 2 * 3 * (conv * 10 * 8 + linear)
        torch.testing.assert_close(frozen(x), sparse(x))


def test_rows_are_copied_and_count_nothing():
    ids = torch.tensor([[3, 1], [8, 8]])
    for dense in (nn.Sequential(nn.Embedding(9, 4)), nn.Sequential(nn.EmbeddingBag(9, 4))):
        for model in (dense, convert(dense, prune(dense, 0.5))):
            assert counted(lambda model=model: model(ids).sum().backward()) == 0


@pytest.mark.parametrize("first", ["sparselottery", "torch.utils.flop_counter"])
def test_whichever_is_imported_first(first):
    code = (
        f"import {first}, torch, sparselottery\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "layer = sparselottery.MaskedLinear(3, 2, mask=torch.eye(2, 3) > 0)\n"
        "with FlopCounterMode(display=False) as counter: layer(torch.ones(4, 3))\n"
        "print(counter.get_total_flops())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "16\n", done.stderr


@pytest.mark.parametrize("first", ["sparselottery", "ptflops.aten_ops"])
def test_ptflops(tmp_path, first):
    """What is read of it: a table from ops to functions of their arguments, which count multiply-adds."""
    (tmp_path / "ptflops").mkdir()
    (tmp_path / "ptflops" / "__init__.py").touch()
    (tmp_path / "ptflops" / "aten_ops.py").write_text("ATEN_OPS_MAPPING = {}")
    code = (
        f"import {first}, torch, sparselottery\n"
        "from ptflops.aten_ops import ATEN_OPS_MAPPING as table\n"
        "ops, x = torch.ops.sparselottery, torch.ones(4, 3)\n"
        "print(table[ops.chain]([x, [torch.ones(2)], [None]], ()), ops.conv2d_backward in table)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    assert done.stdout == "8 True\n", done.stderr


def test_explain():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(2), nn.Linear(80, 5))
    sparse = convert(model, prune(model, 0.5), torch.randn(3, 4, 12, 10))
    rows = {row["layer"]: row for row in explain(sparse)}
    conv, linear = sparse[0], sparse[2]
    assert rows["0"]["flops"] == 2 * conv.nnz * 80
    assert rows["2"]["flops"] == 2 * linear.nnz * 8
    assert [rows[name]["plan_bytes"] for name in ("0", "2")] == [conv.plan.nbytes, linear.plan.nbytes]
    assert [row["flops"] for row in explain(convert(model, prune(model, 0.5)))] == [None, None]
    assert {row["flops"] for row in explain(model)} == {None}

"""Masked layers on the GPU kernels: on the GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import blocky
from gpus import DEVICE
from torch import nn

from sparselottery import convert, explain, to_dense
from sparselottery.kernels import gpu
from sparselottery.kernels.gpu.device import assumed


@pytest.fixture(autouse=True)
def _on_gpu(monkeypatch):
    """CPU tensors take the GPU's kernels where there is no GPU."""
    monkeypatch.setattr(gpu, "DEVICES", (DEVICE,))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 17), nn.Tanh(), nn.Linear(17, 3)).to(DEVICE)


def convnet():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 20, 3, 2, 1),
        nn.ReLU(), nn.Flatten(), nn.Linear(20, 3),
    ).to(DEVICE)  # fmt: skip


MODELS = {"mlp": (mlp, (6, 20)), "convnet": (convnet, (2, 2, 4, 4))}
BLOCKS = {"mlp": [(16, 16), (16, 1), (1, 1)], "convnet": [(1, 1), (16, 16), (1, 1)]}


def masked(name):
    """The model converted at masks of BLOCKS, and an input."""
    make, size = MODELS[name]
    model = make()
    weights = {key: weight for key, weight in model.state_dict().items() if key.endswith("weight") and weight.dim() > 1}
    masks = {
        key: blocky(weight.shape, block, 0, 0.6).to(DEVICE)
        for (key, weight), block in zip(weights.items(), BLOCKS[name], strict=True)
    }
    return convert(model, masks), torch.randn(size, device=DEVICE)


def gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    grads = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
    return y.detach(), grads


@pytest.mark.parametrize("name", MODELS)
def test_executions_by_default(name):
    model, _ = masked(name)
    layers = [row for row in explain(model) if not row["why"].startswith("kept dense")]
    expected = ["sparse" if block == (1, 1) else "block" for block in BLOCKS[name]]
    assert [row["execution"] for row in layers] == expected


@pytest.mark.gpu_core
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_dense_model(name):
    model, x = masked(name)
    y, grads = gradients(model, x)
    dense_y, dense_grads = gradients(to_dense(model), x)
    torch.testing.assert_close(y, dense_y, rtol=1e-4, atol=1e-5)
    layers = {key: layer for key, layer in model.named_modules() if hasattr(layer, "mask")}
    for (key, _), got, expected in zip([("x", None), *model.named_parameters()], grads, dense_grads, strict=True):
        layer = layers.get(key.rpartition(".")[0])
        if layer is not None and key.endswith("values"):
            expected = expected[layer.mask]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_copies_and_checkpoints():
    model, x = masked("mlp")
    expected = model.eval()(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    other = masked("mlp")[0].eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16])
def test_autocast(dtype):
    model, x = masked("mlp")
    with torch.autocast(DEVICE, dtype):
        y = model(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), model(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", MODELS)
def test_compiles_to_one_graph(name):
    model, x = masked(name)
    expected, expected_grads = gradients(model, x)
    y, grads = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grads, expected_grads)


def test_an_old_gpu_says_what_blocks_need():
    model, _ = masked("mlp")
    with assumed((7, 5), 64 << 10), pytest.raises(ValueError, match=rf"on {DEVICE}: .* capability 8.0, got 7.5"):
        model[0].execution = "block"

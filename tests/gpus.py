"""Runs of the GPU kernels for tests: on the GPU if there is one, else on CPU tensors in Triton's interpreter."""

from __future__ import annotations

import torch
from canaries import Canaries
from chains import Chain
from convs import Conv
from torch import Tensor

from sparselottery.kernels import gpu, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def run_chain(chain: Chain, blocks=None, batch_minor=False, need_x=True, need_values=None, need_bias=None):
    """y and all gradients of a chain, as chains.run."""
    patterns, layers = chain.patterns, len(chain.values)
    crow_indices = [pattern.crow_indices.to(DEVICE) for pattern in patterns]
    col_indices = [pattern.col_indices.to(DEVICE) for pattern in patterns]
    widths = [pattern.shape[1] for pattern in patterns]
    blocks = blocks or [(1, 1)] * layers
    plans = [gpu.plan(*args) for args in zip(crow_indices, col_indices, widths, blocks, strict=True)]
    canaries = Canaries(DEVICE)
    x, gy, *values = map(canaries.copy, (chain.x, chain.gy, *chain.values))
    biases = [None if bias is None else canaries.copy(bias) for bias in chain.biases]
    indices = crow_indices, col_indices, plans
    y, saved = gpu.chain_forward(x, values, biases, *indices, batch_minor, True)
    unsaved, nothing = gpu.chain_forward(x, values, biases, *indices, batch_minor, False)
    assert nothing.numel() == 0
    torch.testing.assert_close(y, unsaved, rtol=0, atol=0, equal_nan=True)
    assert saved.numel() == sum(gpu.saved_features(x, crow_indices, plans)) * reference.leading_dim(len(x))
    needs = need_x, need_values or [True] * layers, need_bias or [True] * layers
    gx, gvalues, gbias = gpu.chain_backward(gy, x, saved, values, *indices, *needs)
    canaries.check()
    named = {"y": y, "gx": gx} | {f"gvalues {layer}": g for layer, g in enumerate(gvalues)}
    return on_cpu(named | {f"gbias {layer}": g for layer, g in enumerate(gbias)})


def run_conv(conv: Conv, block=(1, 1)) -> dict[str, Tensor]:
    """y and all gradients of a convolution, as convs.results."""
    indices = conv.pattern.crow_indices.to(DEVICE), conv.pattern.col_indices.to(DEVICE)
    plan = gpu.conv_plan(*indices, conv.geometry, block)
    canaries = Canaries(DEVICE)
    x, gy, values = map(canaries.copy, (conv.x, conv.gy, conv.values))
    bias = None if conv.bias is None else canaries.copy(conv.bias)
    settings = conv.geometry, conv.relu, conv.pool
    y, winners = gpu.conv_forward(x, values, bias, *indices, plan, *settings)
    needs = True, True, bias is not None
    grads = gpu.conv_backward(gy, x, y, winners, values, *indices, plan, *settings, *needs)
    canaries.check()
    names = ("y", "gx", "gvalues", "gbias")[: 3 + (bias is not None)]
    return on_cpu(dict(zip(names, (y, *grads), strict=False)))

"""A masked linear layer in bf16, and a transformer's block under autocast, against dense ones in bf16 and both in fp32.

oneDNN multiplies bf16 by what the processor has: matrices (AMX), pairs (AVX-512 with BF16), or in fp32. How a lesser
processor would do is seen by ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 or AVX2, of which the rows get a file of their own.
"""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.peers import Problem
from benchmarks.timing import Candidate
from sparselottery import convert, prune

SUFFIX = "".join(f"_{isa.lower()}" for isa in [os.environ.get("ONEDNN_MAX_CPU_ISA")] if isa)  # of the file's name
SHAPES = [(512, 1024, 1024), (128, 4096, 4096)]  # batch, in, out
DENSITIES = [0.5, 0.2, 0.1, 0.05, 0.02]
TOLERANCE = 1e-2  # bf16 rounds by up to 1 in 256
IMAGES, TOKENS, WIDTH, HEADS = 4, 197, 768, 12  # ViT-B/16


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("op", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_linear(shape, op, density, measure):
    backward = op == "forward+backward"
    batch, in_features, out_features = shape
    random = Problem.random(*shape, density)
    numbers = {name: getattr(random, name).bfloat16() for name in ("x", "weight", "bias", "gy")}
    problem = replace(random, **numbers)
    wide = replace(random, **{name: number.float() for name, number in numbers.items()})
    measure(
        {
            "sparselottery": sparse(problem, backward),
            "sparselottery_fp32": sparse(wide, backward),
            "nn_linear": peers.nn_linear(problem, backward),
            "nn_linear_fp32": peers.nn_linear(wide, backward),
        },
        wide.truth(backward),
        TOLERANCE,
        op=op,
        batch=batch,
        in_features=in_features,
        out_features=out_features,
        density=density,
    )


@pytest.mark.parametrize("density", DENSITIES)
def test_block(density, measure):
    torch.manual_seed(0)
    block, x = Block(), torch.randn(IMAGES, TOKENS, WIDTH)
    masks = prune(block, 1 - density)
    with torch.no_grad():
        for name, mask in masks.items():
            block.get_parameter(name).mul_(mask)
    truth = step(deepcopy(block).double(), x.double(), masks, None)
    truth.run()
    candidates = {
        f"{name}{'' if dtype else '_fp32'}": step(make(), x, masks, dtype)
        for name, make in (
            ("sparselottery", lambda: convert(deepcopy(block), masks)),
            ("dense", lambda: deepcopy(block)),
        )
        for dtype in (torch.bfloat16, None)
    }
    measure(
        candidates,
        truth.read(),
        5 * TOLERANCE,
        op="block, forward+backward",
        batch=IMAGES * TOKENS,
        in_features=WIDTH,
        out_features=WIDTH,
        density=density,
    )


class Block(nn.Module):
    """A pre-norm transformer block, as ViT-B/16 has twelve of."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.project(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))


def step(model: nn.Module, x: Tensor, masks: dict[str, Tensor], dtype: torch.dtype | None) -> Candidate:
    """Forward, under autocast if a dtype is given, and backward: gradients of x and of the pruned weights."""
    x = x.clone().requires_grad_()
    parameters = dict(model.named_parameters())

    def run() -> None:
        for leaf in (x, *parameters.values()):
            leaf.grad = None
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            y = model(x)
        y.backward(torch.ones_like(y))

    def read() -> list[Tensor]:
        found = [x.grad]
        for name, mask in masks.items():
            values = parameters.get(name.replace("weight", "values"))
            found.append(parameters[name].grad[mask] if values is None else values.grad)
        return found

    return Candidate(run, read)


def sparse(problem: Problem, backward: bool) -> Candidate:
    """By the sparse kernels, even where the dense layer is faster, which `convert` would find from an example."""
    layer = convert(peers.linear(problem), {"weight": problem.mask})
    return peers.module(problem, layer, lambda: layer.values.grad, backward)

"""A linear layer whose mask consists of blocks, in training, evaluation and frozen, against its rows far apart.

"rows_apart" is the same layer with its rows dealt out, so that no two that follow each other have the same columns: the
kernels for single weights at this density. Its results are put back in order before they are checked, untimed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.peers import Problem
from benchmarks.timing import Candidate
from sparselottery import Pattern, convert
from sparselottery.runtime.layer import FrozenLayer

SHAPES = {(128, 1024, 1024): ("forward", "frozen", "forward+backward"), (128, 1024, 4096): ("forward",)}
BLOCKS = [(4, 1), (8, 1), (16, 1), (8, 8), (16, 16)]
DENSITIES = [0.25, 0.14, 0.07, 0.036]
CASES = [(shape, op, block) for shape, ops in SHAPES.items() for op in ops for block in BLOCKS]
TOLERANCE = 1e-5


def blocked(shape: tuple[int, int, int], block: tuple[int, int], density: float) -> Problem:
    """A problem of blocks (R, C) that divide the matrix."""
    dense = Problem.random(*shape, 1.0)
    rows, columns = block
    grid = torch.rand(shape[2] // rows, shape[1] // columns, generator=torch.Generator().manual_seed(0)) < density
    mask = grid.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return replace(dense, mask=mask, weight=dense.weight * mask / density**0.5)


def sparselottery(problem: Problem, op: str) -> Candidate:
    """The layer as users run it, by its survivors whatever the density."""
    layer, masks = peers.linear(problem), {"weight": problem.mask}
    if op == "frozen":
        pattern = Pattern.from_mask(problem.mask)
        layer = FrozenLayer(layer, pattern, problem.weight[problem.mask], problem.bias)
        return peers.module(problem, layer, lambda: None, backward=False)
    layer = convert(layer.train(op != "forward"), masks)
    return peers.module(problem, layer, lambda: layer.values.grad, op != "forward")


def rows_apart(problem: Problem, op: str, height: int) -> Candidate:
    """The same by rows of which no two that follow each other are of one block."""
    order = torch.arange(len(problem.mask)).view(-1, height).T.flatten()
    back, mask = order.argsort(), problem.mask[order]
    dealt = replace(problem, mask=mask, weight=problem.weight[order], bias=problem.bias[order], gy=problem.gy[:, order])
    candidate = sparselottery(dealt, op)

    def read() -> list[Tensor]:
        y, *gradients = candidate.read()
        if not gradients:
            return [y[:, back].contiguous()]
        gx, gvalues, gbias = gradients
        gweight = torch.zeros(mask.shape).masked_scatter(mask, gvalues)[back]
        return [y[:, back].contiguous(), gx, gweight[problem.mask], gbias[back]]

    return Candidate(candidate.run, read)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(
    ("shape", "op", "block"),
    CASES,
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_blocks(shape, op, block, density, measure):
    problem = blocked(shape, block, density)
    backward = op == "forward+backward"
    measure(
        {
            "sparselottery": sparselottery(problem, op),
            "rows_apart": rows_apart(problem, op, block[0]),
            "nn_linear": peers.nn_linear(problem, backward),
        },
        problem.truth(backward),
        TOLERANCE,
        op=op,
        **dict(zip(("batch", "in_features", "out_features"), shape, strict=True)),
        block=f"{block[0]}x{block[1]}",
        density=density,
    )

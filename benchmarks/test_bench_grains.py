"""What structure gains in milliseconds: Lenet-300-100 with hidden layers of single weights or of blocks.

The densities of the hidden layers are those of `benchmarks.granularity`, whose accuracies stand beside these times in
grains.svg. `step` is a training step of 60 samples, as that benchmark trains; `frozen` is `load_sparse` on 64. Of
random weights those blocks are kept that hold the most: plain, or permuted and then folded, so that only the inputs of
the net are gathered. `masked_dense` is w * mask, `dense` has zeros where weights are pruned.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import results, steps
from benchmarks.granularity import BLOCKS, DENSITIES, block_of
from benchmarks.timing import Candidate
from sparselottery import Ticket, convert, fold, load_sparse, prune, to_dense
from sparselottery.lab.masked_dense import masked_dense
from sparselottery.lab.models import lenet_300_100
from sparselottery.masks import Masks

GRAINS = ("1x1", *(block + way for block in BLOCKS for way in ("", "-permuted")))
OUTPUT_DENSITY = 2  # times that of the hidden layers, as its rate is half of theirs
STEP, FROZEN = 60, 64  # samples
TOLERANCE = 1e-2  # rounding flips a few ReLUs against fp64


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("grain", GRAINS)
def test_step(grain, density, measure):
    sparse, masks = pruned(grain, density)
    dense, x, labels = to_dense(sparse), torch.randn(STEP, 784), torch.randint(10, (STEP,))
    candidates = {results.OURS: sparse, "masked_dense": masked_dense(dense, masks)}
    measure(
        {name: steps.step(model, x, labels, masks) for name, model in candidates.items()},
        steps.true_gradients(dense, x, labels, masks),
        TOLERANCE,
        op="step",
        granularity=grain,
        density=density,
    )


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("grain", GRAINS)
def test_frozen(grain, density, measure):
    sparse, _ = pruned(grain, density)
    x = torch.randn(FROZEN, 784)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        Ticket.from_model(sparse).save(path := Path(folder) / "net.safetensors")
        models = {results.OURS: load_sparse(path), "dense": to_dense(sparse).eval()}
        truth = [to_dense(sparse).double()(x.double())]
        case = {"op": "frozen", "granularity": grain, "density": density}
        measure({name: called(model, x) for name, model in models.items()}, truth, TOLERANCE, **case)


def pruned(grain: str, density: float) -> tuple[nn.Module, Masks]:
    torch.manual_seed(0)
    model = lenet_300_100()
    blocks = dict.fromkeys(("fc1.weight", "fc2.weight"), block_of(grain))
    how = {"granularity": blocks, "permute": grain.endswith("-permuted")}
    masks = prune(model, 1 - density, rates={"fc3.weight": 1 - min(1, OUTPUT_DENSITY * density)}, **how)
    sparse = convert(model, masks)
    sparse = fold(sparse) if how["permute"] else sparse
    return sparse, {f"{name}.weight": getattr(sparse, name).mask for name in ("fc1", "fc2", "fc3")}


def called(model: nn.Module, x: torch.Tensor) -> Candidate:
    last: list[torch.Tensor] = []

    def run() -> None:
        with torch.no_grad():
            last[:] = [model(x)]

    return Candidate(run, lambda: last)

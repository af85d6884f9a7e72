"""A whole training step (forward, loss, backward, fused Adam) of a pruned net, against the same net with w * mask.

`dense` is the same step without the multiplication by the mask, which lets pruned weights grow back: what an unpruned
net costs.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import steps
from sparselottery import convert, to_dense
from sparselottery.lab.masked_dense import masked_dense
from sparselottery.lab.models import lenet_300_100
from sparselottery.pruning import prune

NETS = {"mlp-2048": ((2048, 2048), 256), "lenet-300-100": ((300, 100), 60)}  # hidden widths, batch
DENSITIES = [0.5, 0.2, 0.1, 0.05, 0.02]  # of every layer
TOLERANCE = 1e-2  # rounding flips a few ReLUs against fp64, each worth one sample's share of a gradient


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("net", NETS)
def test_mlp_step(net, density, measure):
    hidden, batch = NETS[net]
    torch.manual_seed(0)
    model, x, labels = lenet_300_100(hidden=hidden), torch.randn(batch, 784), torch.randint(10, (batch,))
    masks = prune(model, 1 - density, method="random")
    sparse = convert(model, masks)
    dense = to_dense(sparse)
    models = {"sparselottery": sparse, "masked_dense": masked_dense(model, masks), "dense": dense}
    measure(
        {name: steps.step(model, x, labels, masks) for name, model in models.items()},
        steps.true_gradients(dense, x, labels, masks),
        TOLERANCE,
        net=net,
        batch=batch,
        density=density,
    )

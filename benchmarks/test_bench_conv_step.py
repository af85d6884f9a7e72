"""A whole training step (forward, loss, backward, fused Adam) of a pruned convolutional net, against w * mask.

w * mask runs in both memory formats, each with images in its own; our net takes images in NCHW.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from benchmarks import steps
from sparselottery import convert, to_dense
from sparselottery.lab.masked_dense import masked_dense
from sparselottery.lab.models import CIFAR10, build
from sparselottery.pruning import prune

BATCH = {"conv-6": 60, "vgg-19": 64}
CASES = [("conv-6", 0.1), ("conv-6", 0.05), ("conv-6", 0.02), ("vgg-19", 0.1), ("vgg-19", 0.05)]  # of every layer
# Rounding flips a few ReLUs against fp64; batchnorm over few pixels of 16 layers spreads each (dense: up to 2e-2).
TOLERANCE = {"conv-6": 1e-2, "vgg-19": 1e-1}


@pytest.mark.parametrize(("net", "density"), CASES)
def test_conv_step(net, density, measure):
    torch.manual_seed(0)
    model, images = build(net, CIFAR10, 10), torch.randn(BATCH[net], *CIFAR10)
    labels = torch.randint(10, (len(images),))
    masks = prune(model, 1 - density, method="random")
    sparse = convert(model, masks)
    dense, last = masked_dense(model, masks), {"memory_format": torch.channels_last}
    runs = {
        "sparselottery": (sparse, images),
        "masked_dense": (dense, images),
        "masked_dense_channels_last": (deepcopy(dense).to(**last), images.to(**last)),
    }
    measure(
        {name: steps.step(model, x, labels, masks) for name, (model, x) in runs.items()},
        steps.true_gradients(to_dense(sparse), images, labels, masks),
        TOLERANCE[net],
        net=net,
        batch=len(images),
        density=density,
    )

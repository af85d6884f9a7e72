"""VGG-19's forward pass in evaluation mode, pruned to 5 %, against dense: eager in two formats, and compiled."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.timing import Candidate
from sparselottery import convert, to_dense
from sparselottery.lab.models import CIFAR10, build
from sparselottery.pruning import prune

NET, DENSITY = "vgg-19", 0.05  # of every layer
TOLERANCE = 1e-4


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("batch", [1, 128])
def test_conv_net(batch, measure):
    torch.manual_seed(0)
    model, images = build(NET, CIFAR10, 10), torch.randn(batch, *CIFAR10)
    sparse = convert(model, prune(model, 1 - DENSITY, method="random")).eval()
    last = torch.channels_last
    candidates = {
        "sparselottery": forward(sparse, images),
        "dense": forward(to_dense(sparse), images),
        "dense_channels_last": forward(to_dense(sparse).to(memory_format=last), images.to(memory_format=last)),
    }
    if peers.COMPILER_MISSING is None:
        candidates["dense_compiled"] = forward(frozen(to_dense(sparse), images), images)
    with torch.no_grad():
        truth = to_dense(sparse).double()(images.double())
    measure(candidates, [truth], TOLERANCE, net=NET, batch=batch, density=DENSITY)


def forward(model: nn.Module, images: Tensor) -> Candidate:
    run = torch.no_grad()(partial(model, images))
    return Candidate(run, lambda: [run()])


def frozen(model: nn.Module, images: Tensor) -> nn.Module:
    """`model` compiled by inductor, its weights packed as constants; for images of this shape."""
    compiled = torch.compile(model, dynamic=False)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled(images)
    return compiled

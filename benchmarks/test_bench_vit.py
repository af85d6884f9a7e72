"""A whole model of another library: transformers' ViT-B/16 of 4 layers, 90 % of every layer pruned, against dense.

Weights are random, and `convert` gets an example. The gradients are those of all parameters. `dense` has zeros where
weights are pruned; `masked_dense` multiplies by the mask in every forward pass, as pruned nets are usually trained.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks import steps
from benchmarks.timing import Candidate
from sparselottery import convert, prune, to_dense
from sparselottery.lab.masked_dense import masked_dense

LAYERS, BATCH, DENSITY = 4, 4, 0.1
TOLERANCE = 1e-4
INERT = ("key.bias", "k_proj.bias")  # a softmax forgets what all keys share: the true gradient is zero


@pytest.mark.parametrize("op", ["forward", "forward+backward"])
def test_vit(op, measure):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(num_hidden_layers=LAYERS, num_labels=1000)
    model = transformers.ViTForImageClassification(config).train(op == "forward+backward")
    images, gy = torch.randn(BATCH, 3, config.image_size, config.image_size), torch.randn(BATCH, config.num_labels)
    masks = prune(model, 1 - DENSITY, method="random")
    sparse = convert(model, masks, images)
    models = {"sparselottery": sparse, "dense": to_dense(sparse)}
    if model.training:
        models["masked_dense"] = masked_dense(model, masks)
    make = partial(forward_backward, gy=gy, masks=masks) if model.training else forward
    truth = make(to_dense(sparse).double(), images.double())
    truth.run()
    measure(
        {name: make(each, images) for name, each in models.items()},
        truth.read(),
        TOLERANCE,
        op=op,
        net="vit-b-16",
        layers=LAYERS,
        batch=BATCH,
        density=DENSITY,
    )


def forward(model: nn.Module, images: Tensor) -> Candidate:
    run = torch.no_grad()(partial(model, images))
    return Candidate(run, lambda: [run().logits])


def forward_backward(model: nn.Module, images: Tensor, gy: Tensor, masks: dict[str, Tensor]) -> Candidate:
    def run() -> None:
        model.zero_grad()
        logits = model(images).logits
        logits.backward(gy.to(logits.dtype))

    def read() -> list[Tensor]:
        named = zip(dict(model.named_parameters()), steps.gradients(model, masks), strict=True)
        return [gradient for name, gradient in named if not name.endswith(INERT)]

    return Candidate(run, read)

"""What a call costs where there is almost nothing to compute: tiny layers and chains, and Lenet frozen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks import inference_peers
from benchmarks.timing import Candidate
from sparselottery import convert, prune, to_dense

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(64, 64), (64,)),
    "conv": (lambda: nn.Conv2d(4, 4, 3, padding=1), (4, 8, 8)),
    "chain": (lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), (64,)),
}
DENSITY = 0.1
TOLERANCE = 1e-5


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("op", ["forward", "forward+backward"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layer(layer, op, batch, measure):
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    dense = make()
    sparse = convert(dense, prune(dense, 1 - DENSITY, method="random"))
    dense, backward = to_dense(sparse), op == "forward+backward"
    x = torch.randn(batch, *shape)
    exact = to_dense(sparse).double()(x.double())
    gy = torch.randn(exact.shape)
    (gx,) = torch.autograd.grad(to_dense(sparse).double()(leaf := x.double().requires_grad_()), leaf, gy.double())
    candidates = {"sparselottery": _call(sparse, x, gy, backward), "torch_dense": _call(dense, x, gy, backward)}
    truth = [exact.detach(), gx] if backward else [exact.detach()]
    measure(candidates, truth, TOLERANCE, what=layer, op=op, batch=batch, density=DENSITY)


@pytest.mark.parametrize("batch", [1, 16])
def test_frozen(batch, measure):
    net = inference_peers.NETS["lenet-300-100"]
    sparse, dense = inference_peers.frozen(net)
    x = torch.randn(batch, *net.shape)
    candidates = {"sparselottery": _call(sparse, x), "torch_dense": _call(dense, x)}
    truth = [dense.double()(x.double())]
    dense.float()
    measure(candidates, truth, TOLERANCE, what="lenet-300-100", op="frozen", batch=batch, density=net.density)


def _call(module: nn.Module, x: Tensor, gy: Tensor | None = None, backward: bool = False) -> Candidate:
    """A call on x, without gradients or with all of them, those of x among them."""
    x = x.clone().requires_grad_(backward)
    last: list[Tensor] = []

    def forward() -> None:
        with torch.no_grad():
            last[:] = [module(x)]

    def forward_backward() -> None:
        module.zero_grad()
        x.grad = None
        last[:] = [module(x)]
        last[0].backward(gy)

    return Candidate(
        forward_backward if backward else forward,
        lambda: [last[0].detach(), x.grad] if backward else last,
    )

"""A masked linear layer, forward (under no_grad) and forward + backward, against dense layers and sparse peers."""

from __future__ import annotations

import pytest

from benchmarks import peers
from benchmarks.peers import Problem

SHAPES = [(128, 784, 300), (512, 1024, 1024), (128, 4096, 4096), (32, 768, 3072)]  # batch, in, out
DENSITIES = [1.0, 0.99, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01]
PEER_DENSITIES = [0.2, 0.1, 0.05, 0.02]
TOLERANCE = 1e-5


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("op", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_linear(shape, op, density, measure):
    backward = op == "forward+backward"
    batch, in_features, out_features = shape
    problem = Problem.random(*shape, density)
    makers = [peers.sparselottery, peers.nn_linear]
    if not backward:
        makers.append(peers.onednn)
    if density in PEER_DENSITIES:
        makers += peers.sparse_peers()
    measure(
        {make.__name__: make(problem, backward) for make in makers},
        problem.truth(backward),
        TOLERANCE,
        op=op,
        batch=batch,
        in_features=in_features,
        out_features=out_features,
        density=density,
    )

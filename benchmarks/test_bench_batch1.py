"""One sample through a 4096 x 4096 layer: limited by memory, not by arithmetic."""

from __future__ import annotations

import pytest

from benchmarks import peers
from benchmarks.peers import Problem

SIZE = 4096
DENSITIES = [1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01]
TOLERANCE = 1e-5


@pytest.mark.parametrize("density", DENSITIES)
def test_batch1(density, measure):
    problem = Problem.random(1, SIZE, SIZE, density)
    makers = [peers.sparselottery, peers.nn_linear, peers.onednn, *peers.sparse_peers()]
    measure(
        {make.__name__: make(problem, backward=False) for make in makers},
        problem.truth(backward=False),
        TOLERANCE,
        in_features=SIZE,
        out_features=SIZE,
        density=density,
    )

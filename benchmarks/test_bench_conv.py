"""A masked convolution, forward (under no_grad) and forward + backward, against dense ones and SparseProp's."""

from __future__ import annotations

from functools import lru_cache

import pytest
from torch import Tensor

from benchmarks import conv_peers, peers
from benchmarks.conv_peers import ConvProblem

COLUMNS = ("batch", "channels", "filters", "kernel", "stride", "size")
DENSITIES = {"forward": [0.5, 0.1, 0.05], "forward+backward": [0.9, 0.5, 0.2, 0.1, 0.05, 0.02]}
FEWER = {"forward": [0.1], "forward+backward": [0.9, 0.5, 0.1]}
SHAPES = {
    (128, 64, 64, 3, 1, 32): DENSITIES,
    (128, 128, 128, 3, 1, 16): DENSITIES,
    (128, 256, 256, 3, 1, 8): DENSITIES,
    (128, 512, 512, 3, 1, 4): DENSITIES,
    (128, 128, 128, 3, 2, 16): FEWER,
    (128, 256, 1024, 1, 1, 14): FEWER,
    (16, 128, 128, 3, 1, 16): DENSITIES,
}
CASES = [(shape, density, op, "nchw") for shape, ops in SHAPES.items() for op in ops for density in ops[op]]
CASES += [(shape, 0.1, "forward+backward", "channels_last") for shape in list(SHAPES)[:2]]
CASES.sort(key=lambda case: case[:2])  # what shares a problem stands together
PEER_DENSITIES = [0.2, 0.1, 0.05]
TOLERANCE = 1e-5


@lru_cache(maxsize=1)
def problem_of(shape: tuple[int, ...], density: float) -> tuple[ConvProblem, list[Tensor]]:
    """A problem and its truth."""
    problem = ConvProblem.random(*shape, density)
    return problem, problem.truth()


@pytest.mark.parametrize(
    ("shape", "density", "op", "layout"),
    CASES,
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_conv(shape, density, op, layout, measure):
    """`layout` is that of our images; the dense layers run in both, each with images in its own."""
    backward = op == "forward+backward"
    nchw, truth = problem_of(shape, density)
    last = nchw.channels_last()
    candidates = {
        "sparselottery": conv_peers.sparselottery(last if layout == "channels_last" else nchw, backward),
        "nn_conv2d": conv_peers.nn_conv2d(nchw, backward),
        "nn_conv2d_channels_last": conv_peers.nn_conv2d(last, backward),
    }
    if peers.SPARSEPROP_MISSING is None and density in PEER_DENSITIES and layout == "nchw":
        candidates["sparseprop"] = conv_peers.sparseprop(nchw, backward)
    measure(
        candidates,
        truth if backward else truth[:1],
        TOLERANCE,
        op=op,
        layout=layout,
        **dict(zip(COLUMNS, shape, strict=True)),
        density=density,
    )

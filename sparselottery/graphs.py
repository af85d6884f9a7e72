"""CUDA graphs: work captured once, then replayed in one launch, without its Python."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UP = 3  # times that work runs before its capture, as PyTorch advises


def on_another_stream(work: Callable[[], None], device: torch.device) -> None:
    """Runs it where captures may run, too: not on the default stream, which autograd would remember."""
    with torch.cuda.device(device):
        current, other = torch.cuda.current_stream(), torch.cuda.Stream()
        other.wait_stream(current)
        with torch.cuda.stream(other):
            work()
        current.wait_stream(other)


def captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What repeats the work on the tensors that it is given now; it is not done by the capture itself."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        work()
    return graph.replay

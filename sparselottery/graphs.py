"""CUDA graphs: work captured once, then replayed in one launch, without its Python."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UP = 3  # times that work runs before its capture, as PyTorch advises


class BrokenCaptureError(RuntimeError):
    """A capture failed, and the device does no further work of this process."""


def on_another_stream(work: Callable[[], None], device: torch.device) -> None:
    """Runs it where captures may run, too: not on the default stream, which autograd would remember."""
    with torch.cuda.device(device):
        current, other = torch.cuda.current_stream(), torch.cuda.Stream()
        other.wait_stream(current)
        with torch.cuda.stream(other):
            work()
        current.wait_stream(other)


def captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What repeats the work on the tensors that it is given now; it is not done by the capture itself.

    Raises what CUDA or the work raises where it cannot be captured; BrokenCaptureError if the device is lost with it.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream()):  # a failure does not bring it back
        try:
            with torch.cuda.graph(graph):
                work()
            return graph.replay
        except Exception as error:
            failure = error
    if works(device):
        raise failure
    why = str(failure).partition("\n")[0]
    raise BrokenCaptureError(f"{device} does no further work of this process: a capture failed, {why}") from failure


def works(device: torch.device) -> bool:
    """Does the device still end what it was given, allocate, compute and draw random numbers for this process?

    After a capture that failed PyTorch may believe that it goes on: then its generator refuses.
    """
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 0 <= torch.rand(1, dtype=torch.float32, device=device).item() < 1
    except RuntimeError:
        return False

"""Which of the processes that torchrun started this is; with none, the only one."""

from __future__ import annotations

from torch import Tensor, distributed


def rank() -> int:
    """0 for the process that writes and prints."""
    return distributed.get_rank() if _several() else 0


def size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if _several() else 1


def barrier() -> None:
    """Wait until all processes are here."""
    if _several():
        distributed.barrier()


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if _several():
        distributed.all_reduce(tensor)
    return tensor


def of_first(tensor: Tensor) -> Tensor:
    """What the first process has, in place; tensors are of one shape everywhere."""
    if _several():
        distributed.broadcast(tensor, 0)
    return tensor


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()

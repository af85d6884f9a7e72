"""Which of the processes that torchrun started this is; with none, the only one."""

from __future__ import annotations

import gc

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


def leave() -> None:
    """End the group, and its threads: one that still frees a tensor while Python ends aborts the process.

    They end once nothing holds the group: replicas of DistributedDataParallel do.
    """
    distributed.destroy_process_group()
    gc.collect()


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

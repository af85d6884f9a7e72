"""Which of the processes that torchrun started this is; with none, the only one."""

from __future__ import annotations

from torch import distributed


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


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()

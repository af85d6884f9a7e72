"""What the GPU of a launch can do, by which kernels are chosen and shaped.

capability(x.device)           (9, 0) on an H100
shared_memory(x.device)        bytes of shared memory that one program may have
assumed((8, 6), 99 << 10)      other answers for all devices: launches for a GPU that is not here
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch


class _Limits(NamedTuple):
    capability: tuple[int, int]
    shared: int


_INTERPRETED = _Limits((9, 0), 227 << 10)  # tensors on the CPU are for Triton's interpreter, which has no limits
_ASSUMED: ContextVar[_Limits | None] = ContextVar("assumed", default=None)


def capability(device: torch.device) -> tuple[int, int]:
    """CUDA's compute capability; of an AMD GPU what torch calls so, (9, 4) for gfx942."""
    return _limits(device).capability


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have at most."""
    return _limits(device).shared


@contextmanager
def assumed(capability: tuple[int, int], shared: int) -> Iterator[None]:
    """Within it every device has this capability and this shared memory."""
    token = _ASSUMED.set(_Limits(capability, shared))
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def _limits(device: torch.device) -> _Limits:
    return _ASSUMED.get() or (_INTERPRETED if device.type == "cpu" else _of_gpu(device))


@cache
def _of_gpu(device: torch.device) -> _Limits:
    found = torch.cuda.get_device_properties(device)
    shared = max(found.shared_memory_per_block, getattr(found, "shared_memory_per_block_optin", 0))
    return _Limits((found.major, found.minor), shared)

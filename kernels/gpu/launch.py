"""The one way to start a kernel: on the device of its tensors, or recorded, for whoever wants to compile it only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """kernel[grid](*args, **options): options are the kernel's constexprs, num_warps and num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


_RECORD: ContextVar[list[Launch] | None] = ContextVar("record", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options), asynchronously on the current stream of the first tensor's device.

    An empty grid is nothing to do: CUDA refuses it. Products and sums are fused, as in cuBLAS.
    """
    if 0 in grid:
        return
    options["enable_fp_fusion"] = True  # Triton 3.9 warns where nobody says so
    if (launches := _RECORD.get()) is not None:
        launches.append(Launch(kernel, grid, args, options))
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "cpu":  # the interpreter
        kernel[grid](*args, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*args, **options)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within it nothing is started, and memory stays unwritten: the list collects what would have been."""
    launches: list[Launch] = []
    token = _RECORD.set(launches)
    try:
        yield launches
    finally:
        _RECORD.reset(token)

"""The one way to start a kernel: on the device of its tensors, or recorded, for whoever wants to compile it only.

launch(kernel, grid, num_warps=4, x=x, ROWS=8)      kernel[grid](x=x, ROWS=8); names in capitals are constexprs
recorded()                                          collects launches and starts none
overridden("spmm", warps=8)                         other launch shapes than `tuned` would give, for measurements
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

PROCESSORS = 132  # multiprocessors of an H100: work is divided by them on any GPU, so that results depend on none


class Launch(NamedTuple):
    """kernel[grid](**arguments, **options): options are the compiler's."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


Shape = TypeVar("Shape", bound=NamedTuple)

_RECORD: ContextVar[list[Launch] | None] = ContextVar("record", default=None)
_OVERRIDES: ContextVar[dict[str, dict[str, int]]] = ContextVar("overrides", default={})  # noqa: B039 - never written


def launch(
    kernel: Any, grid: tuple[int, ...], *, num_warps: int, num_stages: int = 3, maxnreg: int | None = None,
    **arguments: Any,
) -> None:  # fmt: skip
    """kernel[grid](**arguments), asynchronously on the current stream of the first tensor's device.

    An empty grid is nothing to do: CUDA refuses it. Products and sums are fused, as in cuBLAS.
    """
    if 0 in grid:
        return
    # Triton 3.9 warns where nobody says whether to fuse
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    options |= {} if maxnreg is None else {"maxnreg": maxnreg}
    if (launches := _RECORD.get()) is not None:
        launches.append(Launch(kernel, grid, arguments, options))
        return
    device = next(each.device for each in arguments.values() if isinstance(each, Tensor))
    if device.type == "cpu" or device.index == torch.cuda.current_device():  # "cpu": the interpreter
        kernel[grid](**arguments, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](**arguments, **options)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within it nothing is started, and memory stays unwritten: the list collects what would have been."""
    launches: list[Launch] = []
    token = _RECORD.set(launches)
    try:
        yield launches
    finally:
        _RECORD.reset(token)


def tuned(name: str, shape: Shape) -> Shape:
    """The launch shape of the kernel `name`: what its module chose, or what `overridden` says."""
    fields = _OVERRIDES.get().get(name)
    return shape._replace(**fields) if fields else shape


@contextmanager
def overridden(name: str, **fields: int) -> Iterator[None]:
    """Within it the kernel `name` is launched with these fields of its shape."""
    token = _OVERRIDES.set({**_OVERRIDES.get(), name: fields})
    try:
        yield
    finally:
        _OVERRIDES.reset(token)

"""A program of `torch.export`, with this library's ops in it, for any batch size that the model takes.

`import sparselottery` (which registers the ops), then `torch.export.load(path).module()` gives the model back. That is
torch's own loader: load only files that you trust, as torch says.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..calls import outputs
from .job import Job, difference, traced


def write(job: Job, path: Path) -> tuple[str, ...]:
    """Write the file; returns whether it takes one batch size alone."""
    with torch.no_grad(), _without_fast_path():
        export = partial(torch.export.export, job.model)
        program, notes = traced(lambda example, shapes: export(*example, dynamic_shapes=shapes), job, job.model)
    whole = io.BytesIO()  # torch's own writer ends the process where a disk is full
    torch.export.save(program, whole)
    path.write_bytes(whole.getbuffer())
    return notes


def fault(job: Job, path: Path) -> str:
    """What is wrong with the program that was written: it must compute what the model computes, to the bit."""
    with path.open("rb") as file, torch.no_grad(), _without_fast_path(), _OneByOne():
        loaded = torch.export.load(file).module()
        ours, theirs = outputs(job.example(job.model)), outputs(job.example(loaded))
    same = len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return "" if same else difference(ours, theirs)


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    """nn.MultiheadAttention by the operators that a program has of it: those that eager inference fuses round anew."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _OneByOne(TorchDispatchMode):
    """Layers one by one, as a program has them: a convolution that takes its batchnorm along rounds otherwise."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True)

"""Tickets and models for other tools to read.

| format | what it is | read by |
|-|-|-|
| "safetensors" | a ticket: values, CSR indices, recipe, architecture (see `files`) | safetensors, `Ticket.load` |
| "npz" | a folder of CSR matrices | numpy and scipy |
| "torch-csr", "torch-bsr" | a state_dict with torch's sparse tensors | safetensors, `load_torch_sparse` |
| "dense" | the dense model's state_dict, zeros where pruned | safetensors, Hugging Face |
| "onnx" | the dense model; executed densely, whatever runs it | ONNX Runtime, OpenVINO |
| "pt2" | a torch.export program with our ops | torch, with this library imported |
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..calls import ExampleInput, outputs
from ..files import atomic
from ..ticket import Ticket
from . import dense, onnx, pt2, torch_sparse
from .dead import remove_dead as remove_dead_units
from .job import OTHER_TENSORS, Job, close, difference
from .npz import is_npz, load_npz, save_npz
from .semi_structured import to_semi_structured
from .simplify import fold_batchnorm as fold_batchnorms
from .torch_sparse import load_torch_sparse

__all__ = ["FORMATS", "ExportReport", "export", "load_npz", "load_torch_sparse", "save_npz", "to_semi_structured"]


class ExportReport(NamedTuple):
    """What was written. folded: names of batchnorms; removed: units by layer; notes: what was left alone, and why."""

    path: Path
    format: str
    bytes: int
    folded: tuple[str, ...]
    removed: dict[str, int]
    notes: tuple[str, ...]


# How each is written (returning notes), and in words what is wrong with what was written: "" if it is what was meant.
FORMATS: dict[str, tuple[Callable[[Job, Path], tuple[str, ...] | None], Callable[[Job, Path], str]]] = {
    "npz": (lambda job, path: save_npz(job.ticket, path), lambda job, path: _fault(job, load_npz(path))),
    "safetensors": (lambda job, path: job.ticket.save(path), lambda job, path: _fault(job, Ticket.load(path))),
    "torch-csr": (torch_sparse.write_csr, torch_sparse.fault),
    "torch-bsr": (torch_sparse.write_bsr, torch_sparse.fault),
    "dense": (dense.write, dense.fault),
    "onnx": (onnx.write, onnx.fault),
    "pt2": (pt2.write, pt2.fault),
}
_OF_FILES = (".safetensors", ".onnx", ".pt", ".pt2")  # no folder is called so


def export(
    source: nn.Module | Ticket,
    path: str | os.PathLike[str],
    format: str = "npz",
    *,
    fold_batchnorm: bool = False,
    remove_dead: bool = False,
    example_input: ExampleInput | None = None,
    sparse_initializer: bool = False,
) -> ExportReport:
    """Write a converted model or a ticket for other tools to read: its sparse layers and the dense rest.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4)).eval()
        >>> report = export(convert(model, prune(model, 0.5)), "net.safetensors", format="safetensors")
        >>> load_sparse("net.safetensors")(torch.zeros(1, 8)).shape
        torch.Size([1, 4])

    format: one of `FORMATS`; "npz" makes the folder `path`, all others a file. What is written is read back before it
    appears at `path`, and must equal the source: to the bit, "onnx" to rounding in ONNX Runtime.
    fold_batchnorm: fold batchnorms into the nn.Linear or nn.Conv2d before them, equal to rounding.
    remove_dead: remove units with no way in or out, with the same outputs to rounding (see `dead`).
        Both change the architecture, so they only apply to models that are trees of plain torch.nn modules in
        Sequentials; others are left alone, and the report says so.
    example_input: a tensor, a tuple of the model's positional arguments or a dict of its keyword arguments: what
        "onnx" and "pt2" trace, and what outputs are compared on. The first dimension of the first tensor is the batch,
        of whatever size later, and of every tensor whose first dimension is as long. Of a model that takes no other
        size it is fixed, and the report says so. It may be left out if the model begins with nn.Linear.
    sparse_initializer: "onnx" only: store masked weights in ONNX's sparse format.

    Returns the ExportReport.
    Raises ValueError for an unknown format, a source without masked layers, a dtype that numpy lacks, or, as "onnx" or
    "pt2", a ticket without an architecture or a model that torch cannot export; OSError if it cannot be written, does
    not read back, or would replace a folder that is neither empty nor an export.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {list(FORMATS)}, got {format!r}")
    if format == "npz" and Path(path).suffix in _OF_FILES:
        raise ValueError(
            f"format: expected that of a file with the path {path}, as 'safetensors', got 'npz', a folder's"
        )
    if sparse_initializer and format != "onnx":
        raise ValueError(f"sparse_initializer: expected the format 'onnx', got {format!r}")
    ticket, model = (source, None) if isinstance(source, Ticket) else (Ticket.from_model(source), source)
    if not ticket.masks:
        raise ValueError("source: expected a converted model or a ticket, got one without masked layers")
    original = Job(ticket, model, example_input, sparse_initializer)
    job, folded, removed, notes = _simplified(original, fold_batchnorm, remove_dead)
    write, fault = FORMATS[format]
    with atomic(path, is_npz) as temporary:
        notes += write(job, temporary) or ()
        if wrong := fault(job, temporary):
            raise OSError(f"{path}: what was written does not read back equal to the source: {wrong}; nothing is kept")
        size = sum(file.stat().st_size for file in (temporary, *temporary.rglob("*")) if file.is_file())
    return ExportReport(Path(path), format, size, folded, removed, notes)


def _simplified(job: Job, fold: bool, remove: bool) -> tuple[Job, tuple[str, ...], dict[str, int], tuple[str, ...]]:
    folded, removed, notes = (), {}, ()
    if not (fold or remove):
        return job, folded, removed, notes
    if job.ticket.architecture is None:
        return job, folded, removed, ("nothing was simplified: the model is no tree of plain torch.nn modules",)
    ticket = job.ticket
    if fold:
        ticket, folded = fold_batchnorms(ticket)
    if remove:
        ticket, (removed, notes) = remove_dead_units(ticket)
    simplified = Job(ticket, None, job.example_input, job.sparse_initializer)
    if job.example_input is not None:
        with torch.no_grad():
            before, after = (outputs(each.example(each.model)) for each in (job, simplified))
        if not close(before, after):
            wrong = difference(before, after)
            raise OSError(f"the simplified model does not compute what the source does: {wrong}; nothing is written")
    return simplified, folded, removed, notes


def _fault(job: Job, ticket: Ticket) -> str:
    same = job.ticket.same(ticket) and job.ticket.architecture == ticket.architecture
    return "" if same else OTHER_TENSORS

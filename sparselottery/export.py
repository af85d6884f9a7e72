"""Tickets and models for other tools to read, and back.

"npz" is a folder: "fc1.weight.npz" for each masked layer, in CSR, read by `scipy.sparse.load_npz`; "dense.npz" with
everything else, read by `numpy.load`; "ticket.json" with the shapes of the masked weights and the recipe. The matrix of
a convolution's weight (O, C, kernel_h, kernel_w) is (O, C * kernel_h * kernel_w).
"safetensors" is a ticket file, see `ticket`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from .pattern import Pattern
from .ticket import Ticket, atomic, checked_shapes


def export(source: nn.Module | Ticket, path: str | os.PathLike[str], format: str = "npz") -> None:
    """Write a converted model or a ticket for other tools to read: its sparse layers and the dense rest.

    format: "npz" makes the folder `path`, "safetensors" the file. What is written is read back and must equal the
    source bit by bit before it appears at `path`.
    Raises ValueError for an unknown format, a source without masked layers or a dtype that numpy lacks; OSError if
    it cannot be written, does not read back, or would replace a folder that is not empty.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {list(FORMATS)}, got {format!r}")
    ticket = source if isinstance(source, Ticket) else Ticket.from_model(source)
    if not ticket.masks:
        raise ValueError("source: expected a converted model or a ticket, got one without masked layers")
    write, read = FORMATS[format]
    with atomic(path) as temporary:
        write(ticket, temporary)
        if not ticket.same(read(temporary)):
            raise OSError(f"{path}: what was written does not read back equal to the source; nothing is kept")


def load_npz(path: str | os.PathLike[str]) -> Ticket:
    """The ticket in a folder that `export` wrote.

    Raises ValueError naming the file that is missing or damaged.
    """
    path = Path(path)
    shapes, recipe = _read(path / "ticket.json", _read_head)
    csr = {name: _read(path / f"{name}.npz", _read_csr) for name in shapes}
    return Ticket.from_csr(csr, shapes, _read(path / "dense.npz", _read_arrays), recipe)


def save_npz(ticket: Ticket, path: str | os.PathLike[str]) -> None:
    """Write the folder that `load_npz` reads. `export` is this, atomic and verified."""
    path = Path(path)
    path.mkdir()
    for name, (pattern, values) in ticket.csr().items():
        if "/" in name or os.sep in name:
            raise ValueError(f"{name}: expected a name that can be a file name")
        indices = pattern.col_indices.numpy(), pattern.crow_indices.numpy()
        matrix = scipy.sparse.csr_array((_numpy(name, values), *indices), shape=pattern.shape)
        scipy.sparse.save_npz(path / f"{name}.npz", matrix, compressed=False)
    np.savez(path / "dense.npz", **{name: _numpy(name, tensor) for name, tensor in ticket.dense().items()})
    head = {"shapes": ticket.shapes, "recipe": ticket.recipe}
    (path / "ticket.json").write_text(json.dumps(head, indent=2) + "\n")


FORMATS: dict[str, tuple[Callable[[Ticket, Path], None], Callable[[Path], Ticket]]] = {
    "npz": (save_npz, load_npz),
    "safetensors": (Ticket.save, Ticket.load),
}


def _numpy(name: str, tensor: Tensor) -> np.ndarray:
    try:
        return tensor.numpy()
    except TypeError:
        raise ValueError(f"{name}: expected a dtype that numpy has, got {tensor.dtype}; use safetensors") from None


def _read(file: Path, reader: Callable[[BinaryIO], Any]) -> Any:
    try:
        with file.open("rb") as stream:
            return reader(stream)
    except Exception as error:  # a damaged zip makes numpy raise almost anything
        raise ValueError(f"{file}: missing, foreign or damaged: {error!r}") from error


def _read_head(file: BinaryIO) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    head = json.load(file)
    return checked_shapes(head["shapes"]), head["recipe"]


def _read_csr(file: BinaryIO) -> tuple[Pattern, Tensor]:
    matrix = scipy.sparse.load_npz(file)
    if matrix.format != "csr":
        raise ValueError(f"expected a CSR matrix, got {matrix.format}")
    indices = torch.from_numpy(matrix.indptr), torch.from_numpy(matrix.indices)
    return Pattern(*indices, matrix.shape), torch.from_numpy(matrix.data)


def _read_arrays(file: BinaryIO) -> dict[str, Tensor]:
    with np.load(file, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

"""A folder that numpy and scipy read.

"fc1.weight.npz" for each masked layer, in CSR, read by `scipy.sparse.load_npz`; "dense.npz" with everything else, read
by `numpy.load`; "ticket.json" with the shapes of the masked weights, the recipe and, if known, the architecture. The
matrix of a convolution's weight (O, C, kernel_h, kernel_w) is (O, C * kernel_h * kernel_w).
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
from torch import Tensor

from ..contents import Contents, checked, checked_shapes
from ..files import loads, refusals_name
from ..pattern import Pattern
from ..ticket import Ticket

HEAD = {"shapes", "recipe"}


def save_npz(ticket: Ticket, path: str | os.PathLike[str]) -> None:
    """Write the folder that `load_npz` reads. `export` is this, atomic and verified."""
    path = Path(path)
    path.mkdir()
    for name, (pattern, values) in ticket.csr().items():
        indices = pattern.col_indices.numpy(), pattern.crow_indices.numpy()
        matrix = scipy.sparse.csr_array((_numpy(name, values), *indices), shape=pattern.shape)
        scipy.sparse.save_npz(path / _file_name(name), matrix, compressed=False)
    np.savez(path / "dense.npz", **{name: _numpy(name, tensor) for name, tensor in ticket.dense().items()})
    head = {"shapes": ticket.shapes, "recipe": ticket.recipe}
    if ticket.architecture is not None:
        head["architecture"] = ticket.architecture
    (path / "ticket.json").write_text(json.dumps(head, indent=2) + "\n")


def is_npz(folder: Path) -> bool:
    """Is it a folder of `save_npz`, and nothing else in it?"""
    names = {file.name for file in folder.iterdir()}
    return {"ticket.json", "dense.npz"} <= names and all(name.endswith(".npz") for name in names - {"ticket.json"})


def load_npz(path: str | os.PathLike[str]) -> Ticket:
    """The ticket in a folder that `export` wrote.

    Raises ValueError naming the file that is missing, damaged or not well formed.
    """
    path = Path(path)
    head = _read(path / "ticket.json", _read_head)
    with refusals_name(path):
        files = {name: path / _file_name(name) for name in head["shapes"]}
    layers = {name: _read(file, _read_csr) for name, file in files.items()}
    dense = _read(path / "dense.npz", _read_arrays)
    with refusals_name(path):
        contents = Contents(layers, head["shapes"], dense, head["recipe"], head.get("architecture"))
        return Ticket.from_contents(checked(contents))


def _file_name(name: str) -> str:
    if any(mark in name for mark in ("/", "\\", "\0", ":", os.sep)):
        raise ValueError(f"{name}: expected a name that can be a file name")
    return f"{name}.npz"


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


def _read_head(file: BinaryIO) -> dict[str, Any]:
    head = loads(file.read())
    if not isinstance(head, dict) or not HEAD <= head.keys() <= HEAD | {"architecture"}:
        raise ValueError("expected an object with shapes and recipe")
    if not isinstance(head["recipe"], dict):
        raise ValueError("recipe: expected an object")
    return {**head, "shapes": checked_shapes(head["shapes"])}


def _read_csr(file: BinaryIO) -> tuple[Pattern, Tensor]:
    """Its arrays as they are: scipy's own reader computes with them unchecked."""
    arrays = _read_arrays(file, strings=("format",))
    if (kind := arrays["format"].item()) not in (b"csr", "csr"):
        raise ValueError(f"expected a CSR matrix, got {kind!r}")
    if arrays["shape"].shape != (2,) or arrays["shape"].dtype.is_floating_point:
        raise ValueError(f"shape: expected (rows, columns), got {arrays['shape']}")
    rows, columns = map(int, arrays["shape"])
    return Pattern(arrays["indptr"], arrays["indices"], (rows, columns)), arrays["data"]


def _read_arrays(file: BinaryIO, strings: tuple[str, ...] = ()) -> dict[str, Any]:
    with np.load(file, allow_pickle=False) as arrays:
        return {name: array if name in strings else torch.from_numpy(array) for name, array in arrays.items()}

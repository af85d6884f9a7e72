"""A state_dict with torch's own sparse tensors, CSR or BSR, in a safetensors file: no pickle to load.

A masked "fc1.weight" is kept as "fc1.weight.crow_indices", "fc1.weight.col_indices" (int32) and "fc1.weight.values",
the arguments of `torch.sparse_csr_tensor` or `torch.sparse_bsr_tensor`, whose size is under "shapes" in the metadata's
entry "sparse": {"layout": "torch.sparse_bsr", "shapes": {"fc1.weight": [300, 784]}}. A weight (O, ...) of more than two
dimensions is the matrix (O, I), as these tensors are matrices. Everything else is dense under its own name.

BSR blocks (R, C) are those of the mask, made smaller where they would be cut off at the matrix's border, and (R, 1) for
convolutions, whose channels are not next to each other in the matrix; (1, 1) for a mask without blocks. Where the mask
has its blocks in another order of rows and columns (`prune` with `permute`), the tensor is the permuted matrix, and the
order stands beside it: weight[rows][:, columns], with "fc1.weight.rows" (O,) and "fc1.weight.columns" (I,), int32. Then
y[:, rows] is what the tensor makes of x[:, columns].
"""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..contents import checked_shapes
from ..files import digest, loads, read_safetensors, refusals_name, write_safetensors
from ..orders import permuted_block_of, permuted_pattern
from ..pattern import Pattern, block_of
from ..storable import DTYPES
from .job import OTHER_TENSORS, Job

PARTS = ("crow_indices", "col_indices", "values")
ORDER = ("rows", "columns")
LAYOUTS = {"torch.sparse_csr": torch.sparse_csr_tensor, "torch.sparse_bsr": torch.sparse_bsr_tensor}


def load_torch_sparse(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state_dict of an export as "torch-csr" or "torch-bsr": sparse tensors, with the order of permuted ones.

    Raises OSError if the file cannot be read, ValueError naming it if it is foreign, damaged or not well formed.
    """
    path = Path(path)
    with refusals_name(path):
        metadata, tensors = read_safetensors(path.read_bytes())
        head = loads(metadata["sparse"]) if "sparse" in metadata else None
        if not isinstance(head, dict) or head.keys() != {"layout", "shapes"} or head["layout"] not in list(LAYOUTS):
            raise ValueError("expected an export as torch-csr or torch-bsr")
        for name, shape in checked_shapes(head["shapes"]).items():
            keys = [f"{name}.{part}" for part in PARTS]
            if name in tensors or any(key not in tensors for key in keys) or len(shape) != 2:
                raise ValueError(f"{name}: expected {keys} of a matrix, and no dense weight")
            tensors[name] = _tensor(name, head["layout"], [tensors.pop(key) for key in keys], shape)
            _check_order(name, tensors, shape)
        return tensors


def write_csr(job: Job, path: Path) -> None:
    _write(job, path, "torch.sparse_csr")


def write_bsr(job: Job, path: Path) -> None:
    _write(job, path, "torch.sparse_bsr")


def fault(job: Job, path: Path) -> str:
    """What is wrong with the file: it must read back equal, values to the bit, and as many of them."""
    state = load_torch_sparse(path)
    sparse = {name: tensor for name, tensor in state.items() if tensor.layout != torch.strided}
    shapes = job.ticket.shapes
    if sparse.keys() != shapes.keys() or any(sparse[name].values().numel() != _nnz(job, name) for name in shapes):
        return OTHER_TENSORS
    for name, tensor in sparse.items():
        matrix = tensor.to_dense()
        if f"{name}.rows" in state:
            rows, columns = (state.pop(f"{name}.{part}").argsort() for part in ORDER)
            matrix = matrix[rows][:, columns]
        state[name] = matrix.view(shapes[name])
    return "" if digest({}, state) == digest({}, job.ticket.weights) else OTHER_TENSORS


def _nnz(job: Job, name: str) -> int:
    return int(job.ticket.masks[name].sum())


def _write(job: Job, path: Path, layout: str) -> None:
    tensors, shapes = job.ticket.dense(), {}
    for name, (pattern, values) in job.ticket.csr().items():
        shapes[name] = pattern.shape
        if layout == "torch.sparse_bsr":
            shape = job.ticket.shapes[name]
            block, order = block_of(pattern, shape), None
            if block == (1, 1):
                block, order = permuted_block_of(pattern, shape)
            if order is not None:
                pattern, index = permuted_pattern(pattern, shape, order)
                values, taps = values[index], torch.arange(math.prod(shape[2:]), device="cpu")
                columns = order.columns[:, None] * len(taps) + taps
                for part, lines in zip(ORDER, (order.rows, columns.flatten()), strict=True):
                    tensors[f"{name}.{part}"] = lines.int()
            pattern, values = _blocks(pattern, values, _uncut(block, shape))
        parts = pattern.crow_indices, pattern.col_indices, values
        tensors.update((f"{name}.{part}", tensor) for part, tensor in zip(PARTS, parts, strict=True))
    head = {"layout": layout, "shapes": shapes}
    write_safetensors(path, tensors, {"sparse": json.dumps(head)})  # one entry: safetensors keeps no order of several


def _uncut(block: tuple[int, int], shape: tuple[int, ...]) -> tuple[int, int]:
    """(R, C) of parts of the blocks that no border of the matrix cuts off."""
    columns = math.gcd(block[1], shape[1]) if len(shape) == 2 else 1
    return math.gcd(block[0], shape[0]) or 1, columns or 1


def _blocks(pattern: Pattern, values: Tensor, block: tuple[int, int]) -> tuple[Pattern, Tensor]:
    """The pattern of the whole blocks (R, C) that the mask consists of, and their values (n, R, C)."""
    (rows, columns), shape = block, pattern.shape
    grid = shape[0] // rows, shape[1] // columns
    crow_indices = pattern.crow_indices[::rows] // (rows * columns)  # the rows of a block are equally long
    starts = pattern.row_indices() % rows == 0
    col_indices = pattern.col_indices[starts][::columns] // columns
    counts = crow_indices.diff()
    by_row = [part.view(rows, -1, columns).transpose(0, 1) for part in values.split((counts * rows * columns).tolist())]
    blocks = torch.cat(by_row) if by_row else values.new_empty(0, rows, columns)
    return Pattern(crow_indices.contiguous(), col_indices.contiguous(), grid), blocks.contiguous()


def _check_order(name: str, tensors: dict[str, Tensor], shape: tuple[int, int]) -> None:
    """Raise ValueError for an order that is not one of each of the matrix's rows, and of its columns."""
    found = {part: tensors[f"{name}.{part}"] for part in ORDER if f"{name}.{part}" in tensors}
    for part, size in zip(ORDER, shape, strict=True) if found else ():
        lines = found.get(part)
        if lines is None or lines.dtype != torch.int32 or lines.sort()[0].tolist() != list(range(size)):
            raise ValueError(f"{name}.{part}: expected an order of {size}, int32, got {lines}")


def _tensor(name: str, layout: str, parts: list[Tensor], shape: tuple[int, int]) -> Tensor:
    crow_indices, col_indices, values = parts
    block = (1, 1) if layout == "torch.sparse_csr" else tuple(values.shape[1:])
    if values.dtype not in DTYPES or values.dim() != (1 if layout == "torch.sparse_csr" else 3) or 0 in block:
        raise ValueError(f"{name}.values: expected floating-point blocks, got {values.dtype} {tuple(values.shape)}")
    if shape[0] % block[0] or shape[1] % block[1] or len(values) != len(col_indices):
        raise ValueError(f"{name}: expected {shape} in blocks as its values are, got {tuple(values.shape)}")
    try:
        Pattern(crow_indices, col_indices, (shape[0] // block[0], shape[1] // block[1])).validate()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|BSR).* is in beta")
        return LAYOUTS[layout](crow_indices, col_indices, values, shape, check_invariants=True)

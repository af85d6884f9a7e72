"""What the file of a ticket or an export holds (see `files`), and whether that fits together."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .architecture import build
from .pattern import MAX_INT32, Pattern, matrix_shape
from .storable import DTYPES


class Contents(NamedTuple):
    """What a file holds. layers: (pattern, values (nnz,)) of each masked weight, as a matrix; shapes: of these weights;
    dense: all other tensors; architecture: None if unknown; tied: other names of masked weights, with the first."""

    layers: dict[str, tuple[Pattern, Tensor]]
    shapes: dict[str, tuple[int, ...]]
    dense: dict[str, Tensor]
    recipe: dict[str, Any]
    architecture: dict[str, Any] | None
    tied: Mapping[str, str] = MappingProxyType({})


def checked(contents: Contents) -> Contents:
    """The same, or ValueError: patterns, values and shapes that do not fit together, or not with the architecture."""
    layers = {}
    for name, (pattern, values) in contents.layers.items():
        if name in contents.dense:
            raise ValueError(f"{name}: expected it to be either dense or sparse, got both")
        try:
            if pattern.shape != (matrix := matrix_shape(contents.shapes[name])):
                raise ValueError(f"expected a matrix {matrix}, got {pattern.shape}")
            layers[name] = pattern.validate(), values
            if values.dtype not in DTYPES or values.shape != (pattern.nnz,):
                expected = f"{pattern.nnz} floating-point numbers"
                raise ValueError(f"values: expected {expected}, got {values.dtype} {tuple(values.shape)}")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if both := contents.dense.keys() & contents.tied.keys():
        raise ValueError(f"{min(both)}: expected it to be either dense or tied, got both")
    contents = contents._replace(layers=layers)
    if contents.architecture is not None:
        _check_architecture(contents)
    return contents


def fitting(contents: Contents) -> Contents:
    """The same; without the architecture if a file would be refused because of it."""
    try:
        if contents.architecture is not None:
            _check_architecture(contents)
    except ValueError:  # modules of several dtypes
        return contents._replace(architecture=None)
    return contents


def _check_architecture(contents: Contents) -> None:
    """Has the described model the names and shapes of these tensors, and each module one floating-point dtype?"""
    expected = build(contents.architecture).state_dict()
    found = contents.shapes | {name: tuple(tensor.shape) for name, tensor in contents.dense.items()}
    found |= {name: contents.shapes[first] for name, first in contents.tied.items()}
    if differ := sorted(
        n for n in expected.keys() | found.keys() if n not in expected or expected[n].shape != found.get(n)
    ):
        raise ValueError(f"architecture: expected a model with these tensors, got one with another {differ[0]!r}")
    dtypes = {name: tensor.dtype for name, tensor in contents.dense.items()}
    dtypes |= {name: values.dtype for name, (_, values) in contents.layers.items()}
    dtypes |= {name: dtypes[first] for name, first in contents.tied.items()}
    of_module: dict[str, torch.dtype] = {}
    for name, like in expected.items():
        dtype = dtypes[name]
        if like.is_floating_point():
            if dtype not in DTYPES or of_module.setdefault(name.rpartition(".")[0], dtype) != dtype:
                raise ValueError(f"{name}: expected the floating-point dtype of its module, got {dtype}")
        elif dtype != like.dtype:
            raise ValueError(f"{name}: expected {like.dtype}, got {dtype}")


def checked_shapes(shapes: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of masked weights, as read from a file; ValueError if they are none."""
    if not isinstance(shapes, dict):
        raise ValueError(f"shapes: expected a mapping, got {type(shapes).__name__}")
    for name, shape in shapes.items():
        if not all(name.split(".")):
            raise ValueError(f"shapes: expected names like '<layer>.weight', got {name!r}")
        if not isinstance(shape, list) or not 2 <= len(shape) <= 8 or not all(_is_size(size) for size in shape):
            raise ValueError(f"shapes[{name!r}]: expected two sizes or more, got {shape!r}")
        if max(matrix_shape(shape)) > MAX_INT32:
            raise ValueError(f"shapes[{name!r}]: expected at most {MAX_INT32} rows and columns, got {shape!r}")
    return {name: tuple(shape) for name, shape in shapes.items()}


def checked_blocks(blocks: Any, shapes: Mapping[str, Any]) -> None:
    """Raise ValueError unless it gives (R, C) for some of the weights. It informs; nothing is computed of it."""
    if not isinstance(blocks, dict) or not blocks.keys() <= shapes.keys():
        raise ValueError("blocks: expected a mapping of the names in shapes")
    for name, block in blocks.items():
        if not isinstance(block, list) or len(block) != 2 or not all(_is_size(side) and side for side in block):
            raise ValueError(f"blocks[{name!r}]: expected (rows, columns), got {block!r}")


def checked_ties(tied: Any, shapes: Mapping[str, Any]) -> dict[str, str]:
    """Raise ValueError unless it gives other names for some of the weights."""
    if not isinstance(tied, dict) or tied.keys() & shapes.keys():
        raise ValueError("tied: expected a mapping of other names than those in shapes")
    if unknown := [name for name, first in tied.items() if not isinstance(first, str) or first not in shapes]:
        raise ValueError(f"tied[{unknown[0]!r}]: expected a name in shapes, got {tied[unknown[0]]!r}")
    return tied


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_INT32

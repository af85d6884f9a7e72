"""The safetensors file of a ticket or an export: tensors, and in its metadata one entry, "ticket", in JSON.

The tensors are the state_dict of the converted model: "fc1.values", "fc1.crow_indices", "fc1.col_indices" for a masked
"fc1.weight", everything else dense under its own name. A weight (O, ...) of more than two dimensions, a convolution's,
is stored as the matrix (O, I), I all the others. col_indices are int16 where I <= 32,768, else int32. The entry is

    {"version": 2, "shapes": {"fc1.weight": [300, 784]}, "blocks": {"fc1.weight": [1, 1]}, "recipe": {...},
     "architecture": {...}, "sha256": "..."}

"blocks" informs of which blocks (R, C) each mask consists; "architecture" describes the dense model and is missing if
that is not a tree of plain torch.nn modules (see `architecture`). The digest covers all of it: a damaged file is an
error and never another ticket. A digest keeps nobody out: all that a file says is checked before anything is computed
of it. Files of version 1 have int32 indices and neither blocks nor an architecture.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import reprlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from .contents import Contents, checked, checked_blocks, checked_shapes, checked_ties
from .pattern import Pattern, block_of, matrix_shape
from .storable import check_storable

VERSION = 2
REQUIRED = {"version", "shapes", "recipe"}
OPTIONAL = {1: set(), 2: {"blocks", "architecture", "tied"}}
MAX_INT16_COLUMNS = 2**15


def write(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write the file, atomically: at `path` there is either what was there before or all of it.

    Raises OSError if it cannot be written, TypeError naming an entry that it cannot hold.
    """
    check_storable({name: values for name, (_, values) in contents.layers.items()}, contents.dense)
    tensors, blocks = dict(contents.dense), {}
    for name, (pattern, values) in contents.layers.items():
        narrow = torch.int16 if pattern.shape[1] <= MAX_INT16_COLUMNS else torch.int32
        parts = values, pattern.crow_indices, pattern.col_indices.to(narrow)
        tensors.update(zip(_csr_names(name), parts, strict=True))
        blocks[name] = block_of(pattern, contents.shapes[name])
    head = {"version": VERSION, "shapes": contents.shapes, "blocks": blocks, "recipe": contents.recipe}
    if contents.architecture is not None:
        head["architecture"] = contents.architecture
    if contents.tied:
        head["tied"] = dict(contents.tied)
    head = json_copy("head", head)
    head["sha256"] = digest(head, tensors)
    with atomic(path) as temporary:
        write_safetensors(temporary, tensors, {"ticket": json.dumps(head)})


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, for all to read whom the umask lets; OSError if that is not possible.

    It holds a copy for each name of a tensor that has several.
    """
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    tensors = {name: each if first[id(each)] == name else each.clone() for name, each in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata)
        path.chmod(mode)  # safetensors lets nobody but its owner read a file
    except SafetensorError as error:  # also of a full disk or a missing folder
        raise OSError(f"{path}: cannot be written: {error}") from None


def read(path: str | os.PathLike[str]) -> Contents:
    """Read a file that `write` wrote, every invariant checked; no dense weight is made of a masked one.

    The tensors are copies that later changes of the file do not reach.
    Raises OSError if it cannot be read, ValueError naming it if it is foreign, truncated, altered, of a newer version
    or not well formed.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: expected a file, a ticket or an export of format safetensors, got a folder")
    with refusals_name(path):
        return _contents(*read_safetensors(path.read_bytes()))


def read_safetensors(data: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors by name) of a safetensors file's bytes; ValueError if it is none."""
    try:
        tensors = dict(sorted(load_tensors(data).items()))  # it gives another order each time
        header = loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"not a safetensors file, or a damaged one: {error}") from None
    return header.get("__metadata__") or {}, tensors


def _contents(metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> Contents:
    if "ticket" not in metadata:
        raise ValueError(f"not a ticket: expected a metadata entry 'ticket', got {sorted(metadata)}")
    try:
        head = loads(metadata["ticket"])
    except ValueError as error:
        raise ValueError(f"damaged ticket: expected JSON in its metadata: {error}") from None
    if not isinstance(head, dict):
        raise ValueError(f"not a ticket: expected a JSON object in its metadata, got {type(head).__name__}")
    version = head.get("version")
    if type(version) is not int or version not in OPTIONAL:
        raise ValueError(f"expected a ticket of version 1 to {VERSION}, got {version!r}")
    if head.pop("sha256", None) != digest(head, tensors):
        raise ValueError("damaged ticket: its contents do not match their sha256")
    if not REQUIRED <= head.keys() <= REQUIRED | OPTIONAL[version]:
        raise ValueError(f"expected version, shapes and recipe in the ticket's metadata, got {list(head)}")
    if not isinstance(head["recipe"], dict):
        raise ValueError(f"recipe: expected a mapping, got {type(head['recipe']).__name__}")
    layers, shapes = {}, checked_shapes(head["shapes"])
    checked_blocks(head.get("blocks", {}), shapes)
    for name, shape in shapes.items():
        names = _csr_names(name)
        if missing := [part for part in names if part not in tensors]:
            raise ValueError(f"{name}: missing {missing}")
        values, crow_indices, col_indices = (tensors.pop(part) for part in names)
        layers[name] = Pattern(crow_indices, col_indices, matrix_shape(shape)), values
    tied = checked_ties(head.get("tied", {}), shapes)
    return checked(Contents(layers, shapes, tensors, head["recipe"], head.get("architecture"), tied))


@contextmanager
def atomic(path: str | os.PathLike[str], ours: Callable[[Path], bool] = lambda folder: False) -> Iterator[Path]:
    """A temporary path beside `path`, for a file or a folder: renamed to it on success, removed on failure.

    A symbolic link stays one: what it points to is replaced. So is a folder that is empty, or one of `ours`. Raises
    OSError if a device, a pipe or a socket is there; that of a failed write names the path.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(f"{path}: expected a file, a folder or nothing there, got a device, a pipe or a socket")
    owner = f".{path.name}.{platform.node()}."
    with suppress(OSError):  # those of another user, or gone meanwhile
        _remove_those_of_the_dead(path.parent, owner)
    temporary = path.with_name(f"{owner}{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir() and ours(path):
            old = path.with_name(f"{owner}{os.getpid()}.old")
            os.replace(path, old)
            os.replace(temporary, path)
            _remove(old)
        else:
            os.replace(temporary, path)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError) and error.errno and str(error.filename) in ("None", str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _remove_those_of_the_dead(folder: Path, owner: str) -> None:
    """Removes what processes of this machine that were killed have left in a folder: `owner`, their number, ".tmp"."""
    for path in folder.glob(f"{glob.escape(owner)}*.tmp"):
        number = path.name.removeprefix(owner).removesuffix(".tmp")
        if number.isdecimal() and not _runs(int(number)):
            _remove(path)


def _runs(number: int) -> bool:
    """Is there a process of this number? Yes, where that cannot be asked without ending it."""
    if os.name != "posix":
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (OverflowError, PermissionError):
        return True
    return True


def _remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


@contextmanager
def refusals_name(path: Path) -> Iterator[None]:
    """Refusals of what the file holds become ValueErrors that name it."""
    try:
        yield
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def loads(text: str | bytes) -> Any:
    """JSON of a file; ValueError also for keys that occur twice and for nesting without end."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("expected JSON of a few levels, got too many") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("expected JSON keys to be unique, got one twice")
    return mapping


def json_copy(what: str, value: Any) -> Any:
    """`value` as JSON would give it back (tuples become lists, numbers of NumPy and torch become Python's).

    Raises TypeError naming `what` if it cannot be JSON.
    """
    try:
        return json.loads(json.dumps(value, default=_number))
    except (TypeError, ValueError) as error:
        got = reprlib.repr(value)  # of a long one the beginning
        raise TypeError(f"{what}: expected JSON-able contents, got {got}: {error}") from None


def _number(value: Any) -> Any:
    """Of a NumPy scalar or a tensor without dimensions; TypeError for anything else."""
    if isinstance(value, (np.generic, np.ndarray, Tensor)) and value.ndim == 0:
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON-able")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a run; ValueError naming it if there is none."""
    try:
        contents = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a JSON file of a run: {error}") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{path}: expected a JSON object of a run, got {type(contents).__name__}")
    return contents


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    """Write it for people to read, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=2) + "\n")


def _csr_names(name: str) -> list[str]:
    """Of what is stored of a masked weight: "fc1.weight" -> ["fc1.values", ...], "bins" -> ["bins.values", ...]."""
    begin = name.removesuffix("weight") if name.endswith("weight") else f"{name}."
    return [begin + part for part in ("values", "crow_indices", "col_indices")]


def digest(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the head and of every tensor's name, dtype, shape and bytes."""
    found = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()

"""A ticket: initial weights, a mask and the recipe that found it, in one safetensors file.

The file's tensors are the state_dict of the converted model: "fc1.values", "fc1.crow_indices", "fc1.col_indices" for
a masked "fc1.weight", everything else dense under its own name. A weight (O, ...) of more than two dimensions, a
convolution's, is stored as the matrix (O, I), I all the others. Its metadata has one entry, "ticket", in JSON:
{"version": 1, "shapes": {"fc1.weight": [300, 784]}, "recipe": {...}, "sha256": "..."}. The digest covers all of it,
so a damaged file is an error and never another ticket. Equal tickets give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .convert import convert, dense_state, load_dense_state, masks_of
from .masks import check, survivors
from .pattern import Pattern, matrix_shape

VERSION = 1


@dataclass(frozen=True, eq=False, repr=False)
class Ticket:
    """Weights of a dense model, the masks that say which of them survive, and how they were found.

    weights: the dense model's state_dict; copied to the CPU, and set to zero where pruned.
    masks: bool tensors keyed by the weight they belong to ("fc1.weight"), of its shape; copied to the CPU.
    recipe: JSON-able; copied as JSON would (tuples become lists).
    Raises TypeError or ValueError if they do not fit together.
    """

    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    recipe: dict[str, Any]

    def __post_init__(self) -> None:
        check(self.masks, self.weights)
        copies = {"copy": True, "memory_format": torch.contiguous_format}
        masks = {name: mask.to("cpu", **copies) for name, mask in self.masks.items()}
        weights = {name: tensor.detach().to("cpu", **copies) for name, tensor in self.weights.items()}
        for name, mask in masks.items():
            if mask.dim() < 2 or name.rpartition(".")[2] != "weight":
                raise ValueError(f"masks: expected '<layer>.weight' of 2-D or more, got {name!r} {tuple(mask.shape)}")
            weights[name].masked_fill_(~mask, 0)
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "masks", masks)
        object.__setattr__(self, "recipe", json_copy("recipe", self.recipe))

    @classmethod
    def from_model(cls, model: nn.Module, recipe: Mapping[str, Any] | None = None) -> Ticket:
        """The present weights and masks of a converted model."""
        return cls(dense_state(model), masks_of(model), dict(recipe or {}))

    @classmethod
    def from_csr(
        cls,
        layers: Mapping[str, tuple[Pattern, Tensor]],
        shapes: Mapping[str, tuple[int, ...]],
        dense: Mapping[str, Tensor],
        recipe: dict[str, Any],
    ) -> Ticket:
        """The inverse of `csr`, `shapes` and `dense`; ValueError if patterns or values (nnz,) are not well formed."""
        weights, masks = dict(dense), {}
        for name, (pattern, values) in layers.items():
            if name in dense:
                raise ValueError(f"{name}: expected it to be either dense or sparse, got both")
            try:
                if pattern.shape != matrix_shape(shapes[name]):
                    raise ValueError(f"expected a matrix {matrix_shape(shapes[name])}, got {pattern.shape}")
                masks[name] = pattern.validate().mask().view(shapes[name])
                weights[name] = pattern.scatter(values).view(shapes[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return cls(weights, masks, recipe)

    @property
    def nnz(self) -> int:
        """How many weights survive, in all masked layers."""
        return survivors(self.masks)

    @property
    def density(self) -> float:
        """Share of the masked layers' weights that survive (1 if no layer is masked)."""
        total = sum(mask.numel() for mask in self.masks.values())
        return self.nnz / total if total else 1.0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each masked weight."""
        return {name: tuple(mask.shape) for name, mask in self.masks.items()}

    def csr(self) -> dict[str, tuple[Pattern, Tensor]]:
        """Each masked weight, as a matrix (O, I): (pattern, values (nnz,) in CSR order)."""
        patterns = {name: Pattern.from_mask(mask.flatten(1)) for name, mask in self.masks.items()}
        return {name: (pattern, pattern.gather(self.weights[name].flatten(1))) for name, pattern in patterns.items()}

    def dense(self) -> dict[str, Tensor]:
        """What is not masked: biases, normalisation, the layers left alone."""
        return {name: tensor for name, tensor in self.weights.items() if name not in self.masks}

    def same(self, other: Ticket) -> bool:
        """Are the weights (to the bit), the masks and the recipe those of `other`?"""
        ours, theirs = ((_digest(t.recipe, t.weights), _digest({}, t.masks)) for t in (self, other))
        return ours == theirs

    def apply(self, model: nn.Module) -> nn.Module:
        """A new model of `model`'s architecture with the ticket's weights, masked layers sparse; `model` is untouched.

        Raises ValueError if the model's names or shapes are not the ticket's.
        """
        converted = convert(model, self.masks)
        load_dense_state(converted, self.weights)
        return converted

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, atomically: at `path` there is either what was there before or the whole ticket."""
        tensors = self.dense()
        for name, (pattern, values) in self.csr().items():
            tensors.update(zip(_csr_names(name), (values, pattern.crow_indices, pattern.col_indices), strict=True))
        head = {"version": VERSION, "shapes": json_copy("shapes", self.shapes), "recipe": self.recipe}
        head["sha256"] = _digest(head, tensors)
        with atomic(path) as temporary:
            save_file(tensors, temporary, {"ticket": json.dumps(head)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ticket:
        """Read a file that `save` wrote.

        Raises FileNotFoundError, or ValueError if the file is foreign, truncated, altered or of a newer version.
        """
        path = Path(path)
        if path.is_dir():
            raise ValueError(f"{path}: expected a ticket file, got a folder")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file, or a damaged one: {error}") from None
        try:
            return cls._from_file(metadata, tensors)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def _from_file(cls, metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> Ticket:
        if "ticket" not in metadata:
            raise ValueError(f"not a ticket: expected a metadata entry 'ticket', got {sorted(metadata)}")
        head = json.loads(metadata["ticket"])
        if not isinstance(head, dict):
            raise ValueError(f"not a ticket: expected a JSON object in its metadata, got {head!r}")
        if head.get("version") != VERSION:
            raise ValueError(f"expected ticket version {VERSION}, got {head.get('version')!r}")
        if head.pop("sha256", None) != _digest(head, tensors):
            raise ValueError("damaged ticket: its contents do not match their sha256")
        if head.keys() != {"version", "shapes", "recipe"}:
            raise ValueError(f"expected version, shapes and recipe in the ticket's metadata, got {list(head)}")
        layers, shapes = {}, checked_shapes(head["shapes"])
        for name, shape in shapes.items():
            names = _csr_names(name)
            if missing := [part for part in names if part not in tensors]:
                raise ValueError(f"{name}: missing {missing}")
            values, crow_indices, col_indices = (tensors.pop(part) for part in names)
            layers[name] = Pattern(crow_indices, col_indices, matrix_shape(shape)), values
        return cls.from_csr(layers, shapes, tensors, head["recipe"])

    def __repr__(self) -> str:
        return f"Ticket({len(self.masks)} masked layers, {self.nnz} weights survive, density {self.density:.4g})"


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, for a file or a folder: renamed to it on success, removed on failure."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
        raise


def checked_shapes(shapes: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of masked weights, as read from a file; ValueError if they are none."""
    if not isinstance(shapes, dict):
        raise ValueError(f"shapes: expected a mapping, got {shapes!r}")
    for name, shape in shapes.items():
        if not isinstance(shape, list) or len(shape) < 2 or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"shapes[{name!r}]: expected two sizes or more, got {shape!r}")
    return {name: tuple(shape) for name, shape in shapes.items()}


def json_copy(what: str, value: Any) -> Any:
    """`value` as JSON would give it back (tuples become lists); TypeError naming `what` if it cannot."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what}: expected JSON-able contents, got {value!r}: {error}") from None


def _csr_names(name: str) -> list[str]:
    """Of a masked weight in a converted model's state_dict: "fc1.weight" -> ["fc1.values", ...]."""
    return [name.removesuffix("weight") + part for part in ("values", "crow_indices", "col_indices")]


def _digest(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the head and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

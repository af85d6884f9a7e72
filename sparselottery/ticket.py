"""A ticket: initial weights, a mask and the recipe that found it, in one safetensors file (see `files`).

Equal tickets give equal bytes.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import hub
from .architecture import build, describe
from .contents import Contents, fitting
from .convert import (
    converted_with,
    copy_of,
    dense_entries,
    dense_state,
    load_dense_state,
    masked_layers,
    masked_weights,
    masks_of,
    tied,
)
from .entries import as_tensors, owned, tied_places, with_data
from .files import digest, json_copy, read, refusals_name, write
from .masks import as_mask, check, survivors
from .nn import MaskedLayer, as_module
from .pattern import Pattern
from .pieces import keep

# A ticket holds dense weights: how many a file may ask for. Real ones survive at more than 1 in 10,000.
FREE_WEIGHTS, WEIGHTS_PER_BYTE = 2**26, 2**12


@dataclass(frozen=True, eq=False, repr=False)
class Ticket:
    """Weights of a dense model, the masks that say which of them survive, and how they were found.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> ticket = Ticket.from_model(convert(model, prune(model, 0.5)))
        >>> ticket.save("ticket.safetensors")
        >>> Ticket.load("ticket.safetensors").apply()
        MaskedSequential(
          (0): MaskedLinear(in_features=8, out_features=4, bias=True, density=0.5, nnz=16, execution=sparse)
        )

    weights: the dense model's state_dict; copied to the CPU, and set to zero where pruned. A file cannot hold all that
        a state_dict can: `save` refuses sparse, nested and quantised buffers and what is no tensor (extra state).
    masks: bool tensors keyed by the weight they belong to ("fc1.weight"), of its shape; copied to the CPU.
    recipe: JSON-able; copied as JSON would (tuples become lists).
    architecture: the dense model as `architecture.describe` gives it; None if unknown.
    Raises TypeError or ValueError if they do not fit together.
    """

    weights: dict[str, Any]
    masks: dict[str, Tensor]
    recipe: dict[str, Any]
    architecture: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check(self.masks, self.weights)
        masks = {name: owned(name, as_mask(name, mask)) for name, mask in self.masks.items()}
        weights = {name: owned(name, entry) for name, entry in self.weights.items()}
        for name, mask in masks.items():
            if mask.dim() < 2:
                raise ValueError(f"masks: expected those of weights of 2-D or more, got {name!r} {tuple(mask.shape)}")
            keep(weights[name], mask)
        for name, first in tied_places(self.weights, masks).items():
            weights[name] = weights[first]
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "masks", masks)
        object.__setattr__(self, "recipe", json_copy("recipe", self.recipe))

    @classmethod
    def of_parts(
        cls, weights: dict[str, Any], masks: dict[str, Tensor], recipe: dict[str, Any], architecture: dict | None
    ) -> Ticket:
        """A ticket of parts that nobody else changes, nothing checked or copied: as `__post_init__` leaves them."""
        ticket = object.__new__(cls)
        parts = {"weights": weights, "masks": masks, "recipe": recipe, "architecture": architecture}
        vars(ticket).update(parts)
        return ticket

    @classmethod
    def from_model(cls, model: nn.Module, recipe: Mapping[str, Any] | None = None) -> Ticket:
        """The present weights and masks of a converted model."""
        weights = {name: owned(name, entry, copied=True) for name, entry in dense_state(as_module(model)).items()}
        weights |= {name: weights[first] for name, first in tied(model).items()}
        masks = {name: mask.cpu() for name, mask in masks_of(model).items()}
        recipe = json_copy("recipe", dict(recipe or {}))
        architecture = fitting(Contents({}, {}, weights, recipe, describe(model))).architecture
        return cls.of_parts(weights, masks, recipe, architecture)

    def pruned(self, masks: dict[str, Tensor], recipe: dict[str, Any]) -> Ticket:
        """The ticket of these weights with fewer survivors, in this one's memory."""
        check(masks, self.weights)
        for name, mask in masks.items():
            keep(self.weights[name], mask)
        return Ticket.of_parts(self.weights, masks, json_copy("recipe", recipe), self.architecture)

    @classmethod
    def from_contents(cls, contents: Contents) -> Ticket:
        """The inverse of `contents`, given what `files.checked` returns; ValueError for few bytes of huge weights."""
        layers, shapes, dense, recipe, architecture, others = contents
        stored = sum(part.nbytes for p, values in layers.values() for part in (p.crow_indices, p.col_indices, values))
        if sum(map(math.prod, shapes.values())) > (limit := FREE_WEIGHTS + WEIGHTS_PER_BYTE * stored):
            raise ValueError(f"shapes: expected at most {limit} weights in files of this size, got {shapes}")
        weights, masks = dict(dense), {}
        for name, (pattern, values) in layers.items():
            masks[name] = pattern.mask().view(shapes[name])
            weights[name] = pattern.scatter(values).view(shapes[name])
        weights |= {name: weights[first] for name, first in others.items()}
        return cls.of_parts(weights, masks, recipe, architecture)

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
    def density_of_all(self) -> float:
        """Share of all weights of two dimensions or more that is left, those counted that have no mask."""
        once = {id(entry): entry for entry in self.weights.values() if isinstance(entry, Tensor) and entry.dim() > 1}
        total = sum(entry.numel() for entry in once.values())
        pruned = sum(mask.numel() for mask in self.masks.values()) - self.nnz
        return (total - pruned) / total if total else 1.0

    @property
    def tied(self) -> dict[str, str]:
        """The names of weights that are a masked one too, with the name of that."""
        first = {id(self.weights[name]): name for name in self.masks}
        return {name: first[id(entry)] for name, entry in self.weights.items() if first.get(id(entry), name) != name}

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

    def contents(self) -> Contents:
        """What its file holds."""
        others = self.tied
        dense = {name: entry for name, entry in self.dense().items() if name not in others}
        return Contents(self.csr(), self.shapes, dense, self.recipe, self.architecture, others)

    def same(self, other: Ticket) -> bool:
        """Are the weights (to the bit), the masks and the recipe those of `other`?"""
        ours, theirs = ((digest(t.recipe, as_tensors(t.weights)), digest({}, t.masks)) for t in (self, other))
        return ours == theirs

    def apply(self, model: nn.Module | None = None) -> nn.Module:
        """A new model of `model`'s architecture with the ticket's weights, masked layers sparse; `model` is untouched.

        model: None for the ticket's own architecture, in evaluation mode, each weight of the dtype that it has here.
        What a model has on the meta device is made on the CPU.
        Raises ValueError if the model's names or shapes are not the ticket's, or the ticket knows no architecture.
        """
        if model is None:
            if self.architecture is None:
                raise ValueError("model: expected one, as the ticket does not know its architecture")
            model = build(self.architecture)
            model.load_state_dict(self.weights, assign=True)
            for name, first in self.tied.items():
                path, _, part = name.rpartition(".")
                setattr(model.get_submodule(path), part, model.get_parameter(first))
        else:
            model = with_data(as_module(model), self.weights)
        converted = converted_with(model, self.masks, self.weights)
        present = {name: layer.weight for name, layer in masked_layers(converted).items() if name in self.masks}
        present |= {name: present[first] for name, first in tied(converted).items() if first in present}
        load_dense_state(converted, {**self.weights, **present})
        return converted

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, atomically: at `path` there is either what was there before or the whole ticket.

        Raises OSError if it cannot be written, TypeError naming an entry of the state_dict that a file cannot hold.
        """
        write(path, self.contents())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ticket:
        """Read a file that `save` wrote.

        Raises FileNotFoundError, or ValueError if the file is foreign, truncated, altered, of a newer version or not
        well formed.
        """
        contents = read(path)
        with refusals_name(Path(path)):
            return cls.from_contents(contents)

    def save_pretrained(self, folder: str | os.PathLike[str], *, measured: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write a folder as the Hub has them: ticket.safetensors, and README.md, its model card.

        measured: rows of `explain`, whose milliseconds the card then shows. Raises as `save`.
        """
        folder, contents = Path(folder), self.contents()
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / hub.FILE, contents)
        hub.write_card(folder, hub.card(contents, measured))

    def push_to_hub(self, repo_id: str, *, measured: Sequence[Mapping[str, Any]] = (), **options: Any) -> str:
        """Upload the ticket with its model card to the Hugging Face Hub; returns the address. Needs the extra "hub".

        measured: as of `save_pretrained`. options: private, token, commit_message, revision, create_pr.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, measured=measured)
            return hub.push(Path(folder), repo_id, **options)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> Ticket:
        """The ticket of a folder of `save_pretrained`, or of a repository of the Hub, which needs the extra "hub".

        options: revision, token, cache_dir, local_files_only. Raises as `load`, and what huggingface_hub raises.
        """
        return cls.load(hub.find(name, **options))

    def __repr__(self) -> str:
        return f"Ticket({len(self.masks)} masked layers, {self.nnz} weights survive, density {self.density:.4g})"


def contents_of(model: nn.Module, recipe: dict[str, Any]) -> Contents:
    """What the file of `Ticket.from_model(model, recipe)` holds, with no dense weight made of a masked one.

    On the CPU, values and indices are those of the layers themselves: to be used up before anybody changes them.
    """
    layers, sparse = masked_weights(model), {}
    for name, layer in layers.items():
        layer.check()
        pattern, values = layer.pattern, owned(name, layer.values.detach(), copied=True)
        pattern = Pattern(pattern.crow_indices.cpu(), pattern.col_indices.cpu(), pattern.shape)
        if layer.transposed:
            pattern, order = pattern.transposed()
            values = values[order]
        sparse[name] = pattern, values
    entries = ((name, entry) for name, entry in dense_entries(model) if not isinstance(entry, MaskedLayer))
    dense = {name: owned(name, copy_of(entry), copied=True) for name, entry in entries}
    shapes = {name: layer.dense_shape for name, layer in layers.items()}
    return fitting(Contents(sparse, shapes, dense, recipe, describe(model), tied(model)))

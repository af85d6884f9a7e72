"""A training that stops between two steps and goes on later: in another process, or on another machine.

Its state is one safetensors file: the model's tensors, the optimiser's and the random state, with what has been
recorded so far as JSON. It is of that training alone: a fingerprint of all that decides a training says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..files import atomic, digest, json_copy, read_safetensors, refusals_name, write_safetensors


class Paused(Exception):
    """A training has stopped before its end, its state kept: begun again in the same way, it goes on."""


class Pause(NamedTuple):
    """When a training is to stop, in seconds as time.time() counts them, and where its state is kept until it ends."""

    until: float
    path: Path

    def due(self) -> bool:
        return time.time() >= self.until


class Training:
    """One training that is about to begin, and its state at ``path``. recipe: JSON-able, all that decides it but the
    model and the data."""

    def __init__(self, path: Path, model: nn.Module, recipe: Any) -> None:
        self._path, self._model = path, model
        self._fingerprint = digest({"recipe": json_copy("recipe", recipe)}, _on_cpu(model.state_dict()))
        self._tensors: dict[str, Tensor] = {}

    def kept(self) -> dict[str, Any] | None:
        """The record that `keep` was given of this training; None if there is none. Raises ValueError for damage."""
        if not self._path.exists():
            return None
        with refusals_name(self._path):
            metadata, self._tensors = read_safetensors(self._path.read_bytes())
        return json.loads(metadata["record"]) if metadata.get("fingerprint") == self._fingerprint else None

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """After `kept`: put the model, its new optimiser and the random state back where they were."""
        with torch.no_grad():
            for name, tensor in self._model.state_dict().items():  # they share the model's memory
                tensor.copy_(self._tensors[f"model.{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self._tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".", 2)
                state.setdefault(int(number), {})[key] = tensor
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        torch.set_rng_state(self._tensors["random.cpu"])
        if "random.cuda" in self._tensors:
            torch.cuda.set_rng_state(self._tensors["random.cuda"])

    def keep(self, optimizer: torch.optim.Optimizer, record: Mapping[str, Any]) -> None:
        """Write the state, atomically. ``record``: JSON-able."""
        tensors = {f"model.{name}": tensor for name, tensor in self._model.state_dict().items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{key}": each for key, each in state.items() if isinstance(each, Tensor)}
        tensors |= {f"random.{kind}": state for kind, state in _random_states().items()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(self._path) as temporary:
            head = {"fingerprint": self._fingerprint, "record": json.dumps(record)}
            write_safetensors(temporary, _on_cpu(tensors), head)

    def end(self) -> None:
        """Remove the state: the training has ended."""
        self._path.unlink(missing_ok=True)


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

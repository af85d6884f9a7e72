"""What one export works on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..ticket import Ticket
from .simplify import leaves

TOLERANCE = 1e-4  # of the largest output
OTHER_TENSORS = "its tensors are not those of the source"


@dataclass(frozen=True, eq=False)
class Job:
    """source: a converted model, or None for the ticket's own architecture; example_input: as given to `export`."""

    ticket: Ticket
    source: nn.Module | None = None
    example_input: Tensor | tuple | None = None
    sparse_initializer: bool = False

    @cached_property
    def model(self) -> nn.Module:
        """The converted model, a copy in evaluation mode on the CPU without gradients."""
        model = self.ticket.apply() if self.source is None else copy.deepcopy(self.source)
        return model.cpu().eval().requires_grad_(False)

    @cached_property
    def example(self) -> tuple[Any, ...]:
        """Positional arguments of the model, with a batch of at least 2, which is what programs are traced with."""
        if self.example_input is None:
            return (self._random_rows(),)
        given = self.example_input if isinstance(self.example_input, tuple) else (self.example_input,)
        return tuple(_widened(each.cpu()) if isinstance(each, Tensor) else each for each in given)

    def _random_rows(self) -> Tensor:
        found = leaves(self.ticket.architecture) if self.ticket.architecture else []
        name, first = found[0] if found else ("", {"type": None})
        if first["type"] != "Linear":
            raise ValueError("example_input: expected one, as the model does not begin with nn.Linear")
        dtype = self.ticket.weights[f"{name}.weight" if name else "weight"].dtype
        generator = torch.Generator().manual_seed(0)
        return torch.randn(
            2, first["arguments"]["in_features"], generator=generator, dtype=torch.float32, device="cpu"
        ).to(dtype)


def batches(example: tuple[Any, ...], dynamic: Any) -> tuple[Any, ...]:
    """The dynamic shapes of an example: its first dimension, the batch, is `dynamic`."""
    return tuple({0: dynamic} if isinstance(each, Tensor) and each.dim() else None for each in example)


def outputs(result: Any) -> list[Tensor]:
    """The tensors in what a model returns, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Are they equal to rounding, sums having been added in another order?"""
    return len(ours) == len(theirs) and all(map(_close, ours, theirs))


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> str:
    """How far apart the outputs of the source and of what was written are, in words."""
    shapes = [[tuple(each.shape) for each in outputs] for outputs in (ours, theirs)]
    if shapes[0] != shapes[1]:
        return f"its outputs are expected to have the shapes {shapes[0]}, and have {shapes[1]}"
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True) if a.numel()]
    apart = max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
    largest = max((float(a.abs().max()) for a, _ in pairs), default=0.0)
    return f"its outputs differ from the source's by up to {apart:.3g}, where the largest is {largest:.3g}"


def _close(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    finite = ours[ours.isfinite()].abs().double()
    rounding = 16 * torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0.0
    tolerance = max(TOLERANCE, rounding) * float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(ours.double(), theirs.double(), rtol=0, atol=tolerance, equal_nan=True)


def _widened(tensor: Tensor) -> Tensor:
    """With a batch of 2 if it is 1, which tracing takes for a constant."""
    return tensor.expand(2, *tensor.shape[1:]).contiguous() if tensor.dim() and len(tensor) == 1 else tensor

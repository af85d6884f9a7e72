"""What one export works on."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..calls import Arguments, ExampleInput, arguments
from ..ticket import Ticket
from .simplify import leaves

TOLERANCE = 1e-4  # of the largest output
OTHER_TENSORS = "its tensors are not those of the source"


@dataclass(frozen=True, eq=False)
class Job:
    """source: a converted model, or None for the ticket's own architecture; example_input: as given to `export`."""

    ticket: Ticket
    source: nn.Module | None = None
    example_input: ExampleInput | None = None
    sparse_initializer: bool = False

    @cached_property
    def model(self) -> nn.Module:
        """The converted model, a copy in evaluation mode on the CPU without gradients."""
        model = self.ticket.apply() if self.source is None else copy.deepcopy(self.source)
        return model.cpu().eval().requires_grad_(False)

    @cached_property
    def example(self) -> Arguments:
        """Arguments of the model, with a batch of at least 2, which is what programs are traced with."""
        given = arguments(self._random_rows() if self.example_input is None else self.example_input)
        on_cpu = given.map(lambda tensor: tensor.cpu())
        return on_cpu.with_batch(2) if on_cpu.batch == 1 else on_cpu

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


def dynamic_batches(model: nn.Module, example: Arguments) -> dict[str, Any]:
    """The dynamic shapes of an example, by parameter of the model's forward: of each tensor of the batch the first.

    Raises ValueError for a keyword that forward takes by `**kwargs`, for which torch.export finds no shapes.
    """

    def dynamic(leaf: Any) -> dict[int, Any] | None:
        return {0: torch.export.Dim.DYNAMIC} if isinstance(leaf, Tensor) and example.is_batched(leaf) else None

    signature = inspect.signature(model.forward)
    named = {each.name for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD}
    if unnamed := [name for name in example.kwargs if name not in named]:
        raise ValueError(f"example_input: expected arguments that the model's forward names, got {unnamed[0]!r}")
    bound = signature.bind(*example.args, **example.kwargs).arguments
    return {name: tree_map(dynamic, each) for name, each in bound.items()}


def traced(
    trace: Callable[[Arguments, dict[str, Any] | None], Any], job: Job, model: nn.Module
) -> tuple[Any, tuple[str, ...]]:
    """What `trace` makes of an example and the dynamic shapes of its batch: of None, with a note, where a model takes
    one size alone.

    Raises ValueError, in a sentence, for a model that cannot be traced.
    """
    dynamic = dynamic_batches(model, job.example)
    try:
        return trace(job.example.map(torch.clone), dynamic), ()  # torch marks the tensors
    except Exception:  # the exporters raise whatever their parts do
        try:
            program = trace(job.example, None)
        except Exception as error:
            why = error.__cause__ or error
            first = next(iter(str(why).splitlines()), "")
            raise ValueError(f"model: torch cannot export it: {type(why).__name__}: {first}") from error
    return program, (f"it takes a batch of {job.example.batch} alone, as the model does not export for any other",)


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

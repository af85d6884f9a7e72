"""MaskedSequential: groups of masked layers and what follows them, each in one native call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..kernels import native
from .conv import MaskedConv2d, run_conv, run_two_convs
from .executions import NATIVE
from .fuse import ELEMENTWISE, NOTHING, Group, Rules, Step, facts_of, groups, is_observed
from .linear import MaskedLinear, run_chain

# Between two masked layers these keep the strides of their input, so it may stay batch-minor.
_KEEPS_STRIDES = {*ELEMENTWISE, *NOTHING}


class MaskedSequential(nn.Sequential):
    """nn.Sequential in which some runs of children are one native call each, forward and backward.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> sparse = convert(model, prune(model, 0.9))
        >>> type(sparse).__name__, sparse(torch.randn(5, 64)).shape
        ('MaskedSequential', torch.Size([5, 10]))

    They are MaskedLinear, ReLU, MaskedLinear, ... and MaskedConv2d with the ReLU after it; on the CPU with the
    MaxPool2d, too, and in evaluation without gradients the BatchNorm2d. Where only elementwise modules stand before the
    next MaskedLinear, activations stay batch-minor. The children keep their names, so the state_dict is that of an
    nn.Sequential. Children with hooks, parametrizations or a forward of their own are called as usual, and all are
    while there are hooks of all modules.
    """

    _kept: _Kept | None = None

    def forward(self, input: Tensor) -> Tensor:
        if nn.modules.module._has_any_global_hook() or ops.in_torch(input) or not isinstance(input, Tensor):
            return super().forward(input)  # what is no tensor, the first child may take
        found, at, end = self._groups(input), 0, 0
        while at < len(found):
            group, at = found[at], at + 1
            if isinstance(group, nn.Module):
                input, end = group(input), end + 1
                continue
            (first, norm, relu, pool), end = group.steps[0], end + len(group.children)
            if first.geometry is None:
                layers = [step.layer for step in group.steps]
                input = run_chain(input, layers, stays_batch_minor(layers[-1], list(self._modules.values())[end:]))
            elif (two := _two_convs(found[at - 1 : at + 1])) and (y := run_two_convs(input, two)) is not None:
                input, end, at = y, end + len(found[at].children), at + 1
            else:
                input = run_conv(input, first, relu, pool, norm)
        return input

    def _groups(self, x: Tensor) -> list[Group | nn.Module]:
        """The groups of a call on x: those of the last call where nothing has changed, as looking is cheaper."""
        kept = self._kept
        if kept is None or torch.compiler.is_compiling():
            return self._group(x)
        if kept.on_cpu != x.is_cpu or (kept.has_norms and ops.takes_norm(x)) or not native.unchanged(kept.facts):
            return self._group(x)
        return kept.groups

    def _group(self, x: Tensor) -> list[Group | nn.Module]:
        children, how = list(self._modules.values()), rules(x)
        found = groups(children, how)
        has_norms = any(type(child) is nn.BatchNorm2d for child in children)
        if not (torch.compiler.is_compiling() or (has_norms and how.norms)):  # a norm has too much to look at
            self._kept = _Kept(facts_of([self], children), found, x.is_cpu, has_norms)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_kept"}


@dataclass(frozen=True, slots=True)
class _Kept:  # no tuple: torch.export goes through those of a module, and facts hold the module's own table
    """The groups of a call without norms in them, as long as the facts hold."""

    facts: tuple[native.Fact, ...]
    groups: list[Group | nn.Module]
    on_cpu: bool
    has_norms: bool


def _two_convs(found: Sequence[Group | nn.Module]) -> tuple[Step, Step] | None:
    """The steps of two groups of a convolution each, if that is what these are and nobody asks for gradients."""
    if torch.is_grad_enabled() or len(found) < 2 or not all(isinstance(group, Group) for group in found):
        return None
    first, second = (group.steps[0] for group in found)
    return None if first.layer.geometry is None or second.layer.geometry is None else (first, second)


def rules(x: Tensor) -> Rules:
    """What one call on x can do: only the kernels of the CPU pool, where they may see the image's size."""
    return Rules(native_layer, norms=ops.takes_norm(x), pools=x.is_cpu and not torch.compiler.is_compiling())


def native_layer(module: nn.Module) -> nn.Module | None:
    """The module, if it is a masked layer that runs on our kernels."""
    return module if type(module) in (MaskedLinear, MaskedConv2d) and module.execution in NATIVE else None


def stays_batch_minor(layer: MaskedLinear, followers: Sequence[nn.Module]) -> bool:
    """Is a masked layer the next reader of this layer's output, with only elementwise modules before it?

    And is it one that reads batch-minor, or is that what this layer writes?
    """
    if not followers or torch.compiler.is_exporting():  # the strides would pin down the batch size
        return False
    for child in followers:
        if type(child) is MaskedLinear:
            native = child.execution in NATIVE and not is_observed(child)
            return native and (child.batch_minor or layer.batch_minor)
        if type(child) not in _KEEPS_STRIDES:
            return False
    return False

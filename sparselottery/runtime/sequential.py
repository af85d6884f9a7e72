"""A frozen nn.Sequential: groups of children in one native call each, the whole net where it has only such children."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels import cpu_net, cpu_stages, native
from ..nn.fuse import NOTHING, Group, Rules, Step, facts_of, groups, is_observed
from ..pattern import Pattern, matrix_shape
from .layer import FEW_IMAGES, Cache, FrozenLayer, chain_of, is_traced, runs_native

SMALL = {nn.Linear: 2**16, nn.Conv2d: 2**12}  # weights of unmasked layers that join the native call of their neighbours


class Run:
    """A group's steps: one native call for few images or a batch of rows, and one each for many images."""

    def __init__(self, group: Group) -> None:
        self.steps, self.children = group
        layers = [step.layer for step in self.steps if step.layer is not None]
        self._made, self._calls = Cache(layers), Cache(layers)
        linear = all(step.layer is not None and step.layer.geometry is None for step in self.steps)
        plain = [step.relu for step in self.steps] == [True] * (len(self.steps) - 1) + [False]
        self._chain = [step.layer for step in self.steps] if linear and plain else []

    def bound(self, x: Tensor) -> tuple | None:
        """What `native.bound` takes after x of a contiguous input of this shape; None where it is no single call."""
        return self._calls((x.shape, torch.get_num_threads()), lambda: self._bind(x))

    def _bind(self, x: Tensor) -> tuple | None:
        packed = self._pick(x) if self._takes(x) else None
        return packed and (self._calls.facts, tuple(x.shape), torch.get_num_threads(), *packed.bound(len(x)))

    def _takes(self, x: Tensor) -> bool:
        return runs_native(x) and x.dim() == (2 if self.steps[0].layer.geometry is None else 4)

    def _pick(self, x: Tensor) -> cpu_net.Net | cpu_net.Chain | None:
        shape, threads = tuple(x.shape[1:]), torch.get_num_threads()
        if self._chain:
            return chain_of(self._chain, self._made, x.shape)
        if len(x) >= FEW_IMAGES:
            return None
        return self._made((shape, threads), lambda: cpu_net.Net(list(map(_stage, self.steps)), shape, threads))

    def __call__(self, x: Tensor) -> Tensor:
        if not self._takes(x):
            for child in self.children:
                x = child(x)
            return x
        if call := self._pick(x):
            return call(x.contiguous())
        for step in self.steps:
            if step.layer is None:
                x = x.mean((2, 3))
            elif step.layer.geometry is None:
                x = step.layer(x.flatten(1))
                x = x.relu_() if step.relu else x
            else:
                x = step.layer.convolve(x, step.relu, step.pool, step.norm)
        return x


def _beside(modules: Iterable[nn.Module]) -> tuple[native.Fact, ...]:
    """Of the tensors that runs take from norms and dense layers; those of frozen layers their own `Cache` watches."""
    modules = [module for module in modules if type(module) in (*SMALL, nn.BatchNorm2d)]
    tables = [table for module in modules for table in (module._parameters, module._buffers)]
    entries = [(table, *each) for table in tables for each in table.items()]
    tensors = [tensor for *_, tensor in entries if tensor is not None and not tensor.is_inference()]
    return *entries, *native.versions(tensors)


@dataclass(frozen=True, slots=True)
class Grouped:  # no tuple, as nn.sequential's
    """The children of a FrozenSequential in order, as long as the facts hold; whole: the run that is all."""

    facts: tuple[native.Fact, ...]
    parts: list[Run | nn.Module]
    whole: Run | None


class FrozenSequential(nn.Sequential):
    """nn.Sequential in evaluation with frozen layers in it, under its children's names.

    Groups of children are one native call each. Children with hooks, parametrizations or a forward of their own are
    called as usual, and all are while there are hooks of all modules.
    """

    _grouped: Grouped | None = None  # made when first asked for

    def forward(self, input: Tensor) -> Tensor:
        if is_traced(input):
            return super().forward(input)
        for part in self.grouped().parts:
            input = part(input)
        return input

    def grouped(self) -> Grouped:
        grouped = self._grouped
        if grouped is None or not native.unchanged(grouped.facts):
            grouped = self._grouped = _group(self)
        return grouped

    def _apply(self, fn, recurse=True):
        self._grouped = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args):
        self._grouped = None  # children can get other tensors
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict:
        return {
            name: value for name, value in super().__getstate__().items() if name != "_grouped"
        }  # a copy makes its own


def _group(net: FrozenSequential) -> Grouped:
    parents: list[nn.Sequential] = []
    children = list(_flat(net, parents))
    watched = list(dict.fromkeys(m for parent in parents for m in (parent, *parent._modules.values())))
    facts = *facts_of(parents, watched), *_beside(watched)
    if nn.modules.module._has_any_global_hook():
        return Grouped(facts, list(net), None)
    parts: list[Run | nn.Module] = []
    for each in groups(children, Rules(_layer, joined=True)):
        if not isinstance(each, Group):
            parts.append(each)
        elif any(type(child) is FrozenLayer for child in each.children):
            parts.append(Run(each))
        else:
            parts += each.children
    alone = len(parts) == 1 and isinstance(parts[0], Run) and not is_observed(net)
    return Grouped(facts, parts, parts[0] if alone else None)


def _flat(module: nn.Sequential, parents: list[nn.Sequential]) -> Iterator[nn.Module]:
    """The children that do something, and in place of Sequentials theirs; parents: all whose children are looked at."""
    parents.append(module)
    for child in module:
        if is_observed(child):
            yield child
        elif type(child) in (nn.Sequential, FrozenSequential):
            yield from _flat(child, parents)
        elif type(child) not in NOTHING or child.training:
            yield child


def _layer(module: nn.Module) -> FrozenLayer | None:
    """The frozen layer that our kernels can run in place of a module: itself, or one in which everything survives."""
    if type(module) in SMALL and 0 < module.weight.numel() <= SMALL[type(module)]:
        rows, columns = matrix_shape(module.weight.shape)
        crow_indices = torch.arange(0, rows * columns + 1, columns, dtype=torch.int32, device="cpu")
        col_indices = torch.arange(columns, dtype=torch.int32, device="cpu").repeat(rows)
        bias = None if module.bias is None else module.bias.detach()
        pattern = Pattern(crow_indices, col_indices, (rows, columns))
        module = FrozenLayer(module, pattern, module.weight.detach().flatten(), bias)
    return module if type(module) is FrozenLayer and module.is_native else None


def _stage(step: Step) -> cpu_stages.Stage:
    return cpu_stages.Mean() if step.layer is None else step.layer.stage(step.relu, step.pool, step.norm)

"""A frozen nn.Sequential: runs of children in one native call each, the whole net where it has only such children."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import cpu_net, cpu_stages
from .layer import FEW_IMAGES, Cache, FrozenLayer, chain_of, runs_native

IN_EVALUATION_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)


class Step(NamedTuple):
    """A masked layer and what one call does with its output; or, without a layer, the mean over all pixels."""

    layer: FrozenLayer | None
    norm: nn.BatchNorm2d | None = None
    relu: bool = False
    pool: int = 1

    def stage(self) -> cpu_stages.Stage:
        return cpu_stages.Mean() if self.layer is None else self.layer.stage(self.relu, self.pool, self.norm)


class Run:
    """Steps that are one native call for few images or a batch of rows, and one each for many images."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps, self._made = steps, Cache()
        linear = all(step.layer is not None and step.layer.geometry is None for step in steps)
        plain = [step.relu for step in steps] == [True] * (len(steps) - 1) + [False]
        self._chain = [step.layer for step in steps] if linear and plain else []

    def takes(self, x: Tensor) -> bool:
        return x.dim() == (2 if self.steps[0].layer.geometry is None else 4) and runs_native(x)

    def bind(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The one native call for inputs of the shape of x, contiguous; None where there is none."""
        packed = self._pick(x) if self.takes(x) else None
        return packed and packed.bind(len(x))

    def _pick(self, x: Tensor) -> cpu_net.Net | cpu_net.Chain | None:
        shape, threads = tuple(x.shape[1:]), torch.get_num_threads()
        if self._chain:
            return chain_of(self._chain, self._made, *x.shape)
        if len(x) >= FEW_IMAGES:
            return None
        return self._made((shape, threads), lambda: cpu_net.Net([step.stage() for step in self.steps], shape, threads))

    def __call__(self, x: Tensor) -> Tensor:
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


class FrozenSequential(nn.Sequential):
    """nn.Sequential in evaluation mode with frozen layers in it. Its children keep their names; hooks of children are
    not called where their run is one native call."""

    def prepare(self) -> None:
        """Finds the runs; to be called when the children are those to be run."""
        self.runs = _runs(_flat(self))

    def forward(self, x: Tensor) -> Tensor:
        for run in self.runs:
            if isinstance(run, nn.Module):
                x = run(x)
            elif run[0].takes(x):
                x = run[0](x)
            else:
                for child in run[1]:
                    x = child(x)
        return x


def _flat(module: nn.Sequential) -> list[nn.Module]:
    """The children, and in place of Sequentials theirs."""
    children: list[nn.Module] = []
    for child in module:
        children += _flat(child) if type(child) in (nn.Sequential, FrozenSequential) else [child]
    return [child for child in children if type(child) not in IN_EVALUATION_NOTHING]


def _runs(children: list[nn.Module]) -> list[nn.Module | tuple[Run, list[nn.Module]]]:
    """Children as they are, and runs of them, each with the children that it is made of."""
    runs, at = [], 0
    while at < len(children):
        steps, end = _steps(children, at)
        if steps:
            runs.append((Run(steps), children[at:end]))
        else:
            runs.append(children[at])
            end = at + 1
        at = end
    return runs


def _steps(children: list[nn.Module], at: int) -> tuple[list[Step], int]:
    """The longest run of steps that begins at `at`, and where it ends."""
    steps: list[Step] = []
    while at < len(children):
        child, end = children[at], at + 1
        if _is_native(child):
            norm, relu, pool = None, False, 1
            if child.geometry is not None and end < len(children) and _normalises(children[end], child):
                norm, end = children[end], end + 1
            if end < len(children) and type(children[end]) is nn.ReLU:
                relu, end = True, end + 1
            if child.geometry is not None and end < len(children) and _pools(children[end]):
                size, end = children[end].kernel_size, end + 1
                pool = size if isinstance(size, int) else size[0]
            if (
                child.geometry is not None
                and steps
                and steps[-1].layer is not None
                and steps[-1].layer.geometry is None
            ):
                break  # rows are no images
            steps.append(Step(child, norm, relu, pool))
        elif steps and _averages(child):
            if end == len(children) or not _flattens(children[end]):
                break
            steps.append(Step(None))
        elif (
            not (steps and _flattens(child) and end < len(children) and _is_native(children[end]))
            or children[end].geometry is not None
        ):
            break
        at = end
    return steps, at


def _is_native(child: nn.Module | None) -> bool:
    return isinstance(child, FrozenLayer) and child.is_native


def _averages(child: nn.Module) -> bool:
    return type(child) is nn.AdaptiveAvgPool2d and child.output_size in (1, (1, 1))


def _flattens(child: nn.Module | None) -> bool:
    return type(child) is nn.Flatten and (child.start_dim, child.end_dim) == (1, -1)


def _normalises(norm: nn.Module, conv: FrozenLayer) -> bool:
    mean = norm.running_mean if type(norm) is nn.BatchNorm2d else None
    if mean is None or len(mean) != len(conv.crow_indices) - 1:
        return False
    return all(t is None or t.dtype == torch.float32 for t in (mean, norm.running_var, norm.weight, norm.bias))


def _pools(child: nn.Module) -> bool:
    """Is it over square windows that cover the image?"""
    if type(child) is not nn.MaxPool2d or child.ceil_mode or child.return_indices:
        return False
    size, stride, padding, dilation = (
        value if isinstance(value, tuple) else (value, value)
        for value in (child.kernel_size, child.stride, child.padding, child.dilation)
    )
    return size == stride and size[0] == size[1] <= 15 and padding == (0, 0) and dilation == (1, 1)

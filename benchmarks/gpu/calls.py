"""Calls of one masked layer on its own kernels, each alone: what `tune` varies and `profile` takes apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.gpu.cases import Case, Conv, Linear
from benchmarks.gpu.problems import Problem, precision, problem
from sparselottery import convert
from sparselottery.kernels import gpu

OPS = ("forward", "gx", "gw")  # the output; the gradient of the input alone, and of the weight alone

# What the bars promise most comes first.
_SQUARE, _WIDE = (4096, 4096, 4096), (4096, 11008)
_LAYERS = [
    Linear("", *_SQUARE, "1x1", 0.1, "fp32"),
    Linear("", *_SQUARE, "64x64", 0.1, "fp32"),
    Linear("", *_SQUARE, "64x64", 0.1, "bf16"),
    Linear("", 1, *_WIDE, "1x1", 0.1, "bf16"),
    Linear("", 16, *_WIDE, "1x1", 0.1, "bf16"),
    Linear("", 64, *_WIDE, "1x1", 0.1, "bf16"),
    Linear("", *_SQUARE, "128x128", 0.1, "bf16"),
    Linear("", *_SQUARE, "64x1", 0.1, "bf16"),
    Linear("", *_SQUARE, "32x32", 0.1, "bf16"),
    Conv("", 256, 256, 14, "64x64", 0.1, "bf16"),
    Conv("", 256, 256, 14, "1x1", 0.1, "fp32"),
]
_INFERENCE = 64  # samples up to which only forward counts
_SMOKE = [
    *(Linear(op, 20, 8, 16, "1x1", 0.3, "fp32") for op in OPS),
    *(Linear(op, 20, 32, 16, "16x16", 0.5, "fp32") for op in ("forward", "gw")),
    Linear("forward", 2, 8, 16, "1x1", 0.3, "fp32"),
    *(Conv(op, 1, 16, 2, "16x16", 0.2, "fp32") for op in ("forward", "gw")),
]


def cases(smoke: bool) -> list[Case]:
    """The layers of the bars with their ops, most valuable first; or tiny ones, each kernel once."""
    if smoke:
        return _SMOKE
    trained = [isinstance(layer, Conv) or layer.batch > _INFERENCE for layer in _LAYERS]
    return [
        replace(layer, op=op)
        for layer, backward in zip(_LAYERS, trained, strict=True)
        for op in (OPS if backward else OPS[:1])
    ]


def name(case: Case) -> str:
    """In one line: "forward 4096x4096x4096 64x64 bf16", density left out where it is the bars' 10 %."""
    sizes = (case.batch, case.channels, case.size) if isinstance(case, Conv) else (case.batch, *case.weight_shape[::-1])
    density = "" if case.density == 0.1 else f" {case.density:g}"
    return f"{case.op} {case.part} {'x'.join(map(str, sizes))} {case.pattern} {case.dtype}{density}"


class Call:
    """One op of a layer, on the stream that is current when it is made; calling it gives its result."""

    def __init__(self, layer: nn.Module, given: Problem, op: str) -> None:
        self._layer, self._op, self._gy = layer, op, given.gy
        self._x = given.x.detach().requires_grad_(op == "gx")
        weight, *others = layer.parameters()
        weight.requires_grad_(op == "gw")
        for parameter in others:
            parameter.requires_grad_(False)
        self._of = weight if op == "gw" else self._x
        self._y = layer(self._x)

    def __call__(self) -> Tensor:
        if self._op == "forward":
            with torch.no_grad():
                return self._layer(self._x)
        return torch.autograd.grad(self._y, self._of, self._gy, retain_graph=True)[0]


def masked(case: Case, device: str) -> tuple[Problem, nn.Module]:
    """The problem of a case and its layer, as convert makes it without an example: on our kernels."""
    given = problem(case, device)
    return given, convert(given.layer(), {"weight": given.mask})


@contextmanager
def measuring(case: Case, device: str) -> Iterator[None]:
    """The precision of a case; kernels on any device; backwards in this thread, where launch shapes are overridden."""
    before, gpu.DEVICES = gpu.DEVICES, (device,)
    try:
        with precision(case.dtype), torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        gpu.DEVICES = before

"""What `torch.utils.flop_counter` counts of the ops: 2 nnz for each row or output pixel, and the same of each gradient.

And ptflops by its backend "aten", in multiply-adds. Registered when these are imported: most programs never count.
fvcore counts what torch.jit.trace records, and that is dense.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from itertools import accumulate
from math import prod
from operator import or_
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_map_only

from ..kernels.reference import Geometry

Shape = Sequence[int]
COUNTER, PTFLOPS = "torch.utils.flop_counter", "ptflops.aten_ops"
COUNTERS = COUNTER, "ptflops.aten_engine"  # where their modes are


def chain_flops(x: Shape, values: Sequence[Shape], *_: Any, **__: Any) -> int:
    """Of `chain`: (N, I) by all layers."""
    return 2 * x[0] * sum(prod(each) for each in values)


def chain_backward_flops(gy: Shape, x: Shape, saved: Shape, values: Sequence[Shape], *rest: Any, **_: Any) -> int:
    """Of `chain_backward`: those of the values, and of the inputs of layers that something is below of."""
    *_, need_x, need_values, need_bias = rest
    trained = [weight or bias for weight, bias in zip(need_values, need_bias, strict=True)]
    need_input = list(accumulate([need_x, *trained], or_))
    gradients = [int(gx) + int(gw) for gx, gw in zip(need_input, need_values, strict=False)]
    return 2 * x[0] * sum(prod(each) * count for each, count in zip(values, gradients, strict=True))


def conv2d_flops(x: Shape, values: Shape, *rest: Any, **_: Any) -> int:
    """Of `conv2d`: every survivor at every output pixel, as torch counts convolutions, those in the padding too."""
    *_, geometry, _, _ = rest
    return 2 * x[0] * prod(values) * prod(Geometry(*geometry).output_size(*x[2:]))


def conv2d_backward_flops(gy: Shape, x: Shape, y: Shape, winners: Shape, values: Shape, *rest: Any, **_: Any) -> int:
    """Of `conv2d_backward`: as much for x as for the values."""
    *_, geometry, _, _, need_x, need_values, _ = rest
    return (int(need_x) + int(need_values)) * conv2d_flops(x, values, geometry, None, None)


def conv_transpose2d_flops(x: Shape, values: Shape, *_: Any, **__: Any) -> int:
    """Of `conv_transpose2d`: every survivor at every pixel of x."""
    return 2 * x[0] * prod(values) * prod(x[2:])


def conv_transpose2d_backward_flops(gy: Shape, x: Shape, values: Shape, *rest: Any, **_: Any) -> int:
    """Of `conv_transpose2d_backward`: as much for x as for the values."""
    *_, need_x, need_values = rest
    return (int(need_x) + int(need_values)) * conv_transpose2d_flops(x, values)


FORMULAS: dict[str, Callable[..., int]] = {
    "chain": chain_flops,
    "chain_backward": chain_backward_flops,
    "conv2d": conv2d_flops,
    "conv2d_backward": conv2d_backward_flops,
    "conv_transpose2d": conv_transpose2d_flops,
    "conv_transpose2d_backward": conv_transpose2d_backward_flops,
}


def _register(flop_counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        flop_counter.register_flop_formula(getattr(torch.ops.sparselottery, name))(formula)


def _register_macs(aten_ops: ModuleType) -> None:
    def macs(formula: Callable[..., int], inputs: Sequence[Any], outputs: Any) -> int:
        return formula(*tree_map_only(Tensor, lambda each: each.shape, tuple(inputs))) // 2

    for name, formula in FORMULAS.items():
        aten_ops.ATEN_OPS_MAPPING[getattr(torch.ops.sparselottery, name)] = partial(macs, formula)


def are_counted() -> bool:
    """Does a counter of FLOPs, and nothing else, look at the calls?"""
    modes = _get_current_dispatch_mode_stack()
    return bool(modes) and all(type(mode).__module__ in COUNTERS for mode in modes)


class _WhenImported:
    """A finder that lets the others find one module, and calls a function with it when it has been imported."""

    def __init__(self, name: str, call: Callable[[ModuleType], None]) -> None:
        self.name, self.call = name, call

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.call(module)

        spec.loader.exec_module = exec_module
        return spec


def count_when_imported() -> None:
    """Register the formulas: now, if a counter is there, else when somebody imports it."""
    for name, register in ((COUNTER, _register), (PTFLOPS, _register_macs)):
        if name in sys.modules:
            register(sys.modules[name])
        else:
            sys.meta_path.insert(0, _WhenImported(name, register))

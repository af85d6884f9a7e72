"""MaskedSequential: groups of masked layers and what follows them, each in one native call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from .conv import MaskedConv2d, run_conv
from .executions import NATIVE
from .fuse import ELEMENTWISE, NOTHING, Rules, groups, is_observed
from .linear import MaskedLinear, run_chain

# Between two masked layers these keep the strides of their input, so it may stay batch-minor.
_KEEPS_STRIDES = {*ELEMENTWISE, *NOTHING}


class MaskedSequential(nn.Sequential):
    """nn.Sequential in which some runs of children are one native call each, forward and backward.

    They are MaskedLinear, ReLU, MaskedLinear, ... and MaskedConv2d with the ReLU after it; on the CPU with the
    MaxPool2d, too, and in evaluation without gradients the BatchNorm2d. Where only elementwise modules stand before the
    next MaskedLinear, activations stay batch-minor. The children keep their names, so the state_dict is that of an
    nn.Sequential. Children with hooks, parametrizations or a forward of their own are called as usual, and all are
    while there are hooks of all modules.
    """

    def forward(self, x: Tensor) -> Tensor:
        if nn.modules.module._has_any_global_hook() or ops.in_torch(x):
            return super().forward(x)
        children, end = list(self._modules.values()), 0
        for group in groups(children, rules(x)):
            if isinstance(group, nn.Module):
                x, end = group(x), end + 1
                continue
            (first, norm, relu, pool), end = group.steps[0], end + len(group.children)
            if first.geometry is None:
                layers = [step.layer for step in group.steps]
                x = run_chain(x, layers, stays_batch_minor(layers[-1], children[end:]))
            else:
                x = run_conv(x, first, relu, pool, norm)
        return x


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
    if torch.compiler.is_exporting():  # the strides would pin down the batch size
        return False
    for child in followers:
        if type(child) is MaskedLinear:
            native = child.execution in NATIVE and not is_observed(child)
            return native and (child.batch_minor or layer.batch_minor)
        if type(child) not in _KEEPS_STRIDES:
            return False
    return False

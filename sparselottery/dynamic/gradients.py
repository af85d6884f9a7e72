"""Gradients of weights that are not there: of all of them a strip of rows at a time, or of some chosen ones.

Both are products of what a layer has read and the gradient of what it gave, so the layer's own backward needs nothing
more, and no gradient of a whole dense weight is ever held.

    x (N, I), gy (N, O)     strip (rows, I) = gy[:, rows]ᵀ x     chosen (n,) = sddmm(gy, x) at a pattern of n
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, ranks
from ..nn import MaskedConv2d, MaskedLayer, MaskedLinear, has_own_forward
from ..pattern import Pattern, matrix_shape

STRIP = 2**20  # weights of a strip


class Watch:
    """What layers read and the gradients of what they gave, kept between `start` and `stop`. Nothing else is hooked.

    rows: by name, of which strips have multiples, but for the last one.
    layers: by name, those that share the weight of that name. Gradients are sums over all calls of all of them, and
    over all processes.
    """

    def __init__(self, layers: Mapping[str, Sequence[MaskedLayer]], rows: Mapping[str, int]) -> None:
        self._layers, self._rows = layers, rows
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._caught: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def check(self) -> None:
        """Raises ValueError if the gradients of a layer cannot be followed."""
        for name, (layer, *_) in self._layers.items():
            if not isinstance(layer, (MaskedLinear, MaskedConv2d)) or has_own_forward(layer):
                raise ValueError(
                    "grow: expected linear layers and 2-D convolutions, whose gradients can be followed, got the "
                    f"{type(layer).__name__} of {name}: name it in `ignore`, or grow at random"
                )

    def start(self) -> None:
        """From the next forward on."""
        self.stop()
        self._caught = {name: [] for name in self._layers}
        for name, layers in self._layers.items():
            self._hooks += [layer.register_forward_hook(self._seen(name)) for layer in layers]

    def stop(self) -> None:
        """Forgets what was caught."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._caught = [], {}

    def _seen(self, name: str):
        caught = self._caught[name]

        def hook(layer: MaskedLayer, args: tuple[Tensor, ...], y: Tensor) -> None:
            if not torch.compiler.is_compiling() and y.requires_grad:
                x = args[0].detach()
                y.register_hook(lambda gy: caught.append((x, gy.detach())))

        return hook

    def _pairs(self, name: str) -> list[tuple[Tensor, Tensor]]:
        if not any(self._caught.values()):
            raise ValueError("grow: expected a backward through the layers, not compiled, before step(), got none")
        return [_prepared(self._layers[name][0], x, gy) for x, gy in self._caught[name]]

    def strips(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Of a weight the gradient, flattened: where each strip begins in it, and the strip."""
        layer = self._layers[name][0]
        pairs, columns = self._pairs(name), matrix_shape(layer.shape)[1]
        for start, stop in strips_of(layer, self._rows[name]):
            strip = layer.values.new_zeros(stop - start, *layer.shape[1:])
            for x, gy in pairs:
                strip += _strip(layer, x, gy, slice(start, stop))
            yield start * columns, ranks.total(strip.flatten())

    def at(self, name: str, pattern: Pattern) -> Tensor:
        """Of a weight the gradient at the positions of a pattern: (nnz,)."""
        layer = self._layers[name][0]
        gradient = layer.values.new_zeros(pattern.nnz)
        if pattern.nnz:
            for x, gy in self._pairs(name):
                gradient += _chosen(layer, pattern, x, gy)
        return ranks.total(gradient)


def _prepared(layer: MaskedLayer, x: Tensor, gy: Tensor) -> tuple[Tensor, Tensor]:
    """In the dtype of the values; rows (N, I) and (N, O), or images (N, C, H, W), padded, and (N, O, OH, OW)."""
    x, gy = x.to(layer.values.dtype), gy.to(layer.values.dtype)
    if layer.geometry is None:
        return x.reshape(-1, x.shape[-1]), gy.reshape(-1, gy.shape[-1])
    x, gy = (each if each.dim() == 4 else each[None] for each in (x, gy))
    if layer.padding_mode != "zeros":
        return F.pad(x, layer._pad_first, layer.padding_mode), gy
    sides = layer.geometry
    return F.pad(x, (sides.left, sides.right, sides.top, sides.bottom)), gy


def strips_of(layer: MaskedLayer, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Rows from, to, those of whole blocks. Of a convolution in groups, the rows of whole groups."""
    rows, columns = matrix_shape(layer.shape)
    unit = math.lcm(multiple, rows // layer.groups if layer.groups > 1 else 1)
    step = max(unit, STRIP // max(columns, 1) // unit * unit)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _strip(layer: MaskedLayer, x: Tensor, gy: Tensor, rows: slice) -> Tensor:
    gy = gy[:, rows]
    if layer.geometry is None:
        return gy.t() @ x
    groups = layer.groups
    if groups > 1:
        of_group = layer.shape[0] // groups
        first, last = rows.start // of_group, rows.stop // of_group
        x, groups = x[:, first * layer.shape[1] : last * layer.shape[1]], last - first
    shape = rows.stop - rows.start, *layer.shape[1:]
    return torch.nn.grad.conv2d_weight(x, shape, gy, layer.stride, 0, layer.dilation, groups)


def _chosen(layer: MaskedLayer, pattern: Pattern, x: Tensor, gy: Tensor) -> Tensor:
    values = x.new_zeros(pattern.nnz, requires_grad=True)
    with torch.enable_grad():
        if layer.geometry is None:
            y = ops.chain(x, [values], [None], *([each] for each in (*pattern.indices, ops.compile_plan(pattern))))
        else:
            geometry = layer.geometry._replace(top=0, bottom=0, left=0, right=0)
            y = ops.conv2d(x, values, None, *pattern.indices, ops.compile_conv_plan(pattern, geometry), geometry)
    return torch.autograd.grad(y, values, gy)[0]

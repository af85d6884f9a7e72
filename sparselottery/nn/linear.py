"""MaskedLinear, and chains of them in one native call."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..pattern import Pattern
from .base import MaskedLayer
from .compact import gather, put_back, spread
from .executions import NATIVE


class MaskedLinear(MaskedLayer):
    """nn.Linear over a fixed mask: y = x Wᵀ + b, where only the surviving weights of W exist.

    Examples:
        >>> layer = MaskedLinear(8, 4, mask=torch.rand(4, 8) < 0.5)
        >>> layer(torch.randn(5, 8)).shape
        torch.Size([5, 4])

    `values` (nnz,) is the parameter, in CSR order; `crow_indices` (O + 1,) and `col_indices` (nnz,) are int32 buffers.
    Gradients and optimiser state are nnz-sized too. `weight` is the dense weight, made where it is used.

    Args:
        in_features, out_features, bias, device, dtype: as in nn.Linear.
        mask: bool (out_features, in_features), by keyword, True where a weight survives; None keeps all of them.
    Raises TypeError or ValueError if the mask is not boolean or not of that shape.
    """

    dense_type = nn.Linear
    arguments = ("in_features", "out_features")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._build(mask, bias, device, dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the dense weight: (out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def batch_minor(self) -> bool:
        """Do its kernels read and write activations in batch-minor layout? Those for blocks of columns take any."""
        return self.block[1] == 1

    def _compile(self, pattern: Pattern, block: tuple[int, int]) -> Tensor:
        return ops.compile_plan(pattern, block)

    def forward(self, input: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        if self._present in NATIVE:
            y = ops.call_chain(input, (self,))
            if y is not None:
                return y
        if ops.in_torch(input):
            return self._in_torch(input)
        if self._present not in NATIVE:
            self.check()
        if self._present in NATIVE:  # a check may have changed it
            return _chain(input, [self])
        if self.execution == "dense":
            return self.multiply(self._dense_weight(), self.bias, input)
        _check_features(input, self)
        if self.execution == "permuted":
            return self._permuted(input)
        bias = None if self.bias is None else self.bias.index_select(0, self._rows)
        y = F.linear(gather(input, self._columns), self._dense_weight(), bias)
        return spread(y, self._rows, self.bias, self.out_features)

    def _permuted(self, x: Tensor) -> Tensor:
        """Gathered in the order of the blocks, multiplied by those, and put back."""
        x = x if self._columns is None else gather(x, self._columns)
        values, bias, *indices = self._permuted_operands()
        indices = [[each] for each in indices]
        y = ops.chain(x.reshape(-1, self.in_features), [values], [bias], *indices, blocks=[self.block])
        return put_back(y, self._rows).reshape(*x.shape[:-1], self.out_features)

    def multiply(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and x.dtype == torch.bfloat16 and x.is_cpu:
            x = x.contiguous()  # torch multiplies what lies between rows by zero, and NaN times zero is NaN
        return F.linear(x, weight, bias)


def _operands(layer: MaskedLinear) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Checked: values, bias, crow_indices, col_indices, plan. From nn.Module's tables, in a tenth of the time."""
    layer.check()
    parameters, buffers = layer._parameters, layer._buffers
    if "values" in parameters and "bias" in parameters:
        own = parameters["values"], parameters["bias"]
    else:  # somebody parametrized them, or put tensors in their place
        own = layer.values, layer.bias
    return *own, buffers["crow_indices"], buffers["col_indices"], buffers["plan"]


def _check_features(x: Tensor, layer: MaskedLinear) -> None:
    ops.check_layout(x)
    if x.shape[-1:] != (layer.in_features,):
        raise ValueError(f"x: expected shape (*, {layer.in_features}), got {tuple(x.shape)}")


def run_chain(x: Tensor, layers: list[MaskedLinear], batch_minor: bool = False) -> Tensor:
    """layers[-1](... relu(layers[0](x))) in one native call: (*, I) -> (*, O).

    The result is batch-minor, strides (1, ld), if asked for; else contiguous.
    """
    y = ops.call_chain(x, layers, batch_minor)
    return _chain(x, layers, batch_minor) if y is None else y


def _chain(x: Tensor, layers: list[MaskedLinear], batch_minor: bool = False) -> Tensor:
    """The same, whatever is unusual."""
    first, last = layers[0], layers[-1]
    operands = [_operands(layer) for layer in layers]
    _check_features(x, first)
    for before, after in pairwise(layers):
        if before.out_features != after.in_features:
            raise ValueError(f"layers: expected {before.out_features} in_features, got {after.in_features}")
    rows = x if x.dim() == 2 else x[None] if x.dim() == 1 else x.flatten(0, -2)
    values, biases, *indices = map(list, zip(*operands, strict=True))
    y = ops.chain(rows, values, biases, *indices, batch_minor=batch_minor, blocks=[layer.block for layer in layers])
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], last.out_features)

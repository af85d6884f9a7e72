"""Training of a chain of sparse linear layers with a ReLU between them, many steps in one native call (csrc/train.cpp).

Raw tensors in, on the CPU. Axes: N samples of a batch, I in, O out, nnz surviving weights of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu, native

_RULES = ("adam", "sgd")  # Rule in csrc/update.h
_ROWS = 96  # of a strip, at most: fewer share out better, more read their input from L1 more often


class Layer(NamedTuple):
    """x Wᵀ + bias: crow_indices (O + 1,) and col_indices (nnz,) int32, values (nnz,), bias (O,) or None."""

    in_features: int
    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    bias: Tensor | None


def supports(dtype: torch.dtype) -> bool:
    return native.available() and dtype in (torch.float32, torch.float64)


class Trainer:
    """Steps of one optimiser on the mean cross-entropy of relu-connected layers; values and biases change in place.

    rule: "adam" with constants (beta1, beta2, eps, weight decay), as torch.optim.Adam, or "sgd" with (momentum, weight
    decay), as torch.optim.SGD. All tensors have one dtype, float32 or float64, and are contiguous; patterns are valid.
    Results do not depend on the number of threads, which is torch's when the trainer is made, or one where that is
    faster, as for small nets whose cores are on two dies: both are timed, again and again.
    moments: of an optimiser that has done `steps` steps, two of the values and two of the bias for each layer, which
    change in place, too; None: it is a new one. The second ones of "sgd" are None.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        rule: str,
        constants: Sequence[float],
        moments: Sequence[Sequence[Tensor | None]] | None = None,
        steps: int = 0,
    ) -> None:
        self._dtype, self._features = layers[0].values.dtype, layers[0].in_features
        self._classes = len(layers[-1].crow_indices) - 1
        self._threads, self._rule, self._steps = torch.get_num_threads(), _RULES.index(rule), steps
        self._constants = torch.tensor(constants, dtype=torch.float64, device="cpu")
        self._pace = torch.zeros(3, dtype=torch.float64, device="cpu")  # Pace in csrc/train.cpp
        moments = map(_zeros, layers) if moments is None else moments
        self._kept = [self._tensors(*each) for each in zip(layers, moments, strict=True)]
        self._words = [0 if tensor is None else tensor.data_ptr() for tensors in self._kept for tensor in tensors]

    def _tensors(self, layer: Layer, moments: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The fields of TrainedLayer in csrc/update.h."""
        strips = [self._strip(rows) for rows in (len(layer.crow_indices) - 1, layer.in_features)]
        plan = cpu.plan(layer.crow_indices, layer.col_indices, layer.in_features, strips=strips)
        return [plan, layer.values, *moments[:2], layer.bias, *moments[2:]]

    def _strip(self, rows: int) -> int:
        """Rows of a strip, so that all threads have about as many."""
        return -(-rows // (self._threads * -(-rows // (self._threads * _ROWS))))

    def __call__(self, images: Tensor, labels: Tensor, order: Tensor, rates: Sequence[float]) -> None:
        """The next steps: order (steps, N) int64 says which images each sees, rates (steps) its learning rate.

        images (any, I), of the dtype of the values; labels (any,) int64. Raises ValueError for other tensors, and for
        what order or labels index and is not there.
        """
        expected = (images.shape[0], self._features), self._dtype, torch.int64, (images.shape[0],), torch.int64
        if (images.shape, images.dtype, labels.dtype, labels.shape, order.dtype) != expected or order.dim() != 2:
            got = tuple(images.shape), images.dtype, labels.dtype, tuple(labels.shape), order.dtype
            raise ValueError(f"images, labels, order: expected {expected} and two dimensions of order, got {got}")
        if len(rates) != len(order):
            raise ValueError(f"rates: expected {len(order)}, got {len(rates)}")
        _check("order", order, images.shape[0])
        _check("labels", labels, self._classes)
        images, labels, order = images.contiguous(), labels.contiguous(), order.contiguous()
        rates = torch.tensor(rates, dtype=torch.float64, device="cpu")
        sizes = [self._dtype == torch.float64, self._threads, len(self._kept), order.shape[1]]
        data = [each.data_ptr() for each in (images, labels, order, rates)]
        rule = [len(order), self._steps, self._rule, self._constants.data_ptr(), self._pace.data_ptr()]
        if order.numel():
            native.LIBRARY.train([*sizes, *data, *rule, *self._words])
        self._steps += len(order)


def _zeros(layer: Layer) -> list[Tensor | None]:
    tensors = layer.values, layer.values, layer.bias, layer.bias
    return [None if each is None else torch.zeros_like(each) for each in tensors]


def _check(name: str, index: Tensor, size: int) -> None:
    low, high = map(int, index.aminmax()) if index.numel() else (0, 0)
    if low < 0 or high >= size:
        raise ValueError(f"{name}: expected values in [0, {size}), got {low} to {high}")

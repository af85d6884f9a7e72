"""A training step on a GPU in one launch: captured in a CUDA graph, then replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..graphs import WARM_UP, captured, on_another_stream


class GraphedStep:
    """``step(x, y, lr=lr)`` that does what `eager(x, y, lr)` does, the learning rate there a tensor of the device.

    The first WARM_UP calls are eager ones, in which optimisers and kernels make what they make once. The next is
    captured, on copies of the batch and the learning rate; it and all after it update these and replay the graph. A
    batch of another shape runs eagerly. `eager` must not wait for the device.
    """

    def __init__(self, eager: Callable[[Tensor, Tensor, Tensor], None], device: torch.device, lr: float) -> None:
        self.eager, self._default_lr = eager, lr
        self._lr = torch.zeros((), device=device)
        self._calls = 0
        self._x = self._y = self._replay = None

    def __call__(self, x: Tensor, y: Tensor, lr: float | None = None) -> None:
        self._lr.fill_(self._default_lr if lr is None else lr)
        if self._calls < WARM_UP:
            self._calls += 1
            on_another_stream(lambda: self.eager(x, y, self._lr), self._lr.device)
            return
        if self._replay is None:
            self._x, self._y = x.clone(), y.clone()
            self._replay = captured(lambda: self.eager(self._x, self._y, self._lr), self._lr.device)
        if (x.shape, y.shape) != (self._x.shape, self._y.shape):
            self.eager(x, y, self._lr)
            return
        self._x.copy_(x)
        self._y.copy_(y)
        self._replay()

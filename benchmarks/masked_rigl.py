"""RigL as it is usually simulated: dense weights, dense gradients, dense moments and 0/1 masks (Evci et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparselottery.dynamic.schedules import Schedule
from sparselottery.lab.masked_dense import MaskedDenseLinear


class WatchedLinear(MaskedDenseLinear):
    """w * mask, whose gradient, which is dense, is kept where somebody asks for it."""

    watched = False

    def forward(self, x: Tensor) -> Tensor:
        self.product = self.weight * self.mask
        if self.watched and self.product.requires_grad:
            self.product.retain_grad()
        return nn.functional.linear(x, self.product, self.bias)


class MaskedRigl:
    """Follows each step of an optimiser, as `MaskUpdater` does: `step()`.

    model: its `MaskedDenseLinear`s take part (`masked_dense`), at the density that their masks have.
    drop_fraction: of the survivors, exchanged at each update, by step.
    products: the model computes w * mask in each forward. Without it, layers are plain ones, whose weights and moments
    are multiplied by the mask after each step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        drop_fraction: Schedule,
        every: int,
        end: int,
        products: bool = True,
    ) -> None:
        self._layers = [layer for layer in model.modules() if type(layer) is MaskedDenseLinear]
        for layer in self._layers:
            layer.__class__ = WatchedLinear if products else nn.Linear
            with torch.no_grad():
                layer.weight *= layer.mask
        self._optimizer, self._drop_fraction, self._products = optimizer, drop_fraction, products
        self._every, self._end, self.steps = every, end, 0
        self._look_ahead()

    @torch.no_grad()
    def step(self) -> bool:
        self.steps += 1
        due = self._due(self.steps)
        for layer in self._layers:
            if due:
                gradient = layer.product.grad if self._products else layer.weight.grad
                self._update(layer, gradient.abs())
            if not self._products:
                for tensor in self._dense(layer):
                    tensor *= layer.mask
        self._look_ahead()
        return due

    def _due(self, step: int) -> bool:
        return step <= self._end and (step % self._every == 0 or step == self._end)

    def _look_ahead(self) -> None:
        for layer in self._layers:
            layer.watched = self._due(self.steps + 1)

    def _dense(self, layer: nn.Linear) -> list[Tensor]:
        """All that has the weight's shape and changes with it."""
        state = self._optimizer.state[layer.weight].values()
        return [layer.weight, *(each for each in state if each.shape == layer.weight.shape)]

    def _update(self, layer: nn.Linear, scores: Tensor) -> None:
        mask, before = layer.mask.view(-1), layer.mask.view(-1).bool()
        count = round(self._drop_fraction(self.steps) * int(before.sum()))
        weights = torch.where(before, layer.weight.view(-1).abs(), torch.inf)
        mask[weights.topk(count, largest=False).indices] = 0
        scores = scores.reshape(-1).masked_fill_(mask.bool(), -1.0)
        mask[scores.topk(count).indices] = 1
        stayed = (before & mask.bool()).view_as(layer.mask)
        for tensor in self._dense(layer):
            tensor *= stayed

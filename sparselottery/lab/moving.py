"""A training whose masks move: native steps, but for those whose gradients the masks follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..kernels import cpu_train
from .native import count_steps, native_trainer

if TYPE_CHECKING:
    from .training import Step


class MovingTrainer:
    """Called as a `Trainer`: the next steps of a model that `native_trainer` can train, and of the masks' updater.

    step: that of autograd, which moves the masks. Both kinds of steps share its optimiser's state.
    kind: what `native_trainer` takes of the optimiser.
    """

    def __init__(self, model: nn.Module, step: Step, kind: tuple[str, float, float]) -> None:
        self._model, self._step, self._kind = model, step, kind
        self._native: cpu_train.Trainer | None = None  # of the present masks

    def __call__(self, images: Tensor, labels: Tensor, order: Tensor, rates: Sequence[float]) -> None:
        updater, optimizer, done = self._step.moves, self._step.optimizer, 0
        while done < len(rates):
            left, unwatched = len(rates) - done, updater.unwatched
            steps = slice(done, done + (left if unwatched is None else min(left, unwatched)))
            if steps.stop > done:
                if self._native is None:
                    self._native = native_trainer(self._model, images, *self._kind, optimizer)
                self._native(images, labels, order[steps], rates[steps])
                count_steps(optimizer, steps.stop - done)
                if updater.step(steps.stop - done):
                    self._native = None
                done = steps.stop
            else:
                self._step(images[order[done]], labels[order[done]], rates[done])
                self._native, done = None, done + 1

"""A callback for Lightning: masks that move while its Trainer trains. It needs the package lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from .dynamic import MaskUpdater


class MovingMasks(Callback):
    """Prune, or prune and regrow, after the steps of a Trainer's optimiser.

        prune = MovingMasks(partial(dynamic.gmp, density=0.1, end=1000))
        Trainer(callbacks=[prune]).fit(module, batches)

    method: makes the updater, called as `method(module, optimizer)`; those of `dynamic` with their other arguments
    given. The net in the module has masked layers (`convert`) before `fit`. Checkpoints of the Trainer hold what the
    updater needs, and a training goes on from them as if it had not stopped.

    Rounds of pruning, each a training from the initial weights, are around the Trainer: `find_ticket(module, train)`,
    in whose `train(module)` a new Trainer fits the module (examples/lightning_ticket.py).
    """

    def __init__(self, method: Callable[..., MaskUpdater]) -> None:
        self.method = method
        self.updater: MaskUpdater | None = None
        self._loaded: dict[str, Any] | None = None
        self._step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises ValueError for a module with several optimisers, or none."""
        if len(trainer.optimizers) != 1:
            raise ValueError(f"optimizers: expected one, got {len(trainer.optimizers)}")
        restored = self._loaded and {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
        self.updater = self.method(pl_module, trainer.optimizers[0])  # which begins with its first masks
        if restored:
            pl_module.load_state_dict(restored)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if self._loaded:  # after the optimiser's state
            self.updater.load_state_dict(self._loaded)
            self._loaded = None

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step != self._step:  # not while gradients are only added up
            self._step = trainer.global_step
            self.updater.step()

    def state_dict(self) -> dict[str, Any]:
        return self.updater.state_dict() if self.updater else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

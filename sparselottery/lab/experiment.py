"""One lottery ticket experiment of the paper: iterative magnitude pruning of Lenet-300-100, every round measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..convert import convert, explain, masks_of
from ..lottery import find_ticket
from ..ticket import Ticket
from . import data as data_sets
from .controls import masked_dense, reinit
from .models import lenet_300_100
from .timing import interleaved_ms
from .training import batches, stepper, train

REINIT_SEED = 1_000_003  # added to the seed: no trial's first weights are another trial's control


@dataclass(frozen=True)
class Settings:
    """All that decides a run's result. `preset` fills it in for each data set."""

    data: str
    rounds: int
    iterations: int
    eval_every: int
    fraction: float = 0.2  # of the surviving weights, per round; half of it in the output layer (paper App. G.4)
    batch: int = 60
    lr: float = 1.2e-3
    seed: int = 0
    rewind_step: int = 0
    one_shot: bool = False  # prune once, to where `rounds` prunings would lead
    continued: bool = False  # reset only at the end (paper App. B, strategy 2)
    reinit: bool = False  # also train every round's mask from other initial weights

    @property
    def name(self) -> str:
        """``<data>-lenet-300-100-<hash>``. Defaults are left out of the hash, so a new option renames no old run."""
        defaults = {field.name: field.default for field in fields(self) if field.default is not MISSING}
        chosen = {key: value for key, value in asdict(self).items() if key not in defaults or value != defaults[key]}
        digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
        return f"{self.data}-lenet-300-100-{digest[:8]}"

    @property
    def prunings(self) -> tuple[int, float, float]:
        """(number of prunings, fraction of each, its fraction in the output layer)."""
        if not self.one_shot:
            return self.rounds, self.fraction, self.fraction / 2
        return 1, 1 - (1 - self.fraction) ** self.rounds, 1 - (1 - self.fraction / 2) ** self.rounds


def preset(data: str, **changes: object) -> Settings:
    """The paper's settings for MNIST and Fashion-MNIST (50K iterations, 16 rounds), smaller ones for the digits."""
    if data not in data_sets.NAMES:
        raise ValueError(f"unknown data {data!r}: expected one of {', '.join(data_sets.NAMES)}")
    small = {"rounds": 12, "iterations": 3000, "eval_every": 20}
    paper = {"rounds": 16, "iterations": 50_000, "eval_every": 100}
    return Settings(**{"data": data, **(small if data == "digits" else paper), **changes})


def run(
    settings: Settings,
    out: str | Path,
    on_round: Callable[[dict], None] | None = None,
    on_eval: Callable[[int], None] | None = None,
) -> Ticket:
    """Find the ticket of ``settings`` in the folder ``out``; finished rounds found there are read, not rerun.

    Each round's record holds what `train` returns, ``sparse_ms`` and ``dense_ms`` of a training step on our kernels and
    on w * mask, ``sparse_bytes`` and ``dense_bytes`` of the weights, and with ``settings.reinit`` the control's
    ``reinit_early_stop_iteration`` and ``reinit_early_stop_test_accuracy``.
    """
    data = data_sets.load(settings.data)
    factory = partial(lenet_300_100, data.features, data.classes)
    recipe = {key: getattr(settings, key) for key in ("iterations", "batch", "lr", "eval_every", "seed")}

    def train_round(model: nn.Module, start: int = 0, stop: int | None = None) -> dict:
        if stop is not None:  # on the way to the weights of the rewind step
            return train(model, data, **{**recipe, "iterations": stop})
        record = train(model, data, **recipe, start=start, on_eval=on_eval)
        record |= step_ms(model, data, settings.batch, settings.lr)
        layers = explain(model)
        record |= {"sparse_bytes": sum(layer["bytes"] for layer in layers)}
        record |= {"dense_bytes": sum(layer["dense_bytes"] for layer in layers)}
        if settings.reinit:
            control = convert(reinit(factory, settings.seed + REINIT_SEED), masks_of(model))
            outcome = train(control, data, **recipe, on_eval=on_eval)
            record |= {f"reinit_{key}": outcome[key] for key in ("early_stop_iteration", "early_stop_test_accuracy")}
        return record

    rounds, fraction, output_fraction = settings.prunings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return find_ticket(
            factory(),
            train_round,
            rounds=rounds,
            fraction=fraction,
            output_fraction=output_fraction,
            rewind_step=settings.rewind_step,
            reset=not settings.continued,
            out=out,
            settings=asdict(settings),
            on_round=on_round,
        )


def step_ms(model: nn.Module, data: data_sets.Dataset, batch: int, lr: float) -> dict[str, float]:
    """Milliseconds of a training step of ``model`` and of the same net as w * mask, both with fused Adam, alternating.

    A step takes its batch from the data, as in training. ``model`` itself is left alone.
    """
    stream = batches(data.train_x, data.train_y, batch, seed=0)
    sparse, dense = stepper(deepcopy(model), lr), stepper(masked_dense(model, masks_of(model)), lr)
    sparse_ms, dense_ms = interleaved_ms(lambda: sparse(*next(stream)), lambda: dense(*next(stream)))
    return {"sparse_ms": sparse_ms, "dense_ms": dense_ms}

"""The paper's lottery ticket experiment: iterative magnitude pruning of one of its nets, every round measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..convert import convert, masks_of, prunable
from ..explain import explain
from ..lottery import find_ticket
from ..ticket import Ticket
from ..timing import interleaved_ms
from . import data as data_sets
from .controls import reinit
from .graph import WARM_UP
from .masked_dense import masked_dense
from .models import build
from .training import batches, stepper, train

REINIT_SEED = 1_000_003  # added to the seed: no trial's first weights are another trial's control
# Of the settings, what `train` takes.
TRAIN_SETTINGS = (
    "iterations",
    "batch",
    "lr",
    "eval_every",
    "seed",
    "optimizer",
    "weight_decay",
    "drops",
    "warmup",
    "augment",
)


@dataclass(frozen=True)
class Settings:
    """All that decides a run's result. `preset` fills it in for each net; the defaults are Lenet's."""

    data: str
    rounds: int
    iterations: int
    eval_every: int
    fraction: float = 0.2  # of the surviving weights, pruned per round in layers whose share is 1
    batch: int = 60
    lr: float = 1.2e-3
    seed: int = 0
    rewind_step: int = 0
    one_shot: bool = False  # prune once, to where `rounds` prunings would lead
    continued: bool = False  # reset only at the end (paper App. B, strategy 2)
    reinit: bool = False  # also train every round's mask from other initial weights
    model: str = "lenet-300-100"
    optimizer: str = "adam"
    weight_decay: float = 0.0
    drops: tuple[float, ...] = ()  # after these shares of the iterations the learning rate falls to a tenth
    warmup: int = 0  # iterations until the learning rate is reached
    augment: bool = False
    scope: str = "layer"  # or "global": convolutions compete with each other
    conv_share: float = 1.0  # of `fraction`, pruned in convolutions, 1x1 shortcuts excepted, which stay whole
    fc_share: float = 1.0  # in linear layers
    output_share: float = 0.5  # in the output layer (paper App. G.4)
    granularity: tuple[int, int] = (1, 1)  # blocks that are pruned whole; single weights in the output layer
    device: str = "cpu"  # or "cuda"

    @property
    def name(self) -> str:
        """``<data>-<model>-<hash>``. Defaults are left out of the hash, so a new option renames no old run."""
        defaults = {field.name: field.default for field in fields(self) if field.default is not MISSING}
        chosen = {key: value for key, value in asdict(self).items() if key not in defaults or value != defaults[key]}
        digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
        return f"{self.data}-{self.model}-{digest[:8]}"

    @property
    def prunings(self) -> int:
        return 1 if self.one_shot else self.rounds

    def rate(self, share: float) -> float:
        """What each pruning removes of a layer's survivors, if it removes ``share`` of `fraction` per round."""
        rate = share * self.fraction
        return 1 - (1 - rate) ** self.rounds if self.one_shot else rate


# Paper Fig. 2, which leaves the number of rounds open: these end with 1 to 4 % of the weights.
CONV_NET = Settings("cifar10", rounds=20, iterations=20_000, eval_every=100, model="conv-2", lr=2e-4, conv_share=0.5)
DEEP_NET = Settings(
    "cifar10",
    rounds=16,
    iterations=30_000,
    eval_every=100,
    model="resnet-18",
    batch=128,
    optimizer="sgd",
    lr=0.1,
    weight_decay=1e-4,
    drops=(2 / 3, 5 / 6),
    augment=True,
    scope="global",
    fc_share=0.0,
    output_share=0.0,
)
PRESETS = {
    settings.model: settings
    for settings in (
        Settings("mnist", rounds=16, iterations=50_000, eval_every=100),
        CONV_NET,
        replace(CONV_NET, model="conv-4", iterations=25_000, lr=3e-4),
        replace(CONV_NET, model="conv-6", iterations=30_000, lr=3e-4, conv_share=0.75),
        DEEP_NET,
        replace(DEEP_NET, model="vgg-19", rounds=20, iterations=112_480, batch=64, drops=(1 / 2, 3 / 4)),
    )
}


def preset(data: str | None = None, model: str = "lenet-300-100", **changes: object) -> Settings:
    """The paper's settings for a net, and smaller ones for Lenet on the digits.

    ``data`` None: the digits for Lenet, CIFAR-10 for the others. Raises ValueError for an unknown net, for unknown data
    and for a net that does not take them.
    """
    if model not in PRESETS:
        raise ValueError(f"unknown model {model!r}: expected one of {', '.join(PRESETS)}")
    settings = PRESETS[model]
    takes = [name for name in data_sets.NAMES if (name == "cifar10") == (settings.data == "cifar10")]
    data = takes[0] if data is None else data
    if data not in takes:
        raise ValueError(f"{model}: expected data among {', '.join(takes)}, got {data!r}")
    small = {"rounds": 12, "iterations": 3000, "eval_every": 20} if data == "digits" else {}
    return replace(settings, **{"data": data, **small, **changes})


def run(
    settings: Settings,
    data: data_sets.Dataset,
    out: str | Path,
    on_round: Callable[[dict], None] | None = None,
    on_eval: Callable[[int], None] | None = None,
) -> Ticket:
    """Find the ticket of ``settings`` in the folder ``out``; finished rounds found there are read, not rerun.

    ``data``: what `data.load` gives for ``settings.data``; its shape, classes and note are kept with the settings.
    Each round's record holds what `train` returns, ``sparse_ms`` and ``dense_ms`` of a training step on our kernels and
    on w * mask, ``sparse_bytes`` and ``dense_bytes`` of the weights, and with ``settings.reinit`` the control's
    ``reinit_early_stop_iteration`` and ``reinit_early_stop_test_accuracy``. Raises ValueError for a device that is not
    there.
    """
    if settings.device not in ("cpu", *["cuda"] * torch.cuda.is_available()):
        raise ValueError(f"device: expected cpu, or cuda where torch sees a GPU, got {settings.device!r}")
    factory, data = partial(_net, settings, data.shape, data.classes), data.to(settings.device)
    recipe = {key: getattr(settings, key) for key in TRAIN_SETTINGS}

    def train_round(model: nn.Module, start: int = 0, stop: int | None = None) -> dict:
        record = train(model, data, **recipe, start=start, stop=stop, on_eval=on_eval)
        if stop is not None:  # on the way to the weights of the rewind step
            return record
        record |= step_ms(model, data, settings)
        layers = explain(model)
        record |= {"sparse_bytes": sum(layer["bytes"] for layer in layers)}
        record |= {"dense_bytes": sum(layer["dense_bytes"] for layer in layers)}
        if settings.reinit:
            control = convert(reinit(factory, settings.seed + REINIT_SEED), masks_of(model))
            outcome = train(control, data, **recipe, on_eval=on_eval)
            record |= {f"reinit_{key}": outcome[key] for key in ("early_stop_iteration", "early_stop_test_accuracy")}
        return record

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = factory()
        return find_ticket(
            model,
            train_round,
            rounds=settings.prunings,
            **pruning(settings, model),
            rewind_step=settings.rewind_step,
            reset=not settings.continued,
            out=out,
            settings=_recorded(settings) | {"shape": data.shape, "classes": data.classes, "note": data.note},
            on_round=on_round,
        )


def _net(settings: Settings, shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """A new net; its weights are drawn on the CPU, the same for every device."""
    return build(settings.model, shape, classes).to(settings.device)


def pruning(settings: Settings, model: nn.Module) -> dict:
    """How `find_ticket` is to prune ``model``: convolutions by ``fraction`` and ``scope``, the rest by ``rates``.

    Blocks are pruned everywhere but in the output layer.
    """
    rates, granularity = {}, {}
    for name, weight in prunable(model).items():
        if weight.dim() == 2:
            rates[name] = settings.rate(settings.fc_share)
        elif weight[0, 0].numel() == 1:
            rates[name] = 0.0
        granularity[name] = settings.granularity
    granularity[name] = (1, 1)  # the output layer
    return {
        "fraction": settings.rate(settings.conv_share),
        "scope": settings.scope,
        "rates": rates,
        "output_fraction": settings.rate(settings.output_share),
        "granularity": granularity,
    }


def _recorded(settings: Settings) -> dict:
    """What is kept of the settings with a run: without the latest defaults, so that runs begun before them go on."""
    later = {"granularity": (1, 1), "device": "cpu"}
    return {key: value for key, value in asdict(settings).items() if key not in later or value != later[key]}


def step_ms(model: nn.Module, data: data_sets.Dataset, settings: Settings) -> dict[str, float]:
    """Milliseconds of a training step of ``model`` and of the same net as w * mask, alternating.

    Both have the optimiser of ``settings``. A step takes its batch from the data, as in training. ``model`` itself is
    left alone.
    """
    stream = batches(data.train_x, data.train_y, settings.batch, seed=0, augment=settings.augment)
    how = settings.lr, settings.optimizer, settings.weight_decay
    sparse, dense = stepper(deepcopy(model), *how), stepper(masked_dense(model, masks_of(model)), *how)
    steps, options = (lambda: sparse(*next(stream)), lambda: dense(*next(stream))), {}
    if settings.device == "cuda":
        options["synchronize"] = torch.cuda.synchronize
        for step in steps * (WARM_UP + 1):  # until both are captured
            step()
    sparse_ms, dense_ms = interleaved_ms(*steps, **options)
    return {"sparse_ms": sparse_ms, "dense_ms": dense_ms}

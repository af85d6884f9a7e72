"""The paper's lottery ticket experiment: iterative magnitude pruning of one of its nets, every round measured."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from ..convert import masks_of, prunable
from ..explain import explain
from ..lottery import find_ticket
from ..orders import Permuted
from ..random_state import random_state_kept
from ..ticket import Ticket
from ..timing import interleaved_ms
from . import data as data_sets
from .controls import CONTROLS, Round
from .determinism import deterministic
from .executions import settle
from .graph import WARM_UP
from .masked_dense import masked_dense
from .methods import updater
from .models import build
from .pause import Pause
from .settings import Settings
from .training import Runner, evaluate, learning_rate, train

# Of the settings, what `train` takes.
TRAIN_SETTINGS = (
    "iterations",
    "batch",
    "lr",
    "eval_every",
    "seed",
    "optimizer",
    "momentum",
    "weight_decay",
    "drops",
    "warmup",
    "augment",
)
CALL_MS = 2.0  # of training in one call, where steps are timed
SCORED_IMAGES = 256  # those that SNIP and GraSP see


def run(
    settings: Settings,
    data: data_sets.Dataset,
    out: str | Path,
    on_round: Callable[[dict], None] | None = None,
    on_eval: Callable[[int], None] | None = None,
    pause: Pause | None = None,
) -> Ticket:
    """Find the ticket of ``settings`` in the folder ``out``; finished rounds found there are read, not rerun.

    ``data``: what `data.load` gives for ``settings.data``; its shape, classes and note are kept with the settings.
    Each round's record holds what `train` returns, ``sparse_ms`` and ``dense_ms`` of a training step on our kernels and
    on w * mask, ``sparse_bytes`` and ``dense_bytes`` of the weights, and ``executions`` of its layers where they were
    measured. Raises ValueError, before anything is written, for a device that is not there, a batch of more images than
    there are and what `find_ticket` refuses, and `Paused` when ``pause`` is due: the same call goes on.
    """
    _check(settings, data)
    data = data.to(settings.device)

    def measured(model: nn.Module, recipe: dict, start: int = 0, stop: int | None = None) -> dict:
        settled = _settle(model, settings, data, Path(out))
        record = train(model, data, **recipe, start=start, stop=stop, on_eval=on_eval, pause=pause)
        if stop is not None:  # on the way to the weights of the rewind step
            return record
        layers = explain(model)
        at_once = max(1, min(settings.eval_every, round(CALL_MS / record["train_step_ms"])))
        return {
            **record,
            **settled,
            **step_ms(model, data, settings, at_once),
            "sparse_bytes": sum(layer["bytes"] for layer in layers),
            "dense_bytes": sum(layer["dense_bytes"] for layer in layers),
        }

    recipe = _recipe(settings)
    if settings.method != "imp":
        recipe["moves"] = partial(updater, settings, _densities(settings, data))
    recorded = {**asdict(settings), "shape": data.shape, "classes": data.classes, "note": data.note}
    with torch.random.fork_rng(devices=[]), deterministic(settings.device):
        torch.manual_seed(settings.seed)
        model = _net(settings, data)
        return find_ticket(
            model,
            partial(measured, recipe=recipe),
            rounds=settings.prunings,
            retrain=partial(measured, recipe=_last_rate(recipe)) if settings.retrain == "fine-tune" else None,
            **pruning(settings, model),
            rewind_step=settings.rewind_step,
            reset=settings.retrain == "rewind",
            out=out,
            settings=recorded | ({"scale": settings.scale} if settings.scale else {}),
            on_round=on_round,
        )


def compare(
    settings: Settings,
    data: data_sets.Dataset,
    ladder: Path,
    control: str,
    number: int,
    seed: int,
    on_eval: Callable[[int], None] | None = None,
    pause: Pause | None = None,
) -> tuple[dict, Ticket]:
    """The record and the trained weights of a control at a round of the ladder in the folder ``ladder``.

    ``control``: one of `CONTROLS`; ``seed``: of all that it draws. Its training is the ladder's: from the rewind step
    on, with the same random state and, if it does not reorder them, the same batches. The record of a control that is
    not trained holds one evaluation, at iteration 0, and None for the times of training. Raises FileNotFoundError if
    the ladder has not finished the round, ValueError for a device that is not there, `Paused` when ``pause`` is due.
    """
    _check(settings, data)
    chosen, data, generator = CONTROLS[control], data.to(settings.device), torch.Generator().manual_seed(seed)
    here = Round(
        number=number,
        theta=Ticket.load(ladder / "theta.safetensors"),
        dense=Ticket.load(ladder / "round-00.safetensors"),
        previous=Ticket.load(ladder / f"round-{number - 1:02d}.safetensors") if number else None,
        masks=Ticket.load(ladder / f"round-{number:02d}.safetensors").masks,
        factory=partial(_net, settings, data),
        images=data.train_x[:SCORED_IMAGES],
        labels=data.train_y[:SCORED_IMAGES],
        pruning=pruning(settings, _net(settings, data)),
        fit=lambda net, stop: train(net, data, **_recipe(settings), stop=stop),
        rewind_step=settings.rewind_step,
    )
    with random_state_kept(), deterministic(settings.device):
        began = perf_counter()
        start = chosen.start(here, generator)
        model = start.apply(here.factory())
        torch.manual_seed(here.theta.recipe["seed"])  # as the ladder does before each training
        if chosen.trains:
            recipe = _recipe(settings) | ({"seed": seed} if chosen.reorders else {})
            settled = _settle(model, settings, data, ladder)
            outcome = train(model, data, **recipe, start=settings.rewind_step, on_eval=on_eval, pause=pause) | settled
        else:
            outcome = _evaluated(model, data)
        seconds = perf_counter() - began
    total = sum(mask.numel() for mask in start.masks.values())
    record = {"round": number, "density": start.density, "nnz": start.nnz, "total": total, "seconds": seconds}
    return {**record, **outcome}, Ticket.from_model(model, {**start.recipe, "control": control, "control_seed": seed})


def _settle(model: nn.Module, settings: Settings, data: data_sets.Dataset, ladder: Path) -> dict:
    """For the record: the executions of the layers, where they are measured."""
    if settings.execution == "kernels":
        return {}
    return {"executions": settle(model, data.train_x[: settings.batch], ladder / "executions")}


def _check(settings: Settings, data: data_sets.Dataset) -> None:
    """Raise ValueError for settings that this machine or these data do not allow."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected cpu, or cuda where torch sees a GPU, got 'cuda'")
    if settings.batch > (images := len(data.train_x)):
        raise ValueError(f"batch: expected at most the {images} training images, got {settings.batch}")


def _recipe(settings: Settings) -> dict:
    """The keyword arguments of `train`."""
    return {key: getattr(settings, key) for key in TRAIN_SETTINGS}


def _last_rate(recipe: dict) -> dict:
    """The same training, all of it at the last learning rate."""
    last = learning_rate(recipe["iterations"] - 1, *(recipe[key] for key in ("iterations", "lr", "drops", "warmup")))
    return recipe | {"lr": last, "drops": (), "warmup": 0}


def _evaluated(model: nn.Module, data: data_sets.Dataset) -> dict:
    """What `train` returns, of a net that is not trained."""
    began = perf_counter()
    val_loss, val_accuracy = evaluate(model, data.val_x, data.val_y)
    _, test_accuracy = evaluate(model, data.test_x, data.test_y)
    seconds = perf_counter() - began
    return {
        "early_stop_iteration": 0,
        "early_stop_test_accuracy": test_accuracy,
        "final_test_accuracy": test_accuracy,
        "train_seconds": 0.0,
        "eval_seconds": seconds,
        "train_step_ms": None,
        "eval_ms": 1e3 * seconds,
        "steps": None,
        "curves": {
            "iteration": [0],
            "val_loss": [val_loss],
            "val_accuracy": [val_accuracy],
            "test_accuracy": [test_accuracy],
        },
    }


def _net(settings: Settings, data: data_sets.Dataset) -> nn.Sequential:
    """A new net; its weights are drawn on the CPU, the same for every device."""
    return build(settings.model, data.shape, data.classes, settings.dropout).to(settings.device)


def pruning(settings: Settings, model: nn.Module) -> dict:
    """How `find_ticket` is to prune ``model``: keyword arguments of `prune`.

    With scope "layer" a layer loses its share of the fraction. With "global" all layers whose share is not 0 compete,
    and lose the fraction together. 1x1 shortcuts stay whole. Blocks are pruned everywhere but in the output layer.
    Raises ValueError if nothing is left to prune.
    """
    weights = prunable(model)
    output = list(weights)[-1]
    shares = {name: _share(settings, weight, name == output) for name, weight in weights.items()}
    if not any(shares.values()):
        raise ValueError(f"prune_layers: {settings.model} has no {settings.prune_layers} layers to prune")
    if settings.scope == "global":
        shares = {name: share and 1.0 for name, share in shares.items()}
    rates = {name: settings.rate(share) for name, share in shares.items()}
    grain = Permuted(*settings.granularity) if settings.permute else settings.granularity
    competing = [name for name in weights if rates[name]] if settings.scope == "global" else []
    return {
        "fraction": settings.rate(1.0),
        "scope": settings.scope,
        "rates": {name: rate for name, rate in rates.items() if name not in competing},
        "granularity": {name: (1, 1) if name == output else grain for name in weights},
    }


def _densities(settings: Settings, data: data_sets.Dataset) -> dict[str, float]:
    """Of each layer what is left after all rounds."""
    net = _net(settings, data)
    rates = pruning(settings, net)["rates"]
    return {name: (1 - rates[name]) ** settings.rounds for name in prunable(net)}


def _share(settings: Settings, weight: torch.Tensor, output: bool) -> float:
    """Of the fraction, that a layer loses."""
    kind = "fc" if weight.dim() == 2 else "conv"
    if settings.prune_layers not in ("all", kind) or (kind == "conv" and weight[0, 0].numel() == 1):
        return 0.0
    return settings.output_share if output else getattr(settings, f"{kind}_share")


def step_ms(model: nn.Module, data: data_sets.Dataset, settings: Settings, at_once: int = 1) -> dict[str, float]:
    """Milliseconds of a step as `train` does it, of ``model`` and of the same net as w * mask, alternating.

    Both have the optimiser of ``settings``. A step takes its batch from the data. ``at_once``: steps of one call, which
    native ones need to show their speed. ``model`` itself is left alone.
    """
    drawn = settings.batch, 0, 0, settings.augment, slice(None)
    how = settings.lr, settings.optimizer, settings.weight_decay, settings.momentum
    runs = [Runner(net, data, drawn, how) for net in (deepcopy(model), masked_dense(model, masks_of(model)))]
    calls, options = [partial(run, [settings.lr] * at_once) for run in runs], {}
    if settings.device == "cuda":
        options["synchronize"] = torch.cuda.synchronize
        for call in calls * (WARM_UP + 1):  # until both are captured
            call()
    sparse_ms, dense_ms = (ms / at_once for ms in interleaved_ms(*calls, **options))
    return {"sparse_ms": sparse_ms, "dense_ms": dense_ms}

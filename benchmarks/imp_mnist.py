"""The paper's main experiment: iterative magnitude pruning of Lenet-300-100, on our kernels and as w * mask.

    SPARSELOTTERY_DATA=... python -m benchmarks.imp_mnist --rounds 16 --iterations 50000 --trials 5
    SPARSELOTTERY_DATA=... python -m benchmarks.imp_mnist --rounds 16 --iterations 300 --no-reinit
    SPARSELOTTERY_DATA=... python -m benchmarks.imp_mnist --model conv-2 --rounds 16 --iterations 10 --eval-every 5 \\
        --evaluated 750 --no-reinit

Both runs are the same code, each prunes by its own weights, and they take turns round by round, so that the machine's
drift hits both alike; `--only sparse` leaves w * mask out, whose round 0 is the same net. A random reinit of each of
our masks is trained as well. A row per round and trial; the file is rewritten after every round. Columns `seconds` are
what the clock said, `ms` medians, which stalls do not move. A training shortened by some factor is in proportion if
`--eval-every` and the images that `--evaluated` leaves (of 15,000) are divided by one factor too: Conv-2's above is.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import results
from sparselottery import convert
from sparselottery.convert import dense_state, load_dense_state, prunable
from sparselottery.lab import data
from sparselottery.lab.controls import reinit
from sparselottery.lab.data import Dataset
from sparselottery.lab.masked_dense import masked_dense
from sparselottery.lab.models import build
from sparselottery.lab.settings import PRESETS, Settings, preset
from sparselottery.lab.training import train
from sparselottery.masks import survivors
from sparselottery.pruning import prune

REINIT_SEED = 1_000_003  # added to the seed: no trial's first weights are another trial's control


class Round(NamedTuple):
    masks: dict[str, Tensor]
    outcome: dict  # of lab.training.train


def imp(execute: Callable, factory: Callable[[], nn.Module], fit: Callable, settings: Settings) -> Iterator[Round]:
    """Train theta_0 at the mask, yield, prune, again. execute(model, masks) is the masked net."""
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable(factory()).items()}
    while True:
        model = execute(reinit(factory, settings.seed), masks)
        yield Round(masks, fit(model))
        trained = factory()
        load_dense_state(trained, dense_state(model))
        convolutions = [name for name, mask in masks.items() if mask.dim() == 4]
        rates = dict.fromkeys(convolutions, settings.fraction * settings.conv_share)
        output = settings.fraction * settings.output_share
        masks = prune(trained, settings.fraction, masks, rates=rates, output_fraction=output)


RUNS = {"sparse": convert, "dense": masked_dense}


def fewer(images: Dataset, evaluated: int) -> Dataset:
    """The same with so many images to validate and test on, shared as they are now."""
    val = round(evaluated * len(images.val_x) / (len(images.val_x) + len(images.test_x)))
    counts = {"val": val, "test": evaluated - val}
    parts = {f"{part}_{axis}": getattr(images, f"{part}_{axis}")[:n] for part, n in counts.items() for axis in "xy"}
    return replace(images, **parts)


def trial(settings: Settings, runs: list[str], evaluated: int | None = None, reinits: bool = True) -> Iterator[dict]:
    """A row per round; runs: names in RUNS."""
    images = data.load(settings.data)
    images = images if evaluated is None else fewer(images, evaluated)
    factory = partial(build, settings.model, images.shape, images.classes)
    recipe = {key: getattr(settings, key) for key in ("iterations", "batch", "lr", "eval_every", "seed")}
    fit = partial(train, data=images, **recipe)
    ladders = {name: imp(RUNS[name], factory, fit, settings) for name in runs}
    for number in range(settings.rounds + 1):
        rounds = {name: next(ladder) for name, ladder in ladders.items()}
        masks = rounds[runs[0]].masks
        outcomes = {name: each.outcome for name, each in rounds.items()}
        if reinits:
            outcomes["reinit"] = fit(convert(reinit(factory, settings.seed + REINIT_SEED), masks))
        density = survivors(masks) / sum(mask.numel() for mask in masks.values())
        row = {"data": settings.data, "trial": settings.seed, "round": number, "density": round(density, 5)}
        row |= {key: recipe[key] for key in ("iterations", "batch", "eval_every")}
        row |= {"model": settings.model, "evaluated": len(images.val_x) + len(images.test_x)}
        for key in ("train_seconds", "eval_seconds", "train_step_ms", "eval_ms"):
            row |= {f"{name}_{key}": round(outcomes[name][key], 4) for name in runs}
        for name, outcome in outcomes.items():
            for key in ("early_stop_iteration", "early_stop_test_accuracy", "final_test_accuracy"):
                row[f"{name}_{key}"] = round(outcome[key], 4)
        yield row


def clock_seconds(rows: list[dict], run: str) -> float:
    """Of training and evaluating, in all rounds."""
    return sum(row[f"{run}_train_seconds"] + row[f"{run}_eval_seconds"] for row in rows)


def median_seconds(rows: list[dict], run: str) -> float:
    """The same from the medians: steps times ms per step and evaluations times ms per evaluation."""
    steps = sum(row["iterations"] * row[f"{run}_train_step_ms"] for row in rows)
    evaluations = sum((1 + math.ceil(row["iterations"] / row["eval_every"])) * row[f"{run}_eval_ms"] for row in rows)
    return (steps + evaluations) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=PRESETS, default="lenet-300-100")
    parser.add_argument("--data", choices=data.NAMES, help="default: mnist for Lenet, CIFAR-10 for the others")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=50_000)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--evaluated", type=int, help="so many images to validate and test on; default: all")
    parser.add_argument("--no-reinit", dest="reinits", action="store_false", help="without the control")
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=RUNS, help="this run alone")
    parser.add_argument("--out", type=Path, help="default: imp-DATA.csv among this machine's rows")
    args = parser.parse_args()
    name = args.data or ("mnist" if args.model == "lenet-300-100" else "cifar10")
    out = args.out or results.FOLDER / f"imp-{name}.csv"
    torch.set_num_threads(args.threads)
    runs = [args.only] if args.only else list(RUNS)
    chosen = {key: getattr(args, key) for key in ("rounds", "iterations", "eval_every")}
    rows: list[dict] = []
    for seed in range(args.trials):
        settings = preset(name, args.model, seed=seed, **chosen)
        for row in trial(settings, runs, args.evaluated, args.reinits):
            rows.append(row)
            results.write(out, rows)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if args.only:
        return
    for how, seconds in (("by the clock", clock_seconds), ("from the medians", median_seconds)):
        sparse, dense = seconds(rows, "sparse"), seconds(rows, "dense")
        print(f"seconds {how}: {sparse:.1f} sparse, {dense:.1f} w * mask, ratio {sparse / dense:.3f}")


if __name__ == "__main__":
    main()

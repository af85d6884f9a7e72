"""The paper's main experiment: iterative magnitude pruning of Lenet-300-100, on our kernels and as w * mask.

    SPARSELOTTERY_DATA=... python -m benchmarks.imp_mnist --rounds 16 --iterations 50000 --trials 5

Both runs are the same code, each prunes by its own weights, and they take turns round by round, so that the machine's
drift hits both alike; `--only sparse` leaves w * mask out, whose round 0 is the same net. A random reinit of each of
our masks is trained as well. A row per round and trial; the file is rewritten after every round. Columns `seconds` are
what the clock said, `ms` medians, which stalls do not move.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
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
from sparselottery.lab.masked_dense import masked_dense
from sparselottery.lab.models import lenet_300_100
from sparselottery.lab.settings import Settings, preset
from sparselottery.lab.training import train
from sparselottery.lottery import prune
from sparselottery.masks import survivors

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
        masks = prune(trained, settings.fraction, masks, output_fraction=settings.fraction / 2)


RUNS = {"sparse": convert, "dense": masked_dense}


def trial(settings: Settings, runs: list[str]) -> Iterator[dict]:
    """A row per round; runs: names in RUNS."""
    images = data.load(settings.data)
    factory = partial(lenet_300_100, images.features, images.classes)
    recipe = {key: getattr(settings, key) for key in ("iterations", "batch", "lr", "eval_every", "seed")}
    fit = partial(train, data=images, **recipe)
    ladders = {name: imp(RUNS[name], factory, fit, settings) for name in runs}
    for number in range(settings.rounds + 1):
        rounds = {name: next(ladder) for name, ladder in ladders.items()}
        masks = rounds[runs[0]].masks
        outcomes = {name: each.outcome for name, each in rounds.items()}
        outcomes["reinit"] = fit(convert(reinit(factory, settings.seed + REINIT_SEED), masks))
        density = survivors(masks) / sum(mask.numel() for mask in masks.values())
        row = {"data": settings.data, "trial": settings.seed, "round": number, "density": round(density, 5)}
        row |= {key: recipe[key] for key in ("iterations", "batch", "eval_every")}
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
    parser.add_argument("--data", choices=data.NAMES, default="mnist")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=50_000)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=RUNS, help="this run alone")
    parser.add_argument("--out", type=Path, default=results.FOLDER / "imp-mnist.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs = [args.only] if args.only else list(RUNS)
    chosen = {key: getattr(args, key) for key in ("rounds", "iterations", "eval_every")}
    rows: list[dict] = []
    for seed in range(args.trials):
        for row in trial(preset(args.data, seed=seed, **chosen), runs):
            rows.append(row)
            results.write(args.out, rows)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if args.only:
        return
    for name, seconds in (("by the clock", clock_seconds), ("from the medians", median_seconds)):
        sparse, dense = seconds(rows, "sparse"), seconds(rows, "dense")
        print(f"seconds {name}: {sparse:.1f} sparse, {dense:.1f} w * mask, ratio {sparse / dense:.3f}")


if __name__ == "__main__":
    main()

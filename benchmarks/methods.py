"""Methods that prune while training beside iterative pruning, at the same iterations a training.

    SPARSELOTTERY_DATA=... python -m benchmarks.methods train            # 3 seeds; the next call goes on
    SPARSELOTTERY_DATA=... python -m benchmarks.methods time             # on a quiet machine
    SPARSELOTTERY_DATA=... python -m benchmarks.methods train --net conv-2      # on a quiet machine

Each writes methods-NET.csv, a row for each method, of all that is there by then. Trainings are runs of `sparselottery
lab` in the folder `--runs`; none begins after `--minutes`. Seconds are those of one seed, evaluations included, in all
trainings that the method needs: taken by `time`, where RigL is trained as w * mask as well, with dense gradients
(`MaskedRigl`), or, of Conv-2, those of `train`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import NamedTuple

import torch

from benchmarks import results
from benchmarks.lab import about
from benchmarks.masked_rigl import MaskedRigl
from sparselottery import dynamic
from sparselottery.convert import convert, masks_of, prunable
from sparselottery.files import read_json, write_json
from sparselottery.lab import data, experiment, grid
from sparselottery.lab.controls import reinit
from sparselottery.lab.masked_dense import masked_dense
from sparselottery.lab.methods import METHODS, updater
from sparselottery.lab.models import build
from sparselottery.lab.settings import Settings, preset
from sparselottery.lab.training import train

LADDERS = {"imp": {}, "one-shot": {"one_shot": True}}  # those that train more than once, by what they set
ACCURACIES = ("early_stop_test_accuracy", "final_test_accuracy")
MASKED = {"w-times-mask": True, "masked-after-steps": False}  # RigL on dense weights, by `products`


LENET = {"data": "mnist", "rounds": 16, "iterations": 5000, "eval_every": 100}
CONV = {"data": "cifar10", "rounds": 4, "iterations": 600, "eval_every": 300}


class Case(NamedTuple):
    """What is compared on a net: `pruned` are shares of the layers that are pruned at the whole fraction."""

    pruned: tuple[float, ...]
    methods: tuple[str, ...]
    seeds: int
    threads: int  # of a training
    settings: dict


CASES = {
    "lenet-300-100": Case((0.95, 0.98), (*LADDERS, *METHODS), 3, 1, LENET),
    "conv-2": Case((0.9375,), ("imp", "gmp", "rigl"), 1, results.THREADS, CONV),
}


def settings(net: str, pruned: float, method: str) -> Settings:
    """Of a run whose last masks leave 1 - pruned of the weights."""
    chosen = preset(model=net, **CASES[net].settings)
    chosen = replace(chosen, fraction=1 - (1 - pruned) ** (1 / chosen.rounds))
    return replace(chosen, **LADDERS[method]) if method in LADDERS else replace(chosen, method=method)


def cases(net: str) -> Iterator[tuple[float, str, grid.Grid]]:
    case = CASES[net]
    for pruned in case.pruned:
        for method in case.methods:
            yield pruned, method, grid.Grid(settings(net, pruned, method), trials=case.seeds, threads=case.threads)


def train_all(net: str, runs: Path, until: float) -> None:
    """What is not done, a training after the other; none begins after `until`."""
    note = data.load(CASES[net].settings["data"]).note
    for pruned, method, wanted in cases(net):
        for event in grid.run(wanted, runs / wanted.name, workers=1, note=note, until=until):
            if event.kind == "failed":
                raise RuntimeError(f"{method}, {pruned} pruned: {event.job.name}: {event.payload}")
            if event.kind == "progress" and "round" in event.payload:
                print(method, pruned, event.job.name, event.payload, flush=True)


def trained(wanted: grid.Grid, folder: Path) -> list[list[dict]]:
    """Of each seed that is there to its end the records of all its trainings."""
    last = wanted.settings.prunings
    found = [folder / wanted.name / grid.Job(trial).name for trial in range(wanted.trials)]
    done = [each for each in found if (each / f"round-{last:02d}.json").exists()]
    return [[read_json(each / f"round-{number:02d}.json") for number in range(last + 1)] for each in done]


def seconds_of(records: list[dict]) -> dict:
    """Of all trainings and evaluations that a method needs."""
    keys = "train_seconds", "eval_seconds"
    return {key: sum(record[key] for record in records) for key in keys} | {key: records[-1][key] for key in ACCURACIES}


def timed(chosen: Settings, images: data.Dataset) -> dict:
    records: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        experiment.run(chosen, images, folder, on_round=records.append)
    return seconds_of(records)


def timed_masked(chosen: Settings, images: data.Dataset, products: bool) -> dict:
    """RigL on dense weights, from the masks and by the schedule of ours."""
    net = reinit(partial(build, chosen.model, images.shape, images.classes), chosen.seed)
    model = convert(net, {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable(net).items()})
    densities = experiment._densities(chosen, images)
    ours = updater(chosen, densities, model, torch.optim.Adam(model.parameters()))
    masked = masked_dense(net, masks_of(model))
    moves = partial(masked_rigl, ours=ours, products=products)
    recipe = {key: getattr(chosen, key) for key in experiment.TRAIN_SETTINGS}
    return seconds_of([train(masked, images, **recipe, moves=moves)])


def masked_rigl(model, optimizer, ours: dynamic.MaskUpdater, products: bool) -> MaskedRigl:
    return MaskedRigl(model, optimizer, ours.drop_fraction, ours.every, ours.end, products)


def time_all(net: str, runs: Path) -> None:
    """Keeps seconds in `runs`, one file a net; what is there already stays."""
    path = runs / f"seconds-{net}.json"
    found = read_json(path) if path.exists() else {}
    images = data.load(CASES[net].settings["data"])
    for pruned, method, wanted in cases(net):
        ways = {"": partial(timed, wanted.settings, images)}
        if method == "rigl" and net == "lenet-300-100":
            ways |= {f" {way}": partial(timed_masked, wanted.settings, images, each) for way, each in MASKED.items()}
        for way, run in ways.items():
            key = f"{pruned} {method}{way}"
            if key not in found:
                found[key] = run()
                write_json(path, found)
                print(key, found[key], flush=True)


def rows(net: str, runs: Path) -> tuple[list[dict], dict[str, str]]:
    """Of all that is there, and what must be known of it."""
    path, found, told = runs / f"seconds-{net}.json", [], {}
    seconds = read_json(path) if path.exists() else {}
    for pruned, method, wanted in cases(net):
        all_records = trained(wanted, runs)
        records = [each[-1] for each in all_records]
        if records and wanted.threads == results.THREADS:
            seconds.setdefault(f"{pruned} {method}", seconds_of(all_records[0]))
        if records:
            told = about(read_json(runs / wanted.name / "grid.json"))
        ways = {"": results.OURS} | {f" {way}": way for way in MASKED}
        for way, impl in ways.items():
            key = f"{pruned} {method}{way}"
            each = records if not way else [seconds[key]] if key in seconds else []
            if each:
                found.append(_row(net, pruned, method, impl, wanted, each, seconds.get(key)))
    told = {key: told[key] for key in ("length", "data") if key in told}
    told |= {"seconds": "of one seed, evaluations included, on the quiet machine; accuracies: means over seeds"}
    return found, told


def _row(net: str, pruned: float, method: str, impl: str, wanted: grid.Grid, records: list, seconds: dict | None):
    chosen, densities = wanted.settings, {record["density"] for record in records if "density" in record}
    row = {"net": net, "data": chosen.data, "pruned": pruned, "method": method, "impl": impl}
    row |= {"density": f"{max(densities):.4g}" if densities else "", "iterations": chosen.iterations}
    row |= {"trainings": chosen.prunings + 1, "seeds": len(records)}
    for name in ACCURACIES:
        values = [record[name] for record in records]
        row |= {name: f"{fmean(values):.4f}", f"{name.split('_')[0]}_deviation": f"{pstdev(values):.4f}"}
    parts = ("train_seconds", "eval_seconds")
    row["seconds"] = f"{sum(seconds[part] for part in parts):.3g}" if seconds else ""
    return row | {part: f"{seconds[part]:.3g}" if seconds else "" for part in parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "time", "rows"))
    parser.add_argument("--net", choices=CASES, default="lenet-300-100")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    parser.add_argument("--minutes", type=float, default=9.0, help="after which `train` begins no further training")
    parser.add_argument("--out", type=Path, default=results.FOLDER)
    args = parser.parse_args()
    torch.set_num_threads(results.THREADS)
    if args.what == "train":
        train_all(args.net, args.runs, time.time() + 60 * args.minutes)
    if args.what == "time":
        time_all(args.net, args.runs)
    found, told = rows(args.net, args.runs)
    if found:
        results.write(args.out / f"methods-{args.net}.csv", found, head=results.header() | told)


if __name__ == "__main__":
    main()

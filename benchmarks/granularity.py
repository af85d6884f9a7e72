"""What structure costs in accuracy: Lenet-300-100 on MNIST, pruned by single weights and by blocks.

    SPARSELOTTERY_DATA=... python -m benchmarks.granularity
    SPARSELOTTERY_DATA=... python -m benchmarks.granularity --net conv-2 --threads 2
    SPARSELOTTERY_DATA=... python -m benchmarks.granularity --only 16x16 16x16-permuted --seeds 0 1 2
    SPARSELOTTERY_DATA=... python -m benchmarks.granularity --held

A ladder of rounds for each granularity, plain or permuted, the output layer by single weights; and the masks of single
weights regrouped, trained from the first weights. A row for each of the rounds at about 25, 14, 7 and 3.6 % of the
weights, and for the dense net; of Conv-2 on CIFAR-10, which is trained briefly and halved in each round, at 25, 12.5, 6
and 3 %. `density` is of all layers. `accuracy` is of the test images, in %, at the iteration of
the least validation loss. The file is rewritten after each ladder and keeps the rows of ladders that are not run again,
so that the whole may be made in parts.

`--held` writes another table instead: of the magnitude that the largest weights hold, what as many weights in blocks
hold, plain and permuted: in the layers of Lenet after one such training, and in a random Gaussian matrix.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import results
from sparselottery import Ticket, convert, find_ticket, regroup
from sparselottery.arrange import Sought, find_orders
from sparselottery.convert import dense_state, load_dense_state, prunable
from sparselottery.grids import block_sums
from sparselottery.lab import data
from sparselottery.lab.data import Dataset
from sparselottery.lab.models import build
from sparselottery.lab.settings import preset
from sparselottery.lab.training import train
from sparselottery.links import links
from sparselottery.masks import survivors
from sparselottery.orders import Order


class Net(NamedTuple):
    data: str
    rounds: tuple[int, ...]  # that have a row
    fraction: float  # pruned in a round, of the output layer half of it
    iterations: int
    eval_every: int


LENET = "lenet-300-100"
NETS = {
    LENET: Net("mnist", (0, 6, 9, 12, 15), 0.2, 3000, 100),
    "conv-2": Net("cifar10", (0, 2, 3, 4, 5), 0.5, 600, 200),
}
BLOCKS = ("8x8", "16x16", "32x32", "16x1", "64x1")
WAYS = ("", "-permuted", "-regrouped")
GRAINS = ("1x1", *(block + way for block in BLOCKS for way in WAYS))
COUNTS = ("trial", "round", "stops_at", "iterations", "batch", "eval_every")  # columns
DENSITIES = (0.25, 0.14, 0.07, 0.036)


def block_of(grain: str) -> tuple[int, int]:
    rows, columns = grain.partition("-")[0].split("x")
    return int(rows), int(columns)


class Trial:
    """Ladders from the same first weights and with the same data order."""

    def __init__(self, name: str, images: Dataset, seed: int) -> None:
        settings = preset(model=name)
        self.net, self.images, self.seed = NETS[name], images, seed
        self.recipe = {"iterations": self.net.iterations, "batch": settings.batch}
        self.recipe |= {"eval_every": self.net.eval_every}
        self.training = {**self.recipe, "lr": settings.lr, "seed": seed}
        torch.manual_seed(seed)
        self.model = build(name, images.shape, images.classes)
        self.hidden = list(prunable(self.model))[:-1]

    def rows(self, grain: str, single: Path) -> list[dict]:
        """One for each round that has one. single: the folder of the ladder of single weights, run if it is not."""
        if not grain.endswith("-regrouped"):
            out = single if grain == "1x1" else None
            records = self.ladder(block_of(grain), grain.endswith("-permuted"), out)
            return [self.row(grain, record) for record in records if record["round"] in self.net.rounds]
        records = self.ladder((1, 1), False, single)
        theta, rows = Ticket.load(single / "theta.safetensors"), []
        for number in self.net.rounds[1:]:
            ticket = Ticket.load(single / f"round-{number:02d}.safetensors")
            blocks = dict.fromkeys(self.hidden, block_of(grain))
            masks = regroup(ticket, blocks, links=links(self.model)).masks
            model = convert(self.model, masks)
            load_dense_state(model, theta.weights)
            torch.manual_seed(theta.recipe["seed"])  # as the ladder does
            density = survivors(masks) / sum(mask.numel() for mask in masks.values())
            rows.append(self.row(grain, {"round": number, "density": density, **self.fit(model)}))
        return rows

    def ladder(self, block: tuple[int, int], permute: bool, out: Path | None) -> list[dict]:
        """The records of a run."""
        records: list[dict] = []
        how = {"granularity": dict.fromkeys(self.hidden, block), "permute": permute, "out": out}
        torch.manual_seed(self.seed)
        fractions = {"fraction": self.net.fraction, "output_fraction": self.net.fraction / 2}
        find_ticket(self.model, self.fit, rounds=self.net.rounds[-1], on_round=records.append, **fractions, **how)
        return records

    def fit(self, model: nn.Module) -> dict:
        record = train(model, self.images, **self.training)
        names = {"accuracy": "early_stop_test_accuracy", "final_accuracy": "final_test_accuracy"}
        percent = {name: round(100 * record[key], 2) for name, key in names.items()}
        return percent | {"stops_at": record["early_stop_iteration"]}

    def row(self, grain: str, record: dict) -> dict:
        row = {"granularity": grain, "trial": self.seed, "round": record["round"]}
        row |= {"density": round(record["density"], 5)}
        row |= {key: record[key] for key in ("accuracy", "final_accuracy", "stops_at")} | self.recipe
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        return row


def held(name: str, weight: Tensor) -> list[dict]:
    """A row for each block and density. weight: (O, I), magnitudes."""
    rows, natural = [], Order(*map(torch.arange, weight.shape))
    for block in map(block_of, BLOCKS):
        sizes = block_sums(torch.ones_like(weight), block)
        for density in DENSITIES:
            kept = max(1, round(density * sizes.numel()))
            layer = Sought(weight, torch.ones_like(weight, dtype=torch.bool), block, kept, ahead=False)
            (order,) = find_orders([layer], [(0, 1)], [natural])
            row = {"weights": name, "block": f"{block[0]}x{block[1]}", "density": density}
            for how, each in (("plain", natural), ("permuted", order)):
                sums = block_sums(each.permuted(weight), block)
                best = (sums / sizes).flatten().sort(descending=True, stable=True).indices[:kept]
                single = weight.flatten().sort(descending=True).values[: int(sizes.flatten()[best].sum())]
                row[how] = round(float(sums.flatten()[best].sum() / single.sum()), 4)
            rows.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return rows


def trained_weights(images: Dataset) -> dict[str, Tensor]:
    """Magnitudes of Lenet's hidden layers after a training, and of a Gaussian matrix."""
    torch.manual_seed(0)
    model = build(LENET, images.shape, images.classes)
    settings, iterations = preset(), NETS[LENET].iterations
    how = {"iterations": iterations, "eval_every": iterations, "batch": settings.batch, "lr": settings.lr}
    train(model, images, **how, seed=0)
    *hidden, _ = prunable(model)
    state = dense_state(model)
    return {name: state[name].abs() for name in hidden} | {"gaussian 1024x1024": torch.randn(1024, 1024).abs()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=GRAINS, default=GRAINS, metavar="RxC[-permuted|-regrouped]")
    parser.add_argument("--net", choices=NETS, default=LENET)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="a trial each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--held", action="store_true", help="the table of magnitudes")
    parser.add_argument("--out", type=Path, help="default: granularity.csv, or granularity-NET.csv, of this machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images = data.load(NETS[args.net].data)
    if args.held:
        rows = [row for name, weight in trained_weights(images).items() for row in held(name, weight)]
        results.write(args.out or results.FOLDER / "granularity-held.csv", rows)
        return
    out = args.out or results.FOLDER / ("granularity.csv" if args.net == LENET else f"granularity-{args.net}.csv")
    kept = results.read(out)[1] if out.exists() else []
    kept = [row | {name: int(row[name]) for name in COUNTS} for row in kept]
    note = {"data": images.note} if images.note else {}
    for seed in args.seeds:
        trial = Trial(args.net, images, seed)
        with tempfile.TemporaryDirectory() as folder:
            for grain in args.only:
                rows = trial.rows(grain, Path(folder))
                kept = [row for row in kept if (row["granularity"], row["trial"]) != (grain, seed)] + rows
                kept.sort(key=lambda row: (row["trial"], GRAINS.index(row["granularity"])))
                results.write(out, kept, head=results.header() | note)


if __name__ == "__main__":
    main()

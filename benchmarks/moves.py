"""What a change of masks costs beside a training step: `python -m benchmarks.moves` writes moves.csv.

A tenth of the survivors of each layer goes and as many come, back and forth; Adam holds two moments of each. step_ms:
forward, cross-entropy, backward and the optimiser's step, at this batch; move_ms: all of `set_masks`, the kernels' next
plan included, given bool masks or patterns. Medians, in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import cycle, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import results
from benchmarks.steps import LEARNING_RATE
from benchmarks.timing import Candidate, race
from sparselottery import Pattern, convert, prune, set_masks

SHARE = 0.1  # of the survivors, that change


class Case(NamedTuple):
    widths: tuple[int, ...]
    batch: int
    density: float


CASES = {"linear-4096": Case((4096, 4096), 128, 0.1), "lenet-300-100": Case((784, 300, 100, 10), 60, 0.05)}


def changed(mask: Tensor) -> Tensor:
    """A mask of as many survivors, of which a share are others."""
    scores = torch.rand(mask.shape)
    count = round(SHARE * int(mask.sum()))
    gone = torch.where(mask, scores, 2.0).flatten().argsort()[:count]
    come = torch.where(mask, 2.0, scores).flatten().argsort()[:count]
    other = mask.flatten().clone()
    other[gone], other[come] = False, True
    return other.view(mask.shape)


def rows(net: str, budget: float) -> Iterator[dict]:
    """A row for each way to give the masks."""
    case = CASES[net]
    torch.manual_seed(0)
    layers = [layer for sizes in pairwise(case.widths) for layer in (nn.Linear(*sizes), nn.ReLU())]
    dense = nn.Sequential(*layers[:-1])
    masks = prune(dense, 1 - case.density, method="random")
    model = convert(dense, masks)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    x, labels = torch.randn(case.batch, case.widths[0]), torch.randint(case.widths[-1], (case.batch,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    step()
    both = [masks, {name: changed(mask) for name, mask in masks.items()}]
    given: dict[str, list[Mapping[str, Tensor | Pattern]]] = {
        "bool": both,
        "pattern": [{name: Pattern.from_mask(mask) for name, mask in each.items()} for each in both],
    }
    candidates = {"step": Candidate(step, list)}
    for name, each in given.items():
        turns = cycle(reversed(each))
        candidates[name] = Candidate(partial(move, model, turns, optimizer), list)
    timing = race(candidates, [], 0.0, budget)
    for name in given:
        row = {"net": net, "batch": case.batch, "density": case.density, "changed": SHARE, "masks": name}
        row |= {"impl": results.OURS, "step_ms": f"{1e3 * timing.seconds['step']:.3g}"}
        yield row | {"move_ms": f"{1e3 * timing.seconds[name]:.3g}"}


def move(model: nn.Module, turns: Iterator[Mapping[str, Tensor | Pattern]], optimizer: torch.optim.Optimizer) -> None:
    set_masks(model, next(turns), optimizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=results.FOLDER / "moves.csv")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for each net")
    args = parser.parse_args()
    torch.set_num_threads(results.THREADS)
    measured = []
    for net in CASES:
        for row in rows(net, args.budget):
            measured.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    results.write(args.out, measured)


if __name__ == "__main__":
    main()

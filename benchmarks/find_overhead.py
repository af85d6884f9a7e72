"""What pruning and a round cost beside training, 50 million weights (Linux): `python -m benchmarks.find_overhead`.

Two layers of 5000 x 5000, and a `train` that does nothing. seconds: of one `prune`, or of `find_ticket` for each of its
trainings, one more than rounds; cpu_s: those of the processors, all threads together; plan_s: those of cpu_s in which
the kernels' plans are made; peak_rss: bytes of the process over what it held with the model; trained: those of them
that the largest model given to `train` holds, in values, indices and plans. Each row is of a process of its own.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn

from benchmarks import results
from benchmarks.memory import resident
from sparselottery import find_ticket, ops, prune

SIDE, ROUNDS = 5000, 3


def measure(what: str, side: int) -> dict[str, object]:
    """A row."""
    torch.set_num_threads(results.THREADS)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(side, side), nn.ReLU(), nn.Linear(side, side))
    plans = 0.0
    compile_plan = ops.compile_plan

    def timed(*arguments: object) -> torch.Tensor:
        nonlocal plans
        began = time.process_time()
        plan = compile_plan(*arguments)
        plans += time.process_time() - began
        return plan

    ops.compile_plan = timed
    sizes = [0]

    def train(given: nn.Module) -> None:
        sizes.append(sum(each.nbytes for each in (*given.parameters(), *given.buffers())))

    before, started, began = resident("VmRSS"), time.perf_counter(), time.process_time()
    if what == "prune":
        prune(model, 0.2)
        parts = 1
    else:
        find_ticket(model, train, rounds=ROUNDS)
        parts = ROUNDS + 1
    spent = {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - began, "plan_s": plans}
    peak = resident("VmHWM") - before
    row = {"what": what, "weights": 2 * side * side, "impl": results.OURS}
    row |= {name: f"{each / parts:.3g}" for name, each in spent.items()}
    return row | {"peak_rss": peak, "trained": max(sizes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=results.FOLDER / "find_overhead.csv")
    parser.add_argument("--side", type=int, default=SIDE)
    args = parser.parse_args()
    measured = []
    for what in ("prune", "find_ticket"):
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            measured.append(fresh.submit(measure, what, args.side).result())
        print(" ".join(f"{key}={value}" for key, value in measured[-1].items()), flush=True)
    results.write(args.out, measured)


if __name__ == "__main__":
    main()

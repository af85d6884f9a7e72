"""A training step while two other processes multiply with torch on all cores: `python -m benchmarks.busy`.

Lenet-300-100, batch 60, two threads, and two in each of the others: a fair share of the cores is a third. Writes
busy.csv: means of a step, quiet_ms and busy_ms, their ratio as `times`, and the busy median, as a few steps that wait
for a descheduled thread make most of the mean. sparselottery steps through autograd; sparselottery_native makes STEPS
steps in one call, as the lab trains; `dense` and `masked_dense` (w * mask) are torch's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import fmean, median
from time import perf_counter

import torch
from torch import Tensor, nn

from benchmarks import results, steps, timing
from sparselottery import convert, prune, to_dense
from sparselottery.lab.masked_dense import masked_dense
from sparselottery.lab.models import lenet_300_100
from sparselottery.lab.native import native_trainer
from sparselottery.lab.training import stepper

BATCH, DENSITY, STEPS = 60, 0.1, 50
OTHERS, SIDE = 2, 1024  # processes, and what they multiply
TURN, TURNS = 1.0, 4  # seconds that a candidate runs before the next one's turn, and how often
TOLERANCE = 1e-2

Run = Callable[[], object]


def candidates(x: Tensor, labels: Tensor) -> dict[str, tuple[Run, int]]:
    """What is called by name, and the steps in a call. All have made one step, the same: else AssertionError."""
    model = lenet_300_100()
    masks = prune(model, 1 - DENSITY, method="random")
    native, sparse = convert(model, masks), convert(model, masks)
    eager = {results.OURS: sparse, "dense": to_dense(sparse), "masked_dense": masked_dense(model, masks)}
    truth = to_dense(sparse).double()
    expected = update(truth, masks, stepper(truth, steps.LEARNING_RATE), x.double(), labels)
    called: dict[str, tuple[Run, int]] = {}
    for name, net in eager.items():
        step = stepper(net, steps.LEARNING_RATE)
        timing.check(name, update(net, masks, step, x, labels), expected, TOLERANCE)
        called[name] = (lambda step=step: step(x, labels)), 1
    trainer = native_trainer(native, x)
    if trainer is not None:
        order, rates = torch.arange(BATCH).repeat(STEPS, 1), [steps.LEARNING_RATE] * STEPS
        once = update(native, masks, lambda *data: trainer(*data, order[:1], rates[:1]), x, labels)
        timing.check("native", once, expected, TOLERANCE)
        called[f"{results.OURS}_native"] = (lambda: trainer(x, labels, order, rates)), STEPS
    return called


def update(model: nn.Module, masks: dict[str, Tensor], step: Callable, x: Tensor, labels: Tensor) -> list[Tensor]:
    """What a step adds to the parameters, in order, to the dense ones at the mask."""
    named = dict(model.named_parameters())
    before = [each.detach().clone() for each in named.values()]
    step(x, labels)
    added = [each.detach() - old for each, old in zip(named.values(), before, strict=True)]
    return [each[masks[name]] if name in masks else each for name, each in zip(named, added, strict=True)]


def times(called: dict[str, tuple[Run, int]], turn: float, turns: int) -> dict[str, list[float]]:
    """Seconds of a step, call by call; candidates take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in called}
    for _ in range(turns):
        for name, (run, count) in called.items():
            run()
            spent = 0.0
            while spent < turn:
                began = perf_counter()
                run()
                took = perf_counter() - began
                spent += took
                seconds[name].append(took / count)
    return seconds


@contextmanager
def busy_machine() -> Iterator[None]:
    """While others multiply."""
    context = get_context("spawn")
    ready = [context.Event() for _ in range(OTHERS)]
    others = [context.Process(target=multiply, args=(event,), daemon=True) for event in ready]
    for other in others:
        other.start()
    try:
        if not all(event.wait(60) for event in ready):
            raise RuntimeError("the other processes did not start within a minute")
        yield
    finally:
        for other in others:
            other.terminate()
            other.join()


def multiply(ready: Event) -> None:
    """Forever."""
    torch.set_num_threads(results.THREADS)
    a = torch.randn(SIDE, SIDE)
    while True:
        a @ a
        ready.set()


def rows(turn: float = TURN, turns: int = TURNS) -> list[dict]:
    torch.manual_seed(0)
    called = candidates(torch.randn(BATCH, 784), torch.randint(10, (BATCH,)))
    quiet = times(called, turn, turns)
    with busy_machine():
        busy = times(called, turn, turns)
    measured = []
    for name in called:
        row = {"net": "lenet-300-100", "batch": BATCH, "density": DENSITY, "impl": name, "others": OTHERS}
        means = fmean(quiet[name]), fmean(busy[name])
        row |= {"quiet_ms": f"{1e3 * means[0]:.4g}", "busy_ms": f"{1e3 * means[1]:.4g}"}
        row |= {"times": f"{means[1] / means[0]:.3g}", "busy_median_ms": f"{1e3 * median(busy[name]):.4g}"}
        measured.append(row | {"calls": len(busy[name])})
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=results.FOLDER / "busy.csv")
    args = parser.parse_args()
    torch.set_num_threads(results.THREADS)
    measured = rows()
    for row in measured:
        print(" ".join(f"{key}={value}" for key, value in row.items()))
    results.write(args.out, measured)


if __name__ == "__main__":
    main()

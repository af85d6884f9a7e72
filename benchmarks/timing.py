"""The one timing core: candidates that compute the same thing are checked, then timed in turn, in one process.

Interleaving makes drift of the machine (clock, neighbours) hit all candidates alike, so that ratios of the medians
hold where absolute times do not. Before each sample its candidate runs untimed for a while, unless a call outlasts
what caches hold. So what is measured is a call among its like, as in a training loop: not one in caches that others
have filled, nor one beside threads of theirs that still spin. A candidate whose result is wrong raises before anything
is timed.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from torch import Tensor

MIN_SAMPLE = 2e-3  # seconds; shorter calls are repeated within a sample
MIN_ROUNDS = 5  # clean samples of each candidate, whatever the budget
WARM_UP = 5  # calls; the first ones also pay for autotuning
WARM_UP_SECONDS = 0.2  # after which long calls are warm enough
LINGER = 0.01  # seconds; libgomp's threads spin for 8 ms before they sleep, and each copy of it has its own
STALL = 1.5  # a sample this many times the lower quartile of its candidate is a stall, and dropped
PATIENCE = 4  # give up after this many times the budget and MIN_ROUNDS


@dataclass(frozen=True)
class Candidate:
    """`run` is timed; `read` returns what the last run left, as tensors comparable to the truth."""

    run: Callable[[], object]
    read: Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Timing:
    """Median seconds and calls per sample of each candidate, over `rounds` rounds; `rejected` samples were stalls."""

    seconds: dict[str, float]
    calls: dict[str, int]
    rounds: int
    rejected: int


def race(candidates: dict[str, Candidate], truth: Sequence[Tensor], tolerance: float, budget: float) -> Timing:
    """Check every candidate against `truth`, then time them in turn for about `budget` seconds.

    Raises AssertionError if a result is wrong, RuntimeError if the machine is too busy for MIN_ROUNDS clean rounds.
    """
    for name, candidate in candidates.items():
        candidate.run()
        check(name, candidate.read(), truth, tolerance)
    gc.collect()
    gc.disable()
    try:
        calls = {name: _calls(candidate.run) for name, candidate in candidates.items()}
        rounds = _rounds(candidates, calls, budget)
    finally:
        gc.enable()
    clean = clean_samples(rounds)
    if (fewest := min(map(len, clean.values()))) < MIN_ROUNDS:
        raise RuntimeError(f"the machine is too busy: only {fewest} of {len(rounds)} samples were no stalls")
    seconds = {name: median(samples) for name, samples in clean.items()}
    return Timing(seconds, calls, len(rounds), len(rounds) * len(clean) - sum(map(len, clean.values())))


def check(name: str, got: Sequence[Tensor], truth: Sequence[Tensor], tolerance: float) -> None:
    """Raise AssertionError unless ||got - truth|| <= tolerance ||truth||, tensor by tensor (NaN fails)."""
    for index, (actual, expected) in enumerate(zip(got, truth, strict=True)):
        if actual.shape != expected.shape:
            raise AssertionError(f"{name}: result {index} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
        if not actual.is_contiguous():
            raise AssertionError(f"{name}: result {index} is not row-major")
        error = float((actual.double() - expected).norm())
        if not error <= tolerance * float(expected.norm()):
            raise AssertionError(f"{name}: result {index} is wrong by {error:.3g} (norm {float(expected.norm()):.3g})")


def clean_samples(rounds: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Each candidate's samples that are no stalls (a competing process makes OpenMP spin for about 8 ms)."""
    columns = {name: [r[name] for r in rounds] for name in rounds[0]}
    limits = {name: STALL * quantiles(samples, n=4)[0] for name, samples in columns.items()}
    return {name: [sample for sample in samples if sample <= limits[name]] for name, samples in columns.items()}


def _calls(run: Callable[[], object]) -> int:
    """Calls in a sample, so that it lasts MIN_SAMPLE; warms up on the way."""
    samples: list[float] = []
    while len(samples) < WARM_UP and sum(samples) < WARM_UP_SECONDS:
        samples.append(_sample(run, 1))
    return max(1, math.ceil(MIN_SAMPLE / min(samples)))


def _run_for(seconds: float, run: Callable[[], object]) -> None:
    """At least once."""
    end = time.perf_counter() + seconds
    run()
    while time.perf_counter() < end:
        run()


def _sample(run: Callable[[], object], calls: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _rounds(candidates: dict[str, Candidate], calls: dict[str, int], budget: float) -> list[dict[str, float]]:
    """Time all candidates once a round, back and forth, so that none always follows the same other."""
    rounds: list[dict[str, float]] = []
    order = list(candidates)
    start = time.perf_counter()
    while True:
        rounds.append({})
        for name in order:
            if len(rounds) == 1 or rounds[-2][name] < WARM_UP_SECONDS:
                _run_for(LINGER, candidates[name].run)
            rounds[-1][name] = _sample(candidates[name].run, calls[name])
        order.reverse()
        spent = time.perf_counter() - start
        if spent < budget or len(rounds) < MIN_ROUNDS:
            continue
        exhausted = spent >= PATIENCE * budget and len(rounds) >= PATIENCE * MIN_ROUNDS
        if exhausted or min(map(len, clean_samples(rounds).values())) >= MIN_ROUNDS:
            return rounds

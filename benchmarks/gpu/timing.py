"""Candidates checked, captured in CUDA graphs, and timed in turn by the GPU's own clock.

As benchmarks/timing.py, from which the checks and the medians come, but a candidate that raises or is wrong does not
stop the others: it gets no time, and its reason is kept.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import MIN_ROUNDS, Candidate, check, clean_samples
from sparselottery.graphs import BrokenCaptureError, captured, works

MIN_SAMPLE = 1e-3  # seconds; shorter calls are repeated within a sample
WARM_UP = 4  # calls before a capture: kernels are compiled, autotuned and tried; a GraphedStep captures itself in them
HOPELESS = 8  # a candidate this many times slower than the fastest is timed on its own, by a few calls
FEW = 3


class DeviceLostError(RuntimeError):
    """The GPU refuses any further work of this process."""


class CaptureError(RuntimeError):
    """The candidate `name` cannot be captured: nothing more is measured in a process that may be broken by it."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name} cannot be captured: {why}")
        self.name = name


class Entry(NamedTuple):
    """make: a fresh candidate, with weights of its own. chosen: the execution that was chosen for it.

    dense: it multiplies zeros, too. captured: it captures itself in a CUDA graph while it is warmed.
    """

    make: Callable[[], Candidate]
    dense: bool
    chosen: str = ""
    captured: bool = False


@dataclass
class Race:
    """Median seconds of each candidate, why others have none, and which of the timed ones ran in a CUDA graph."""

    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    graphed: set[str] = field(default_factory=set)
    rounds: dict[str, int] = field(default_factory=dict)
    rejected: int = 0


class CpuClock:
    """Times what has ended when it returns."""

    capture = None  # there are no graphs
    device = torch.device("cpu")

    def warm(self, run: Callable[[], object]) -> None:
        run()

    def wait(self) -> None:
        pass

    def seconds(self, run: Callable[[], object], calls: int) -> float:
        """Of one call, after another one."""
        run()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls


class CudaClock:
    """Times what the GPU does between two events of the current stream."""

    device = torch.device("cuda")

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """What repeats the run, in one launch."""
        return captured(run, self.device)

    def warm(self, run: Callable[[], object]) -> None:
        """On a stream of its own, as PyTorch asks for before a capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        self.wait()

    def wait(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], calls: int) -> float:
        """Of one call, after another one."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls


def clock(device: str) -> CpuClock | CudaClock:
    return CudaClock() if device == "cuda" else CpuClock()


def race(
    entries: Mapping[str, Entry],
    truth: Sequence[Tensor],
    tolerances: Sequence[float],
    budget: float,
    clock: CpuClock | CudaClock,
    copies: int = 1,
    eager: Collection[str] = (),
) -> Race:
    """Check every entry against `truth`, tensor by tensor, then time those that are right for about `budget` seconds.

    copies: so many of each run one after the other, each with weights of its own, which then come from memory and not
    from a cache; the time is that of one. eager: names that are not to be captured.
    Raises DeviceLostError if a candidate takes the GPU down, CaptureError if one cannot be captured, BrokenCaptureError
    if one that captures itself breaks the device in it: the process is of no more use then.
    """
    result = Race()
    runs: dict[str, Callable[[], object]] = {}
    for name, entry in entries.items():
        try:
            candidate = _together([entry.make() for _ in range(copies)])
            run = candidate.run
            clock.warm(run)
            capture = clock.capture is not None and not entry.captured and name not in eager
            if capture:
                run = _captured(name, run, clock)
            run()
            clock.wait()
            for index, (got, right, tolerance) in enumerate(zip(candidate.read(), truth, tolerances, strict=True)):
                check(f"{name}, result {index}", [got], [right], tolerance)
        except CaptureError:
            raise
        except BrokenCaptureError as error:  # of a candidate that captures itself
            raise BrokenCaptureError(f"{name}: {error}") from error
        except Exception as error:  # whatever is wrong with it, the others count
            result.failures[name] = _first_line(error)
            _still_alive(clock, result.failures[name])
            continue
        runs[name] = run
        result.graphed |= {name} if capture or entry.captured else set()
    gc.collect()
    gc.disable()
    try:
        _time(runs, budget, clock, result)
    finally:
        gc.enable()
    result.seconds = {name: result.seconds[name] / copies for name in entries if name in result.seconds}
    return result


def _time(runs: dict[str, Callable[[], object]], budget: float, clock: CpuClock | CudaClock, result: Race) -> None:
    """Fills in the medians."""
    once = {name: min(clock.seconds(run, 1) for _ in range(2)) for name, run in runs.items()}
    limit = HOPELESS * min(once.values(), default=0)
    for name in [name for name, seconds in once.items() if seconds > limit]:
        run = runs.pop(name)
        result.seconds[name], result.rounds[name] = median(clock.seconds(run, 1) for _ in range(FEW)), FEW
    if not runs:
        return
    calls = {name: max(1, math.ceil(MIN_SAMPLE / once[name])) for name in runs}
    rounds: list[dict[str, float]] = []
    order, start = list(runs), time.perf_counter()
    while len(rounds) < MIN_ROUNDS or time.perf_counter() - start < budget:
        rounds.append({name: clock.seconds(runs[name], calls[name]) for name in order})
        order.reverse()
    clean = clean_samples(rounds)
    result.seconds |= {name: median(samples) for name, samples in clean.items()}
    result.rounds |= dict.fromkeys(runs, len(rounds))
    result.rejected = len(rounds) * len(clean) - sum(map(len, clean.values()))


def _together(candidates: list[Candidate]) -> Candidate:
    """All of them, one after the other; what the last one left counts."""

    def run() -> None:
        for candidate in candidates:
            candidate.run()

    return candidates[0] if len(candidates) == 1 else Candidate(run, candidates[-1].read)


def _captured(name: str, run: Callable[[], object], clock: CudaClock) -> Callable[[], object]:
    try:
        return clock.capture(run)
    except Exception as error:
        raise CaptureError(name, _first_line(error)) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _still_alive(clock: CpuClock | CudaClock, why: str) -> None:
    if not works(clock.device):
        raise DeviceLostError(why)

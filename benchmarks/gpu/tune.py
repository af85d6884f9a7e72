"""Which launch shapes are fastest here: those around the default of each kernel, in the calls that the bars are about.

A launch shape is the NamedTuple that a kernel's module gives `launch.tuned`. A result that differs from the default's
has no time. The winners are printed as constants for a person to commit: nothing tunes itself at run time, so that
the same program gives the same bits.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from itertools import chain, combinations, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import calls
from benchmarks.gpu.baselines import copies
from benchmarks.gpu.calls import Call
from benchmarks.gpu.cases import Case
from benchmarks.gpu.problems import TOLERANCE
from benchmarks.gpu.timing import CaptureError, Entry, clock, race
from benchmarks.timing import Candidate
from sparselottery.kernels.gpu.launch import Launch, overridden, recorded, shapes

MOST, MOST_SMOKE = 12, 1  # launch shapes of a kernel beside the default
MAX_WARPS = 32  # of a program: CUDA starts no more than 1,024 threads
SAMPLE = 1e-3  # seconds that a graph of calls takes at least, so that its own launch does not count
SECONDS = 0.3  # of timing a kernel's shapes, all together
WORTH = 1.02  # a gain below it is noise: the default stays
DEFAULT = "default"


class Job(NamedTuple):
    """All kernels of one call."""

    case: Case


def jobs(smoke: bool) -> list[Job]:
    return [Job(case) for case in calls.cases(smoke)]


def measure(job: Job, device: str, smoke: bool) -> list[dict]:
    """A row for each launch shape of each kernel that the call launches; without `us`, the reason in detail."""
    case = job.case
    stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()
    with calls.measuring(case, device), stream:
        given, layer = calls.masked(case, device)
        many = [Call(copy.deepcopy(layer), given, case.op) for _ in range(copies(given, device))]
        return vary(many, TOLERANCE[case.dtype], device, calls.name(case), MOST_SMOKE if smoke else MOST)


def vary(many: list[Callable[[], Tensor]], tolerance: float, device: str, case: str, most: int) -> list[dict]:
    """The rows of `measure`; `many` are the same call on different copies of its weight."""
    with shapes() as defaults:
        truth = many[0]().double().contiguous()
    rounds = max(1, math.ceil(SAMPLE / clock(device).seconds(many[0], 1) / len(many))) if device == "cuda" else 1
    rows = []
    for kernel, default in defaults.items():
        tried = _launchable(many[0], kernel, default, most)
        if device == "cuda":
            _compile(chain.from_iterable(tried.values()))
        entries = {
            _config(shape): Entry(partial(_candidate, many * rounds, kernel, shape, device), False, captured=True)
            for shape in tried
        }
        result = race(entries, [truth], [tolerance], SECONDS if device == "cuda" else 0.0, clock(device))
        first = result.seconds.get(_config(default), math.nan)
        for shape in tried:
            config = _config(shape)
            seconds = result.seconds.get(config)
            gain = DEFAULT if shape == default else f"{first / seconds:.3g}x" if seconds else ""
            rows.append({
                "part": "tune",
                "kernel": kernel,
                "case": case,
                "config": config,
                "us": float(f"{1e6 * seconds / len(many) / rounds:.4g}") if seconds else "",
                "detail": result.failures.get(config, gain),
            })  # fmt: skip
    return rows


def neighbours(shape: NamedTuple) -> list[dict[str, int]]:
    """Fields to replace: one halved or doubled (stages: one less, one more), then two of them alike."""
    down, up = {}, {}
    for field, value in shape._asdict().items():
        down[field], up[field] = (value - 1, value + 1) if field == "stages" else (value // 2, 2 * value)
    ones = [{field: way[field]} for field in up for way in (up, down)]
    twos = [{field: way[field] for field in pair} for way in (up, down) for pair in combinations(up, 2)]
    return [fields for fields in ones + twos if all(fields.values())]


def summary(rows: list[dict]) -> list[str]:
    """The constants of each winner, the largest gain over the default first; then how many defaults stay."""
    wins, stay, failed = [], 0, []
    for (kernel, case), group in groupby(rows, key=lambda row: (row["kernel"], row["case"])):
        found = list(group)
        timed = [row for row in found if row["us"] != ""]
        default = next((row for row in timed if row["detail"] == DEFAULT), None)
        if default is None:
            failed.append(f"{kernel}, {case}: the default has no time: {found[0]['detail']}")
            continue
        best = min(timed, key=lambda row: row["us"])
        gain = default["us"] / best["us"]
        if gain < WORTH:
            stay += 1
            continue
        line = f"{kernel}, {case}: {best['config']}: {best['us']:g} us, {gain:.2f}x of {default['config']}"
        wins.append((gain, line))
    lines = failed + [line for _, line in sorted(wins, reverse=True)]
    return [*lines, f"the default stays: {stay} of {stay + len(lines)}"] if rows else []


def _config(shape: NamedTuple) -> str:
    return " ".join(f"{field}={value}" for field, value in shape._asdict().items())


def _candidate(many: list[Callable[[], Tensor]], kernel: str, shape: NamedTuple, device: str) -> Candidate:
    """All of the calls with that launch shape of the kernel, in one CUDA graph."""
    results: list[Tensor] = []
    with overridden(kernel, **shape._asdict()):
        with shapes() as used:
            results[:] = [many[0]()]
        if used.get(kernel) != shape:
            raise RuntimeError(f"{kernel}: expected a launch of {shape}, got {used.get(kernel)}")

        def run() -> None:
            with overridden(kernel, **shape._asdict()):
                for call in many:
                    results[:] = [call()]

        replay = _captured(run, _config(shape)) if device == "cuda" else run
    return Candidate(replay, lambda: [results[0].contiguous()])


def _captured(run: Callable[[], None], name: str) -> Callable[[], None]:
    """On the stream of the calls: a backward runs on that of its forward."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            run()
    except Exception as error:
        raise CaptureError(name, str(error)) from error
    return graph.replay


def _launchable(
    call: Callable[[], Tensor], kernel: str, default: NamedTuple, most: int
) -> dict[NamedTuple, list[Launch]]:
    """The default and up to `most` of its neighbours that a GPU can start, with all launches of the call."""
    found = {default: _launches(call, kernel, default)}
    for fields in neighbours(default):
        if len(found) > most:
            break
        shape = default._replace(**fields)
        launches = _launches(call, kernel, shape)
        if all(each.options["num_warps"] <= MAX_WARPS for each in launches):
            found[shape] = launches
    return found


def _launches(call: Callable[[], Tensor], kernel: str, shape: NamedTuple) -> list[Launch]:
    """What the call starts with that launch shape, without starting it."""
    with suppress(Exception), overridden(kernel, **shape._asdict()), recorded() as found:  # told when it is measured
        call()
    return found


def _compile(launches: Iterable[Launch]) -> None:
    """At once in threads: ptxas is a process, and most of Triton leaves Python's lock."""

    def warm(launch: Launch) -> None:
        with suppress(Exception):  # told when it is measured
            launch.kernel.warmup(**launch.arguments, grid=launch.grid, **launch.options)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(warm, launches))

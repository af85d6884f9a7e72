"""Options and fixtures of the benchmark cases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import peers, results, timing


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, default=2.5, help="time budget of a benchmark case")
    parser.addoption("--results", type=Path, default=results.FOLDER, help="folder of the CSV files (for trial runs)")


def pytest_configure(config):
    # A case that fails has not come to use pytest-benchmark, which is no second failure.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")


def pytest_terminal_summary(terminalreporter):
    for reason in filter(None, (peers.SPARSEPROP_MISSING, peers.COMPILER_MISSING)):
        terminalreporter.write_line(reason)


@pytest.fixture(scope="module")
def rows(request):
    """Collects the rows of a module (test_bench_<name>.py), which become <name>.csv when all its tests have run.

    A module may name a SUFFIX for the file.
    """
    collected: list[dict] = []
    torch.set_num_threads(results.THREADS)
    yield collected
    if collected:
        name = request.module.__name__.rpartition("test_bench_")[2] + getattr(request.module, "SUFFIX", "")
        results.write(request.config.getoption("--results") / f"{name}.csv", collected)


@pytest.fixture
def measure(request, benchmark, rows):
    """measure(candidates, truth, tolerance, **case): race the candidates and add a row for each.

    speedup = its time / our time, so above 1 where we win. pytest-benchmark reports our own time as well.
    """

    def run(candidates, truth, tolerance, **case):
        timed = timing.race(candidates, truth, tolerance, request.config.getoption("--seconds"))
        for name, seconds in timed.seconds.items():
            speedup = seconds / timed.seconds[results.OURS]
            measured = {"impl": name, "ms": f"{1e3 * seconds:.4g}", "speedup": f"{speedup:.3g}"}
            rows.append({**case, **measured, "rounds": timed.rounds, "rejected": timed.rejected})
            benchmark.extra_info[f"vs {name}"] = round(speedup, 2)
        benchmark.pedantic(candidates[results.OURS].run, rounds=timing.MIN_ROUNDS, iterations=timed.calls[results.OURS])

    return run

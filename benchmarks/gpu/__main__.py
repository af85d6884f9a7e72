"""`python -m benchmarks.gpu [--cases tests linear conv step] [--seconds S] [--smoke] [--results DIR]`.

Runs the tests of the GPU kernels, then measures, then prints what the rows say. Exits with 1 if a test failed or ours
was wrong or raised somewhere; bars that are short are no error.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.gpu import runner, summary
from benchmarks.gpu.cases import PARTS, cases
from benchmarks.gpu.measure import facts_and_peaks
from benchmarks.gpu.rows import Files, folder

ROOT = Path(__file__).parents[2]
TESTS = ("test_kernels_gpu*.py", "test_ops_gpu.py", "test_nn_gpu*.py", "test_lab_graph.py")
SHARES = {"tests": 0.35, "linear": 0.3, "conv": 0.15, "step": 0.2}  # of the seconds; what a part leaves, the next have
PREPARING = 0.2  # of what the measurements have
MAX_JOBS = 8

tell = partial(print, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--seconds", type=float, default=500, help="for all of it; a case in flight may end later")
    parser.add_argument("--smoke", action="store_true", help="tiny layers, for a trial; rows go to a new folder")
    parser.add_argument("--results", type=Path, help="folder of the CSV files (default: of this GPU, in results)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("expected a GPU, but torch sees none")
    end, fine = time.perf_counter() + args.seconds, True
    if "tests" in args.cases:
        fine &= run_tests(SHARES["tests"] * args.seconds)
    if parts := [part for part in PARTS if part in args.cases]:
        worker = runner.Worker()
        try:
            head = worker.run(facts_and_peaks, "cuda")
            if args.results is None:
                here = results.RESULTS / folder(head["machine"])
                args.results = Path(tempfile.mkdtemp(prefix="gpu-")) if args.smoke else here
            planned = {part: cases(part, args.smoke) for part in parts}
            layers = [case for part in parts for case in planned[part]]
            jobs = min(MAX_JOBS, os.cpu_count() or 1)
            runner.prepare(layers, PREPARING * max(0.0, end - time.perf_counter()), "cuda", jobs)
            for seconds, part in spread(parts, end):
                files = Files(args.results, part, head)
                fine &= runner.run(planned[part], seconds, worker.measure, "cuda", files, tell)
        finally:
            worker.stop()
        summary.main(args.results)
    tell("\nall fine" if fine else "\nFAILED: tests, or cases of ours; see above")
    return 0 if fine else 1


def spread(parts: list[str], end: float) -> Iterator[tuple[float, str]]:
    """Each part with its share of the seconds that are left when its turn comes."""
    for number, part in enumerate(parts):
        share = SHARES[part] / sum(SHARES[each] for each in parts[number:])
        yield share * max(0.0, end - time.perf_counter()), part


def run_tests(seconds: float) -> bool:
    """pytest on the tests that have GPU kernels, in several processes if it can; are all of them fine?"""
    paths = [str(path) for pattern in TESTS for path in sorted((ROOT / "tests").glob(pattern))]
    command = [sys.executable, "-m", "pytest", "-m", "not slow", "-r", "fE", *paths]
    if find_spec("xdist"):
        command += ["-n", str(min(MAX_JOBS, os.cpu_count() or 1))]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        tell(f"FAILED: the tests did not finish in {seconds:.0f} s")
        return False


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.gpu [--parts PART ...] [--seconds S] [--results DIR] [--smoke] [--dry-run]`.

Tests the GPU kernels and measures them, in the order of what is worth most, then prints what the files say. Whatever a
part does, the others have their turn. Files that only parts write which are not asked for stay as they are in DIR.
Exits with 1 if a test failed or ours was wrong or raised somewhere; bars that are short are no error.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # which is decided by the first import of Triton, in every process

import torch

from benchmarks import results
from benchmarks.gpu import summary, tests
from benchmarks.gpu.cases import planned
from benchmarks.gpu.prepare import prepare
from benchmarks.gpu.roofline import described, peaks
from benchmarks.gpu.rows import Folder, facts, folder_name, opened
from benchmarks.gpu.runner import Runner, run_cases, run_jobs
from benchmarks.gpu.worker import Worker

# Seconds of 540; what a part leaves, the next have.
PLAN = {
    "core tests": 60, "peaks": 10, "prepare": 30, "tune": 70, "bars": 110, "profile": 20, "probe": 15,
    "small batches": 60, "steps": 60, "rest": 55, "other tests": 50,
}  # fmt: skip
MAX_JOBS = 8


class Run:
    """One run of the plan. device: "cuda", or "cpu" for a dry run."""

    def __init__(self, folder: Folder, device: str, smoke: bool, test_folder: Path, test_limit: float) -> None:
        self.folder, self.device, self.smoke = folder, device, smoke
        self.worker, self.jobs = Worker(device, self._log), min(MAX_JOBS, os.cpu_count() or 1)
        self.runner = Runner(self.worker)
        self.test_files, self.test_limit = tests.files(test_folder), test_limit
        self.results: list[tests.Result] = []
        self.cases = planned(smoke)

    def part(self, name: str, seconds: float) -> bool:
        """Runs it; was all of it right?"""
        parts: dict[str, Callable[[float], bool]] = {
            "core tests": lambda seconds: self._test(tests.CORE, seconds),
            "peaks": self._measure_peaks,
            "prepare": self._prepare,
            "other tests": lambda seconds: self._test(tests.OTHERS, seconds),
        }
        if name in parts:
            return parts[name](seconds)
        if name in self.cases:
            self.folder.begin(*{case.part for case in self.cases[name]})
            return run_cases(name, self.cases[name], seconds, self.runner.measure, self.folder)
        self.folder.begin("kernels")
        return run_jobs(name, import_module(f"benchmarks.gpu.{name}"), self.smoke, seconds, self.worker, self.folder)

    def _test(self, marks: str, seconds: float) -> bool:
        def save(found: list[tests.Result]) -> None:
            self.folder.save("junit.xml", tests.junit([*self.results, *found]))

        done = self.results
        verdict = tests.run(self.test_files, marks, seconds, self.jobs, self._log, self.test_limit, done, save)
        self.results += verdict.results
        for why in verdict.left:
            self.folder.miss("tests", marks, "", f"{marks}: {why}")
        self.folder.tell("\n".join(verdict.lines()))
        return verdict.fine

    def _log(self, text: str) -> None:
        self.folder.tell(text, aloud=False)

    def _measure_peaks(self, seconds: float) -> bool:
        self.runner.peaks = self.worker.run(peaks, self.device)
        self.folder.describe({"peaks": described(self.runner.peaks)})
        self.folder.tell(f"peaks: {self.folder.head['peaks']}")
        return True

    def _prepare(self, seconds: float) -> bool:
        fine, cases = True, [case for cases in self.cases.values() for case in cases]
        for case, kernel, why in prepare(cases, seconds, self.device, self.jobs):
            self.folder.miss("prepare", case, kernel, why)
            self.folder.tell(f"{'FAILED' if kernel else 'note'}: prepare {case} {kernel}: {why}")
            fine &= not kernel
        return fine


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PLAN), default=list(PLAN))
    parser.add_argument("--seconds", type=float, default=540, help="for all of it; what is in flight may end later")
    parser.add_argument("--results", type=Path, help="folder of all files (default: of this GPU, in results)")
    parser.add_argument("--smoke", action="store_true", help="tiny layers, for a trial; files go to a new folder")
    parser.add_argument("--dry-run", action="store_true", help="--smoke without a GPU, in Triton's interpreter")
    parser.add_argument("--tests", type=Path, default=tests.FOLDER, help="folder of the tests")
    parser.add_argument("--test-limit", type=float, default=tests.LIMIT, help="seconds after which a test is stopped")
    args = parser.parse_args(argv)
    if not (args.dry_run or torch.cuda.is_available()):
        parser.error("expected a GPU, but torch sees none")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends it early still gets the tail
    device, smoke = "cpu" if args.dry_run else "cuda", args.smoke or args.dry_run
    end, folder = time.monotonic() + args.seconds, _opened(args.results, device, smoke)
    run, fine = Run(folder, device, smoke, args.tests, args.test_limit), True
    try:
        for number, name in enumerate(args.parts):
            share = PLAN[name] / sum(PLAN[each] for each in args.parts[number:])
            fine &= _attempt(run, name, share * max(0.0, end - time.monotonic()))
            folder.save("summary.txt", summary.whole(folder.texts) + "\n")
    except KeyboardInterrupt:
        folder.tell("interrupted")
        fine = False
    finally:
        run.worker.stop()
    folder.save("summary.txt", summary.whole(folder.texts) + "\n")
    last = "all fine" if fine else "FAILED: tests, or cases of ours; see above and log.txt"
    folder.tell(f"{summary.tail(folder.texts, summary.TAIL - len(last) - 2)}\n{last}")
    return 0 if fine else 1


def _opened(wanted: Path | None, device: str, smoke: bool) -> Folder:
    """The folder, with its first line before the GPU is opened, which may fail or never end."""
    if wanted is None and not smoke:
        print("opening the GPU, whose name is that of the folder", flush=True)
        head = facts(device)
        return opened(results.RESULTS / folder_name(head["machine"]), head)
    folder = opened(wanted or Path(tempfile.mkdtemp(prefix="gpu-")))
    folder.tell(f"opening the device {device}")
    folder.describe(facts(device))
    folder.tell("; ".join(folder.head.values()))
    return folder


def _attempt(run: Run, name: str, seconds: float) -> bool:
    """The part, or why it broke: the others have their turn."""
    run.folder.tell(f"--- {name}: {seconds:.0f} s")
    try:
        return run.part(name, seconds)
    except Exception as error:
        run.folder.miss(name, "all", "", f"{type(error).__name__}: {error}")
        run.folder.tell(f"FAILED: {name}: {type(error).__name__}: {error}")
        return False


if __name__ == "__main__":
    sys.exit(main())

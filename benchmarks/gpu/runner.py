"""All cases within a budget of seconds, in a process that may hang or lose the GPU: then another one goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, replace
from multiprocessing import get_context

from benchmarks.gpu.bars import OURS
from benchmarks.gpu.cases import DENSITIES, OPS, Case, Step, label
from benchmarks.gpu.measure import Outcome, measure
from benchmarks.gpu.rows import Files

CASE_SECONDS = {"linear": 0.1, "conv": 0.1, "step": 0.4}  # of timing alone
CASE_LIMIT = 60  # seconds after which a case, the compilation of its kernels included, is stopped
NOT_REACHED = "not reached: out of time"


class Worker:
    """Runs functions in a process of its own, which is replaced when it dies, hangs or has lost the GPU."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._pid = 0

    def run(self, function: Callable, *args: object, limit: float = CASE_LIMIT) -> object:
        """function(*args). Raises TimeoutError after `limit` seconds, BrokenProcessPool if the process dies of it."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, get_context("spawn"))
            self._pid = self._pool.submit(os.getpid).result()
        try:
            return self._pool.submit(function, *args).result(limit)
        except (TimeoutError, BrokenProcessPool):
            self.stop()
            raise

    def measure(self, case: Case, seconds: float, device: str, eager: frozenset[str]) -> Outcome:
        try:
            outcome = self.run(measure, case, seconds, device, eager)
        except TimeoutError:
            return Outcome(missing={"": f"did not finish in {CASE_LIMIT} s"})
        except BrokenProcessPool:
            return Outcome(missing={"": "the process died"})
        if outcome.lost:
            self.stop()
        return outcome

    def stop(self) -> None:
        """Whatever the process does; the next call starts another one."""
        if self._pool is not None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def run(
    cases: Sequence[Case],
    seconds: float,
    measure: Callable[[Case, float, str, frozenset[str]], Outcome],
    device: str,
    files: Files,
    tell: Callable[[str], None] = print,
) -> bool:
    """Measures the cases in their order for `seconds`; files get rows, reasons and what was not reached.

    A baseline's reason is noted at its first case only. Returns whether all of ours that was tried was right.
    """
    fine, known, eager, end = True, set(), frozenset(), time.perf_counter() + seconds
    files.add([], [])
    for number, case in enumerate(cases):
        if time.perf_counter() >= end:
            tell(f"{files.part}: {len(cases) - number} of {len(cases)} cases not reached")
            files.add([], [{**asdict(left), "impl": "", "why": NOT_REACHED} for left in cases[number:]])
            break
        outcome = measure(case, CASE_SECONDS[files.part], device, eager)
        while outcome.retry and outcome.retry not in eager:
            tell(f"note: {label(case)}: {outcome.missing['']}; from now on it runs without a graph")
            eager |= {outcome.retry}
            outcome = measure(case, CASE_SECONDS[files.part], device, eager)
        missing = []
        for impl, why in outcome.missing.items():
            ours = not impl or impl.startswith(OURS)
            if ours or (impl, why) not in known:
                known.add((impl, why))
                missing.append({**asdict(case), "impl": impl, "why": why})
                tell(f"{'FAILED' if ours else 'note'}: {label(case)} {impl}: {why}")
            fine &= not ours
        files.add(outcome.rows, missing)
        tell(f"{label(case)}: " + ", ".join(f"{row['impl']} {row['ms']}" for row in outcome.rows))
    return fine


def prepare(cases: Iterable[Case], seconds: float, device: str, jobs: int) -> None:
    """Compiles kernels of the cases in `jobs` processes, for at most `seconds`: on disk, for all later processes.

    One density and one op of each layer stand for all. What goes wrong here is told when the case is measured.
    """
    layers = [case for case in cases if not isinstance(case, Step)]
    chosen = list(dict.fromkeys(replace(case, density=DENSITIES[0], op=OPS[0]) for case in layers))
    context, end = get_context("spawn"), time.perf_counter() + seconds
    processes = [context.Process(target=_warm, args=(chosen[i::jobs], device), daemon=True) for i in range(jobs)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, end - time.perf_counter()))
        process.kill()
        process.join()


def _warm(cases: list[Case], device: str) -> None:
    for case in cases:
        if measure(case, 0.0, device).lost:
            return

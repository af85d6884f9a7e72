"""All cases within a budget of seconds, in a process that may hang or lose the GPU: then another one goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from types import ModuleType

from benchmarks.gpu import timing
from benchmarks.gpu.bars import OURS
from benchmarks.gpu.cases import Case, label
from benchmarks.gpu.measure import Outcome, measure
from benchmarks.gpu.roofline import Peaks
from benchmarks.gpu.rows import Folder
from sparselottery import execution
from sparselottery.kernels import gpu

UNCAPTURED = frozenset({"torch_csr", "torch_bsr"})  # whose captures may end in a lost process
CASE_SECONDS = {"linear": 0.1, "conv": 0.1, "step": 0.4}  # of timing alone
CASE_LIMIT = 60  # seconds after which a case, the compilation of its kernels included, is stopped
NOT_REACHED = "not reached: out of time"
GRACE = 10  # seconds that what is in flight may take beyond its part's
LOST = ("DeviceLostError", "CaptureError", "AcceleratorError")  # errors after which a process is of no more use


def take_tensors_of(device: str) -> None:
    """The kernels of a GPU run on tensors of this device; on the CPU as few times as possible."""
    gpu.DEVICES = (device,)
    if device == "cpu":
        timing.MIN_ROUNDS, timing.MIN_SAMPLE, execution.BURSTS, execution.BURST_MS = 3, 0.0, 1, 0.0


class Worker:
    """Runs functions in a process of its own, which is replaced when it dies, hangs or has lost the GPU.

    device: "cuda", or "cpu" for a dry run in Triton's interpreter.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.peaks: Peaks | None = None  # measured once, for all processes
        self._pool: ProcessPoolExecutor | None = None
        self._pid = 0

    def run(self, function: Callable, *args: object, limit: float = CASE_LIMIT) -> object:
        """function(*args). Raises TimeoutError after `limit` seconds, BrokenProcessPool if the process dies of it."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, get_context("spawn"), take_tensors_of, (self.device,))
            self._pid = self._pool.submit(os.getpid).result()
        try:
            return self._pool.submit(function, *args).result(limit)
        except (TimeoutError, BrokenProcessPool):
            self.stop()
            raise

    def measure(self, case: Case, seconds: float, eager: frozenset[str], limit: float = CASE_LIMIT) -> Outcome:
        try:
            outcome = self.run(measure, case, seconds, self.device, eager, self.peaks, limit=limit)
        except TimeoutError:
            return Outcome(missing={"": f"did not finish in {limit:.0f} s"})
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


def run_cases(
    part: str,
    cases: Sequence[Case],
    seconds: float,
    measure: Callable[[Case, float, frozenset[str], float], Outcome],
    folder: Folder,
) -> bool:
    """Measures the cases in their order for `seconds`; the folder gets rows, reasons and what was not reached.

    A baseline's reason is noted at its first case only. Returns whether all of ours that was tried was right.
    """
    fine, known, eager, end = True, set(), UNCAPTURED, time.monotonic() + seconds
    for number, case in enumerate(cases):
        limit = _limit(end)
        if time.monotonic() >= end:
            _not_reached(part, [label(each) for each in cases[number:]], len(cases), folder)
            break
        outcome = measure(case, CASE_SECONDS[case.part], eager, limit)
        while outcome.retry and outcome.retry not in eager:
            folder.tell(f"note: {label(case)}: {outcome.missing['']}; from now on it runs without a graph")
            eager |= {outcome.retry}
            outcome = measure(case, CASE_SECONDS[case.part], eager, limit)
        for impl, why in outcome.missing.items():
            ours = not impl or impl.startswith(OURS)
            if ours or (impl, why) not in known:
                known.add((impl, why))
                folder.miss(part, label(case), impl, why)
                folder.tell(f"{'FAILED' if ours else 'note'}: {label(case)} {impl}: {why}")
            fine &= not ours
        folder.add(case.part, outcome.rows)
        folder.tell(f"{label(case)}: " + ", ".join(f"{row['impl']} {row['ms']}" for row in outcome.rows))
    return fine


def run_jobs(part: str, module: ModuleType, smoke: bool, seconds: float, worker: Worker, folder: Folder) -> bool:
    """All of module.jobs for `seconds`, each in the worker; their rows are those of the table "kernels"."""
    fine, jobs, end = True, module.jobs(smoke), time.monotonic() + seconds
    for number, job in enumerate(jobs):
        if time.monotonic() >= end:
            _not_reached(part, list(map(str, jobs[number:])), len(jobs), folder)
            break
        try:
            rows = worker.run(module.measure, job, worker.device, smoke, limit=_limit(end))
        except Exception as error:  # of any kind: the others count
            why = _why(error)
            if type(error).__name__ in LOST:
                worker.stop()
            fine = False
            folder.miss(part, str(job), "", why)
            folder.tell(f"FAILED: {part} {job}: {why}")
            continue
        folder.add("kernels", rows)
        folder.tell(f"{part} {job}: {len(rows)} rows")
    return fine


def _limit(end: float) -> float:
    """Seconds that what begins now may take, at most, in a part that ends then."""
    return min(CASE_LIMIT, max(0.0, end - time.monotonic()) + GRACE)


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "did not finish in time"
    if isinstance(error, BrokenProcessPool):
        return "the process died"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _not_reached(part: str, left: list[str], total: int, folder: Folder) -> None:
    for each in left:
        folder.rows["missing"].append({"part": part, "case": each, "impl": "", "why": NOT_REACHED})
    folder.add("missing", [{"part": part, "case": "all", "impl": "", "why": f"{len(left)} of {total} {NOT_REACHED}"}])
    folder.tell(f"{part}: {len(left)} of {total} {NOT_REACHED}")

"""All cases within a budget of seconds, in a worker, whatever becomes of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import ModuleType

from benchmarks.gpu.bars import OURS
from benchmarks.gpu.cases import Case, label
from benchmarks.gpu.measure import Outcome, measure
from benchmarks.gpu.roofline import Peaks
from benchmarks.gpu.rows import Folder
from benchmarks.gpu.worker import LIMIT, FailedError, LateError, Worker

UNCAPTURED = frozenset({"torch_csr", "torch_bsr"})  # whose captures may end in a lost process
CASE_SECONDS = {"linear": 0.1, "conv": 0.1, "step": 0.4}  # of timing alone
NOT_REACHED = "not reached: out of time"
GRACE = 10  # seconds that what is in flight may take beyond its part's


class Runner:
    """Measures cases in a worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.peaks: Peaks | None = None  # measured once, for all processes

    def measure(self, case: Case, seconds: float, eager: frozenset[str], limit: float = LIMIT) -> Outcome:
        try:
            outcome = self.worker.run(measure, case, seconds, self.worker.device, eager, self.peaks, limit=limit)
        except FailedError as error:
            return Outcome(missing={"": _why(error, limit)})
        if outcome.lost:
            self.worker.stop()
        return outcome


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
            ours = (not impl or impl.startswith(OURS)) and why != NOT_REACHED
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
        limit = _limit(end)
        try:
            rows = worker.run(module.measure, job, worker.device, smoke, limit=limit)
        except FailedError as error:
            why = _why(error, limit)
            fine &= why == NOT_REACHED
            folder.miss(part, str(job), "", why)
            folder.tell(f"{'note' if why == NOT_REACHED else 'FAILED'}: {part} {job}: {why}")
            continue
        folder.add("kernels", rows)
        folder.tell(f"{part} {job}: {len(rows)} rows")
    return fine


def _limit(end: float) -> float:
    """Seconds that what begins now may take, at most, in a part that ends then."""
    return min(LIMIT, max(0.0, end - time.monotonic()) + GRACE)


def _why(error: FailedError, limit: float) -> str:
    """Its reason; what only the end of its part cut off was not reached."""
    return NOT_REACHED if isinstance(error, LateError) and limit < LIMIT else str(error)


def _not_reached(part: str, left: list[str], total: int, folder: Folder) -> None:
    for each in left:
        folder.rows["missing"].append({"part": part, "case": each, "impl": "", "why": NOT_REACHED})
    folder.add("missing", [{"part": part, "case": "all", "impl": "", "why": f"{len(left)} of {total} {NOT_REACHED}"}])
    folder.tell(f"{part}: {len(left)} of {total} {NOT_REACHED}")

"""One case, measured in this process: rows of those that were right, and reasons for those that have none."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass, field

import torch

from benchmarks.gpu import baselines, nets
from benchmarks.gpu.bars import OURS
from benchmarks.gpu.cases import Case, Step
from benchmarks.gpu.problems import TOLERANCE, precision, problem
from benchmarks.gpu.roofline import Peaks, least_seconds, peaks
from benchmarks.gpu.timing import CaptureError, DeviceLostError, Race, clock, race
from sparselottery.graphs import BrokenCaptureError, works


@dataclass
class Outcome:
    """rows: of the CSV. missing: impl -> why it has no row; "" for the whole case.

    lost: this process is of no more use. retry: the impl to leave uncaptured when the case is tried again.
    """

    rows: list[dict] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    lost: bool = False
    retry: str = ""


def measure(
    case: Case, seconds: float, device: str, eager: frozenset[str] = frozenset(), given: Peaks | None = None
) -> Outcome:  # fmt: skip
    """Races everyone for about `seconds`, in CUDA graphs except `eager`; what raises becomes a reason.

    given: the peaks of the device, which are measured here without it.
    """
    with precision(case.dtype):
        try:
            return _measure(case, seconds, device, eager, given or peaks(device))
        except CaptureError as error:
            return Outcome(missing={"": str(error)}, lost=True, retry=error.name)
        except BrokenCaptureError as error:  # of a choice, or of a whole step: there is nothing to leave uncaptured
            return Outcome(missing={"": f"CaptureError: {error}"}, lost=True)
        except DeviceLostError as error:
            return Outcome(missing={"": f"the GPU was lost: {error}"}, lost=True)
        except Exception as error:  # of the case itself: reported, and the next one is tried
            return Outcome(missing={"": f"{type(error).__name__}: {error}"}, lost=not works(clock(device).device))
        finally:
            gc.collect()


def _measure(case: Case, seconds: float, device: str, eager: frozenset[str], limits: Peaks) -> Outcome:
    if device == "cuda" and torch.cuda.mem_get_info()[0] < torch.cuda.mem_get_info()[1] / 2:
        torch.cuda.empty_cache()
    if isinstance(case, Step):
        entries, truth, tolerances = nets.race_of(case, device)
        copies, nnz, weights = 1, 0, 0
    else:
        given = problem(case, device)
        entries = baselines.entries(given, case.pattern, case.op)
        truth = given.truth[:1] if case.op == "forward" else given.truth
        tolerances, copies = [TOLERANCE[case.dtype]] * len(truth), baselines.copies(given, device)
        nnz, weights = given.truth[2].numel(), given.weight.numel()
    result = race(entries, truth, tolerances, seconds, clock(device), copies, eager)
    rows = []
    for name, took in result.seconds.items():
        dense, chosen = entries[name].dense, entries[name].chosen
        least = least_seconds(case, weights if dense else nnz, limits)
        rows.append({
            **asdict(case),
            "impl": name,
            "chosen": chosen,
            "ms": f"{1e3 * took:.4g}",
            "speedup": _speedup(result, name),
            "roofline": "" if least is None else f"{least / took:.3g}",
            "graph": "yes" if name in result.graphed else "no",
            "rounds": result.rounds[name],
            "rejected": result.rejected,
        })  # fmt: skip
    return Outcome(rows, result.failures)


def _speedup(result: Race, name: str) -> str:
    """Its time over ours; nothing where ours has none."""
    return f"{result.seconds[name] / result.seconds[OURS]:.3g}" if OURS in result.seconds else ""

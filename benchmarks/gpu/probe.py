"""A question, not a feature: does a 2:4 cover of single surviving weights beat the dense product?

The tensor cores of cuSPARSELt skip half of the weights, at most 2 of 4 neighbours being nonzero. Of random survivors
nearly all fit: the cover. The rest, the remainder, is multiplied by our kernels. Training would also pack the values
anew at each step; that is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import calls
from benchmarks.gpu.cases import Linear
from benchmarks.gpu.problems import TOLERANCE, problem
from benchmarks.gpu.timing import Entry, Race, clock, race
from benchmarks.timing import Candidate
from sparselottery import convert

SHAPES, SHAPES_SMOKE = ((4096, 4096, 4096), (8192, 4096, 4096)), ((4, 32, 16),)
DENSITIES, DENSITIES_SMOKE = (0.1, 0.05, 0.2), (0.4,)
SECONDS = 0.2  # of timing what is timed together
DENSE, COVER, REMAINDER, BOTH = "dense", "2:4 cover", "remainder", "2:4 cover + remainder"
WORTH = 1.1  # times as fast as dense, from which on code for it would pay


class Job(NamedTuple):
    """One layer. eager: not in a CUDA graph, should cuSPARSELt not allow one."""

    case: Linear
    eager: bool = False


def jobs(smoke: bool) -> list[Job]:
    shapes, densities = (SHAPES_SMOKE, DENSITIES_SMOKE) if smoke else (SHAPES, DENSITIES)
    found = [Job(Linear("forward", *shape, "1x1", d, "bf16")) for shape in shapes for d in densities]
    return [*found, Job(found[0].case, eager=True)]


def measure(job: Job, device: str, smoke: bool) -> list[dict]:
    """Rows of the dense product, the cover, the remainder, and both; without `us`, the reason in detail."""
    with calls.measuring(job.case, device):
        given = problem(job.case, device)
        covered = cover(given.mask)
        cut = given.weight * covered
        layer = convert(given.layer(), {"weight": given.mask & ~covered}).requires_grad_(False)
        dense = given.layer().requires_grad_(False)
        truth = given.truth[0]
        of_cover = given.x.double() @ cut.double().t()
        runs = {
            DENSE: (lambda: lambda: dense(given.x), truth),
            BOTH: (lambda: _both(_product(cut, given.x), layer, given.x), truth),
            COVER: (lambda: _product(cut, given.x), of_cover),
            REMAINDER: (lambda: lambda: layer(given.x), truth - of_cover),
        }
        found, why = {}, {}
        for names in ((DENSE, BOTH), (COVER,), (REMAINDER,)):
            result = _race({name: runs[name][0] for name in names}, runs[names[0]][1], job, device)
            found |= result.seconds
            why |= result.failures
    share = f"covers {100 * covered.sum().item() / given.mask.sum().item():.2f} %"
    case = calls.name(job.case) + (" eager" if job.eager else "")
    return [
        {
            "part": "probe",
            "kernel": name,
            "case": case,
            "config": share,
            "us": float(f"{1e6 * found[name]:.4g}") if name in found else "",
            "detail": why.get(name, f"{found.get(DENSE, 0) / found.get(name, 1):.3g}x"),
        }
        for name in runs
    ]


def cover(mask: Tensor) -> Tensor:
    """Of a mask (O, I), the first two survivors of each four neighbours of a row. I is a multiple of 4."""
    fours = mask.view(len(mask), -1, 4)
    return (fours & (fours.cumsum(-1) <= 2)).view_as(mask)


def summary(rows: list[dict]) -> list[str]:
    """A line for each layer, then one that decides."""
    lines, best = [], 0.0
    for case, group in groupby(rows, key=lambda row: row["case"]):
        found = {row["kernel"]: row for row in group}
        times = ", ".join(f"{name} {row['us'] or row['detail']}" for name, row in found.items())
        if DENSE in found and BOTH in found and found[DENSE]["us"] and found[BOTH]["us"]:
            best = max(best, found[DENSE]["us"] / found[BOTH]["us"])
        lines.append(f"{case}: {next(iter(found.values()))['config']}; us: {times}")
    verdict = f"{best:.2f}x of dense at best: {'worth' if best >= WORTH else 'not worth'} code" if best else "no answer"
    return [*lines, f"2:4 cover of single weights: {verdict}"] if rows else []


def _product(weight: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """x weightᵀ by cuSPARSELt, by the algorithm that it finds fastest; weight has at most 2 of 4 neighbours."""
    packed, columns = torch._cslt_compress(weight), x.t()
    algorithm = torch._cslt_sparse_mm_search(packed, columns, transpose_result=True)
    return lambda: torch._cslt_sparse_mm(packed, columns, transpose_result=True, alg_id=algorithm)


def _both(product: Callable[[], Tensor], layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: layer(x).add_(product())


def _race(makes: dict[str, Callable[[], Callable[[], Tensor]]], truth: Tensor, job: Job, device: str) -> Race:
    """Each of them against the truth, then in turn."""

    def entry(make: Callable[[], Callable[[], Tensor]]) -> Entry:
        def candidate() -> Candidate:
            run, results = make(), []

            def keep() -> None:
                results[:] = [run()]

            return Candidate(keep, lambda: results)

        return Entry(candidate, False)

    entries = {name: entry(make) for name, make in makes.items()}
    seconds = SECONDS if device == "cuda" else 0.0
    eager = frozenset(entries) if job.eager else frozenset()
    return race(entries, [truth], [TOLERANCE[job.case.dtype]], seconds, clock(device), eager=eager)

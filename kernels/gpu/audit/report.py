"""Compiles every kernel for GPUs that are not here, and reads the result.

The functions of this package run on problems, recorded (launch.py): what would be launched is compiled (aot.py),
disassembled (sass.py) and held against `EXPECTATIONS`. A row is a kernel as a problem launches it, on a target:

    regs stack spill   registers, bytes of stack, spills: a thread's      tensor   instructions on tensor cores
    loads              bits x loads from global memory, in the innermost loops; loop: instructions in these
    shared             bytes of shared memory, a program's

Exit status: 0 if all is as expected, 1 if not, 2 if nothing could be compiled.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from torch import Tensor

from ..launch import Launch, recorded
from .aot import TARGETS, Compiled, compile_launch, compiling_for, missing, missing_for, specialisation
from .problems import PROBLEMS, Problem
from .sass import TMA

TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
BY_WARP = {"gfx942": "v_mfma"}  # for fewer rows than instructions of several warps have; else HMMA
WARP_GROUP_ROWS = 64
WIDE = {"sm_80": 128, "sm_90": 128, "sm_100": 128, "gfx942": 64}  # bits a thread; AMD has twice the threads
NARROW = {"gfx942": ("_block_conv_kernel", "_block_conv_sddmm_kernel")}  # Triton misses that 16 channels are contiguous
WIDE_SHARE = 0.4  # the rest: indices, and weights one by one
ASYNCHRONOUS = {"HGMMA", "UTCHMMA"}  # read a stage while the next is loaded: one buffer more


class Expected(NamedTuple):
    """What the code of a launch must have, besides no stack, no spills and shared memory that the target has."""

    wide: float = 0.0  # share of the bytes loaded in its loops that loads of WIDE bits bring
    rows: int = 0  # of the matrix products on tensor cores; 0: there are none
    stage: int = 0  # bytes of what a step of the loop multiplies


class Row(NamedTuple):
    """A kernel, as a problem launches it, on a target."""

    problem: str
    kernel: str
    target: str
    compiled: Compiled | None
    verdict: str  # "ok", or what is not as expected


def itemsize(launch: Launch) -> int:
    """Of the first tensor: what a kernel multiplies."""
    return next(each.element_size() for each in launch.arguments.values() if isinstance(each, Tensor))


def _block_spmm(launch: Launch) -> Expected:
    of = launch.arguments
    return _block(launch, of["BM"], (of["BM"] + of["OUT"]) * of["BK"], of["x"].stride(0) == 1)


def _block_sddmm(launch: Launch) -> Expected:
    of = launch.arguments
    return _block(launch, of["K"], (of["K"] + of["R"]) * of["BM"], True)


def _block(launch: Launch, rows: int, stage: int, transposed: bool) -> Expected:
    size = itemsize(launch)
    if size == 4 and launch.arguments["PRECISION"] == "ieee":
        return Expected(WIDE_SHARE)  # on CUDA cores
    # TF32 operands that are transposed are copied 4 bytes at a time; ragged rows start anywhere.
    narrow = (size == 4 and transposed) or launch.arguments["RAGGED"]
    return Expected(0.0 if narrow else WIDE_SHARE, rows, stage * size)


EXPECTATIONS: dict[str, Callable[[Launch], Expected]] = {
    "_layout_kernel": lambda launch: Expected(),
    "_spmm_kernel": lambda launch: Expected(WIDE_SHARE),
    "_spmm_narrow_kernel": lambda launch: Expected(WIDE_SHARE if launch.arguments["NB"] > 1 else 0.0),
    "_sddmm_kernel": lambda launch: Expected(WIDE_SHARE),
    "_pack_kernel": lambda launch: Expected(),
    "_unpack_kernel": lambda launch: Expected(),
    "_block_spmm_kernel": _block_spmm,
    "_block_conv_kernel": _block_spmm,
    "_block_sddmm_kernel": _block_sddmm,
    "_block_conv_sddmm_kernel": _block_sddmm,
}


def judge(compiled: Compiled, launch: Launch, target: str, expected: Expected) -> str:
    """ "ok", or what is not as expected."""
    code, faults = compiled.code, []
    if code.stack or code.spills:
        faults.append("spills")
    excused = launch.kernel.__name__ in NARROW.get(target, ())
    if not excused and (share := code.share(WIDE[target])) < expected.wide:
        faults.append(f"wide loads {share:.0%} < {expected.wide:.0%}")
    if expected.rows:
        opcode = TENSOR_CORES[target] if expected.rows >= WARP_GROUP_ROWS else BY_WARP.get(target, "HMMA")
        buffers = launch.options["num_stages"] - (opcode not in ASYNCHRONOUS)
        if opcode not in code.tensor_cores:
            faults.append(f"no {opcode}")
        elif compiled.shared < buffers * expected.stage:
            faults.append(f"shared < {buffers} stages of {expected.stage}")
    if compiled.shared > TARGETS[target].shared:
        faults.append(f"shared > {TARGETS[target].shared}")
    return "; ".join(faults) or "ok"


def launches_of(problems: Iterable[Problem]) -> list[tuple[str, Launch]]:
    """(problem, launch) of each kernel and specialisation that the problems launch, once."""
    found: dict = {}
    for problem in problems:
        with recorded() as launches:
            problem.run()
        for launch in launches:
            found.setdefault(specialisation(launch), (problem.name, launch))
    return list(found.values())


def audit(
    launches: Iterable[tuple[str, Launch]],
    target: str,
    expectations: Mapping[str, Callable[[Launch], Expected]] = EXPECTATIONS,
) -> Iterator[Row]:
    """A row for each of `launches`, in their order. A kernel without an expectation is not as expected."""

    def row(named: tuple[str, Launch]) -> Row:
        problem, launch = named
        name = launch.kernel.__name__
        try:
            compiled = compile_launch(launch)
        except Exception as error:  # of any kind: Triton and what it calls raise their own
            return Row(problem, name, target, None, f"does not compile: {_last_line(error)}")
        expected = expectations.get(name)
        verdict = "not in EXPECTATIONS" if expected is None else judge(compiled, launch, target, expected(launch))
        return Row(problem, name, target, compiled, verdict)

    with compiling_for(TARGETS[target]), ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(row, launches)


def _last_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[-1][:80]


HEADER = "problem", "kernel", "target", "regs", "stack", "spill", "tensor", "loads", "loop", "shared", "verdict"


def cells(row: Row) -> tuple[str, ...]:
    """As HEADER names them."""
    name = row.kernel.removeprefix("_").removesuffix("_kernel")
    if row.compiled is None:
        return row.problem, name, row.target, *[""] * 7, row.verdict
    code, shared = row.compiled
    tensor = " ".join(f"{opcode}:{count}" for opcode, count in code.tensor_cores.items())
    loads = " ".join(f"{_width(bits)}:{count}" for bits, count in sorted(code.loads.items(), reverse=True))
    counts = (str(count) for count in (code.registers, code.stack, code.spills))
    return row.problem, name, row.target, *counts, tensor, loads, str(code.loop), str(shared), row.verdict


def _width(bits: int) -> str:
    return "TMA" if bits == TMA else str(bits)


def table(rows: Iterable[Row]) -> str:
    lines = [HEADER, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kernels.gpu.audit", description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="one of the targets; may be repeated")
    parser.add_argument("--only", default="", metavar="TEXT", help="problems with TEXT in their names")
    parser.add_argument("--csv", metavar="PATH", help="write the table there too")
    args = parser.parse_args(argv)
    return run([each for each in PROBLEMS if args.only in each.name], args.target or list(TARGETS), args.csv)


def run(
    problems: list[Problem], targets: Iterable[str], path: str | None = None,
    expectations: Mapping[str, Callable[[Launch], Expected]] = EXPECTATIONS,
) -> int:  # fmt: skip
    """Audits, prints, writes; the exit status."""
    if reason := missing():
        print(reason, file=sys.stderr)
        return 2
    start, rows, launches = time.perf_counter(), [], launches_of(problems)
    for target in targets:
        if reason := missing_for(TARGETS[target]):
            print(f"{target} skipped: {reason}")
        else:
            rows += audit(launches, target, expectations)
    rows.sort(key=lambda row: [problem.name for problem in problems].index(row.problem))
    print(table(rows))
    if path is not None:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([HEADER, *map(cells, rows)])
    failed = sum(row.verdict != "ok" for row in rows)
    print(f"{len(rows)} kernels, {failed} not as expected, {time.perf_counter() - start:.0f} s")
    if not rows:
        return 2
    return 1 if failed else 0

"""Compiles every kernel for GPUs that are not here, and reads the result.

The functions of this package run on problems, recorded (launch.py) as for each target: what would be launched is
compiled (aot.py), disassembled (sass.py) and held against `EXPECTATIONS`. A row is a kernel as a problem launches it:

    regs stack spill   registers, bytes of stack, spills: a thread's      tensor   instructions on tensor cores
    loads              bits x loads from global memory, in the innermost loops; loop: instructions in these
    barriers           of those instructions, how many wait for the other threads of the program
    a nonzero          on CUDA cores, instructions for 4 multiply-adds of a thread: a warp's for one weight by 128
                       samples, or for two by 64. 400 / it is the share of multiply-adds in per cent
    shared             bytes of shared memory, a program's

Rows are printed as they come. Exit status: 0 if all is as expected, 1 if not, 2 if nothing could be compiled.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple, TextIO

from torch import Tensor

from ..launch import Launch, recorded
from . import table
from .aot import (
    TARGETS,
    Compiled,
    Target,
    compile_launch,
    compiling_for,
    missing,
    missing_for,
    specialisation,
    triton_version,
)
from .problems import PROBLEMS, Problem
from .sass import TMA

WARP_GROUP_ROWS = 64  # of the products for which several warps share an instruction; on AMD, as on older GPUs, one does
NARROW_GROUPS = (3, 9)  # Triton with which they do so for fewer columns than 16, too
NARROW = {"gfx942": ("_block_conv_kernel", "_block_conv_sddmm_kernel")}  # Triton misses that 16 channels are contiguous
WIDE_SHARE = 0.4  # the rest: indices, and weights one by one
NONZERO = 14  # instructions, at most
ASYNCHRONOUS = {"HGMMA", "UTCHMMA"}  # read a stage while the next is loaded: one buffer more


class Expected(NamedTuple):
    """What the code of a launch must have, besides shared memory that the target has."""

    wide: float = 0.0  # share of the bytes loaded in its loops that wide loads bring
    rows: int = 0  # of the matrix products on tensor cores; 0: there are none
    columns: int = 0  # of these
    stage: int = 0  # bytes of what a step of the loop multiplies
    nonzero: float = 0.0  # most instructions a nonzero, of NVIDIA's; 0: any
    barriers: int | None = None  # most of them; None: any


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
    return _block(launch, (of["BM"], of["OUT"]), of["BK"], of["x"].stride(0) == 1)


def _block_sddmm(launch: Launch) -> Expected:
    of = launch.arguments
    return _block(launch, (of["K"], of["R"]), of["BM"], True)


def _sddmm_tiles(launch: Launch) -> Expected:
    of = launch.arguments
    return Expected(WIDE_SHARE, of["ROWS"], of["COLUMNS"], (of["ROWS"] + of["COLUMNS"]) * of["BM"] * itemsize(launch))


def _block(launch: Launch, tile: tuple[int, int], depth: int, transposed: bool) -> Expected:
    size = itemsize(launch)
    if size == 4 and launch.arguments["PRECISION"] == "ieee":
        return Expected(WIDE_SHARE, nonzero=8)  # on CUDA cores: half of it multiply-adds
    # TF32 operands that are transposed are copied 4 bytes at a time; ragged rows start anywhere.
    narrow = (size == 4 and transposed) or launch.arguments["RAGGED"]
    return Expected(0.0 if narrow else WIDE_SHARE, *tile, sum(tile) * depth * size)


EXPECTATIONS: dict[str, Callable[[Launch], Expected]] = {
    "_layout_kernel": lambda launch: Expected(),
    "_terms_kernel": lambda launch: Expected(),
    "_spmm_kernel": lambda launch: Expected(WIDE_SHARE, nonzero=NONZERO),
    "_spmm_narrow_kernel": lambda launch: Expected(WIDE_SHARE if launch.arguments["NB"] > 1 else 0.0, barriers=0),
    "_sddmm_tiles_kernel": _sddmm_tiles,
    "_take_kernel": lambda launch: Expected(),
    "_sddmm_kernel": lambda launch: Expected(WIDE_SHARE, barriers=0),
    "_scatter_kernel": lambda launch: Expected(),
    "_pack_kernel": lambda launch: Expected(),
    "_unpack_kernel": lambda launch: Expected(),
    "_block_spmm_kernel": _block_spmm,
    "_block_conv_kernel": _block_spmm,
    "_block_sddmm_kernel": _block_sddmm,
    "_block_conv_sddmm_kernel": _block_sddmm,
}


def judge(
    compiled: Compiled, launch: Launch, name: str, expected: Expected, version: tuple[int, int] | None = None
) -> str:
    """ "ok", or what is not as expected of the target `name` and of a version of Triton, the one here by default."""
    code, target, faults = compiled.code, TARGETS[name], []
    if code.spills or code.stack:
        faults.append("spills")
    excused = launch.kernel.__name__ in NARROW.get(name, ())
    if not excused and (share := code.share(target.wide)) < expected.wide:
        faults.append(f"wide loads {share:.0%} < {expected.wide:.0%}")
    if expected.rows:
        opcode = _tensor_cores(target, expected, version or triton_version())
        split = launch.arguments.get("PRECISION") == "tf32x3"  # by way of registers
        buffers = launch.options["num_stages"] - (split or opcode not in ASYNCHRONOUS)
        if opcode not in code.tensor_cores:
            faults.append(f"no {opcode}")
        elif compiled.shared < buffers * expected.stage:
            faults.append(f"shared < {buffers} stages of {expected.stage}")
    if target.backend == "cuda" and 0 < expected.nonzero < code.nonzero:
        faults.append(f"a nonzero {code.nonzero:.1f} > {expected.nonzero:g}")
    if expected.barriers is not None and code.barriers > expected.barriers:
        faults.append(f"barriers {code.barriers} > {expected.barriers}")
    if compiled.shared > target.shared:
        faults.append(f"shared > {target.shared}")
    return "; ".join(faults) or "ok"


def _tensor_cores(target: Target, expected: Expected, version: tuple[int, int]) -> str:
    """The opcode of the products that are expected."""
    by_warp = expected.rows < WARP_GROUP_ROWS or (expected.columns < 16 and version < NARROW_GROUPS)
    return "HMMA" if by_warp and target.tensor_cores in ASYNCHRONOUS else target.tensor_cores


def launches_of(problems: Iterable[Problem]) -> Iterator[tuple[str, Launch]]:
    """(problem, launch) of each kernel and specialisation that the problems launch, once."""
    found = set()
    for problem in problems:
        with recorded() as launches:
            problem.run()
        for launch in launches:
            if (kind := specialisation(launch)) not in found:
                found.add(kind)
                yield problem.name, launch


def audit(
    problems: Iterable[Problem], target: str, kernel: str = "",
    expectations: Mapping[str, Callable[[Launch], Expected]] = EXPECTATIONS,
) -> Iterator[Row]:  # fmt: skip
    """A row for each launch of a kernel with `kernel` in its name, in their order, as soon as it is compiled.

    A kernel without an expectation is not as expected.
    """

    def row(problem: str, launch: Launch) -> Row:
        name = launch.kernel.__name__
        try:
            compiled = compile_launch(launch)
        except Exception as error:  # of any kind: Triton and what it calls raise their own
            return Row(problem, name, target, None, f"does not compile: {_last_line(error)}")
        expected = expectations.get(name)
        verdict = "not in EXPECTATIONS" if expected is None else judge(compiled, launch, target, expected(launch))
        return Row(problem, name, target, compiled, verdict)

    with compiling_for(TARGETS[target]), ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = deque()
        for problem, launch in launches_of(problems):
            if kernel in launch.kernel.__name__:
                rows.append(pool.submit(row, problem, launch))
            while rows and rows[0].done():
                yield rows.popleft().result()
        while rows:
            yield rows.popleft().result()


def _last_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[-1][:80]


HEADER = (
    "problem", "kernel", "target", "regs", "stack", "spill", "tensor", "loads", "loop", "barriers", "a nonzero",
    "shared", "verdict",
)  # fmt: skip
WIDTHS = 36, 17, 6, 4, 5, 5, 10, 24, 4, 8, 9, 6, 0  # of the columns as they are printed


def cells(row: Row) -> tuple[str, ...]:
    """As HEADER names them."""
    name = row.kernel.removeprefix("_").removesuffix("_kernel")
    if row.compiled is None:
        return row.problem, name, row.target, *[""] * 9, row.verdict
    code, shared = row.compiled
    tensor = " ".join(f"{opcode}:{count}" for opcode, count in code.tensor_cores.items())
    loads = " ".join(f"{_width(bits)}:{count}" for bits, count in sorted(code.loads.items(), reverse=True))
    counts = (str(count) for count in (code.registers, code.stack, code.spills))
    nonzero = f"{code.nonzero:.2f}" if code.nonzero and not tensor else ""
    in_loop = str(code.loop), str(code.barriers), nonzero
    return row.problem, name, row.target, *counts, tensor, loads, *in_loop, str(shared), row.verdict


def _width(bits: int) -> str:
    return "TMA" if bits == TMA else str(bits)


def line(cells: Iterable[str]) -> str:
    return "  ".join(map(str.ljust, cells, WIDTHS)).rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kernels.gpu.audit", description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="one of the targets; may be repeated")
    parser.add_argument("--only", default="", metavar="TEXT", help="problems with TEXT in their names")
    parser.add_argument("--kernel", default="", metavar="TEXT", help="kernels with TEXT in their names")
    parser.add_argument("--csv", metavar="PATH", help="write the rows there too")
    parser.add_argument("--table", action="store_true", help="audit everything and replace the committed table")
    args = parser.parse_args(argv)
    if args.table and (args.target or args.only or args.kernel or args.csv):
        parser.error("--table: expected no other option, for it holds everything")
    problems = [each for each in PROBLEMS if args.only in each.name]
    if reason := missing():
        print(reason, file=sys.stderr)
        return 2
    with ExitStack() as files:
        file = None
        if args.table:
            file = files.enter_context(table.replacing())
        elif args.csv:
            file = files.enter_context(open(args.csv, "w"))
        return run(problems, args.target or TARGETS, file, args.kernel)


def run(
    problems: list[Problem], targets: Iterable[str], file: TextIO | None = None, kernel: str = "",
    expectations: Mapping[str, Callable[[Launch], Expected]] = EXPECTATIONS,
) -> int:  # fmt: skip
    """Audits, prints and writes as CSV, row by row; the exit status."""
    start, verdicts = time.perf_counter(), []

    def tell(cells: tuple[str, ...]) -> None:
        print(line(cells), flush=True)
        if file is not None:
            csv.writer(file, lineterminator="\n").writerow(cells)
            file.flush()

    tell(HEADER)
    for target in targets:
        if reason := missing_for(TARGETS[target]):
            print(f"{target} skipped: {reason}")
            continue
        for row in audit(problems, target, kernel, expectations):
            tell(cells(row))
            verdicts.append(row.verdict)
    failed = sum(verdict != "ok" for verdict in verdicts)
    print(f"{len(verdicts)} kernels, {failed} not as expected, {time.perf_counter() - start:.0f} s")
    if not verdicts:
        return 2
    return 1 if failed else 0

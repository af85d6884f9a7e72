"""`make gpu-sanitize`, or `python -m benchmarks.gpu.sanitize [--results DIR] [--seconds S]`: compute-sanitizer.

It looks for reads and writes out of bounds (memcheck) and for races in shared memory (racecheck) while each layer of
tests/test_gpu_only.py goes forward and backward, in a process of its own. All of it goes to DIR/sanitize.txt, the end
of it to stdout. Exits with 1 if anything was found, failed or did not finish; with 0 where there is nothing to run it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu import child

NAME = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")
TEST = "tests/test_gpu_only.py::test_the_same_step_gives_the_same_bits"
LAYERS = (
    "linear 1x1 fp32", "linear 1x1 bf16", "linear 1x1 x1 bf16", "linear 1x1 x33 bf16", "linear 16x16 fp32",
    "linear 32x32 bf16", "linear 64x1 bf16", "chain 16x16 1x1 fp32", "conv 1x1 fp32", "conv 16x16 fp32",
    "conv 32x32 bf16",
)  # fmt: skip
LIMIT = 120  # seconds of a layer: starting Python and torch under a sanitizer takes most of it
JOBS = 6  # layers at a time
FOUND = 99  # the exit status for errors
OPTIONS = ("--error-exitcode", FOUND, "--target-processes", "application-only")  # not the compilers that Triton starts
TAIL = 8000  # characters of the report that are printed

# Without torch's cache each tensor is an allocation, so that a read beyond its end is out of bounds.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=default")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="folder of sanitize.txt (default: the report is only printed)")
    parser.add_argument("--seconds", type=float, default=500, help="for all of it")
    args = parser.parse_args(argv)
    end, program = time.monotonic() + args.seconds, find()
    if program is None or not torch.cuda.is_available():
        why = f"there is no {NAME} on PATH, in CUDA_HOME, /usr/local/cuda* or pip's nvidia packages"
        report(args.results, [f"not run: {why if program is None else 'torch sees no GPU'}"])
        return 0
    verdicts, details = [], []
    for verdict, output in results(program, end):
        verdicts.append(verdict)
        details += [] if verdict.startswith("fine") else [f"\n{verdict}\n{output}"]
        report(args.results, [*details, "", *verdicts], tell=False)
    fine = all(verdict.startswith("fine") for verdict in verdicts)
    report(args.results, [*details, "", *sorted(verdicts), "all fine" if fine else "NOT FINE: see above"])
    return 0 if fine else 1


def find() -> Path | None:
    """The sanitizer."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    homes += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    found = [shutil.which(NAME), *(home / "bin" / NAME for home in homes)]
    if spec := find_spec("nvidia"):
        found += [path for folder in spec.submodule_search_locations or [] for path in Path(folder).rglob(NAME)]
    return next((Path(path) for path in found if path and Path(path).is_file() and os.access(path, os.X_OK)), None)


def results(program: Path, end: float) -> Iterator[tuple[str, str]]:
    """A verdict of one line and the output, for each layer and tool as they come; memcheck is first."""

    def run(tool: str, layer: str) -> tuple[str, str]:
        start = time.monotonic()
        if start >= end:
            return f"not reached: {tool}, {layer}", ""
        command = [program, "--tool", tool, *OPTIONS, sys.executable, *PYTEST, f"{TEST}[{layer}]"]
        status, output = child.run(command, min(LIMIT, end - start), ENVIRONMENT)
        known = {0: "fine", FOUND: "ERRORS", None: "did not finish"}
        return (
            f"{known.get(status, f'exit status {status}')}: {tool}, {layer}, {time.monotonic() - start:.0f} s",
            output,
        )

    with ThreadPoolExecutor(JOBS) as pool:
        for done in as_completed([pool.submit(run, tool, layer) for tool in TOOLS for layer in LAYERS]):
            yield done.result()


def report(folder: Path | None, lines: list[str], tell: bool = True) -> None:
    """Replaces sanitize.txt; a folder that cannot be written to is told, and no reason to stop."""
    text = "\n".join(lines) + "\n"
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "sanitize.txt").write_text(text)
        except OSError as error:
            text += f"note: not written: {error}\n"
    if tell:
        print(text[-TAIL:], end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""The paper's experiments on a GPU, ten minutes a call: `python -m benchmarks.gpu.lab --results DIR [--seconds 570]`.

Needs nothing but torch, Triton, NumPy, SciPy, safetensors and a decoder of JPEG, and CIFAR-10 in $SPARSELOTTERY_DATA.
DIR gets log.txt, gpu-lab-<experiment>.csv, a row for each training, and gpu-lab-runs-*.part. Whoever calls it again
goes on, with the same --runs or, on another machine, with those files in DIR: the training in flight is paused between
two steps, and a kill, even with -9, loses no more than it.

The plan, most valuable first; the times are arithmetic for an H100, none was measured. A training is

    Conv-2     20,000 steps of 16 GFLOP (60 images, forward and backward): 0.5 ms, bound by 40 launches and 120 MB of
               Adam as much as by TF32; 201 evaluations of 1.3 TFLOP: 35 ms. 10 s + 7 s + choices and files: 22 s
    Resnet-18  30,000 steps of 31 GFLOP in 250 launches, all of 16 to 64 channels: 1.4 ms; 61 evaluations of
               1.2 TFLOP at such channels: 80 ms. 42 s + 5 s: 50 s

so that 540 s hold 24 of the one or 10 of the other. Conv-2: 5 prunings of 50 % (of convolutions and the output 25 %),
to 3 % of the weights, each with a reinit: 11 trainings, 240 s, and the same twice again. Resnet-18: back to iteration
1,000, 5 prunings of 36 %, which is two of the paper's 20 %, to 10.7 %, reinits at rounds 3 and 5: 8 trainings, 400 s;
then the same ladder back to iteration 0, then the other reinits. It is evaluated every 500 iterations in place of 100.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.gpu.lab_archive import Archive
from benchmarks.lab import training_rows
from sparselottery.lab import data
from sparselottery.lab.grid import Grid, done, run
from sparselottery.lab.settings import preset

RESERVE = 15.0  # seconds before the end in which the last state and rows are written
ARCHIVE_MIB = 42  # of the parts: with the images, 18 MB, and the sources they are to travel within 64
ROOT = Path(__file__).parents[2]


def plan(experiment: str, device: str) -> list[Grid]:
    """Grids, the most valuable first; each keeps what the ones before it have done."""
    how = {"device": device, "execution": "measured"}
    if experiment == "conv-2":
        conv = preset(model="conv-2", rounds=5, fraction=0.5, **how)
        return [Grid(conv, trials, ("reinit",)) for trials in (1, 2, 3)]
    late = preset(model="resnet-18", rounds=5, fraction=0.36, rewind_step=1000, eval_every=500, **how)
    return [
        Grid(late, 1, ("reinit",), rounds=(3, 5)),
        Grid(replace(late, rewind_step=0)),
        Grid(late, 1, ("reinit",)),
        Grid(late, 2, ("reinit",)),
    ]


def tiny(grid: Grid) -> Grid:
    """The same grid in seconds on the CPU."""
    rewind_step = grid.settings.rewind_step // 500
    settings = replace(grid.settings, rounds=2, iterations=6, eval_every=2, batch=4, rewind_step=rewind_step)
    return replace(grid, settings=settings, rounds=grid.rounds and (2,))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.lab", description=__doc__.splitlines()[0])
    parser.add_argument("--experiments", nargs="+", choices=("conv-2", "resnet-18"), default=["conv-2", "resnet-18"])
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="of the rows, the log, the archive")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "gpu-lab", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=570, help="for all of it; default: %(default)g")
    parser.add_argument("--smoke", action="store_true", help="a few iterations, on the CPU")
    args = parser.parse_args(argv)
    if not args.smoke and not torch.cuda.is_available():
        parser.error("expected a GPU, but torch sees none (--smoke runs on the CPU)")
    return Lab(args).work(sys.argv[1:] if argv is None else argv)


class Lab:
    """One call: its time, where it writes, and what it has said."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._until, self._args = time.time() + args.seconds - min(RESERVE, args.seconds / 10), args
        self._archive = Archive(args.runs, args.results, ARCHIVE_MIB * 2**20)
        args.results.mkdir(parents=True, exist_ok=True)

    def work(self, argv: list[str]) -> int:
        if found := self._archive.unpack():
            self._tell(f"{len(found)} files out of the archive, into {self._args.runs}")
        note = data.load("cifar10").note
        self._tell(f"data: {note or 'CIFAR-10 as published'}; images by {_decoder()}")
        failed = False
        for experiment, grid in self._grids():
            if time.time() >= self._until:
                break
            failed |= self._do(experiment, grid, note)
        self._archived()
        left = sum(not done(self._folder(grid), job) for _, grid in self._grids() for job in grid.jobs)
        goes_on = f"python -m benchmarks.gpu.lab {' '.join(argv)}"
        self._tell(f"{left} jobs are left: {goes_on}\ngoes on, with {self._args.runs} or with the files of "
                   f"{self._args.results} in the new DIR" if left else "everything of the plan is done")  # fmt: skip
        return int(failed)

    def _grids(self) -> Iterator[tuple[str, Grid]]:
        for experiment in self._args.experiments:
            if self._args.smoke:
                yield from ((experiment, tiny(grid)) for grid in plan(experiment, "cpu")[:2])
            else:
                yield from ((experiment, grid) for grid in plan(experiment, "cuda"))

    def _folder(self, grid: Grid) -> Path:
        return self._args.runs / grid.name

    def _do(self, experiment: str, grid: Grid, note: str) -> bool:
        """Did a job fail?"""
        failed = False
        for job, kind, payload in run(grid, self._folder(grid), workers=1, note=note, until=self._until):
            if kind == "progress" and "round" in payload:
                weights, accuracy = 100 * payload["density"], 100 * payload["early_stop_test_accuracy"]
                self._tell(
                    f"{experiment} {job.name}, round {payload['round']}: {weights:.1f} % of the weights, "
                    f"{accuracy:.2f} % of the test images at iteration {payload['early_stop_iteration']}"
                )
                self._write_rows(experiment)
                self._archived()
            elif kind in ("paused", "failed"):
                failed |= kind == "failed"
                self._tell(f"{experiment} {job.name} {kind}: {payload}")
        return failed

    def _write_rows(self, experiment: str) -> None:
        """Of all folders of the experiment in which a round is done."""
        found, head = [], results.header() | self._facts()
        for folder, grid in {self._folder(grid): grid for each, grid in self._grids() if each == experiment}.items():
            if any(folder.glob("trial-*/ticket/round-*.safetensors")):
                rows, about = training_rows(folder)
                found += [{"rewind_step": grid.settings.rewind_step, **row} for row in rows]
                head |= about
        results.write(self._args.results / f"gpu-lab-{experiment}.csv", found, head=head)

    def _facts(self) -> dict[str, str]:
        if self._args.smoke:
            return {"images": _decoder()}
        gpu = f"{torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}, CUDA {torch.version.cuda}"
        return {"gpu": gpu, "precision": "torch's default: TF32 in dense convolutions", "images": _decoder()}

    def _archived(self) -> None:
        for name in self._archive.pack():
            self._tell(f"too large for the archive, in {self._args.runs} only: {name}")

    def _tell(self, text: str) -> None:
        print(text, flush=True)
        with (self._args.results / "log.txt").open("a") as log:
            log.write(text + "\n")


def _decoder() -> str:
    return next((name for name in ("PIL", "torchvision") if find_spec(name)), "no decoder")


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sys.exit(main())

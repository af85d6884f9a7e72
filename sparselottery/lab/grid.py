"""A ladder for each trial, and trainings to compare it with: jobs that are done when what they write is there.

A job's result follows from the settings, the trial, the control, the draw, the round and the threads alone, whatever
the order, wherever it runs, and however often it was interrupted before.

    <folder>/grid.json                               what was asked for
    <folder>/trial-0/ticket/                         the ladder: a folder of `find_ticket`
    <folder>/trial-0/reinit/draw-0/round-07.json     the record of a control, trained at the ladder's round 7
    <folder>/trial-0/order/draw-0/round-07.safetensors   its trained weights, of a control that keeps them
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..files import json_copy, read_json, write_json
from . import data as data_sets
from .controls import CONTROLS
from .executors import EXECUTORS, Event, Place, Report
from .experiment import compare
from .experiment import run as run_ladder
from .pause import Pause
from .settings import Settings

PAUSED = "paused.safetensors"  # of a ladder, and what the state of another paused training ends with
REPORT_SECONDS = 0.5  # between a job's reports of how far it is
SHOWN = ("round", "density", "early_stop_iteration", "early_stop_test_accuracy")


class Job(NamedTuple):
    """A trial's ladder, if there is no control, else one training."""

    trial: int
    control: str | None = None
    draw: int = 0
    round: int = 0

    @property
    def name(self) -> str:
        """Its path in the folder, without the suffix."""
        if self.control is None:
            return f"trial-{self.trial}/ticket"
        return f"trial-{self.trial}/{self.control}/draw-{self.draw}/round-{self.round:02d}"


@dataclass(frozen=True)
class Grid:
    """Trials x controls. Raises ValueError for what makes no sense.

    settings: those of trial 0; trial t has their seed + t.
    controls: names of `CONTROLS`.
    draws: of each control that draws.
    rounds: at which the controls are trained; None: at all that prune, and at round 0 if the order of the data differs.
    threads: of each job; results depend on them.
    """

    settings: Settings
    trials: int = 1
    controls: tuple[str, ...] = ()
    draws: int = 1
    rounds: tuple[int, ...] | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("trials", "draws", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if unknown := [name for name in self.controls if name not in CONTROLS]:
            raise ValueError(f"controls: expected some of {', '.join(CONTROLS)}, got {unknown[0]!r}")
        last = self.settings.prunings
        if wrong := [number for number in self.rounds or () if not 1 <= number <= last]:
            raise ValueError(f"rounds: expected numbers from 1 to {last}, got {wrong[0]}")

    @property
    def name(self) -> str:
        """Of its folder: of the settings and threads, so that more trials and controls join those that are there."""
        return self.settings.named({"threads": self.threads})

    @property
    def jobs(self) -> list[Job]:
        """In the order in which they begin."""
        trials = range(self.trials)
        ladders = [Job(trial) for trial in trials]
        return ladders + [
            Job(trial, control, draw, number)
            for trial in trials
            for number in range(self.settings.prunings + 1)
            for control in self.controls
            if number in self.rounds_of(control)
            for draw in range(self.draws if CONTROLS[control].random else 1)
        ]

    def rounds_of(self, control: str) -> tuple[int, ...]:
        """At which a control is trained."""
        every = range(0 if CONTROLS[control].reorders else 1, self.settings.prunings + 1)
        return tuple(every if self.rounds is None else self.rounds)

    def trainings(self, job: Job) -> int:
        """How many a job consists of."""
        return 1 if job.control else self.settings.prunings + 1


def run(
    grid: Grid,
    folder: Path,
    executor: str = "processes",
    workers: int | None = None,
    note: str = "",
    until: float = math.inf,
) -> Iterator[Event]:
    """Do the jobs of the grid that are not done, in ``folder``, and yield what happens to them.

    A job's progress is a mapping with an ``iteration`` of its present training, or, of a finished training, with
    ``round``, ``density``, ``early_stop_iteration`` and ``early_stop_test_accuracy``. ``note``: what is to be said
    beside figures made from the data. ``until``, in seconds as time.time() counts them: no job begins after it, and
    those that run are paused between two steps; the same call goes on with them. Raises ValueError for an unknown
    executor and for a folder of another grid.
    """
    if executor not in EXECUTORS:
        raise ValueError(f"executor: expected one of {', '.join(EXECUTORS)}, got {executor!r}")
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "grid.json", _described(grid, folder, note))
    left = [job for job in grid.jobs if not done(folder, job)]

    def take() -> Job | None:
        if time.time() >= until:
            return None
        job = next((job for job in left if _ready(folder, job)), None)
        if job is not None:
            left.remove(job)
        return job

    place = Place(workers, grid.threads, int(grid.settings.device == "cuda"), folder)
    yield from EXECUTORS[executor](partial(work, grid, folder, until=until), take, place)
    for job in left if time.time() < until else ():
        yield Event(job, "failed", f"{Job(job.trial).name} has not finished round {job.round}")


def done(folder: Path, job: Job) -> bool:
    """Is what the job writes last there?"""
    return (folder / (f"{job.name}.json" if job.control else f"{job.name}/ticket.safetensors")).exists()


def work(grid: Grid, folder: Path, job: Job, report: Report, until: float = math.inf) -> None:
    """Do one job in this process. Raises `Paused` if it is not done by ``until``."""
    torch.set_num_threads(grid.threads)
    settings = replace(grid.settings, seed=grid.settings.seed + job.trial)
    data, ladder, last = _data(settings.data), folder / Job(job.trial).name, 0.0

    def pause(path: Path) -> Pause | None:
        return None if until == math.inf else Pause(until, path)

    def on_eval(iteration: int) -> None:
        nonlocal last
        if time.monotonic() - last > REPORT_SECONDS:
            report({"iteration": iteration})
            last = time.monotonic()

    def on_round(record: dict) -> None:
        report({key: record[key] for key in SHOWN})

    if job.control is None:
        run_ladder(settings, data, ladder, on_round, on_eval, pause(ladder / PAUSED))
        return
    path = folder / f"{job.name}.json"
    if path.exists():  # begun twice
        return
    drawn, kept = _seed(settings.seed, job), path.with_suffix(f".{PAUSED}")
    record, trained = compare(settings, data, ladder, job.control, job.round, drawn, on_eval, pause(kept))
    path.parent.mkdir(parents=True, exist_ok=True)
    if CONTROLS[job.control].keeps:
        trained.save(path.with_suffix(".safetensors"))
    write_json(path, record)  # last: the job is done when this file is there
    on_round(record)


def _ready(folder: Path, job: Job) -> bool:
    """Is what the job reads there?"""
    return job.control is None or (folder / Job(job.trial).name / f"round-{job.round:02d}.safetensors").exists()


def _seed(trial: int, job: Job) -> int:
    """Of all that a job draws: another one for each trial's seed, control, draw and round."""
    text = f"{trial} {job.control} {job.draw} {job.round}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def _described(grid: Grid, folder: Path, note: str) -> dict[str, Any]:
    """What grid.json says: all trials, controls, draws and rounds that were ever asked for."""
    path = folder / "grid.json"
    before = read_json(path) if path.exists() else {}
    settings = json_copy("settings", asdict(grid.settings))
    if before and (before["settings"], before["threads"]) != (settings, grid.threads):
        raise ValueError(f"{path} is of a grid with other settings or threads: use another folder")
    return {
        "settings": settings,
        "scale": grid.settings.scale,
        "note": note,
        "trials": max(grid.trials, before.get("trials", 0)),
        "controls": list(dict.fromkeys([*before.get("controls", ()), *grid.controls])),
        "draws": max(grid.draws, before.get("draws", 0)),
        "threads": grid.threads,
        "rounds": _either(before.get("rounds", ()), grid.rounds),
        "machine": _machine(),
    }


def _either(before: Iterable[int] | None, now: Iterable[int] | None) -> list[int] | None:
    """The rounds of both; None, which is all of them, if it is one of them."""
    return None if before is None or now is None else sorted({*before, *now})


def _machine() -> str:
    """The processor, its cores and torch, in a line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]}, {os.cpu_count()} CPUs, torch {torch.__version__}"


@lru_cache(maxsize=1)
def _data(name: str) -> data_sets.Dataset:
    """Read once per process."""
    return data_sets.load(name)

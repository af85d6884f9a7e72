"""``lab`` and ``report``: the paper's experiments as grids of trials and controls, and what came of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from ..lab import data
from ..lab.controls import CONTROLS
from ..lab.executors import EXECUTORS, Event
from ..lab.grid import Grid, Job, done, run
from ..lab.settings import PRESETS, Settings, preset, scaled
from .options import add_out, add_settings, given, names, positive, sizes
from .runs import kept, trainings
from .tables import Columns, bars, header, row
from .xor import add_xor

TEXT = "Run one of the paper's experiments: trials of its ladder, and trainings to compare them with."
CONTROLS_TEXT = "controls:\n" + "\n".join(f"  {name:12}{control.text}" for name, control in CONTROLS.items())
COLUMNS: Columns = (
    ("trial", lambda r: str(r["trial"])),
    ("round", lambda r: str(r["round"])),
    ("trained     ", lambda r: (f"{r['control']} {r['draw']}" if r["draw"] else r["control"]).ljust(12)),
    ("weights %", lambda r: f"{100 * r['density']:.1f}"),
    ("test %", lambda r: f"{100 * r['early_stop_test_accuracy']:.2f}"),
    ("stops at", lambda r: str(r["early_stop_iteration"])),
)


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    experiments = command("lab", lab, TEXT).add_subparsers(required=True, metavar="EXPERIMENT")
    add_xor(experiments)
    for name in PRESETS:
        sub = experiments.add_parser(
            name,
            aliases=["lenet"] if name == "lenet-300-100" else [],
            help=f"on {PRESETS[name].data}, {PRESETS[name].iterations:,} iterations, {PRESETS[name].rounds} rounds",
            description=TEXT,
            epilog=CONTROLS_TEXT,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=lab, experiment=name)
        _add_grid(sub)
        add_settings(sub, Settings, vars(PRESETS[name]), leave_out=["model"])

    text = "Write the figures and numbers of a run as one HTML page, with CSV files, PNGs and SVGs beside it."
    sub = command("report", report, text)
    sub.add_argument("run", type=Path, metavar="RUN", help="a run folder of `lab` or `find`, finished or not")
    sub.add_argument("--out", type=Path, help="folder to write into; default: report/ in RUN")


def _add_grid(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--trials", type=positive, default=3, metavar="N", help="default: %(default)s")
    sub.add_argument(
        "--controls",
        type=names(CONTROLS),
        default=("reinit", "rearranged", "one-shot"),
        metavar="NAME,NAME",
        help="default: reinit,rearranged,one-shot",
    )
    sub.add_argument("--draws", type=positive, default=1, metavar="N", help="of controls that draw; default: 1")
    sub.add_argument(
        "--control-rounds", type=sizes, metavar="N,N", help="at which the controls are trained; default: all that prune"
    )
    sub.add_argument(
        "--scale", type=float, default=1.0, metavar="X", help="of the iterations, warm-up and rewind step; default: 1"
    )
    sub.add_argument("--executor", choices=EXECUTORS, default="processes", help="default: %(default)s")
    sub.add_argument(
        "--workers", type=positive, metavar="N", help="jobs at once; default: as many as there are cores for"
    )
    sub.add_argument(
        "--threads",
        dest="job_threads",
        type=positive,
        default=1,
        metavar="N",
        help="of each job; results depend on it; default: 1",
    )
    sub.add_argument("--print", action="store_true", help="show all settings and stop")
    add_out(sub)


def lab(args: argparse.Namespace) -> None:
    chosen = given(args, Settings)
    settings = scaled(preset(chosen.pop("data", PRESETS[args.experiment].data), args.experiment, **chosen), args.scale)
    grid = Grid(settings, args.trials, args.controls, args.draws, args.control_rounds, args.job_threads)
    out = args.out / grid.name
    if args.print:
        shown = {key: getattr(grid, key) for key in ("trials", "controls", "draws", "threads")}
        shown |= {"control_rounds": grid.rounds, "scale": settings.scale, "folder": str(out)}
        print(json.dumps({**asdict(settings), **shown}, indent=2))
        return
    total = sum(map(grid.trainings, grid.jobs))
    before = sum(grid.trainings(job) for job in grid.jobs if done(out, job))
    args.kept = lambda: kept(_done(grid, out), total, out)
    print(
        f"{settings.data}: {settings.model}, {grid.trials} trials, {total} trainings of {settings.iterations} "
        f"iterations, {before} of them done, into {out}"
    )
    note = data.load(settings.data).note
    for each in filter(None, (settings.scale, note)):
        print(f"note: {each}")
    failures = _watch(grid, run(grid, out, args.executor, args.workers, note), before, total)
    if failures:
        told = "; ".join(f"{job.name}: {reason}" for job, reason in failures)
        raise ValueError(f"{len(failures)} jobs failed, which the same command tries again: {told}")
    if before == total:
        print("nothing was trained: the run was finished before")
    print(f"\nnext:   sparselottery report {out}")


def _done(grid: Grid, out: Path) -> int:
    """How many trainings of the grid are done, those of unfinished ladders too."""
    return sum(done(out, job) if job.control else trainings(out / job.name, grid.trainings(job)) for job in grid.jobs)


def report(args: argparse.Namespace) -> None:
    from ..lab.report import write  # matplotlib: an extra, and slow to import

    print(write(args.run, args.out))


def _watch(grid: Grid, events: Iterator[Event], before: int, total: int) -> list[tuple[Job, str]]:
    """Show the events: a line for each finished training, a bar for each that runs; returns which jobs failed."""
    failures, finished = [], before
    print(header(COLUMNS))
    with bars() as (update, say):
        update("all", description="trainings", total=total, completed=finished)
        for job, kind, payload in events:
            if kind == "failed":
                failures.append((job, payload))
                say(f"{job.name} failed: {payload}")
            elif kind == "progress" and "iteration" in payload:
                update(job.name, description=job.name, total=grid.settings.iterations, completed=payload["iteration"])
            elif kind == "progress":
                finished += 1
                update("all", completed=finished)
                shown = {"trial": job.trial, "control": job.control or "ticket", "draw": job.draw}
                say(row(COLUMNS, shown | payload))
            if kind != "progress":
                update(job.name, visible=False)
    return failures

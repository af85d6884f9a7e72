"""Runs of `sparselottery lab` as committed rows and figures: `python -m benchmarks.lab RUN NAME`, or `... xor`.

Writes lab-NAME.csv, a row for each training, and the report's figures of accuracy and early stop beside it. `xor` runs
that experiment here and writes lab-xor.csv, a row for each size of net.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

from benchmarks import results
from sparselottery.files import json_copy
from sparselottery.lab import xor
from sparselottery.lab.report import folder, tables, write
from sparselottery.lab.settings import preset

FIGURES = ("accuracy", "early-stop")


def about(grid: dict) -> dict[str, str]:
    """What a reader of the rows must know of the run: what grid.json says."""
    settings = grid["settings"]
    length = grid["scale"] or f"the paper's {settings['iterations']:,} iterations"
    presets = json_copy("settings", asdict(preset(settings["data"], settings["model"])))
    ours = presets | settings  # a run may be older than a setting
    changed = [f"{key} {ours[key]} in place of {value}" for key, value in presets.items() if ours[key] != value]
    jobs = f"threads a training: {grid['threads']}, others beside it: seconds and ms are not those of a quiet machine"
    if settings["device"] == "cuda":
        jobs = "one training at a time on the GPU"
    found = {"length": length, "settings": ", ".join(changed), "data": grid["note"], "jobs": jobs}
    return {key: text for key, text in found.items() if text}


def xor_rows(out: Path) -> None:
    began = perf_counter()
    rows = xor.run(xor.Settings())
    seconds = f"{perf_counter() - began:.1f} of all sizes and their tickets, on one thread"
    settings = ", ".join(f"{key} {value}" for key, value in asdict(xor.Settings()).items())
    results.write(out / "lab-xor.csv", rows, head=results.header() | {"settings": settings, "seconds": seconds})


def training_rows(run: Path) -> tuple[list[dict], dict[str, str]]:
    """A row for each finished training of a run's folder, finished or not, and what a reader must know of it."""
    grid = json.loads((run / "grid.json").read_text())
    return [{"data": grid["settings"]["data"], **row} for row in tables.trainings(folder.read(run))], about(grid)


def grid_rows(run: Path, name: str, out: Path) -> None:
    rows, told = training_rows(run)
    results.write(out / f"lab-{name}.csv", rows, head=results.header() | told)
    with tempfile.TemporaryDirectory() as report:
        write(run, report)
        for figure in FIGURES:
            shutil.copy(Path(report) / "figures" / f"{figure}.svg", out / f"lab-{name}-{figure}.svg")
    print(f"{len(rows)} trainings; {'; '.join(told.values())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a folder of `sparselottery lab`, or xor")
    parser.add_argument("name", nargs="?", default="xor", help="of the files: lab-NAME.csv")
    parser.add_argument("--out", type=Path, default=results.FOLDER)
    args = parser.parse_args()
    xor_rows(args.out) if args.run == "xor" else grid_rows(Path(args.run), args.name, args.out)


if __name__ == "__main__":
    main()

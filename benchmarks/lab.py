"""A run of `sparselottery lab` as committed rows and figures: `python -m benchmarks.lab RUN NAME`.

Writes lab-NAME.csv, a row for each training, and the report's figures of accuracy and early stop beside it.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tempfile
from pathlib import Path

from benchmarks import results
from sparselottery.lab.report import write

FIGURES = ("accuracy", "early-stop")


def about(grid: dict) -> dict[str, str]:
    """What a reader of the rows must know of the run: what grid.json says."""
    length = grid["scale"] or f"the paper's {grid['settings']['iterations']:,} iterations"
    jobs = f"{grid['threads']} threads a training, others beside it: seconds and ms are not those of a quiet machine"
    return {"length": length, "jobs": jobs} | ({"data": grid["note"]} if grid["note"] else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a folder of `sparselottery lab`")
    parser.add_argument("name", help="of the files: lab-NAME.csv")
    parser.add_argument("--out", type=Path, default=results.FOLDER)
    args = parser.parse_args()
    grid = json.loads((args.run / "grid.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        write(args.run, Path(folder))
        with (Path(folder) / "csv" / "trainings.csv").open(newline="") as file:
            rows = [{"data": grid["settings"]["data"], **row} for row in csv.DictReader(file)]
        results.write(args.out / f"lab-{args.name}.csv", rows, head=results.header() | about(grid))
        for figure in FIGURES:
            shutil.copy(Path(folder) / "figures" / f"{figure}.svg", args.out / f"lab-{args.name}-{figure}.svg")
    print(f"{len(rows)} trainings; {'; '.join(about(grid).values())}")


if __name__ == "__main__":
    main()

"""``lab xor``: thousands of tiny nets."""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import asdict
from pathlib import Path

from ..files import atomic
from ..lab.xor import Settings, run
from .options import add_settings, given, positive
from .tables import print_rows, progress

TEXT = "How often nets of 2-H-1 units learn XOR, and how often the best units of the largest ones."
NOTE = (
    "boundary: all four points are on their side; zero loss: its mean is below the limit; shares of the trials, with\n"
    "95 % intervals. ticket: the largest nets, pruned to as many units in one shot, reset and trained again."
)


def add_xor(experiments: argparse._SubParsersAction) -> None:
    sub = experiments.add_parser("xor", help="thousands of tiny nets", description=TEXT)
    sub.set_defaults(command=xor)
    add_settings(sub, Settings, vars(Settings()))
    sub.add_argument("--threads", type=positive, help="default: torch's")
    sub.add_argument("--print", action="store_true", help="show all settings and stop")
    sub.add_argument("--csv", type=Path, metavar="FILE", help="also write the table there")


def xor(args: argparse.Namespace) -> None:
    settings = Settings(**given(args, Settings))
    if args.print:
        print(json.dumps(asdict(settings), indent=2))
        return
    print(f"xor: {settings.trials:,} nets of each size, at most {settings.iterations:,} iterations")
    with progress("trainings", 2 * len(settings.hidden) - 1) as (update, _):
        rows = run(settings, lambda done, _: update(completed=done))
    print_rows([_shown(row) for row in rows])
    print(NOTE)
    if args.csv:
        with atomic(args.csv) as temporary, temporary.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        print(f"-> {args.csv}")


def _shown(row: dict) -> dict:
    columns = {"hidden": row["hidden"]}
    for prefix in ("", "ticket_"):
        for share in ("boundary", "zero_loss"):
            name = prefix + share
            low, middle, high = (row[key] for key in (f"{name}_low", name, f"{name}_high"))
            text = None if middle is None else f"{100 * middle:.1f} ({100 * low:.1f}-{100 * high:.1f})"
            columns[name.replace("_", " ") + " %"] = text
    return columns

"""`python -m benchmarks.torture [PART ...] [--minutes M] [--seed S] [--first N] [--cases N] [--results DIR]`.

Goes on after the cases that the rows of this seed, this machine and these versions say were tried; with --first it
tries what it is told, and writes no row. Exits with 1 if a case failed.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from benchmarks import results

from . import campaign

COLUMNS = ["part", "tried", "failed", "seconds", "seed", "machine", "versions"]
FILE = "torture.csv"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.torture")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(campaign.PARTS)}; default: all")
    parser.add_argument("--minutes", type=float, default=10.0, help="of all parts together; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, help="try from this case on, and write no row")
    parser.add_argument("--cases", type=int, help="of each part, in all; default: what it aims at")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the rows")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(campaign.PARTS):
        parser.error(f"PART: expected some of {', '.join(campaign.PARTS)}, got {unknown.pop()}")
    parts, failed = args.parts or list(campaign.PARTS), 0
    left = 60 * args.minutes  # of trying; what is built is built on top of it
    for i, part in enumerate(parts):
        rows = Rows(args.results / FILE, args.seed)
        first = rows.tried(part) if args.first is None else args.first
        aim = args.cases or import_module(campaign.module(part)).CASES
        cases = aim if args.first is not None else max(0, aim - first)
        outcome = campaign.run(part, args.seed, first, cases, left / (len(parts) - i), _tell)
        left = max(0.0, left - outcome.seconds)
        failed += len(outcome.failures)
        row = rows.joined(part, outcome)
        _tell(
            f"{part}: {outcome.tried:,} cases in {outcome.seconds:.0f} s, {len(outcome.failures)} failed; "
            f"of this seed {row['tried']:,} of {aim:,}, {row['failed']:,} failed"
        )
        if args.first is None and outcome.tried:
            rows.write(row)
    return int(failed > 0)


class Rows:
    """Those of the campaigns in a file; a campaign is a part's cases of one seed, machine and versions."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path, head = path, results.header()
        self._key = {"seed": seed, "machine": head["machine"], "versions": head["versions"]}
        self._rows = results.read(path)[1] if path.exists() else []

    def tried(self, part: str) -> int:
        return int((self._found(part) or {"tried": 0})["tried"])

    def joined(self, part: str, outcome: campaign.Outcome) -> dict:
        """The row with what came now."""
        before = self._found(part) or {"tried": 0, "failed": 0, "seconds": 0}
        counts = {
            "tried": int(before["tried"]) + outcome.tried,
            "failed": int(before["failed"]) + len(outcome.failures),
            "seconds": round(before["seconds"] + outcome.seconds),
        }
        return {"part": part, **counts, **self._key}

    def write(self, row: dict) -> None:
        kept = [each for each in self._rows if each is not self._found(row["part"])]
        rows = [{**each, **{name: int(each[name]) for name in COLUMNS[1:5]}} for each in kept]
        results.write(self._path, [*rows, row], COLUMNS)

    def _found(self, part: str) -> dict | None:
        wanted = {"part": part, **self._key}
        return next((row for row in self._rows if all(row[name] == each for name, each in wanted.items())), None)


def _tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())

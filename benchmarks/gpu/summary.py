"""What the rows say, from the CSV files alone: `python -m benchmarks.gpu.summary [DIR ...]`.

A table per part, a cell per density: how many times as fast as the best dense baseline ours is, as `convert` chooses,
and its share of the roofline. `~` marks cases in which ours chose dense. Then the bars, and what has no row.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from benchmarks import results
from benchmarks.gpu.bars import BARS, DENSE, MEASURED, OURS

COLUMN = 16


def main(folder: Path) -> None:
    """Prints everything about the folder of one GPU."""
    measured = {part: results.read(path) for part in DENSE if (path := folder / f"gpu-{part}.csv").exists()}
    print(f"\n{folder}: times as fast as the best dense baseline, share of the roofline (~ ours chose dense)")
    for part, (head, rows) in measured.items():
        print(f"\n{part}: {'; '.join(head.values())}")
        print(*_table(part, rows), sep="\n")
    print(f"\n{'bar':60} {'least':>6} {'here':>6}   {'lowest..highest':>20}")
    for bar in BARS:
        rows = measured[bar.part][1] if bar.part in measured else []
        speedups = [value for case, value in speedups_of(bar.part, rows) if bar.matches(bar.part, case)]
        if not speedups:
            print(f"{bar.what:60} {bar.least:>5g}x   not yet measured")
            continue
        here = bar.statistic(speedups)
        spread = f"{min(speedups):.2f}..{max(speedups):.2f} of {len(speedups)}"
        print(f"{bar.what:60} {bar.least:>5g}x {here:>5.2f}x   {spread:>20}  {'met' if here >= bar.least else 'SHORT'}")
    _print_missing(folder)


def speedups_of(part: str, rows: list[dict]) -> list[tuple[dict, float]]:
    """Each case that has rows of ours and of a dense baseline, with our speed-up over the fastest of these."""
    return [(case, dense["ms"] / ours["ms"]) for case, ours, dense in _cases(part, rows) if ours and dense]


def _cases(part: str, rows: list[dict]) -> list[tuple[dict, dict | None, dict | None]]:
    """Each case, our row of it and the row of its best dense baseline."""
    grouped: dict[tuple, list[dict]] = {}
    for row in rows:
        grouped.setdefault(tuple(value for key, value in row.items() if key not in MEASURED), []).append(row)
    found = []
    for group in grouped.values():
        ours = next((row for row in group if row["impl"] == OURS), None)
        dense = min((row for row in group if row["impl"] in DENSE[part]), key=lambda row: row["ms"], default=None)
        found.append(({key: value for key, value in group[0].items() if key not in MEASURED}, ours, dense))
    return found


def _table(part: str, rows: list[dict]) -> list[str]:
    """A line per layer or net, op, dtype and pattern, a column per density."""
    cells: dict[str, dict[float, str]] = {}
    for case, ours, dense in _cases(part, rows):
        density = case.pop("density")
        line = " ".join(f"{value:g}" if isinstance(value, float) else value for value in case.values())
        cells.setdefault(line, {})[density] = _cell(ours, dense)
    densities = sorted({density for line in cells.values() for density in line}, reverse=True)
    width = max(map(len, cells), default=0)
    lines = [f"{'density':{width}}" + "".join(f"{density:>{COLUMN}g}" for density in densities)]
    for line in sorted(cells):
        lines.append(f"{line:{width}}" + "".join(f"{cells[line].get(d, '-'):>{COLUMN}}" for d in densities))
    return lines


def _cell(ours: dict | None, dense: dict | None) -> str:
    if not ours or not dense:
        return "no ours" if dense else "no dense"
    share = f" {100 * ours['roofline']:.0f} %" if ours["roofline"] != "" else ""
    return f"{'~' if ours['chosen'] == 'dense' else ''}{dense['ms'] / ours['ms']:.2f}x{share}"


def _print_missing(folder: Path) -> None:
    """What was not reached, counted by all but the density; every other reason in full."""
    left: Counter[str] = Counter()
    for part in DENSE:
        if not (path := folder / f"gpu-{part}-missing.csv").exists():
            continue
        for row in results.read(path)[1]:
            impl, why, density = row.pop("impl"), row.pop("why"), row.pop("density")
            line = " ".join([part, *(f"{value:g}" if isinstance(value, float) else value for value in row.values())])
            if why.startswith("not reached"):
                left[line] += 1
            else:
                print(f"no row: {line} {density:g} {impl or 'any'}: {why}")
    for line, count in left.items():
        print(f"not reached: {line}, {count} densities")


if __name__ == "__main__":
    for each in results.folders(sys.argv[1:]):
        if any(each.glob("gpu-*.csv")):
            main(each)

"""What the files of a run say: `python -m benchmarks.gpu.summary [DIR ...]`.

A table per part, a cell per density: how many times as fast as the best dense baseline ours is, as `convert` chooses,
and its share of the roofline; `~` marks cases in which ours chose dense. Then what launch shapes won, what calls are
made of, what has no row, the tests and, last, the bars.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from benchmarks import results
from benchmarks.gpu import tests
from benchmarks.gpu.bars import BARS, DENSE, MEASURED, OURS
from benchmarks.gpu.rows import PARTS_OF_KERNELS

COLUMN = 14
TAIL = 8000  # characters: of a long output only the end may be kept


class Section(NamedTuple):
    """Some lines of the summary, and how many of its characters they may have in a tail; 0: all that they need."""

    lines: list[str]
    most: int = 0


def main(folder: Path) -> None:
    """Prints everything about a folder."""
    print(folder, whole({path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".csv", ".xml")}))


def whole(texts: Mapping[str, str]) -> str:
    """Of the texts of a run's files, by name."""
    return "\n".join(line for section in sections(texts) for line in section.lines)


def tail(texts: Mapping[str, str], limit: int = TAIL) -> str:
    """The summary in at most `limit` characters, the bars whole and last; what was cut is counted."""
    found = sections(texts)
    fixed = [_cut(section, section.most) for section in found[1:]]
    room = limit - len("\n".join(line for lines in fixed for line in lines)) - 1
    text = "\n".join(line for lines in [_cut(found[0], max(room, 1)), *fixed] for line in lines)
    return text[-limit:]


def sections(texts: Mapping[str, str]) -> list[Section]:
    """The tables, which may be cut to any size, then everything else; the bars last."""
    measured = {part: results.parsed(texts.get(f"gpu-{part}.csv", "")) for part in DENSE}
    missing, kernels = (results.parsed(texts.get(f"gpu-{name}.csv", ""))[1] for name in ("missing", "kernels"))
    tables = ["times as fast as the best dense baseline, share of the roofline (~ ours chose dense)"]
    for part, (head, rows) in measured.items():
        if rows:
            tables += ["", f"{part}: {'; '.join(head.values())}", *_table(part, rows)]
    found = [Section(tables)]
    for part, most in zip(PARTS_OF_KERNELS, (1500, 1000, 500), strict=True):
        lines = _explained(part, [row for row in kernels if row["part"] == part])
        found.append(Section(["", f"{part}:", *lines] if lines else [], most))
    found.append(Section(["", *_missing(missing)], 900))
    found.append(Section(["", *_tests(texts.get("junit.xml", ""), missing)], 1500))
    return [*found, Section(["", *_bars({part: rows for part, (_, rows) in measured.items()})])]


def _cut(section: Section, most: int) -> list[str]:
    lines, size = [], 0
    for number, line in enumerate(section.lines):
        size += len(line) + 1
        if most and size > most - 40:
            return [*lines, f"... {len(section.lines) - number} more lines in summary.txt"]
        lines.append(line)
    return lines


def _explained(part: str, rows: list[dict]) -> list[str]:
    try:
        return import_module(f"benchmarks.gpu.{part}").summary(rows)
    except Exception as error:  # of rows that nobody thought of: the bars are worth more
        return [f"no summary: {type(error).__name__}: {error}"]


def _bars(measured: dict[str, list[dict]]) -> list[str]:
    lines = [f"{'bar':70} {'least':>6} {'here':>6}   lowest..highest"]
    for bar in BARS:
        found = speedups_of(bar.part, measured.get(bar.part, []))
        speedups = [value for case, value in found if bar.matches(bar.part, case)]
        if not speedups:
            lines.append(f"{bar.what:70} {bar.least:>5g}x   not yet measured")
            continue
        here = bar.statistic(speedups)
        spread = f"{min(speedups):.2f}..{max(speedups):.2f} of {len(speedups)}"
        verdict = "met" if here >= bar.least else "SHORT"
        lines.append(f"{bar.what:70} {bar.least:>5g}x {here:>5.2f}x   {spread:>18}  {verdict}")
    return lines


def _missing(rows: list[dict]) -> list[str]:
    """Ours without a row, in full; then what was not reached, a line a part, and notes of baselines."""
    rows = [row for row in rows if row["part"] != "tests"]
    whole = [row for row in rows if row["case"] == "all"]
    single = [row for row in rows if row["case"] != "all" and not str(row["why"]).startswith("not reached")]
    ours = [row for row in single if not row["impl"] or str(row["impl"]).startswith(OURS) or row["part"] == "prepare"]
    notes = Counter(row["impl"] for row in single if row not in ours)
    lines = [f"no row: {row['part']} {row['case']} {row['impl'] or 'any'}: {row['why']}" for row in ours]
    lines += [f"{row['part']}: {row['why']}" for row in whole]
    return lines + [f"no row: {impl} in {count} cases (gpu-missing.csv)" for impl, count in notes.items()]


def _tests(junit: str, missing: list[dict]) -> list[str]:
    if not junit:
        return ["tests: none has run"]
    left = [str(row["why"]) for row in missing if row["part"] == "tests"]
    return tests.Verdict(tests.read_junit(junit), left).lines()


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


if __name__ == "__main__":
    for each in results.folders(sys.argv[1:]):
        if any(each.glob("gpu-*.csv")):
            main(each)

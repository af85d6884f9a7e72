"""A run as one self-contained HTML page, with its numbers as CSV files and its figures as PNG and SVG beside it.

    folder -> rows (tables, tickets) -> CSV files -> figures -> page

The figures and the page are made from the CSV files; only pictures of whole masks come from the tickets themselves.
"""

from __future__ import annotations

import os
from pathlib import Path

from ... import __version__
from ...files import atomic
from . import tables, tickets
from .folder import Run, read

__all__ = ["write"]


def write(run: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of a run's folder, of a grid or of `find_ticket`, finished or not; returns the HTML file.

    ``out`` (default: ``report`` in the run's folder) gets report.html, csv/*.csv and figures/*.{png,svg}; files of an
    earlier report are replaced. Raises FileNotFoundError for a folder that is no run's or has no finished round,
    ValueError for a damaged file in it, ModuleNotFoundError without matplotlib.
    """
    from . import contents, draw, page, summary  # matplotlib: rows and folders are read without it

    found = read(Path(run))
    out = found.folder / "report" if out is None else Path(out)
    rows, missing = _rows_in_files(found, out / "csv")
    drawings, pictures = contents.drawings(rows), contents.pictures(found, rows)
    for each in drawings:
        _write(out / "figures" / f"{each.name}.svg", draw.on_white(each.svg).encode())
        _write(out / "figures" / f"{each.name}.png", each.png)
    for each in pictures:
        _write(out / "figures" / f"{each.name}.png", each.png)
    title = summary.title(found)
    notes = [*summary.notes(found), *missing]
    parts = [
        page.header(title, summary.sentence(found), notes, summary.tiles(rows["rounds"], rows["seconds"])),
        *contents.sections(found, rows, drawings, pictures),
        page.settings(found),
        page.footer(
            [*summary.machines(found), f"Written by sparselottery {__version__}; numbers in csv/, figures in figures/."]
        ),
    ]
    _write(out / "report.html", page.document(title, parts).encode())
    return out / "report.html"


def _rows_in_files(found: Run, folder: Path) -> tuple[dict[str, list[tables.Row]], list[str]]:
    """All rows, as they are read back from the CSV files, and what could not be had."""
    trainings = tables.trainings(found)
    rounds = tables.rounds(trainings)
    lines, missing = tickets.connectivity(found)
    rows = {"trainings": trainings, "rounds": rounds, "seconds": tables.seconds(rounds), "curves": tables.curves(found)}
    rows |= tickets.rows(found) | {"connectivity": lines}
    for name, each in rows.items():
        if each:
            tables.write(folder / f"{name}.csv", each)
            rows[name] = tables.read(folder / f"{name}.csv")
    return rows, [missing] if missing else []


def _write(path: Path, contents: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_bytes(contents)

"""What commands print: lines of cells, tables, and bars on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from time import perf_counter

Columns = tuple[tuple[str, Callable[[dict], str]], ...]  # header, cell of a record


def line(cells: Iterable[str]) -> str:
    return "  ".join(cells)


def header(columns: Columns) -> str:
    return line(title for title, _ in columns)


def row(columns: Columns, record: dict) -> str:
    """The record's cells, each below its header: for tables whose rows come one by one."""
    return line(cell(record).rjust(len(title)) for title, cell in columns)


def print_rows(rows: list[dict]) -> None:
    """Rows with the same keys as a table: right-aligned, but for the reasons at the end."""
    cells = [list(rows[0])] + [[_cell(value) for value in each.values()] for each in rows]
    widths = [0 if column[0] == "why" else max(map(len, column)) for column in zip(*cells, strict=True)]
    for each in cells:
        print(line(cell.rjust(width) for cell, width in zip(each, widths, strict=True)))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return "-" if value is None else str(value)


@contextmanager
def progress(
    description: str, total: int, head: Iterable[str] = ()
) -> Iterator[tuple[Callable[..., None], Callable[[str], None]]]:
    """A bar on a terminal, nothing elsewhere.

    Yields ``update(completed=..., description=...)`` and ``say(line)``, which prints above the bar. The lines of
    ``head`` come before what the first of these calls does: what is refused until then has said nothing.
    """
    head = iter(head)  # of which nothing is left for the second call
    with bars() as (update, say):

        def after_head(call: Callable[..., None], *arguments: object, **changes: object) -> None:
            for line in head:
                say(line)
            call(*arguments, **changes)

        update(description, description=description, total=total)
        yield partial(after_head, update, description), partial(after_head, say)


@contextmanager
def bars() -> Iterator[tuple[Callable[..., None], Callable[[str], None]]]:
    """Bars on a terminal, nothing elsewhere.

    Yields ``update(key, ...)``, which draws the bar ``key`` with rich's ``completed``, ``total``, ``description`` or
    ``visible``, and ``say(line)``, which prints above the bars.
    """
    if not sys.stdout.isatty():
        yield (lambda *_, **__: None), partial(print, flush=True)
        return
    from rich.progress import Progress

    with Progress(transient=True, auto_refresh=False) as drawing:  # a thread that draws would disturb what is timed
        tasks, drawn = {}, 0.0

        def update(key: str, **changes: object) -> None:
            nonlocal drawn
            if key not in tasks:
                tasks[key] = drawing.add_task("", total=None)
            drawing.update(tasks[key], **changes)
            if perf_counter() - drawn > 0.1:
                drawing.refresh()
                drawn = perf_counter()

        yield update, partial(drawing.console.print, markup=False, highlight=False, emoji=False, soft_wrap=True)

"""Rows and CSV files: all that the report shows is in these, and is read back from them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ...files import atomic
from .folder import NUMBERS, TICKET, Run

Row = dict[str, Any]
STEPS = ("first_iteration", "iterations")
AVERAGED = tuple(key for key in NUMBERS if key not in ("nnz", "total"))


def write(path: Path, rows: Sequence[Row]) -> None:
    """A CSV file of rows with the same keys, written atomically; None is an empty cell."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(text.getvalue())


def read(path: Path) -> list[Row]:
    """What `write` wrote: ints, floats, None and texts."""
    with path.open(newline="") as file:
        return [{key: _value(key, cell) for key, cell in row.items()} for row in csv.DictReader(file)]


def _value(key: str, cell: str) -> Any:
    if key in ("control", "layer", "shape", "side"):
        return cell
    if not cell:
        return None
    return float(cell) if set(cell) & set(".en") else int(cell)


def trainings(run: Run) -> list[Row]:
    """One row for each training."""
    numbers = dict.fromkeys(key for each in run.trainings for key in each.numbers)
    return [
        {"trial": each.trial, "control": each.control, "draw": each.draw, "round": each.round}
        | _steps(each.curves["iteration"])
        | numbers
        | each.numbers
        for each in run.trainings
    ]


def own(rows: Sequence[Row]) -> list[str]:
    """The numbers of trainings that only the user's own training returned."""
    return [key for key in rows[0] if key not in ("trial", "control", "draw", "round", *STEPS, *NUMBERS)]


def _steps(iterations: Sequence[float]) -> Row:
    """The iteration that a training began with, and how many it had."""
    first = min(iterations, default=None)
    return {"first_iteration": first, "iterations": None if first is None else max(iterations) - first}


def curves(run: Run) -> list[Row]:
    """One row for each evaluation of each training."""
    return [
        {"trial": each.trial, "control": each.control, "draw": each.draw, "round": each.round}
        | dict(zip(each.curves, values, strict=True))
        for each in run.trainings
        for values in zip(*each.curves.values(), strict=True)
    ]


def rounds(rows: Iterable[Row]) -> list[Row]:
    """Over trials and draws of each control's round: how many, and of each number mean, ``_min`` and ``_max``.

    Of milliseconds it is the median, which a stalled machine does not move. ``whole_ms``: the ticket's ``sparse_ms`` of
    round 0, which is the whole net by the same steps.
    """
    found, rows = [], list(rows)
    for (control, number), group in grouped(rows, "control", "round").items():
        row: Row = {"control": control, "round": number, "trainings": len(group)}
        for key in (*STEPS, *AVERAGED, *own(rows)):
            values = [each[key] for each in group if each[key] is not None]
            average = median if key.endswith("_ms") else fmean
            row |= (
                {key: average(values), f"{key}_min": min(values), f"{key}_max": max(values)}
                if values
                else dict.fromkeys((key, f"{key}_min", f"{key}_max"))
            )
        found.append(row)
    whole = next((row["sparse_ms"] for row in found if (row["control"], row["round"]) == (TICKET, 0)), None)
    found = [row | {"whole_ms": whole} for row in found]
    return sorted(found, key=lambda row: (row["control"] != TICKET, row["control"], row["round"]))


def seconds(rows: Iterable[Row]) -> list[Row]:
    """After each round of the ladder, seconds of all steps so far, mean over trials.

    On our kernels, as w * mask, and with the whole net on our kernels in each round. A round's are milliseconds per
    step times its iterations. Saved is what we take less than the faster of the two others. Rounds are left out from
    the first that lacks them.
    """
    found: list[Row] = []
    sparse = whole = dense = 0.0
    for row in sorted((row for row in rows if row["control"] == TICKET), key=lambda row: row["round"]):
        if None in (row["sparse_ms"], row["whole_ms"], row["dense_ms"], row["iterations"]):
            break
        sparse += row["sparse_ms"] / 1e3 * row["iterations"]
        whole += row["whole_ms"] / 1e3 * row["iterations"]
        dense += row["dense_ms"] / 1e3 * row["iterations"]
        found.append({"round": row["round"], "density": row["density"], "sparse_seconds": sparse})
        found[-1] |= {"whole_seconds": whole, "dense_seconds": dense, "saved_seconds": min(whole, dense) - sparse}
    return found


def grouped(rows: Iterable[Row], *keys: str) -> dict[Any, list[Row]]:
    """By the values of one key, or tuples of those of several; in order of appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys), []).append(row)
    return groups


def mean(rows: Iterable[Row], key: str, by: Callable[[Row], Any]) -> dict[Any, float]:
    """The mean of one column for each value of ``by``."""
    groups: dict[Any, list[float]] = {}
    for row in rows:
        groups.setdefault(by(row), []).append(row[key])
    return {value: fmean(numbers) for value, numbers in groups.items()}


def spread(values: Iterable[int], count: int = 6) -> list[int]:
    """At most ``count`` of the values, evenly apart, the first and the last among them."""
    ordered = sorted(set(values))
    step = -(-(len(ordered) - 1) // (count - 1)) or 1
    chosen = ordered[::step]
    if chosen[-1:] != ordered[-1:]:
        chosen[-1 if 2 * (len(ordered) - 1) < (2 * len(chosen) - 1) * step else len(chosen) :] = ordered[-1:]
    return chosen

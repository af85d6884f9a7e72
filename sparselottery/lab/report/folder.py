"""A run's folder, read: of a grid (trials x controls) or of one `find_ticket`, finished or not."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from ...files import read_json
from ..controls import CONTROLS

TICKET = "ticket"  # what the ladder's own trainings are called beside the controls
NUMBERS = (
    "density",
    "nnz",
    "total",
    "seconds",
    "early_stop_iteration",
    "early_stop_test_accuracy",
    "final_test_accuracy",
    "train_seconds",
    "eval_seconds",
    "train_step_ms",
    "eval_ms",
    "sparse_ms",
    "dense_ms",
    "sparse_bytes",
    "dense_bytes",
)
COLUMNS = ("trial", "control", "draw", "round", "layer", "shape", "side")  # of the tables, which are no numbers
CURVES = ("iteration", "val_loss", "val_accuracy", "test_accuracy")


class Training(NamedTuple):
    """One training: its numbers (None where not measured), its curves, and its trained weights, if they were kept.

    Numbers are those of `NUMBERS`, then others that the training returned, of a net of the user's own.
    """

    trial: int
    control: str
    draw: int
    round: int
    numbers: dict[str, float | None]
    curves: dict[str, list[float]]
    weights: Path | None


class Run(NamedTuple):
    """``grid``: what grid.json says, {} for a folder of `find`. ``recipe``: settings.json of the first ladder."""

    folder: Path
    grid: dict[str, Any]
    recipe: dict[str, Any]
    ladders: dict[int, Path]  # by trial
    trainings: list[Training]

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the result: those of trial 0."""
        found = {**_mapping(self.recipe.get("settings")), **_mapping(self.grid.get("settings"))}
        return found or self.recipe

    @property
    def finished(self) -> bool:
        """Are all ladders at their end, and all trainings of the controls done?"""
        trials = range(_count(self.grid.get("trials")) or 1)
        if any(
            trial not in self.ladders or not (self.ladders[trial] / "ticket.safetensors").exists() for trial in trials
        ):
            return False
        done = {each[:4] for each in self.trainings}
        rounds = self.grid.get("rounds") or range(1, 1 + max(each.round for each in self.trainings))
        return all(
            (trial, control, draw, number) in done
            for trial in trials
            for control in self.controls
            for draw in range(_draws(control, _count(self.grid.get("draws")) or 1))
            for number in rounds
        )

    @property
    def controls(self) -> list[str]:
        """Those that were asked for, then others that are there."""
        asked = self.grid.get("controls")
        asked = [str(name) for name in asked] if isinstance(asked, list) else []
        return list(dict.fromkeys([*asked, *(each.control for each in self.trainings if each.control != TICKET)]))


def read(folder: Path) -> Run:
    """Raises FileNotFoundError if the folder is no run's, or one without a finished round; ValueError for damage."""
    if (folder / "grid.json").is_file():
        grid = read_json(folder / "grid.json")
        homes = {int(path.name[6:]): path for path in folder.glob("trial-*") if re.fullmatch(r"trial-\d+", path.name)}
        homes = dict(sorted(homes.items()))
        ladders = {trial: home / TICKET for trial, home in homes.items()}
    elif (folder / "settings.json").is_file():
        grid, homes, ladders = {}, {}, {0: folder}
    else:
        raise FileNotFoundError(f"{folder}: expected a run folder with grid.json or settings.json, found neither")
    trainings = [each for trial, ladder in ladders.items() for each in _ladder(trial, ladder)]
    for trial, home in homes.items():
        for draw in sorted(home.glob("*/draw-*"), key=lambda path: (path.parent.name, _number(path))):
            trainings += [_training(path, trial, draw.parent.name, _number(draw)) for path in _records(draw)]
    if not any(each.control == TICKET for each in trainings):
        raise FileNotFoundError(f"{folder}: expected a run with a finished round, found none yet")
    started = {trial: ladder for trial, ladder in ladders.items() if (ladder / "settings.json").is_file()}
    return Run(folder, grid, read_json(next(iter(started.values())) / "settings.json"), started, trainings)


def _ladder(trial: int, folder: Path) -> list[Training]:
    """A round of a ladder is done when its weights are there."""
    found = [_training(path, trial, TICKET, 0) for path in _records(folder)]
    return [each for each in found if each.weights is not None]


def _records(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("round-*.json") if re.fullmatch(r"round-\d+\.json", path.name))


def _training(path: Path, trial: int, control: str, draw: int) -> Training:
    record = read_json(path)
    own = [key for key, value in record.items() if key not in (*NUMBERS, *COLUMNS) and _is_finite(value)]
    numbers = {key: _finite(path, key, record.get(key)) for key in (*NUMBERS, *own)}
    for key in ("density", "nnz", "total"):
        if numbers[key] is None:
            raise ValueError(f"{path}: expected a number {key!r}, found none")
    if not 0 < numbers["density"] <= 1:
        raise ValueError(f"{path}: density: expected one in (0, 1], got {numbers['density']}")
    curves = _mapping(record.get("curves"))
    lists = {key: [_finite(path, f"curves.{key}", each) for each in _list(path, key, curves.get(key, []))]
             for key in CURVES}  # fmt: skip
    if len({len(values) for values in lists.values()}) > 1:
        raise ValueError(f"{path}: curves: expected lists of one length, got {[len(each) for each in lists.values()]}")
    weights = path.with_suffix(".safetensors")
    return Training(trial, control, draw, _number(path), numbers, lists, weights if weights.is_file() else None)


def _number(path: Path) -> int:
    digits = path.stem.rpartition("-")[2]
    if not digits.isdecimal():
        raise ValueError(f"{path}: expected a name that ends with a number")
    return int(digits)


def _is_finite(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


def _finite(path: Path, key: str, value: Any) -> float | None:
    if value is None:
        return None
    if not _is_finite(value):
        raise ValueError(f"{path}: {key}: expected a finite number, got {value!r}")
    return value


def _list(path: Path, key: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{path}: curves.{key}: expected a list, got {type(value).__name__}")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _draws(control: str, draws: int) -> int:
    return draws if control in CONTROLS and CONTROLS[control].random else 1


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0

"""Rows about the tickets of a run: what `analyses` finds in their masks and weights, round by round."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ...ticket import Ticket
from .. import analyses, data
from ..controls import MASK_ONLY
from ..models import build
from ..training import evaluate
from .folder import TICKET, Run
from .tables import Row, spread

TEST_IMAGES = 2000  # of connectivity: enough for a percentage, few enough for a deep net
QUARTILES = (0.25, 0.5, 0.75)


def rows(run: Run) -> dict[str, list[Row]]:
    """``layers``, ``overlap``: of all trials. ``distributions``, ``movement``, ``degrees``: of the first.

    Degrees and distributions are of a few rounds. Only one round's tickets are in memory at a time.
    """
    found: dict[str, list[Row]] = {name: [] for name in ("layers", "overlap", "distributions", "movement", "degrees")}
    first = next(iter(run.ladders))
    files = {(each.round, each.trial): each.weights for each in run.trainings if each.control == TICKET}
    numbers = sorted({number for number, _ in files})
    theta = Ticket.load(run.ladders[first] / "theta.safetensors")
    previous: Ticket | None = None
    start = theta.weights
    for number in numbers:
        tickets = {trial: Ticket.load(path) for (each, trial), path in files.items() if each == number}
        masks = {trial: ticket.masks for trial, ticket in tickets.items()}
        found["layers"] += [row for trial, each in masks.items() for row in _layers(number, trial, each)]
        found["overlap"] += _overlap(number, masks)
        if first not in tickets:
            continue
        if previous is not None and not previous.recipe.get(MASK_ONLY):
            found["movement"] += _movement(number - 1, start, previous, masks[first])
        if previous is not None:
            start = theta.weights if resets(run) else previous.weights
        if number in spread(numbers):
            found["distributions"] += _distributions(number, theta, masks[first])
            found["degrees"] += _degrees(number, masks[first])
        previous = tickets[first]
    return found


def resets(run: Run) -> bool:
    """Does every round begin with theta_k?"""
    return bool(run.recipe.get("reset", True)) and run.settings.get("retrain", "rewind") == "rewind"


def connectivity(run: Run, points: int = 11) -> tuple[list[Row], str]:
    """Test loss and error between the ticket's weights and those of the control `order`, and why there is nothing.

    Both were trained from the same weights at the same mask. Of a few rounds, on the first TEST_IMAGES. The rows of a
    trial's round are in the order of ``share``.
    """
    ladder = {(each.trial, each.round): each.weights for each in run.trainings if each.control == TICKET}
    few = spread(number for _, number in ladder)
    pairs = [
        (each.trial, each.round, ladder[each.trial, each.round], each.weights)
        for each in run.trainings
        if each.control == "order" and each.draw == 0 and each.weights and (each.trial, each.round) in ladder
        if each.round in few
    ]
    if not pairs:
        return [], ""
    settings = run.settings
    try:
        model = build(settings["model"], tuple(settings["shape"]), settings["classes"])
        images = data.load(settings["data"])
    except (KeyError, TypeError, ValueError, OSError, ImportError) as error:
        return [], f"Linear mode connectivity was left out: {type(error).__name__}: {error}"
    x, y = images.test_x[:TEST_IMAGES], images.test_y[:TEST_IMAGES]
    found = []
    for trial, number, one, other in pairs:
        ends = Ticket.load(one), Ticket.load(other)
        line = analyses.connectivity(*ends, model, partial(evaluate, x=x, y=y), points)
        instability = analyses.instability([1 - accuracy for accuracy in line.accuracies])
        for share, loss, accuracy in zip(*line, strict=True):
            row = {"trial": trial, "round": number, "density": ends[0].density, "share": share, "test_loss": loss}
            found.append(row | {"test_error": 1 - accuracy, "instability": instability})
    return found, ""


def _layers(number: int, trial: int, masks: dict[str, Tensor]) -> list[Row]:
    return [
        {"trial": trial, "round": number, "layer": name, "shape": "x".join(map(str, mask.shape))}
        | {"total": mask.numel(), "nnz": int(mask.sum()), "density": float(mask.double().mean())}
        for name, mask in masks.items()
    ]


def _overlap(number: int, masks: dict[int, dict[str, Tensor]]) -> list[Row]:
    found = []
    for a, b in combinations(masks, 2):
        for name, (jaccard, expected) in analyses.overlap(masks[a], masks[b]).items():
            density = float(masks[a][name].double().mean())
            row: Row = {"round": number, "trial": a, "other_trial": b, "layer": name, "density": density}
            found.append(row | {"jaccard": jaccard, "expected": expected})
    return found


def _distributions(number: int, theta: Ticket, masks: dict[str, Tensor]) -> list[Row]:
    found = []
    for name, (edges, initial, survivors) in analyses.distributions(theta, masks).items():
        bins: Any = zip(edges[:-1].tolist(), edges[1:].tolist(), initial.tolist(), survivors.tolist(), strict=True)
        keys = ("left", "right", "initial", "survivors")
        found += [{"round": number, "layer": name} | dict(zip(keys, each, strict=True)) for each in bins]
    return found


def _movement(number: int, start: dict[str, Tensor], trained: Ticket, next_masks: dict[str, Tensor]) -> list[Row]:
    found = []
    for name, moved in analyses.movement(start, trained, next_masks).items():
        row: Row = {"round": number, "layer": name, "density": float(trained.masks[name].double().mean())}
        for group, distance in moved._asdict().items():
            row[f"{group}_weights"] = len(distance)
            for share in QUARTILES:
                value = float(torch.from_numpy(distance.numpy()).kthvalue(1 + round(share * (len(distance) - 1)))[0]) \
                    if len(distance) else None  # fmt: skip
                row[f"{group}_{round(100 * share)}"] = value
        found.append(row)
    return found


def _degrees(number: int, masks: dict[str, Tensor]) -> list[Row]:
    return [
        {"round": number, "layer": name, "side": side, "unit": unit, "connections": connections}
        for name, mask in masks.items()
        for side, counts in analyses.degrees(mask)._asdict().items()
        for unit, connections in enumerate(counts.tolist())
    ]

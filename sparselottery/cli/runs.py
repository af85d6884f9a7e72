"""What commands read of run folders."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from ..calls import ExampleInput
from ..lab.models import build
from ..ticket import Ticket
from .user_code import is_own, load_example, load_net

RUN_TEXT = "a run folder of `find`, or a trial-N/ticket of `lab`"


def add_own_net(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help="of a net of your own: what makes it, as `find` had")
    add_example(parser)


def add_example(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--example", metavar="MODULE:NAME", help="an input of the net of your own, or what returns one")


def trainings(run: Path, count: int) -> int:
    """How many of a run's `count` trainings are done."""
    return sum((run / f"round-{number:02d}.safetensors").exists() for number in range(count))


def kept(done: int, count: int, folder: Path) -> str:
    """What an interrupted command says."""
    return f"{done} of {count} trainings are kept in {folder}"


def round_file(run: Path, number: int | None) -> Path:
    """The file of a round's trained weights; the last round's for None."""
    files = sorted(run.glob("round-*.safetensors" if number is None else f"round-{number:02d}.safetensors"))
    if not files:
        wanted = "a finished round" if number is None else f"round {number}"
        raise FileNotFoundError(f"{run}: expected a run folder with {wanted} (round-NN.safetensors), found none")
    return files[-1]


def net(ticket: Ticket, model: str | None) -> nn.Module | None:
    """A net like the one that a ticket of this command was found in; None where the ticket knows it.

    model: of a net of one's own, the function that makes it. It is never taken from the file, which may be anybody's.
    """
    if model is not None:
        return load_net(model)
    settings = _settings(ticket)
    if is_own(settings.get("model")):
        if ticket.architecture is None:
            raise ValueError(f"--model: expected what makes the net, got none; the run was of {settings['model']}")
        return None
    if missing := {"model", "shape", "classes", "batch"} - settings.keys():
        raise ValueError(f"expected a ticket of `sparselottery find`, found one whose settings lack {sorted(missing)}")
    return build(settings["model"], tuple(settings["shape"]), settings["classes"], settings.get("dropout", 0.0))


def example_of(ticket: Ticket, example: str | None, batch: int | None = None) -> ExampleInput | None:
    """The input that is named; else random images of the run's shape, as many as its batch; None of another net."""
    if example is not None:
        return load_example(example)
    settings = _settings(ticket)
    return torch.randn(batch or settings["batch"], *settings["shape"]) if "shape" in settings else None


def _settings(ticket: Ticket) -> dict:
    found = ticket.recipe.get("settings")
    return found if isinstance(found, dict) else {}

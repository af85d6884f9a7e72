"""What commands read of run folders."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..lab.models import build
from ..ticket import Ticket

RUN_TEXT = "a run folder of `find`, or a trial-N/ticket of `lab`"


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


def net(ticket: Ticket) -> nn.Sequential:
    """A net like the one that a ticket of this command was found in."""
    settings = ticket.recipe.get("settings") or {}
    if missing := {"model", "shape", "classes", "batch"} - settings.keys():
        raise ValueError(f"expected a ticket of `sparselottery find`, found one whose settings lack {sorted(missing)}")
    return build(settings["model"], tuple(settings["shape"]), settings["classes"], settings.get("dropout", 0.0))

"""``find``, ``explain``: one ticket of the paper's nets, and how its layers run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import torch

from ..execution import choose_execution
from ..explain import explain as explain_layers
from ..lab import data, distributed
from ..lab.experiment import run
from ..lab.settings import PRESETS, Settings, preset, scaled
from ..ticket import Ticket
from .options import add_out, add_settings, given, positive
from .runs import RUN_TEXT, kept, net, round_file, trainings
from .tables import Columns, header, print_rows, progress, row

EXPLAIN_NOTE = (
    "ms: forward and backward of the native call that the layer is part of, with the layer run so; -: cannot be.\n"
    "packs: whole activations and gradients that a training step rewrites for the layer: of a chain of linear layers\n"
    "its input and its output's gradient; of a convolution none, its kernel rewrites blocks that fit a cache."
)
ROUND_COLUMNS: Columns = (
    ("round", lambda r: str(r["round"])),
    ("weights %", lambda r: f"{100 * r['density']:.1f}"),
    ("test %", lambda r: f"{100 * r['early_stop_test_accuracy']:.2f}"),
    ("stops at", lambda r: str(r["early_stop_iteration"])),
    ("sparse ms/step", lambda r: f"{r['sparse_ms']:.3f}"),
    ("dense ms/step", lambda r: f"{r['dense_ms']:.3f}"),
    ("speed-up", lambda r: f"{r['dense_ms'] / r['sparse_ms']:.2f}x"),
    ("sparse bytes", lambda r: f"{r['sparse_bytes']:,}"),
    ("dense bytes", lambda r: f"{r['dense_bytes']:,}"),
)


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command("find", find, "Find a ticket of one of the paper's nets by iterative magnitude pruning.")
    sub.add_argument("--model", choices=PRESETS, help="default: lenet-300-100")
    presets = [vars(settings) for settings in (preset(), *PRESETS.values())]
    common = {name: value for name, value in presets[0].items() if all(each[name] == value for each in presets)}
    add_settings(sub, Settings, common, leave_out=["model"])
    sub.add_argument(
        "--scale", type=float, default=1.0, metavar="X", help="of the iterations, warm-up and rewind step; default: 1"
    )
    sub.add_argument("--threads", type=positive, help="default: torch's")
    add_out(sub)

    text = "Measure how each layer of a run's last round runs best; show that, and its bytes."
    sub = command("explain", explain, text)
    sub.add_argument("run", type=Path, metavar="RUN", help=RUN_TEXT)


def find(args: argparse.Namespace) -> None:
    """Of several processes, started by torchrun, the first one prints."""
    with (
        distributed.from_environment() as rank,
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere if rank else sys.stdout),
    ):
        _find(args)


def _find(args: argparse.Namespace) -> None:
    settings = scaled(preset(**given(args, Settings)), args.scale)
    out = args.out / settings.name
    rounds = settings.prunings
    before = trainings(out, rounds + 1)
    args.kept = lambda: kept(trainings(out, rounds + 1), rounds + 1, out)
    print(f"{settings.data}: {settings.model}, {rounds + 1} trainings of {settings.iterations} iterations, into {out}")
    images = data.load(settings.data)
    for note in filter(None, (settings.scale, images.note)):
        print(f"note: {note}")
    print(header(ROUND_COLUMNS))
    with progress(f"round 0 of {rounds}", settings.iterations) as (update, say):

        def on_round(record: dict) -> None:
            say(row(ROUND_COLUMNS, record))
            update(completed=0, description=f"round {min(record['round'] + 1, rounds)} of {rounds}")

        ticket = run(settings, images, out, on_round, on_eval=lambda iteration: update(completed=iteration))
    if before == rounds + 1:
        print("nothing was trained: the run was finished before")
    path = out / "ticket.safetensors"
    print(f"\nticket: {path} ({ticket.density:.1%} of the weights, {path.stat().st_size:,} bytes)")
    print(f"next:   sparselottery explain {out}\n        sparselottery export {out} --out trained")


def explain(args: argparse.Namespace) -> None:
    path = round_file(args.run, None)
    ticket = Ticket.load(path)
    model, settings = ticket.apply(net(ticket)), ticket.recipe["settings"]
    choose_execution(model, torch.randn(settings["batch"], *settings["shape"]))
    print(f"{path}: {ticket.density:.1%} of the weights; measured with {torch.get_num_threads()} threads")
    print_rows(explain_layers(model))
    print(EXPLAIN_NOTE)

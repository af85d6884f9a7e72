"""``find``, ``explain``: one ticket of one of the paper's nets or of your own, and how its layers run."""

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
from .own import TEXT as OWN_TEXT
from .own import find_own
from .runs import RUN_TEXT, add_example, add_own_net, example_of, kept, net, round_file, trainings
from .tables import Columns, header, print_rows, progress, row
from .user_code import check_example, is_own

EXPLAIN_NOTE = (
    "ms: forward and backward of the native call that the layer is part of, with the layer run so; -: cannot be.\n"
    "packs: whole activations and gradients that a training step rewrites for the layer: of a chain of linear layers\n"
    "its input and its output's gradient; of a convolution none, its kernel rewrites blocks that fit a cache."
)
SPEED_NOTE = (
    "speed-up: over the faster of the whole net, which is round 0 by the same steps, and torch's w * mask, whose step\n"
    "takes turns with ours. All three are milliseconds a step."
)
ROUND_COLUMNS: Columns = (
    ("round", lambda r: str(r["round"])),
    ("weights %", lambda r: f"{100 * r['density']:.1f}"),
    ("test %", lambda r: f"{100 * r['early_stop_test_accuracy']:.2f}"),
    ("stops at", lambda r: str(r["early_stop_iteration"])),
    ("ms/step", lambda r: f"{r['sparse_ms']:.3f}"),
    ("whole net", lambda r: f"{r['whole_ms']:.3f}"),
    ("w * mask", lambda r: f"{r['dense_ms']:.3f}"),
    ("speed-up", lambda r: f"{min(r['whole_ms'], r['dense_ms']) / r['sparse_ms']:.2f}x"),
    ("sparse bytes", lambda r: f"{r['sparse_bytes']:,}"),
    ("dense bytes", lambda r: f"{r['dense_bytes']:,}"),
)


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    text = "Find a ticket by iterative magnitude pruning: of one of the paper's nets, or of a net of your own."
    sub = command("find", find, text)
    sub.epilog, sub.formatter_class = OWN_TEXT, argparse.RawDescriptionHelpFormatter
    own = f"one of {', '.join(PRESETS)}, or MODULE:FUNCTION, which makes a net of your own; default: lenet-300-100"
    sub.add_argument("--model", type=_model, metavar="NET", help=own)
    sub.add_argument("--train", metavar="MODULE:FUNCTION", help="what trains the net of your own")
    add_example(sub)
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
    add_own_net(sub)


def _model(text: str) -> str:
    if not is_own(text) and text not in PRESETS:
        expected = f"expected one of {', '.join(PRESETS)}, or MODULE:FUNCTION, as in mynet:make for make of mynet.py"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
    return text


def find(args: argparse.Namespace) -> None:
    """Of several processes, started by torchrun, the first one prints."""
    with (
        distributed.from_environment() as rank,
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere if rank else sys.stdout),
    ):
        (find_own if is_own(args.model) else _find)(args)


def _find(args: argparse.Namespace) -> None:
    if wrong := next((name for name in ("train", "example") if getattr(args, name)), None):
        raise ValueError(
            f"--{wrong}: expected with --model MODULE:FUNCTION only, got {args.model or 'the default net'}"
        )
    settings = scaled(preset(**given(args, Settings)), args.scale)
    out = args.out / settings.name
    rounds = settings.prunings
    before = trainings(out, rounds + 1)
    args.kept = lambda: kept(trainings(out, rounds + 1), rounds + 1, out)
    images = data.load(settings.data)
    trained = f"{rounds + 1} trainings of {settings.iterations} iterations"
    notes = [f"note: {note}" for note in (settings.scale, images.note) if note]
    head = [f"{settings.data}: {settings.model}, {trained}, into {out}", *notes, header(ROUND_COLUMNS)]
    with progress(f"round 0 of {rounds}", settings.iterations, head) as (update, say):
        whole_ms = None

        def on_round(record: dict) -> None:
            nonlocal whole_ms
            whole_ms = whole_ms or record["sparse_ms"]
            say(row(ROUND_COLUMNS, record | {"whole_ms": whole_ms}))
            update(completed=0, description=f"round {min(record['round'] + 1, rounds)} of {rounds}")

        ticket = run(settings, images, out, on_round, on_eval=lambda iteration: update(completed=iteration))
    if before == rounds + 1:
        print("nothing was trained: the run was finished before")
    print(SPEED_NOTE)
    path = out / "ticket.safetensors"
    print(f"\nticket: {path} ({ticket.density:.1%} of the weights, {path.stat().st_size:,} bytes)")
    print(f"next:   sparselottery explain {out}\n        sparselottery export {out} --out trained")


def explain(args: argparse.Namespace) -> None:
    path = round_file(args.run, None)
    ticket = Ticket.load(path)
    model, example = net(ticket, args.model), example_of(ticket, args.example)
    if example is None:
        raise ValueError("--example: expected an input of the net, or what returns one, as MODULE:NAME, got none")
    model = ticket.apply(model)
    if args.example:
        check_example(model, example, args.example)
    choose_execution(model, example)
    print(f"{path}: {ticket.density:.1%} of the weights; measured with {torch.get_num_threads()} threads")
    print_rows([{name: cell for name, cell in row.items() if name != "prunable"} for row in explain_layers(model)])
    print(EXPLAIN_NOTE)

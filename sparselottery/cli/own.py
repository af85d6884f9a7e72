"""``find --model MODULE:FUNCTION --train MODULE:FUNCTION``: a ticket of a net of your own, by your own training."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from typing import Any

from torch import nn

from ..lab.executions import settle
from ..lab.settings import Settings, check
from ..lottery import find_ticket
from ..random_state import random_state_kept, seed_all
from .options import given
from .runs import kept, trainings
from .tables import Columns, header, progress, row
from .user_code import blamed, check_call, check_example, load, load_example, load_net

TEXT = """\
nets of your own:
  sparselottery find --model mynet:make --train mynet:train --rounds 10 --example mynet:example

  mynet is a module that Python can import from the current folder (mynet.py, or a package). There,
    make()        returns a new nn.Module;
    train(model)  trains it in place, with an optimiser that it makes itself, and may return a dict of numbers
                  ({"test accuracy": 0.97}), which are shown, kept in the run and drawn by `report` (texts and lists
                  in it are kept, no more); with --rewind-step
                  it takes start and stop too, the steps to train from and to: train(model, start=0, stop=None);
    example       is an input of the net or a function that returns one: a tensor, a tuple of arguments or a dict of
                  keyword arguments. With it each layer runs in the way that a measurement finds fastest.
  Everything else is the training's: --batch, --lr, --data and the like are for the paper's nets. The same command goes
  on where an interrupted run stopped, and with more --rounds where a finished one ended. What it was is known by these
  names and options, not by the code behind them: after changing that, give another --out.
"""
OPTIONS = (
    "model", "rounds", "fraction", "seed", "rewind_step", "one_shot", "retrain", "scope", "granularity", "permute",
)  # fmt: skip
RETRAIN = ("rewind", "continue")
DEFAULT_ROUNDS = 10


def find_own(args: argparse.Namespace) -> None:
    """As `find` for one of the paper's nets: the same folder, the same progress, resumable."""
    settings, pruning = _settings(args)
    with random_state_kept():
        seed_all(settings["seed"])  # of what modules draw when they are imported, too
        _find_own(args, settings, pruning)


def _find_own(args: argparse.Namespace, settings: dict[str, Any], pruning: dict[str, Any]) -> None:
    train = load("--train", args.train)
    _check_train(args.train, train, pruning["rewind_step"])
    example = load_example(args.example) if args.example else None
    rounds, out = pruning.pop("rounds"), args.out / _name(settings, pruning)
    before = trainings(out, rounds + 1)
    args.kept = lambda: kept(trainings(out, rounds + 1), rounds + 1, out)
    columns: Columns = ()

    head = [f"{args.model}: {rounds + 1} trainings by {args.train}, into {out}"]
    with progress(f"round 0 of {rounds}", rounds + 1, head) as (update, say):

        def trained(model: nn.Module, **steps: Any) -> dict[str, Any]:
            update()
            if example is not None:
                with blamed(f"{args.model} on {args.example}"):
                    settle(model, example, out / "executions")
            with blamed(args.train):
                return train(model, **steps)

        def on_round(record: dict[str, Any]) -> None:
            nonlocal columns
            if not columns:
                columns = _columns(record)
                say(header(columns))
            say(row(columns, record))
            done = record["round"] + 1
            update(completed=done, description=f"round {min(done, rounds)} of {rounds}")

        seed_all(settings["seed"])
        model = load_net(args.model)
        if example is not None:
            check_example(model, example, args.example)
        options = {**pruning, "rounds": rounds, "out": out, "settings": settings, "on_round": on_round}
        try:
            ticket = find_ticket(model, trained, **options)
        except TypeError as error:
            if not str(error).startswith("train:"):
                raise
            raise ValueError(f"{args.train} returned what cannot be kept: {error}") from None
    if before == rounds + 1:
        print("nothing was trained: the run was finished before")
    path = out / "ticket.safetensors"
    print(f"\nticket: {path} ({ticket.density:.1%} of the weights, {path.stat().st_size:,} bytes)")
    known = "" if ticket.architecture else f" --model {args.model}"
    shown = f" --example {args.example}" if args.example else " --example MODULE:NAME"
    print(f"next:   sparselottery report {out}\n        sparselottery explain {out}{known}{shown}")
    print(f"        sparselottery export {out}{known} --format safetensors --out trained.safetensors")


def _check_train(name: str, train: Any, rewind_step: int) -> None:
    if not callable(train):
        raise ValueError(f"--train: expected a function that trains a model, got {type(train).__name__} {name}")
    check_call(f"--train: expected {name} to take the model alone", train, object())
    if rewind_step:
        check_call(
            f"--train: expected {name} to take start and stop, for --rewind-step", train, object(), start=0, stop=1
        )


def _settings(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the run is known by, and how `find_ticket` is to prune; ValueError for options of the paper's nets."""
    chosen = given(args, Settings)
    foreign = [name for name in chosen if name not in OPTIONS] + ["scale"] * (args.scale != 1)
    if foreign:
        raise ValueError(f"--{foreign[0].replace('_', '-')}: expected with one of the paper's nets only; "
                         f"of {args.model} it is up to --train")  # fmt: skip
    if not args.train:
        raise ValueError(f"--train: expected the function that trains {args.model}, as MODULE:NAME, got none")
    if (retrain := chosen.get("retrain", "rewind")) not in RETRAIN:
        raise ValueError(f"--retrain: expected one of {', '.join(RETRAIN)} for a net of your own, got {retrain!r}")
    check({name: value for name, value in chosen.items() if name not in ("model", "rounds")})
    rounds, fraction = chosen.get("rounds", DEFAULT_ROUNDS), chosen.get("fraction", 0.2)
    if chosen.get("one_shot"):
        rounds, fraction = 1, 1 - (1 - fraction) ** rounds
    pruning = {
        "rounds": rounds,
        "fraction": fraction,
        "rewind_step": chosen.get("rewind_step", 0),
        "reset": retrain == "rewind",
        "scope": chosen.get("scope", "layer"),
        "granularity": chosen.get("granularity", (1, 1)),
    }
    if chosen.get("permute"):  # else left out, so that the name of a run stays what it was
        pruning["permute"] = True
    names = {"model": args.model, "train": args.train, "example": args.example}
    shown = {"seed": chosen.get("seed", 0), "fraction": fraction, "scope": pruning["scope"]}
    return {**names, **shown, "one_shot": bool(chosen.get("one_shot")), "rewind_step": pruning["rewind_step"]}, pruning


def _name(settings: dict[str, Any], pruning: dict[str, Any]) -> str:
    """``<module>-<function>-<hash>``, the same for any number of rounds."""
    digest = hashlib.sha256(json.dumps([settings, pruning], sort_keys=True).encode()).hexdigest()
    return f"{settings['model'].replace(':', '-')}-{digest[:8]}"


def _columns(record: dict[str, Any]) -> Columns:
    """For all records like this one: what every round has, then the numbers that the training returned."""

    def number(key: str) -> Callable[[dict], str]:
        return lambda each: f"{each[key]:.6g}" if _is_number(each.get(key)) else "-"

    fixed: Columns = (
        ("round", lambda r: str(r["round"])),
        ("weights %", lambda r: f"{100 * r['density']:.1f}"),
        ("   seconds", lambda r: f"{r['seconds']:.4g}"),
    )
    own = [key for key in record if key not in ("round", "density", "nnz", "total", "seconds")]
    return fixed + tuple((key.rjust(10), number(key)) for key in own if _is_number(record[key]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

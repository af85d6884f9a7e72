"""``export`` and ``info``: tickets for other tools, and what runs here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ..export import FORMATS
from ..export import export as write_export
from ..info import info as versions
from ..ticket import Ticket
from .runs import RUN_TEXT, add_own_net, example_of, net, round_file
from .user_code import check_example


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    command("info", info, "Show versions and which backends run here, or why not.")

    sub = command("export", export, "Export the trained weights of a round for other tools to read.")
    sub.add_argument("run", type=Path, metavar="RUN", help=RUN_TEXT)
    sub.add_argument("--format", choices=sorted(FORMATS), default="npz", help="default: %(default)s")
    sub.add_argument("--out", type=Path, required=True, help="where to write")
    sub.add_argument("--round", type=int, help="default: the last one")
    sub.add_argument("--fold-batchnorm", action="store_true", help="into the layers before them")
    sub.add_argument("--remove-dead", action="store_true", help="units that nothing goes into or comes out of")
    add_own_net(sub)
    sub.add_argument("--sparse-initializer", action="store_true", help="onnx: smaller in the file, executed densely")


def info(args: argparse.Namespace) -> None:
    rows = versions()
    for name, value in rows.items():
        print(name.ljust(max(map(len, rows))), value)


def export(args: argparse.Namespace) -> None:
    source = round_file(args.run, args.round)
    ticket = Ticket.load(source)
    known = ticket.architecture is not None or "model" not in (ticket.recipe.get("settings") or {})
    exported = ticket if known and args.model is None else ticket.apply(net(ticket, args.model))
    example = example_of(ticket, args.example, batch=2)
    if args.example:
        check_example(ticket.apply() if exported is ticket else exported, example, args.example)
    report = write_export(
        exported,
        args.out,
        format=args.format,
        fold_batchnorm=args.fold_batchnorm,
        remove_dead=args.remove_dead,
        example_input=example,
        sparse_initializer=args.sparse_initializer,
    )
    print(f"{source} -> {report.path} ({report.format}, {report.bytes:,} bytes)")
    if args.fold_batchnorm:
        print(f"batchnorms folded: {len(report.folded)}")
    if args.remove_dead:
        removed = ", ".join(f"{name} {count}" for name, count in report.removed.items())
        print(f"dead units removed: {sum(report.removed.values())}{removed and f' ({removed})'}")
    for note in report.notes:
        print(f"note: {note}")

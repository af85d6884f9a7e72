"""The command ``sparselottery``: find, explain, info, export, bench, bench-model. The only module that prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from .bench_model import bench_model, write_bench
from .execution import choose_execution
from .explain import explain
from .export import FORMATS, export
from .info import info
from .lab import data
from .lab.experiment import Settings, preset, run
from .lab.models import MODELS, build
from .lab.timing import linear_ms
from .pattern import BLOCKS
from .ticket import Ticket

EXIT_ERROR, EXIT_INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's error is one line on stderr and 2."""
    args = _parser().parse_args(argv)
    try:
        if getattr(args, "threads", None) is not None:
            torch.set_num_threads(args.threads)
        args.command(args)
    except (OSError, ValueError) as error:
        return _fail(" ".join(str(error).split()))
    except ModuleNotFoundError as error:
        extra = "export" if str(error.name).startswith("onnx") else "lab"
        return _fail(f"{error.name} is not installed: pip install 'sparselottery[{extra}]'")
    except KeyboardInterrupt:
        hint = "; the same command goes on after the last finished round" if args.command is _find else ""
        print(f"\nsparselottery: interrupted{hint}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _fail(message: str) -> int:
    print(f"sparselottery: {message}", file=sys.stderr)
    return EXIT_ERROR


def _find(args: argparse.Namespace) -> None:
    names = {field.name for field in fields(Settings)}
    settings = preset(**{name: value for name, value in vars(args).items() if name in names and value is not None})
    out = args.out / settings.name
    rounds = settings.prunings
    columns = ROUND_COLUMNS + (REINIT_COLUMNS if settings.reinit else ())
    print(f"{settings.data}: {settings.model}, {rounds + 1} trainings of {settings.iterations} iterations, into {out}")
    images = data.load(settings.data)
    if images.note:
        print(f"note: {images.note}")
    print(_line(header for header, _ in columns))
    with _progress(f"round 0 of {rounds}", settings.iterations) as (update, say):

        def on_round(record: dict) -> None:
            say(_line(cell(record).rjust(len(header)) for header, cell in columns))
            update(completed=0, description=f"round {min(record['round'] + 1, rounds)} of {rounds}")

        ticket = run(settings, images, out, on_round, on_eval=lambda iteration: update(completed=iteration))
    path = out / "ticket.safetensors"
    print(f"\nticket: {path} ({ticket.density:.1%} of the weights, {path.stat().st_size:,} bytes)")
    print(f"next:   sparselottery explain {out}\n        sparselottery export {out} --out trained")


def _explain(args: argparse.Namespace) -> None:
    path = _round_file(args.run, None)
    ticket = Ticket.load(path)
    model, settings = ticket.apply(_net(ticket)), ticket.recipe["settings"]
    choose_execution(model, torch.randn(settings["batch"], *settings["shape"]))
    print(f"{path}: {ticket.density:.1%} of the weights; measured with {torch.get_num_threads()} threads")
    _print_rows(explain(model))
    print(EXPLAIN_NOTE)


def _info(args: argparse.Namespace) -> None:
    rows = info()
    for name, value in rows.items():
        print(name.ljust(max(map(len, rows))), value)


def _export(args: argparse.Namespace) -> None:
    source = _round_file(args.run, args.round)
    ticket = Ticket.load(source)
    if ticket.architecture is None and "model" in (ticket.recipe.get("settings") or {}):
        exported = ticket.apply(_net(ticket))
    else:
        exported = ticket
    shape = (ticket.recipe.get("settings") or {}).get("shape")
    report = export(
        exported,
        args.out,
        format=args.format,
        fold_batchnorm=args.fold_batchnorm,
        remove_dead=args.remove_dead,
        example_input=torch.randn(2, *shape) if shape else None,
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


def _bench_model(args: argparse.Namespace) -> None:
    rows = bench_model(args.file, args.batch, args.shape, args.seconds)
    print(f"{args.file}: float32, {torch.get_num_threads()} threads; speedup: that of sparselottery over the row")
    _print_rows(rows)
    for path in write_bench(rows, args.out) if args.out else ():
        print(f"-> {path}")


def _bench(args: argparse.Namespace) -> None:
    cases = [(shape, density) for shape in args.shape for density in args.density]
    rows = []
    with _progress("linear layers", len(cases)) as (update, _):
        for shape, density in cases:
            ms = linear_ms(*shape, density)
            row: dict[str, object] = {"batch, in, out": "x".join(map(str, shape)), "density": density}
            for key, title in (("forward", "fwd"), ("both", "fwd+bwd")):
                sparse, dense = ms[f"{key}_sparse_ms"], ms[f"{key}_dense_ms"]
                row |= {f"{title} sparse ms": sparse, f"{title} dense ms": dense}
                row[f"{title} speed-up"] = f"{dense / sparse:.2f}x"
            rows.append(row)
            update(completed=len(rows))
    print(f"MaskedLinear against nn.Linear, float32, {torch.get_num_threads()} threads, medians of alternating bursts")
    _print_rows(rows)


EXPLAIN_NOTE = (
    "ms: forward and backward of the native call that the layer is part of, with the layer run so; -: cannot be.\n"
    "packs: whole activations and gradients that a training step rewrites for the layer: of a chain of linear layers\n"
    "its input and its output's gradient; of a convolution none, its kernel rewrites blocks that fit a cache."
)
ROUND_COLUMNS: tuple[tuple[str, Callable[[dict], str]], ...] = (
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
REINIT_COLUMNS: tuple[tuple[str, Callable[[dict], str]], ...] = (
    ("reinit test %", lambda r: f"{100 * r['reinit_early_stop_test_accuracy']:.2f}"),
    ("reinit stops at", lambda r: str(r["reinit_early_stop_iteration"])),
)


def _line(cells: Iterable[str]) -> str:
    return "  ".join(cells)


def _print_rows(rows: list[dict]) -> None:
    """Rows with the same keys as a table: right-aligned, but for the reasons at the end."""
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [0 if column[0] == "why" else max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print(_line(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return "-" if value is None else str(value)


@contextmanager
def _progress(description: str, total: int) -> Iterator[tuple[Callable[..., None], Callable[[str], None]]]:
    """A bar on a terminal, nothing elsewhere.

    Yields ``update(completed=..., description=...)`` and ``say(line)``, which prints above the bar.
    """
    if not sys.stdout.isatty():
        yield (lambda **_: None), partial(print, flush=True)
        return
    from rich.progress import Progress

    with Progress(transient=True, auto_refresh=False) as progress:  # a thread that draws would disturb what is timed
        task, drawn = progress.add_task(description, total=total), 0.0

        def update(**changes: object) -> None:
            nonlocal drawn
            progress.update(task, **changes)
            if perf_counter() - drawn > 0.1:
                progress.refresh()
                drawn = perf_counter()

        yield update, partial(progress.console.print, markup=False, highlight=False, soft_wrap=True)


def _round_file(run: Path, number: int | None) -> Path:
    """The file of a round's trained weights; the last round's for None."""
    files = sorted(run.glob("round-*.safetensors" if number is None else f"round-{number:02d}.safetensors"))
    if not files:
        wanted = "a finished round" if number is None else f"round {number}"
        raise FileNotFoundError(f"{run}: expected a run folder with {wanted} (round-NN.safetensors), found none")
    return files[-1]


def _net(ticket: Ticket) -> nn.Sequential:
    """A net like the one that a ticket of this command was found in."""
    settings = ticket.recipe.get("settings") or {}
    if missing := {"model", "shape", "classes", "batch"} - settings.keys():
        raise ValueError(f"expected a ticket of `sparselottery find`, found one whose settings lack {sorted(missing)}")
    return build(settings["model"], tuple(settings["shape"]), settings["classes"])


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _shape(text: str) -> tuple[int, int, int]:
    sizes = tuple(_positive(size) for size in text.split(","))
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"expected batch,in,out, got {text!r}")
    return sizes


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_positive(size) for size in text.split(","))


def _granularity(text: str) -> tuple[int, int]:
    sizes = tuple(_positive(size) for size in text.split("x"))
    if len(sizes) != 2:
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS, got {text!r}")
    return sizes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparselottery", description="Find lottery tickets and run them sparse.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        return sub

    find = command("find", _find, "Find a ticket of one of the paper's nets by iterative magnitude pruning.")
    find.add_argument("--model", choices=MODELS, help="default: lenet-300-100")
    find.add_argument("--data", choices=data.NAMES, help="default: digits, offline, for Lenet; else cifar10")
    find.add_argument("--rounds", type=int, help="prunings; default: the net's, 16 or 20; for the digits 12")
    find.add_argument("--fraction", type=float, help="of the survivors pruned per round, less in some layers; 0.2")
    find.add_argument(
        "--granularity",
        type=_granularity,
        metavar="RxC",
        help="prune whole blocks of R rows (filters) x C columns (channels at one tap), except in the output layer; "
        f"block kernels for GPUs exist for {', '.join(f'{rows}x{cols}' for rows, cols in BLOCKS)}; default: 1x1",
    )
    find.add_argument("--iterations", type=int, help="per training; default: the paper's; for the digits 3000")
    find.add_argument("--batch", type=int, help="default: the paper's")
    find.add_argument("--lr", type=float, help="learning rate; default: the paper's")
    find.add_argument("--warmup", type=int, help="iterations until the learning rate is reached; default: 0")
    find.add_argument("--seed", type=int, help="of the first weights and the data order; default: 0")
    find.add_argument("--rewind-step", type=int, help="reset to the weights of this iteration; default: 0")
    find.add_argument("--one-shot", action="store_true", help="prune once, to where all rounds would lead")
    find.add_argument("--continued", action="store_true", help="do not reset between the rounds")
    find.add_argument("--reinit", action="store_true", help="also train every mask from other initial weights")
    find.add_argument("--device", choices=("cpu", "cuda"), help="where to train; default: cpu")
    find.add_argument("--threads", type=_positive, help="default: torch's")
    find.add_argument("--out", type=Path, default=Path("runs"), help="parent of the run folder; default: %(default)s")

    sub = command(
        "explain", _explain, "Measure how each layer of a run's last round runs best; show that, and its bytes."
    )
    sub.add_argument("run", type=Path, metavar="RUN", help="a run folder of `find`")

    command("info", _info, "Show versions and which backends run here, or why not.")

    sub = command("export", _export, "Export the trained weights of a round for other tools to read.")
    sub.add_argument("run", type=Path, metavar="RUN", help="a run folder of `find`")
    sub.add_argument("--format", choices=sorted(FORMATS), default="npz", help="default: %(default)s")
    sub.add_argument("--out", type=Path, required=True, help="where to write")
    sub.add_argument("--round", type=int, help="default: the last one")
    sub.add_argument("--fold-batchnorm", action="store_true", help="into the layers before them")
    sub.add_argument("--remove-dead", action="store_true", help="units that nothing goes into or comes out of")
    sub.add_argument("--sparse-initializer", action="store_true", help="onnx: smaller in the file, executed densely")

    sub = command("bench", _bench, "Time MaskedLinear against nn.Linear on this machine.")
    sub.add_argument("--density", type=float, nargs="+", default=[0.5, 0.2, 0.1, 0.05], help="default: %(default)s")
    shapes = [(128, 784, 300), (512, 1024, 1024)]
    sub.add_argument("--shape", type=_shape, nargs="+", default=shapes, metavar="N,I,O", help="batch, in, out")
    sub.add_argument("--threads", type=_positive, help="default: torch's")

    text = "Time a ticket's or an export's net against dense torch, torch.compile and ONNX Runtime."
    sub = command("bench-model", _bench_model, text)
    sub.add_argument("file", type=Path, metavar="FILE", help="a .safetensors file that knows its architecture")
    sub.add_argument("--batch", type=_sizes, default=(1, 64), metavar="N,N", help="default: 1,64")
    sub.add_argument("--shape", type=_sizes, metavar="C,H,W", help="of one input; default: what the file tells")
    sub.add_argument("--seconds", type=float, default=3.0, help="of calls for each row; default: %(default)s")
    sub.add_argument("--threads", type=_positive, help="default: torch's")
    sub.add_argument("--out", type=Path, help="folder for table.csv and, with matplotlib, plot.svg")
    return parser

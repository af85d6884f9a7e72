"""``bench`` and ``bench-model``: sparse against dense on this machine."""

from __future__ import annotations

import argparse
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch

from ..bench_model import bench_model, write_bench
from ..lab.timing import linear_ms
from ..ticket import Ticket
from .options import positive, sizes, three_sizes
from .runs import add_own_net
from .tables import print_rows, progress
from .user_code import check_example, load_example, load_net


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command("bench", bench, "Time MaskedLinear against nn.Linear on this machine.")
    sub.add_argument("--density", type=float, nargs="+", default=[0.5, 0.2, 0.1, 0.05], help="default: %(default)s")
    shapes = [(128, 784, 300), (512, 1024, 1024)]
    sub.add_argument("--shape", type=three_sizes, nargs="+", default=shapes, metavar="N,I,O", help="batch, in, out")
    sub.add_argument("--threads", type=positive, help="default: torch's")

    text = "Time a ticket's or an export's net against dense torch, torch.compile and ONNX Runtime."
    sub = command("bench-model", bench_net, text)
    sub.add_argument("file", type=Path, metavar="FILE", help="a .safetensors file; of a net of your own with --model")
    add_own_net(sub)
    sub.add_argument("--batch", type=sizes, default=(1, 64), metavar="N,N", help="default: 1,64")
    sub.add_argument("--shape", type=sizes, metavar="C,H,W", help="of one input; default: what the file tells")
    sub.add_argument("--seconds", type=float, default=3.0, help="of calls for each row; default: %(default)s")
    sub.add_argument("--threads", type=positive, help="default: torch's")
    sub.add_argument("--out", type=Path, help="folder for table.csv and, with matplotlib, plot.svg")


def bench(args: argparse.Namespace) -> None:
    cases = [(shape, density) for shape in args.shape for density in args.density]
    rows = []
    with progress("linear layers", len(cases)) as (update, _):
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
    print_rows(rows)


def bench_net(args: argparse.Namespace) -> None:
    model = load_net(args.model) if args.model else None
    example = load_example(args.example) if args.example else None
    if example is not None:
        check_example(Ticket.load(args.file).apply(model), example, args.example)
    with _without_chatter():
        rows = bench_model(args.file, args.batch, args.shape, args.seconds, model=model, example_input=example)
    print(f"{args.file}: float32, {torch.get_num_threads()} threads; speedup: that of sparselottery over the row")
    print_rows(rows)
    for path in write_bench(rows, args.out) if args.out else ():
        print(f"-> {path}")


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Without what Inductor writes to stderr of all it has timed, and the exporter's log of a missing torchvision.

    Warnings come afterwards.
    """
    exporter = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings(record=True) as told:
            yield
    finally:
        exporter.setLevel(level)
        for each in told:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)

"""The command ``sparselottery``. The only package that prints."""

from __future__ import annotations

import argparse
import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import metadata
from pathlib import Path

import torch

from .. import __version__
from ..lab.distributed import TORCHRUN
from ..started import EXIT_INTERRUPTED
from . import bench, export, find, lab

EXIT_ERROR, EXIT_PIPE, EXIT_TERMINATED = 2, 141, 143  # from 128 on: as of a signal's death
EXTRAS = {"onnx": "export", "onnxruntime": "export", "onnxscript": "export", "ray": "ray"}  # of the others: lab


class Terminated(KeyboardInterrupt):
    """SIGTERM came: it ends a command as Ctrl-C does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's error is one line on stderr and 2.

    Nobody reading the output any more is no error: the command ends, quietly. Interrupted, it says what is kept.
    """
    if sys.stdout is None:  # closed, as by >&-
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            return main(argv)
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # what is left to print goes there, at the latest when Python ends
        os.close(nowhere)
        return EXIT_PIPE


def _run(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    try:
        with _terminable():
            if getattr(args, "threads", None) is not None:
                torch.set_num_threads(args.threads)
            args.command(args)
    except (OSError, ValueError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise
        return _fail(" ".join(str(error).split()))
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(str(error.name).partition(".")[0], "lab")
        return _fail(f"{error.name} is not installed: pip install 'sparselottery[{extra}]'")
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":
            kept = args.kept() if "kept" in args else "nothing half-written is left"
            print(f"\nsparselottery: interrupted; {kept}; goes on with: {_command(argv)}", file=sys.stderr)
        return EXIT_TERMINATED if isinstance(stop, Terminated) else EXIT_INTERRUPTED
    return 0


def _nobody_reads() -> bool:
    """Is stdout a pipe whose reader is gone? Other pipes break too, those to jobs."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError):  # no poll on Windows; stdout without a descriptor
        return False


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated`, so that files in the making are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _command(argv: list[str]) -> str:
    """What was typed to get here."""
    start = ["sparselottery"]
    if os.environ.keys() >= TORCHRUN:
        start = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "-m", "sparselottery"]
    elif Path(sys.argv[0]).name == "__main__.py":
        start = [Path(sys.executable).name, "-m", "sparselottery"]
    return shlex.join([*start, *argv])


def _version() -> str:
    """Of the package that is installed; of the source tree that runs, if none is."""
    try:
        return metadata.version("sparselottery")
    except metadata.PackageNotFoundError:
        return __version__


def _fail(message: str) -> int:
    print(f"sparselottery: {message}", file=sys.stderr)
    return EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparselottery", description="Find lottery tickets and run them sparse.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        return sub

    for module in (find, lab, export, bench):
        module.add_commands(command)
    return parser

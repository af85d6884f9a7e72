"""The command ``sparselottery``. The only package that prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from . import bench, export, find, lab

EXIT_ERROR, EXIT_INTERRUPTED = 2, 130
EXTRAS = {"onnx": "export", "onnxruntime": "export", "onnxscript": "export", "ray": "ray"}  # of the others: lab


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
        extra = EXTRAS.get(str(error.name).partition(".")[0], "lab")
        return _fail(f"{error.name} is not installed: pip install 'sparselottery[{extra}]'")
    except KeyboardInterrupt:
        resumes = args.command in (find.find, lab.lab)
        hint = "; the same command goes on after the last finished round" if resumes else ""
        print(f"\nsparselottery: interrupted{hint}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _fail(message: str) -> int:
    print(f"sparselottery: {message}", file=sys.stderr)
    return EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparselottery", description="Find lottery tickets and run them sparse.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        return sub

    for module in (find, lab, export, bench):
        module.add_commands(command)
    return parser

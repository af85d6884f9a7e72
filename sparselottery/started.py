"""Ctrl-C while the command ``sparselottery`` still imports torch: one line and 130, as later; no traceback."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType

EXIT_INTERRUPTED = 130


def _as_command() -> bool:
    """Was Python started to run the command, as a script or by ``python -m sparselottery``?"""
    name = getattr(sys, "argv", [""])[0]
    return Path(name).stem == "sparselottery" or (name == "-m" and "sparselottery" in sys.orig_argv)


def _say(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    sys.stderr.write("\nsparselottery: interrupted before anything was begun\n")
    sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)  # else Python dies of the signal


if _as_command():
    sys.excepthook = _say

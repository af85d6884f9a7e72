"""A small grid on the digits, run as a user would: by a process that may be killed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

OPTIONS = [
    *("--data", "digits", "--rounds", "2", "--iterations", "40", "--eval-every", "20"),
    *("--trials", "2", "--controls", "reinit,order", "--draws", "1", "--workers", "2"),
]


def command(out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "sparselottery", "lab", "lenet", *OPTIONS, *options, "--out", str(out)]


def killed(out: Path, moment: Callable[[], bool]) -> bool:
    """Run the grid and kill it, with -9 and nothing else, at a moment; False if it had ended by then.

    Raises AssertionError if one of its processes lives on. Linux only.
    """
    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while not moment() and process.poll() is None:
            time.sleep(0.01)
        ended = process.poll() is not None
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 30
    while members := running(process.pid):
        assert time.monotonic() < deadline, f"living on: {members}"
        time.sleep(0.05)
    return not ended


def running(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = stat.read_text().split(" ", 1)
        except OSError:  # ended meanwhile
            continue
        state, _, _, its_session = rest.rpartition(")")[2].split()[:4]
        found += [int(pid)] if int(its_session) == session and state not in "ZX" else []
    return found


def finish(out: Path) -> None:
    subprocess.run(command(out), stdout=subprocess.DEVNULL, check=True)

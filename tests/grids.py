"""A small grid on the digits, run as a user would: by a process that may be killed. What of it must not change.

python tests/grids.py 20    kills it 20 times, each at another moment, and compares how it ends
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TIMES = {"seconds", "train_seconds", "eval_seconds", "train_step_ms", "eval_ms", "sparse_ms", "dense_ms"}
OPTIONS = [
    *("--data", "digits", "--rounds", "2", "--iterations", "40", "--eval-every", "20"),
    *("--trials", "2", "--controls", "reinit,order", "--draws", "1", "--workers", "2"),
]


def command(out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "sparselottery", "lab", "lenet", *OPTIONS, *options, "--out", str(out)]


def results(out: Path) -> dict[str, object]:
    """Of every file of the grids in a folder what is not a time: the bytes of tensors, the numbers of records."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("[!.]*.*")):
        key = str(path.relative_to(out))
        if path.suffix == ".safetensors":
            found[key] = path.read_bytes()
        elif path.suffix == ".json":
            record = json.loads(path.read_text())
            found[key] = {name: value for name, value in record.items() if name not in TIMES}
    return found


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


def after(seconds: float) -> Callable[[], bool]:
    """The moment so many seconds from now."""
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() > deadline


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


def main(times: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        finish(Path(folder) / "whole")
        longest, expected = time.monotonic() - began, results(Path(folder) / "whole")
        for number in range(times):
            out, moment = Path(folder) / str(number), random.uniform(0, longest)
            cut = killed(out, after(moment))
            finish(out)
            assert results(out) == expected, f"killed after {moment:.2f} s it ended otherwise"
            print(f"{number + 1} of {times}: {'killed' if cut else 'ended'} after {moment:.2f} s, the same end")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(int(sys.argv[1]))

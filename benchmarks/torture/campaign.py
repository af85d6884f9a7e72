"""Many cases of one part: in a process that may crash or hang, and is started again with the case after."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("layers", "files", "threads", "kills", "saves")
LIMIT = 300.0  # seconds without a word, after which a case is said to hang
LINES, COLUMNS = 20, 160  # of what a crash said, that are shown


class Outcome(NamedTuple):
    """Cases [first, first + tried) were tried; failures: case and reason."""

    tried: int
    failures: list[tuple[int, str]]
    seconds: float


def module(part: str) -> str:
    return f"{__package__}.{part}"


def command(part: str, seed: int, case: int) -> str:
    """What tries one case again."""
    return f"python -m benchmarks.torture {part} --seed {seed} --first {case} --cases 1"


def run(part: str, seed: int, first: int, cases: int, seconds: float, tell: Callable[[str], None]) -> Outcome:
    """Tries cases [first, first + cases) of a part, as many as begin within so many seconds.

    tell: is given each failure, with the line that tries it again.
    """
    began, tried, failures = time.monotonic(), 0, []
    prepare = getattr(import_module(module(part)), "prepare", None)
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        folder = Path(name)
        environment = prepare(folder) if prepare else {}
        began = time.monotonic()  # building is no trying
        while tried < cases and (left := seconds - (time.monotonic() - began)) > 0:
            arguments = [module(part), seed, first + tried, cases - tried, left, folder]
            done, found = worker([str(each) for each in arguments], environment, folder / "stderr")
            for number, reason in found:
                tell(f"{part} {number}: {reason}\n  {command(part, seed, number)}")
            tried, failures = tried + done, failures + found
            if not done:
                raise RuntimeError(f"{part}: no case begun: {_tail(folder / 'stderr')}")
    return Outcome(tried, failures, time.monotonic() - began)


def worker(arguments: list[str], environment: dict[str, str], errors: Path) -> tuple[int, list[tuple[int, str]]]:
    """How many cases a process with these arguments of `worker` ended, and the failures; it may end by a crash."""
    tried, failures, open_case, hangs = 0, [], None, False
    places = {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.torture.worker", *arguments],
            cwd=errors.parent,
            env=os.environ | places | environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
    with process.stdout:
        try:
            for line in _lines(process.stdout.fileno()):
                said = json.loads(line)
                if "begin" in said:
                    open_case = said["begin"]
                    continue
                tried, open_case = tried + 1, None
                if said["failed"]:
                    failures.append((said["end"], said["failed"]))
        except TimeoutError:
            hangs = True
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it left behind as well
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    if open_case is not None:
        why = f"nothing for {LIMIT:.0f} s" if hangs else f"the process ended with {code}"
        failures.append((open_case, f"{why}\n{_tail(errors)}"))
        tried += 1
    return tried, failures


def _lines(descriptor: int) -> Iterator[bytes]:
    """Those that come, until the end; TimeoutError if none comes."""
    rest = b""
    while select.select([descriptor], [], [], LIMIT)[0]:
        data = os.read(descriptor, 2**16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
    raise TimeoutError


def _tail(path: Path) -> str:
    """What matters of a report: from where a sanitizer begins the frames of our code, or the last lines."""
    lines = path.read_text(errors="replace").splitlines()
    starts = [i for i, line in enumerate(lines) if "ERROR:" in line or "WARNING:" in line or "runtime error" in line]
    if starts:
        lines = [line for line in lines[starts[0] :] if "/csrc/" in line or "    #" not in line][:LINES]
    return "\n".join(line[:COLUMNS] for line in lines[-LINES:])

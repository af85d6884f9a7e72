"""`python -m benchmarks.torture.worker MODULE SEED FIRST CASES SECONDS FOLDER`: tries cases, for `campaign`.

It says {"begin": case} and {"end": case, "failed": reason or null}, a line each. A part's module has `trial(folder)`: a
context whose value tries the case that a random generator draws, and raises if anything is wrong.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path


def main(module: str, seed: int, first: int, cases: int, seconds: float, folder: Path) -> None:
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints does not mix with ours

    def say(**what: object) -> None:
        said.write(json.dumps(what) + "\n")
        said.flush()

    until = time.monotonic() + seconds
    with import_module(module).trial(folder) as attempt:
        for number in range(first, first + cases):
            if number > first and time.monotonic() > until:
                return
            say(begin=number)
            failed = None
            try:
                attempt(random.Random(f"{module.rpartition('.')[2]} {seed} {number}"))
            except Exception as error:  # any: it is what we look for
                failed = reason(error)
            say(end=number, failed=failed)


def reason(error: Exception) -> str:
    """In a line, with where it was raised."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    notes = "; ".join(getattr(error, "__notes__", ()))
    text = " ".join(f"{type(error).__name__}: {error} {notes}".split())
    return f"{text} ({Path(where.filename).name}:{where.lineno})"


if __name__ == "__main__":
    module, *numbers, folder = sys.argv[1:]
    main(module, *map(int, numbers[:3]), float(numbers[3]), Path(folder))

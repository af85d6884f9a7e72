"""A command in a process of its own, which may hang or die, and what it prints."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).parents[2]  # where it runs, and from where it imports
_NOTHING: Mapping[str, str] = MappingProxyType({})


def run(command: Sequence[object], limit: float, environment: Mapping[str, str] = _NOTHING) -> tuple[int | None, str]:
    """Its exit status and its output. The status is None if it, and all that it started, was killed at the limit."""
    process = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    except BaseException:  # an interrupt: what was started is not to use the GPU beside what comes next
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise

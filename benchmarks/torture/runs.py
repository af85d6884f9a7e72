"""The command line in forks of one process, which imported torch once; and what of a run must not change."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from sparselottery import cli
from sparselottery.lab import data

LIMIT_SECONDS = 240
TIMES = {"seconds", "train_seconds", "eval_seconds", "train_step_ms", "eval_ms", "sparse_ms", "dense_ms"}
SMALL = ("--data", "digits", "--rounds", "2", "--iterations", "40", "--eval-every", "20")
FIND = ("find", *SMALL, "--threads", "1")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
FORMATS = ("npz", "safetensors", "torch-csr", "dense", "pt2")


def results(out: Path) -> dict[str, object]:
    """Of every file in a folder of runs what is not a time: the bytes of tensors, the numbers of records."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("[!.]*.*")):
        key = str(path.relative_to(out))
        if path.suffix == ".safetensors":
            found[key] = path.read_bytes()
        elif path.suffix == ".json":
            record = json.loads(path.read_text())
            found[key] = {name: value for name, value in record.items() if name not in TIMES}
    return found


def contents(path: Path) -> dict[str, bytes] | None:
    """The bytes of a file, or of all files in a folder; None if nothing is there."""
    if path.is_dir():
        return {str(each.relative_to(path)): each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file()}
    return {"": path.read_bytes()} if path.exists() else None


class Wholes:
    """What commands write when nobody disturbs them, in a folder; each is run once, when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, save: Callable[[Path], Callable[[], int]]) -> Path:
        path = self._folder / name
        if name not in self.seconds:
            self._folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            began = time.monotonic()
            finish(save(path))
            self.seconds[name] = time.monotonic() - began
        return path

    @property
    def run(self) -> Path:
        """The folder of a finished run of `find`."""
        return next(self("find", find).iterdir())

    def export(self, format: str) -> Callable[[Path], Callable[[], int]]:
        """What exports that run to a path."""
        run = self.run
        return lambda out: command("export", run, "--format", format, "--out", out)


def find(out: Path) -> Callable[[], int]:
    return command(*FIND, "--out", out)


def load_all() -> None:
    """What the forks are to find in memory. No thread may have been started before one forks."""
    torch.set_num_threads(1)
    data.load("digits")


class Child:
    """A fork with a process group of its own, in which `call` runs; its value is the exit code.

    Whatever it prints to stderr is kept, an exception that leaves `call` as well.
    """

    def __init__(self, call: Callable[[], int]) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(writing)
            self._stderr = os.fdopen(reading, errors="replace")
            return
        code = 70
        try:
            os.setpgid(0, 0)
            signal.alarm(LIMIT_SECONDS)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(writing, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            code = call()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def kill(self, number: int) -> None:
        """Sends a signal to all of its group."""
        os.killpg(self.pid, number)

    def wait(self) -> tuple[int, str]:
        """Its exit code, negative after a signal, and what it said."""
        with self._stderr:
            said = self._stderr.read()
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), said


def command(*arguments: object) -> Callable[[], int]:
    return lambda: cli.main([str(each) for each in arguments])


def finish(call: Callable[[], int]) -> None:
    """In a fork, to its end; AssertionError if that is not a good one."""
    code, said = Child(call).wait()
    assert code == 0, f"exit code {code}: {said}"

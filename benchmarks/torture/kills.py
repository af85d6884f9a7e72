"""`find`, `lab` and `export`, killed with -9 at random moments and begun again: the same bits at the end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .runs import FORMATS, ONE_THREAD, SMALL, Child, Wholes, command, contents, find, finish, load_all, results

CASES = 100
KILLS = 3  # of a case, at most
LAB = ("lab", "lenet", *SMALL, "--trials", "2", "--controls", "reinit,order", "--draws", "1", "--workers", "2")
CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}  # audit events of the file system


def prepare(_: Path) -> dict[str, str]:
    return ONE_THREAD


@contextlib.contextmanager
def trial(folder: Path) -> Iterator[Callable[[random.Random], None]]:
    load_all()
    whole = Wholes(folder / "whole")

    def attempt(draw: random.Random) -> None:
        shutil.rmtree(folder / "cut", ignore_errors=True)
        (folder / "cut").mkdir()
        kind = draw.choice(["find", "lab", "export"])
        if kind == "export":
            exported(draw, draw.choice(FORMATS))
            return
        save, out = (find if kind == "find" else _lab), folder / "cut" / kind
        expected = results(whole(kind, save))
        for _ in range(draw.randrange(1, KILLS + 1)):
            killed(draw, save(out), whole.seconds[kind])
        finish(save(out))
        found = results(out)
        differ = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        assert not differ, f"{kind}: killed, it ended with others of {sorted(differ)}"

    def exported(draw: random.Random, format: str) -> None:
        save, out, before = whole.export(format), folder / "cut" / format, None
        wanted = contents(whole(format, save))
        if format != "npz" and draw.random() < 0.5:  # a folder that holds something is not replaced
            out.write_bytes(b"before")
            before = contents(out)
        killed(draw, save(out), whole.seconds[format])
        found = contents(out)
        assert found in (before, wanted), f"export {format}: half-written"
        if found != wanted or format != "npz":
            finish(save(out))
        assert contents(out) == wanted, f"export {format}: other bits"

    yield attempt


def killed(draw: random.Random, call: Callable[[], int], seconds: float) -> None:
    """In a fork that is killed, with all that it started: at a moment, or when it is about to change a file."""
    if draw.random() < 0.5:
        child = Child(call)
        time.sleep(draw.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):
            child.kill(signal.SIGKILL)
    else:
        count = draw.randrange(1, 40)
        child = Child(lambda: until_change(count, call, signal.SIGKILL))
    code, said = child.wait()
    with contextlib.suppress(ProcessLookupError):  # what it started, if it ended alone
        child.kill(signal.SIGKILL)
    assert code in (0, -signal.SIGKILL), f"exit code {code}: {said}"


def until_change(count: int, call: Callable[[], int], number: int, seconds: float = 0.0) -> int:
    """`call`, but a signal comes to all of this process group when it is about to change a file for the count-th time,
    or after so many seconds of its processor's time from then on."""
    left = [count]
    signal.signal(signal.SIGVTALRM, lambda *_: os.killpg(0, number))

    def hook(event: str, arguments: tuple) -> None:
        if event in CHANGES and (event != "open" or _writes(arguments)):
            left[0] -= 1
            if not left[0]:
                if seconds:
                    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
                else:
                    os.killpg(0, number)

    sys.addaudithook(hook)
    return call()


def _writes(arguments: tuple) -> bool:
    path, _, flags = arguments  # Python's open gives flags as os.open takes them
    return isinstance(path, (str, bytes, os.PathLike)) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def _lab(out: Path) -> Callable[[], int]:
    def call() -> int:
        fork = multiprocessing.get_context("fork")
        multiprocessing.get_context = lambda _: fork  # jobs need not import torch
        return command(*LAB, "--out", out)()

    return call

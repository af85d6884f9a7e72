"""Saves that fail: nothing is left half-written, the error names the place, and the same command goes on.

a file that may not grow, a full file system (root only: a tmpfs of a few pages)
a folder that is missing, is a file, or cannot be written
SIGINT and SIGTERM at a random moment, or at one of the changes of the file system
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from sparselottery.ticket import Ticket

from .kills import until_change
from .runs import FORMATS, ONE_THREAD, Child, Wholes, contents, find, finish, load_all, results

CASES = 1_000
ERROR, INTERRUPTED, TERMINATED = 2, 130, 143  # exit codes of the command
FULL_BYTES = 96 * 1024  # of a file system: less than any run needs


def prepare(_: Path) -> dict[str, str]:
    return ONE_THREAD


@contextlib.contextmanager
def trial(folder: Path) -> Iterator[Callable[[random.Random], None]]:
    load_all()
    whole = Wholes(folder / "whole")
    room = folder / "room"

    def save_of(draw: random.Random) -> tuple[str, Callable[[Path], Callable[[], int]]]:
        """A name, and what saves it at a path."""
        kind = draw.choice(["ticket", *FORMATS, "find", "find"])
        if kind == "find":
            return kind, find
        if kind == "ticket":
            ticket = Ticket.load(whole.run / "ticket.safetensors")
            return kind, lambda out: lambda: _reported(lambda: ticket.save(out))
        return kind, whole.export(kind)

    def attempt(draw: random.Random) -> None:
        with _empty(room):
            kind, save = save_of(draw)
            fault = draw.choice([grows_no_more, full, no_folder, read_only, interrupted, interrupted])
            try:
                fault(draw, kind, save)
            except AssertionError as error:
                error.add_note(f"{kind}, {fault.__name__}")
                raise

    def grows_no_more(draw: random.Random, kind: str, save: Callable) -> None:
        out, before = _target(draw, room, kind)
        limit = draw.choice([0, 1, 100, 4096, draw.randrange(200_000)])

        def limited() -> int:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does: the write then fails
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return save(out)()

        judged(kind, save, out, before, *Child(limited).wait(), {0, ERROR})

    def full(draw: random.Random, kind: str, save: Callable) -> None:
        with _mounted(room, f"size={FULL_BYTES}") as there:
            if not there:
                return grows_no_more(draw, kind, save)
            out, before = _target(draw, room, kind)
            filler = room / "filler"
            filler.write_bytes(b"0" * draw.randrange(FULL_BYTES // 2))
            code, said = Child(save(out)).wait()
            filler.unlink()
            judged(kind, save, out, before, code, said, {0, ERROR}, again=False)
        return None

    def no_folder(draw: random.Random, kind: str, save: Callable) -> None:
        parent = room / "parent"
        if draw.random() < 0.5:
            parent.write_bytes(b"a file")
            refused(parent, save)
            assert contents(parent) == {"": b"a file"}
        elif kind != "find":  # which makes its folders
            refused(parent, save)
            assert not parent.exists()

    def read_only(_: random.Random, kind: str, save: Callable) -> None:
        parent = room / "parent"
        parent.mkdir(mode=0o555)
        with _mounted(parent, "ro") as there:
            if there or os.getuid():
                refused(parent, save)
                assert contents(parent) == {}

    def refused(parent: Path, save: Callable) -> None:
        code, said = Child(save(parent / "out")).wait()
        assert code == ERROR, f"exit code {code}: {said}"
        assert str(parent) in said, f"the error does not name the folder: {said}"

    def interrupted(draw: random.Random, kind: str, save: Callable) -> None:
        out, before = _target(draw, room, kind)
        number = draw.choice([signal.SIGINT, signal.SIGINT, signal.SIGTERM])
        count, seconds = draw.randrange(1, 20), draw.choice([0.0, draw.uniform(0.0001, 0.2)])
        code, said = Child(lambda: until_change(count, save(out), number, seconds)).wait()
        judged(kind, save, out, before, code, said, {0, INTERRUPTED, TERMINATED, -signal.SIGTERM})

    def judged(
        kind: str,
        save: Callable,
        out: Path,
        before: dict | None,
        code: int,
        said: str,
        codes: set[int],
        again: bool = True,
    ) -> None:
        assert code in codes, f"exit code {code}: {said}"
        assert "Traceback" not in said, said
        if code == ERROR:
            assert out.name in said or str(out.parent) in said, f"the error does not name the file: {said}"
        if code in (INTERRUPTED, TERMINATED) and kind == "find":
            assert "goes on" in said, f"it does not say how to go on: {said}"
        if code != -signal.SIGTERM:
            left = [str(path) for path in room.rglob(".*.tmp")]
            assert not left, f"left behind: {left}"
        if kind == "find":
            expected, found = results(whole(kind, save)), results(out)
            wrong = [name for name in found if found[name] != expected.get(name)]
            assert not wrong, f"half-written: {wrong}"
        else:
            found, wanted = contents(out), contents(whole(kind, save))
            assert found in {0: [wanted], ERROR: [before]}.get(code, [before, wanted]), (
                f"exit code {code}, half-written: {found and {name: len(data) for name, data in found.items()}}"
            )
        if again and (kind != "npz" or not out.exists()):
            finish(save(out))
            of = results if kind == "find" else contents
            assert of(out) == of(whole(kind, save)), "it ended otherwise"

    yield attempt


def _reported(save: Callable[[], object]) -> int:
    """As the command line does it."""
    try:
        save()
    except OSError as error:
        print(error, file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _target(draw: random.Random, room: Path, kind: str) -> tuple[Path, dict | None]:
    """Where to save, and what is there now."""
    out = room / "out"
    if kind not in ("find", "npz") and draw.random() < 0.5:
        out.write_bytes(b"before")
    return out, contents(out)


@contextlib.contextmanager
def _empty(room: Path) -> Iterator[None]:
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    yield


@contextlib.contextmanager
def _mounted(folder: Path, options: str) -> Iterator[bool]:
    """A file system in memory, at the folder; False where that is not allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    there = os.getuid() == 0 and subprocess.run(mount, check=False, capture_output=True).returncode == 0
    try:
        yield there
    finally:
        if there:
            subprocess.run(["umount", str(folder)], check=True)

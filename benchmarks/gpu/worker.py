"""A process that may die, hang or lose the GPU: then another one goes on."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection

from benchmarks.gpu import timing
from sparselottery import execution
from sparselottery.graphs import BrokenCaptureError, works
from sparselottery.kernels import gpu

LIMIT = 60  # seconds after which a call, the compilation of its kernels included, is stopped
PATIENCE = 1.0  # seconds for a process that hangs to end what it has started
REAP = 3.0  # seconds for a killed process to end
LOST = (BrokenCaptureError, timing.CaptureError, timing.DeviceLostError)  # after which a process is of no more use


def take_tensors_of(device: str) -> None:
    """The kernels of a GPU run on tensors of this device; on the CPU as few times as possible."""
    gpu.DEVICES = (device,)
    if device == "cpu":
        timing.MIN_ROUNDS, timing.MIN_SAMPLE, execution.BURSTS, execution.BURST_MS = 3, 0.0, 1, 0.0


class FailedError(RuntimeError):
    """A call in a worker gave no result; the message says why."""


class LateError(FailedError):
    """It did not finish in its time."""


class Worker:
    """Runs functions in a process of its own, which is replaced when it dies, hangs or has lost the GPU.

    device: "cuda", or "cpu" for a dry run in Triton's interpreter. log: gets every line that the process prints.
    """

    def __init__(self, device: str, log: Callable[[str], None]) -> None:
        self.device, self._log = device, log
        self._process = None

    def run(self, function: Callable, *args: object, limit: float = LIMIT) -> object:
        """function(*args) within `limit` seconds, the start of a new process included. Raises FailedError."""
        if self._process is None:
            self._start()
        try:
            self._calls.send((function, args))
            if not self._calls.poll(limit):
                self._process.terminate()  # gently
                raise LateError(f"did not finish in {limit:.0f} s")
            found, why, lost = self._calls.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            status = self._process.exitcode
            self.stop()
            raise FailedError(f"the process ended with {status}") from error
        except BaseException:
            self.stop(PATIENCE)
            raise
        if lost:
            self.stop()
        if why:
            raise FailedError(why)
        return found

    def stop(self, patience: float = 0.0) -> None:
        """Whatever the process does; the next call starts another one."""
        if self._process is not None:
            self._process.join(patience)
            self._process.kill()
            self._process.join(REAP)  # a process that is stuck in the driver does not end
            self._follower.join(REAP)  # its last lines
            self._calls.close()
            self._process = None

    def _start(self) -> None:
        context = get_context("spawn")
        self._calls, calls = context.Pipe()
        lines, printed = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(self.device, calls, printed), daemon=True)
        self._follower = threading.Thread(target=self._follow, args=(lines,), daemon=True)
        self._follower.start()
        process.start()
        self._process = process  # not before: an interrupt may have come between
        calls.close()
        printed.close()

    def _follow(self, lines: Connection) -> None:
        with lines, open(os.dup(lines.fileno()), errors="replace") as text:
            for line in text:
                self._log(line.rstrip("\n"))


def _serve(device: str, calls: Connection, printed: Connection) -> None:
    """In the new process, which ends with the one that started it. SIGTERM lets it end what it has started itself."""
    for descriptor in (1, 2):
        os.dup2(printed.fileno(), descriptor)
    printed.close()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    take_tensors_of(device)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            calls.send(_attempt(device, *calls.recv()))


def _attempt(device: str, function: Callable, args: tuple) -> tuple[object, str, bool]:
    """The result, or why there is none, and whether this process is of no more use."""
    try:
        return function(*args), "", False
    except Exception as error:  # of any kind: others count
        traceback.print_exc()
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return None, why, isinstance(error, LOST) or not works(timing.clock(device).device)


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)

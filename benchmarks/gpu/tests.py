"""The tests that have GPU kernels, in several processes that may die, hang or lose the GPU; nothing else stops them.

No plugin of the machine runs but `shard`, and no warning is an error: those are CI's. A file that cannot be imported
is a test that failed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests"
PATTERNS = ("test_gpu_only.py", "test_kernels_gpu*.py", "test_ops_gpu.py", "test_nn_gpu*.py", "test_lab_graph.py")
NO_DEVICE = ("audit", "launch", "device")  # words in the names of files whose tests need no GPU
CORE, OTHERS = "gpu_core", "not slow"  # of which those that have run are left out
LIMIT = 60.0  # seconds of one test
RESTARTS = 20  # of a process whose test died, hung or lost the GPU
POLL = 0.05
SAVE = 3.0  # seconds from one `save` to the next
PATIENCE = 3.0  # seconds for pytest to say where it hangs
PLAIN = ("-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=default", "--tb=short", "-q",
         "--continue-on-collection-errors")  # fmt: skip
PLAIN_ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
LATE = "out of time"
BAD = ("failed", "error")


class Result(NamedTuple):
    """outcome: passed, failed, skipped or error; text: why not passed."""

    test: str
    outcome: str
    seconds: float
    text: str = ""


@dataclass
class Verdict:
    """What has run, and why what has not."""

    results: list[Result] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        return not self.failed and all(why.startswith(LATE) for why in self.left)

    @property
    def failed(self) -> list[Result]:
        return [each for each in self.results if each.outcome in BAD]

    def lines(self) -> list[str]:
        """For people: counts, then a line for each that failed."""
        counts = [f"{sum(each.outcome == kind for each in self.results)} {kind}" for kind in ("passed", "skipped")]
        lines = [f"tests: {', '.join(counts)}, {len(self.failed)} failed", *(f"tests: {why}" for why in self.left)]
        return lines + [f"FAILED {each.test}: {_reason(each.text)}" for each in self.failed]


def files(folder: Path = FOLDER) -> list[Path]:
    """The most telling first."""
    found = [path for pattern in PATTERNS for path in sorted(folder.glob(pattern))]
    return [path for path in found if not any(word in path.stem for word in NO_DEVICE)]


def run(
    paths: Sequence[Path], marks: str, seconds: float, jobs: int, tell: Callable[[str], None], limit: float = LIMIT,
    done: Sequence[Result] = (), save: Callable[[list[Result]], None] = lambda results: None,
) -> Verdict:  # fmt: skip
    """The tests of `paths` with these marks that are not done, for at most `seconds`, in `jobs` processes.

    save: gets all results every SAVE seconds as tests end, and at the end, which may be an interrupt.
    """
    end, verdict, saved, due = time.monotonic() + seconds, Verdict(), 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        ran = [each.test for each in done]
        shards = [_Shard(Path(folder), i, jobs, paths, marks, limit, ran) for i in range(jobs if paths else 0)]
        try:
            while any(not shard.over for shard in shards) and time.monotonic() < end:
                for shard in shards:
                    _add(verdict, shard.poll(), tell)
                if len(verdict.results) > saved and time.monotonic() >= due:
                    saved, due = len(verdict.results), time.monotonic() + SAVE
                    save(verdict.results)
                time.sleep(POLL)
        finally:
            save(verdict.results)
            for shard in shards:
                shard.stop()
    late = sum(not shard.over for shard in shards)
    verdict.left += [f"{LATE} in {late} of {jobs} processes"] if late else []
    verdict.left += [shard.why for shard in shards if shard.why]
    return verdict


def junit(results: Sequence[Result]) -> str:
    """As XML."""
    counts = {"tests": len(results), "failures": sum(each.outcome in BAD for each in results)}
    suite = ElementTree.Element("testsuite", name="gpu", **{name: str(count) for name, count in counts.items()})
    for test, outcome, seconds, text in results:
        name = test.rpartition("::")
        case = ElementTree.SubElement(suite, "testcase", classname=name[0], name=name[2], time=f"{seconds:.3f}")
        if outcome in BAD:
            ElementTree.SubElement(case, "failure", message=_reason(text)).text = _printable(text)
        elif outcome == "skipped":
            ElementTree.SubElement(case, "skipped")
    return ElementTree.tostring(suite, "unicode") + "\n"


def read_junit(text: str) -> list[Result]:
    """The results in a text of `junit`."""
    found = []
    for case in ElementTree.fromstring(text).iter("testcase"):
        failure = case.find("failure")
        outcome = "failed" if failure is not None else "skipped" if case.find("skipped") is not None else "passed"
        name = f"{case.get('classname')}::{case.get('name')}"
        found.append(Result(name, outcome, float(case.get("time", 0)), "" if failure is None else failure.text or ""))
    return found


def _add(verdict: Verdict, found: list[Result], tell: Callable[[str], None]) -> None:
    verdict.results += found
    for each in found:
        if each.outcome in BAD:
            tell(f"FAILED {each.test} after {each.seconds:.1f} s\n{each.text}")


def _reason(text: str) -> str:
    """The line of a failure that says most: pytest marks it with E."""
    lines = [line for line in text.splitlines() if line.strip()]
    marked = [line[1:].strip() for line in lines if line.startswith("E ")]
    return _printable((marked or [line.strip() for line in lines[-1:]] or [""])[0])[:160]


def _printable(text: str) -> str:
    """Without the control characters that XML forbids."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd]", "?", text)


class _Shard:
    """A share of the tests, and the process that is at it."""

    def __init__(
        self, folder: Path, index: int, count: int, paths: Sequence[Path], marks: str, limit: float, done: list[str]
    ) -> None:  # fmt: skip
        self._events, self._done = folder / f"{index}.jsonl", folder / f"{index}.done"
        self._output = folder / f"{index}.out"
        self._events.touch()
        self._done.write_text("".join(f"{test}\n" for test in done))
        self._environment = {
            **os.environ, **PLAIN_ENVIRONMENT, "SHARD": f"{index}/{count}", "SHARD_FILE": str(self._events),
            "SHARD_DONE": str(self._done),
        }  # fmt: skip
        self._command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.shard", *PLAIN, "-m", marks]
        # Else names would depend on where the folder of the tests and this one meet.
        self._command += [f"--rootdir={paths[0].parent}", *map(str, paths)]
        self._limit, self._restarts, self._read = limit, 0, 0
        self.over, self.why = False, ""
        self._start()

    def _start(self) -> None:
        self._running, self._since, self._begun = "", time.monotonic(), False
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def poll(self) -> list[Result]:
        """What has come since the last time; a process that ended too early is started again."""
        if self.over:
            return []
        ended = self._process.poll() is not None
        found = self._take()
        if self.over:
            return found
        if ended:
            lost = [self._blame(f"the process ended with {self._process.returncode} in it")] if self._running else []
            self._again()
            return found + lost
        if self._running and time.monotonic() - self._since > self._limit:
            self._interrupt()
            found += self._take()
            found += [self._blame(f"did not finish in {self._limit:g} s")] if self._running else []
            self._again()
        return found

    def stop(self) -> None:
        self._kill()

    def _take(self) -> list[Result]:
        with self._events.open() as file:
            file.seek(self._read)
            lines = file.readlines()
        lines = lines if not lines or lines[-1].endswith("\n") else lines[:-1]  # one that is being written
        self._read += sum(len(line.encode()) for line in lines)
        found = []
        for each in map(json.loads, lines):
            if each["event"] == "begin":
                self._running, self._since, self._begun = each["id"], time.monotonic(), True
            elif each["event"] == "end":
                self.over = each["outcome"] in (0, 1, 5)  # passed, some failed, nothing to do; else tests are left
            else:
                found.append(Result(each["id"], each["outcome"], each["seconds"], each["text"]))
                self._finish(each["id"])
        return found

    def _finish(self, test: str) -> None:
        self._running = ""
        with self._done.open("a") as file:
            file.write(test + "\n")

    def _blame(self, why: str) -> Result:
        result = Result(self._running, "error", time.monotonic() - self._since, f"{why}: {self._last_words()}")
        self._finish(self._running)
        return result

    def _again(self) -> None:
        """Go on with the other tests, unless the process began none."""
        self._restarts += 1
        if not self._begun or self._restarts > RESTARTS:
            self.over, self.why = True, f"a process ended {self._restarts} times, at last with: {self._last_words()}"
        else:
            self._start()

    def _last_words(self) -> str:
        lines = self._output.read_text(errors="replace").splitlines()
        return " | ".join(line.strip() for line in lines[-3:])[-300:]

    def _interrupt(self) -> None:
        """The end of what hangs, with a word of where if it can be had."""
        self._process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)
        self._kill()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a process that is stuck in the driver does not end
            self._process.wait(PATIENCE)

"""A pytest plugin (`-p benchmarks.gpu.shard`): every n-th test, each result written to a file when it is there.

So a test that ends the process, hangs or breaks the GPU is known by name, and no other result is lost with it. Lines
of JSON: {"event": "begin" | "result" | "lost" | "end", "id": ..., "outcome": ..., "seconds": ..., "text": ...}.
SHARD_FILE: where to; SHARD: "i/n"; SHARD_DONE: a file with the ids of tests that are not to be run again.

All shards share the memory of the GPU, so that each gives back after a test what torch would keep for the next. None
may hold more than MEMORY of it: 40 of an H100's 80 GB. The largest test has x of 4.4 GB, its packed copy, the gradients
of both and of the dense layer, and its error in fp32: about 25 GB. Two of its kind and six others fit.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

MEMORY = 0.5  # of the GPU: a test that takes more fails, under its own name


def gpu() -> ModuleType | None:
    """torch.cuda, if there is a GPU and a test that may use it: one that has imported torch."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_available() else None


def settle() -> None:
    """Wait for the GPU and give back its memory. Raises RuntimeError if it refuses further work of this process."""
    if cuda := gpu():
        cuda.synchronize()
        cuda.empty_cache()


def pytest_collection_finish() -> None:
    if cuda := gpu():
        cuda.set_per_process_memory_fraction(MEMORY)


def _tell(event: str, test: str = "", **more: object) -> None:
    with open(os.environ["SHARD_FILE"], "a") as file:
        file.write(json.dumps({"event": event, "id": test, **more}) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    index, count = map(int, os.environ["SHARD"].split("/"))
    done = set(Path(os.environ["SHARD_DONE"]).read_text().splitlines())
    items[:] = [item for item in items[index::count] if item.nodeid not in done]


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed and os.environ["SHARD"].startswith("0/"):  # the others find the same
        _tell("result", report.nodeid, outcome="error", seconds=0, text=report.longreprtext)


def pytest_runtest_logstart(nodeid: str) -> None:
    _tell("begin", nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":  # a set-up that passed is no result yet
        outcome = "error" if report.failed and report.when != "call" else report.outcome
        text = report.longreprtext if report.failed else ""
        _tell("result", report.nodeid, outcome=outcome, seconds=round(report.duration, 3), text=text)


def pytest_runtest_logfinish(nodeid: str) -> None:
    try:
        settle()
    except RuntimeError as error:  # every later test would fail of it, under the wrong name
        _tell("lost", nodeid, outcome="error", seconds=0, text=f"the GPU was lost: {error}")
        os._exit(3)


def pytest_sessionfinish(exitstatus: int) -> None:
    _tell("end", outcome=int(exitstatus))

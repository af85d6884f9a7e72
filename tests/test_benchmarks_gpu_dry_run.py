"""All of `make gpu` but the GPU: the plan, the files and the end of the output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_benchmarks_gpu_tests import SUITE

from benchmarks import results
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import bars, rows, summary

ROOT = Path(__file__).parents[1]
FILES = {"log.txt", "summary.txt", "junit.xml", *(f"gpu-{name}.csv" for name in rows.TABLES)}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run(options)` -> exit status, output. Two processes at a time are enough."""
    monkeypatch.setattr(command, "MAX_JOBS", 2)
    before = signal.getsignal(signal.SIGTERM)
    yield lambda *options: (
        command.main(["--dry-run", "--results", str(tmp_path / "out"), *map(str, options)]),
        capsys.readouterr().out,
    )
    signal.signal(signal.SIGTERM, before)


def children(pid):
    """The folders of /proc that are gone when the processes that it has started are."""
    return [f"/proc/{child}/exe" for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_tests_that_fail_are_told_last(run, tmp_path):
    (tmp_path / "test_gpu_only.py").write_text(SUITE)
    out = tmp_path / "out"
    status, told = run("--seconds", 100, "--parts", "core tests", "--tests", tmp_path, "--test-limit", 3)
    assert status == 1
    assert {path.name for path in out.iterdir()} == {"log.txt", "summary.txt", "junit.xml", "gpu-missing.csv"}
    tail = told[-summary.TAIL :]
    assert all(bar.what in tail for bar in bars.BARS)
    assert "5 passed, 0 skipped, 4 failed" in tail
    assert all(f"::{name}: " in tail for name in ("test_dies", "test_hangs", "test_breaks_the_gpu", "test_wrong"))
    assert (out / "summary.txt").read_text().rstrip().splitlines()[-1].startswith("step as chosen")
    assert "Traceback" not in tail
    assert "assert 1 == 2" in (out / "log.txt").read_text()


def test_a_dry_run(run, tmp_path):
    out = tmp_path / "out"
    _, told = run("--seconds", 8, "--tests", tmp_path)
    assert {path.name for path in out.iterdir()} == FILES
    assert len(FILES) <= 8
    log = (out / "log.txt").read_text()
    assert [name for name in command.PLAN if f"--- {name}: " not in log] == []
    rows_of = [row["part"] for name in ("kernels", "missing") for row in results.read(out / f"gpu-{name}.csv")[1]]
    assert set(rows.PARTS_OF_KERNELS) <= set(rows_of)
    assert all(bar.what in told[-summary.TAIL :] for bar in bars.BARS)
    assert "Error: " not in "".join(line for line in log.splitlines() if "FAILED" in line)


def test_a_run_that_is_ended_early_still_has_its_tail(run, monkeypatch):
    def ended(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(command, "run_jobs", ended)
    status, told = run("--seconds", 60, "--parts", "tune")
    assert status == 1
    assert "interrupted\n" in told
    assert all(bar.what in told[-summary.TAIL :] for bar in bars.BARS)
    assert told.endswith("log.txt\n")


def test_what_was_there_when_it_was_killed_is_whole_and_no_busy_process_stays(tmp_path):
    table = tmp_path / "gpu-kernels.csv"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--results", tmp_path, "--parts", "tune"],
        cwd=ROOT, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (table.exists() and results.read(table)[1]):  # from now on the worker is at its next job
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = children(process.pid)
    process.kill()
    process.wait()
    while any(map(os.path.exists, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers
    assert not any(map(os.path.exists, workers))
    for name in ("kernels", "missing"):
        head, _ = results.read(tmp_path / f"gpu-{name}.csv")
        assert "machine" in head

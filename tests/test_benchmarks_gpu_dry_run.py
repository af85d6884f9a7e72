"""All of `make gpu` but the GPU: the plan, the files and the end of the output."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from test_benchmarks_gpu_tests import SUITE

from benchmarks import results
from benchmarks.gpu import bars, rows, summary
from benchmarks.gpu.__main__ import PLAN

ROOT = Path(__file__).parents[1]
FILES = {"log.txt", "summary.txt", "junit.xml", *(f"gpu-{name}.csv" for name in rows.TABLES)}


def start(*options):
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", *map(str, options)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def children(pid):
    """The folders of /proc that are gone when the processes that it has started are."""
    return [f"/proc/{child}/exe" for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_tests_that_fail_are_told_last(tmp_path):
    (tmp_path / "test_gpu_only.py").write_text(SUITE)
    out = tmp_path / "out"
    options = "--seconds", 100, "--parts", "core tests", "--tests", tmp_path, "--test-limit", 5
    process = start("--results", out, *options)
    told, _ = process.communicate()
    assert process.returncode == 1
    assert {path.name for path in out.iterdir()} == FILES
    assert len(FILES) <= 8
    tail = told[-summary.TAIL :]
    assert all(bar.what in tail for bar in bars.BARS)
    assert "5 passed, 0 skipped, 4 failed" in tail
    assert all(f"::{name}: " in tail for name in ("test_dies", "test_hangs", "test_breaks_the_gpu", "test_wrong"))
    assert (out / "summary.txt").read_text().rstrip().splitlines()[-1].startswith("step as chosen")
    assert "Traceback" not in tail
    assert "assert 1 == 2" in (out / "log.txt").read_text()


def test_a_dry_run(tmp_path):
    out = tmp_path / "out"
    process = start("--results", out, "--seconds", 15, "--tests", tmp_path)
    told, _ = process.communicate()
    assert {path.name for path in out.iterdir()} == FILES
    log = (out / "log.txt").read_text()
    assert [name for name in PLAN if f"--- {name}: " not in log] == []
    rows_of = [row["part"] for name in ("kernels", "missing") for row in results.read(out / f"gpu-{name}.csv")[1]]
    assert set(rows.PARTS_OF_KERNELS) <= set(rows_of)
    assert all(bar.what in told[-summary.TAIL :] for bar in bars.BARS)
    assert "Error: " not in "".join(line for line in log.splitlines() if "FAILED" in line)


def test_a_run_that_is_ended_early_still_has_its_tail(tmp_path):
    process = start("--results", tmp_path / "out", "--seconds", 60, "--parts", "tune")
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "log.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted\n" in told
    assert all(bar.what in told[-summary.TAIL :] for bar in bars.BARS)
    assert told.endswith("log.txt\n")


def test_what_was_there_when_it_was_killed_is_whole(tmp_path):
    process = start("--results", tmp_path / "out", "--seconds", 60, "--parts", "peaks", "tune")
    deadline = time.monotonic() + 60
    while not ((tmp_path / "out" / "gpu-missing.csv").exists() and children(process.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    while any(map(os.path.exists, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers
    assert not any(map(os.path.exists, workers))
    for name in rows.TABLES:
        head, _ = results.read(tmp_path / "out" / f"gpu-{name}.csv")
        assert "machine" in head

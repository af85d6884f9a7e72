from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from sparselottery.lab import executors
from sparselottery.lab.executors import Place, processes


def work(job: str, report) -> None:
    """What a job's name says. It writes its own process and tells about itself."""
    report(os.getpid())
    if job == "fails":
        raise ValueError("two\nlines")
    if job == "dies":
        os.kill(os.getpid(), signal.SIGKILL)


def taken(jobs: list[str]):
    return lambda: jobs.pop(0) if jobs else None


def place(folder: Path, workers: int | None = 2) -> Place:
    return Place(workers, 1, 0, folder)


def test_one_job_that_fails_or_dies_leaves_the_others_alone(tmp_path):
    events = list(processes(work, taken(["a", "fails", "dies", "b", "c", "d"]), place(tmp_path)))
    ends = {job: (kind, payload) for job, kind, payload in events if kind != "progress"}
    assert ends == {
        **dict.fromkeys("abcd", ("done", None)),
        "fails": ("failed", "ValueError: two lines"),
        "dies": ("failed", f"its process ended with exit code {-signal.SIGKILL}"),
    }
    workers = {job: payload for job, kind, payload in events if kind == "progress"}
    assert workers.keys() == ends.keys()
    assert os.getpid() not in workers.values()
    assert len(set(workers.values())) <= 3  # two, and one for the one that died


def test_a_job_that_others_wait_for(tmp_path):
    """A job may be ready only when another one gets on."""
    finished, left = [], ["first", "second"]

    def take() -> str | None:
        return left.pop(0) if left and (left[0] == "first" or finished) else None

    events = []
    for event in processes(work, take, place(tmp_path)):
        events.append((event.job, event.kind))
        finished += [event.job] if event.kind == "done" else []
    assert finished == ["first", "second"]
    assert Counter(kind for _, kind in events) == {"progress": 2, "done": 2}


def test_no_job_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "_Worker", None)
    assert list(processes(work, taken([]), place(tmp_path))) == []


def test_closing_ends_the_processes(tmp_path):
    events = processes(work, taken(["a", "b", "c", "d"]), place(tmp_path, workers=1))
    pid = next(events).payload
    events.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(("threads", "gpus", "expected"), [(1, 0, 4), (3, 0, 1), (8, 0, 1), (1, 1, 1)])
def test_cores_are_shared_out(monkeypatch, tmp_path, threads, gpus, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    assert executors.workers_of(Place(None, threads, gpus, tmp_path)) == expected
    assert executors.workers_of(Place(7, threads, gpus, tmp_path)) == 7

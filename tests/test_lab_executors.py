from __future__ import annotations

import logging
import os
import signal
import warnings
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.torture.runs import results
from sparselottery.lab import executors
from sparselottery.lab.executors import Place, on_ray, processes
from sparselottery.lab.grid import Grid, run
from sparselottery.lab.grid import work as grid_work
from sparselottery.lab.pause import Paused
from sparselottery.lab.settings import preset

ROOT = Path(__file__).resolve().parent.parent
READS = executors._reads


def work(job: str, report) -> None:
    """What a job's name says. It writes its own process and tells about itself."""
    report(os.getpid())
    if job == "fails":
        raise ValueError("two\nlines")
    if job == "pauses":
        raise Paused("at iteration 7")
    if job == "dies":
        os.kill(os.getpid(), signal.SIGKILL)


def taken(jobs: list[str]):
    return lambda: jobs.pop(0) if jobs else None


def place(folder: Path, workers: int | None = 2) -> Place:
    return Place(workers, 1, 0, folder)


def test_one_job_that_fails_or_dies_leaves_the_others_alone(tmp_path):
    events = list(processes(work, taken(["a", "fails", "dies", "pauses", "b", "c", "d"]), place(tmp_path)))
    ends = {job: (kind, payload) for job, kind, payload in events if kind != "progress"}
    assert ends == {
        **dict.fromkeys("abcd", ("done", None)),
        "fails": ("failed", "ValueError: two lines"),
        "pauses": ("paused", "at iteration 7"),
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


@pytest.fixture(scope="module")
def cluster():
    """Ray's, of a head that does no work and two nodes of one core, all on this machine."""
    ray = pytest.importorskip("ray", reason="needs ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))  # where the nodes find this
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            for _ in range(2):
                started.add_node(num_cpus=1)
            ray.init(address=started.address, log_to_driver=False, logging_level=logging.ERROR)
            yield started
        finally:
            ray.shutdown()
            started.shutdown()


def test_jobs_on_ray(cluster, tmp_path):
    events = list(on_ray(work, taken(["a", "fails", "dies", "b"]), place(tmp_path, workers=None)))
    ends = {job: (kind, payload) for job, kind, payload in events if kind != "progress"}
    assert {ends["a"], ends["b"]} == {("done", None)}
    assert ends["fails"] == ("failed", "ValueError: two lines")
    assert ends["dies"][0] == "failed"
    assert "WorkerCrashedError" in ends["dies"][1]
    assert {job for job, kind, _ in events if kind == "progress"} == {"a", "fails", "dies", "b"}
    assert list(tmp_path.iterdir()) == []


def test_a_grid_on_ray_ends_as_in_one_process(cluster, tmp_path):
    small = Grid(preset("digits", rounds=1, iterations=20, eval_every=20), trials=2, controls=("reinit", "order"))
    assert {event.kind for event in run(small, tmp_path / "ray", "ray")} == {"progress", "done"}
    (tmp_path / "here").mkdir()
    for job in small.jobs:
        grid_work(small, tmp_path / "here", job, lambda _: None)
    expected, found = results(tmp_path / "here"), results(tmp_path / "ray")
    assert found.pop("grid.json")["trials"] == 2
    assert found == expected


def test_storage_that_a_node_does_not_see(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "_reads", unseen)
    with pytest.raises(ValueError, match="expected a folder on storage that all nodes of the Ray cluster see, but "):
        next(on_ray(work, taken(["a"]), place(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def unseen(path: str, text: str) -> bool:
    """As `_reads` where the storage is another one."""
    return READS(path + "-elsewhere", text)


def test_storage_that_is_seen(tmp_path):
    (tmp_path / "token").write_text("text")
    assert executors._reads(str(tmp_path / "token"), "text")
    assert not executors._reads(str(tmp_path / "token"), "other")
    assert not executors._reads(str(tmp_path / "nothing"), "text")

"""Where jobs run: in processes of this machine, or on a Ray cluster.

An executor takes jobs as long as there are any and yields an `Event` for whatever happens to them. A job that fails
leaves the others alone. What a job does must be the same wherever and however often it is begun.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from ..files import atomic
from .pause import Paused

Report = Callable[[Any], None]
Work = Callable[[Any, Report], None]  # work(job, report); picklable
Take = Callable[[], Any]  # the next job that can begin now; None: there is none before another one gets on
POLL_SECONDS = 0.5


class Event(NamedTuple):
    """``kind``: "progress", with what the job reported; "done", None; "paused" or "failed", why, a line."""

    job: Any
    kind: str
    payload: Any = None


class Place(NamedTuple):
    """What the jobs of a run are given: how many at once (None: as many as there are cores for), and each how much."""

    workers: int | None
    threads: int
    gpus: int
    folder: Path  # where all of them write


def processes(work: Work, take: Take, place: Place) -> Iterator[Event]:
    """Run jobs in processes of this machine, each of which ends when this one does, even if that is killed."""
    context = multiprocessing.get_context("spawn")
    workers = workers_of(place)
    idle: list[_Worker] = []
    busy: dict[Connection, tuple[_Worker, Any]] = {}
    try:
        while True:
            while len(busy) < workers and (job := take()) is not None:
                worker = idle.pop() if idle else _Worker(context, work)
                worker.connection.send(job)
                busy[worker.connection] = worker, job
            if not busy:
                return
            for connection in wait(list(busy)):
                worker, job = busy[connection]
                try:
                    kind, payload = connection.recv()
                except (EOFError, OSError):
                    worker.stop()
                    kind, payload = "failed", f"its process ended with exit code {worker.process.exitcode}"
                else:
                    idle += [worker] if kind != "progress" else []
                if kind != "progress":
                    del busy[connection]
                yield Event(job, kind, payload)
    finally:
        for worker in (*idle, *(worker for worker, _ in busy.values())):
            worker.process.kill()
            worker.stop()


def workers_of(place: Place) -> int:
    """How many jobs run at once on this machine: with a GPU one, else so many that each thread has a core."""
    ours = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(ours(0)) if ours else os.cpu_count() or 1
    return place.workers or (1 if place.gpus else max(1, cores // place.threads))


class _Worker:
    """A process that does one job after the other."""

    def __init__(self, context: multiprocessing.context.SpawnContext, work: Work) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that reading ends with the process

    def stop(self) -> None:
        self.process.join()
        self.connection.close()


def _serve(work: Work, connection: Connection) -> None:
    """What a worker's process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(_tried(work, job, lambda payload: connection.send(("progress", payload))))


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _tried(work: Work, job: Any, report: Report) -> tuple[str, str | None]:
    """Kind and payload of the job's last event."""
    try:
        work(job, report)
    except Paused as paused:
        return "paused", str(paused)
    except Exception as error:  # any: the others go on
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "done", None


def on_ray(work: Work, take: Take, place: Place) -> Iterator[Event]:
    """Run jobs on a Ray cluster: the one of RAY_ADDRESS, or one on this machine that is started for it.

    Every node must have the package and see ``place.folder`` and the data; a job whose node is lost begins again on
    another. Raises ValueError if a node does not see the folder, ModuleNotFoundError without Ray.
    """
    import ray
    from ray.util.queue import Queue

    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    try:
        _check_shared(place.folder)
        resources = {"num_cpus": place.threads, "num_gpus": place.gpus}
        workers = place.workers or max(1, int(ray.cluster_resources().get("CPU", 1)) // place.threads)
        progress = Queue(actor_options={"num_cpus": 0})
        remote = ray.remote(**resources, max_retries=3)(_try_remotely)
        environment = {key: value for key, value in os.environ.items() if key.startswith("SPARSELOTTERY_")}
        running: dict[Any, Any] = {}
        while True:
            while len(running) < workers and (job := take()) is not None:
                running[remote.remote(work, job, progress, environment)] = job
            if not running:
                return
            finished, _ = ray.wait(list(running), timeout=POLL_SECONDS)
            for _ in range(progress.qsize()):
                yield Event(*progress.get())
            for each in finished:
                job = running.pop(each)
                try:
                    kind, payload = ray.get(each)
                except ray.exceptions.RayError as lost:
                    kind, payload = "failed", f"{type(lost).__name__}: {' '.join(str(lost).split())}"
                yield Event(job, kind, payload)
    finally:
        if ours:
            ray.shutdown()


def _try_remotely(work: Work, job: Any, progress: Any, environment: dict[str, str]) -> tuple[str, str | None]:
    os.environ.update(environment)
    return _tried(work, job, lambda payload: progress.put((job, "progress", payload)))


def _check_shared(folder: Path) -> None:
    """Raise ValueError unless every node reads there what is written here."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    token, text = folder / ".shared", uuid.uuid4().hex
    with atomic(token) as temporary:
        temporary.write_text(text)
    reads = ray.remote(num_cpus=0)(_reads)
    try:
        for node in ray.nodes():
            if node["Alive"]:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                if not ray.get(reads.options(scheduling_strategy=there).remote(str(token), text)):
                    raise ValueError(
                        f"{folder}: expected a folder on storage that all nodes of the Ray cluster see, "
                        f"but {node['NodeManagerAddress']} does not"
                    )
    finally:
        token.unlink()


def _reads(path: str, text: str) -> bool:
    """Does this node read that text there?"""
    return Path(path).is_file() and Path(path).read_text() == text


EXECUTORS: dict[str, Callable[[Work, Take, Place], Iterator[Event]]] = {"processes": processes, "ray": on_ray}

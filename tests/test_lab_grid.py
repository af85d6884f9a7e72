from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
from grids import OPTIONS, finish, killed

from benchmarks.torture.runs import results
from sparselottery import cli
from sparselottery.lab import experiment, grid, training
from sparselottery.lab.executors import EXECUTORS, Event
from sparselottery.lab.grid import Grid, Job, run
from sparselottery.lab.pause import Paused
from sparselottery.lab.settings import preset
from sparselottery.ticket import Ticket

QUICK = preset("digits", rounds=2, iterations=20, eval_every=20)
FILES = (7, 24)  # that a grid has written when it is killed


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch):
    monkeypatch.setattr(experiment, "interleaved_ms", partial(experiment.interleaved_ms, bursts=1, burst_ms=0.1))


@pytest.fixture
def here(monkeypatch):
    """An executor in this process: one job after the other, the last that can begin first."""

    def backwards(work, take, place):
        while jobs := list(iter(take, None)):
            for job in reversed(jobs):
                events = []
                try:
                    work(job, lambda payload, job=job, events=events: events.append(Event(job, "progress", payload)))
                    events.append(Event(job, "done"))
                except Paused as paused:
                    events.append(Event(job, "paused", str(paused)))
                except ValueError as error:
                    events.append(Event(job, "failed", str(error)))
                yield from events

    monkeypatch.setitem(EXECUTORS, "here", backwards)


def names(events) -> list[str]:
    return [event.job.name for event in events if event.kind == "done"]


def test_jobs():
    jobs = Grid(QUICK, trials=2, controls=("reinit", "order", "one-shot"), draws=2).jobs
    assert [job.name for job in jobs[:2]] == ["trial-0/ticket", "trial-1/ticket"]
    first = [job.name.removeprefix("trial-0/") for job in jobs[2:] if job.trial == 0]
    assert first == [
        *("order/draw-0/round-00", "order/draw-1/round-00"),
        *("reinit/draw-0/round-01", "reinit/draw-1/round-01", "order/draw-0/round-01", "order/draw-1/round-01"),
        "one-shot/draw-0/round-01",
        *("reinit/draw-0/round-02", "reinit/draw-1/round-02", "order/draw-0/round-02", "order/draw-1/round-02"),
        "one-shot/draw-0/round-02",
    ]
    assert len(jobs) == 2 * (1 + len(first))
    assert {job.round for job in Grid(QUICK, controls=("order",), rounds=(2,)).jobs if job.control} == {2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "trials: expected at least 1, got 0"),
        ({"draws": 0}, "draws: expected at least 1"),
        ({"threads": 0}, "threads: expected at least 1"),
        ({"controls": ("reinit", "x")}, "controls: expected some of reinit, .*, got 'x'"),
        ({"rounds": (1, 3)}, "rounds: expected numbers from 1 to 2, got 3"),
        ({"rounds": (0,)}, "rounds: expected numbers from 1 to 2, got 0"),
    ],
)
def test_a_grid_that_makes_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        Grid(QUICK, **changes)


def test_an_executor_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="executor: expected one of processes, ray, got 'x'"):
        next(run(Grid(QUICK), tmp_path, "x"))


def test_what_decides_the_results_names_the_folder():
    grid = Grid(QUICK)
    assert grid.name == replace(grid, trials=5, controls=("reinit",), draws=3, rounds=(1,)).name
    assert len({grid.name, QUICK.name, replace(grid, threads=2).name, Grid(replace(QUICK, lr=1.0)).name}) == 4


def test_every_job_draws_otherwise():
    jobs = [Job(0, control, draw, number) for control in "ab" for draw in (0, 1) for number in (1, 2)]
    assert len({grid._seed(trial, job) for trial in (0, 1) for job in jobs}) == 16


def test_a_grid_and_what_it_writes(tmp_path, here):
    asked = Grid(QUICK, trials=2, controls=("reset", "order", "pruned"), rounds=(2,))
    events = list(run(asked, tmp_path, "here", note="a note"))
    assert sorted(names(events)) == sorted(job.name for job in asked.jobs)
    shown = [event.payload for event in events if event.kind == "progress" and "round" in event.payload]
    assert len(shown) == sum(map(asked.trainings, asked.jobs)) == 2 * (3 + 3)
    described = json.loads((tmp_path / "grid.json").read_text())
    assert described == described | {"trials": 2, "controls": ["reset", "order", "pruned"], "draws": 1, "threads": 1}
    assert described["rounds"] == [2]
    assert described["settings"] == described["settings"] | {"seed": 0, "rounds": 2}
    assert (described["scale"], described["note"]) == (QUICK.scale, "a note")
    assert "torch" in described["machine"]
    weights = {path.parent.parent.name for path in tmp_path.glob("trial-0/*/draw-0/*.safetensors")}
    assert weights == {"order"}  # the only one that keeps them
    for trial in (0, 1):
        folder = tmp_path / f"trial-{trial}"
        ladder = json.loads((folder / "ticket/round-02.json").read_text())
        reset, order, pruned = (
            json.loads((folder / name / "draw-0/round-02.json").read_text()) for name in ("reset", "order", "pruned")
        )
        assert reset["curves"] == ladder["curves"] != order["curves"]
        assert len(pruned["curves"]["iteration"]) == 1
        assert Ticket.load(folder / "ticket/ticket.safetensors").recipe["settings"]["seed"] == trial


def test_what_is_done_is_not_done_again(tmp_path, here, monkeypatch):
    small = Grid(QUICK, controls=("reinit",))
    list(run(small, tmp_path, "here"))
    assert list(run(small, tmp_path, "here")) == []
    (tmp_path / "trial-0/reinit/draw-0/round-02.json").unlink()
    assert names(run(small, tmp_path, "here")) == ["trial-0/reinit/draw-0/round-02"]
    before = results(tmp_path / "trial-0")
    more = Grid(QUICK, trials=2, controls=("one-shot",))
    assert set(names(run(more, tmp_path, "here"))) == {job.name for job in more.jobs} - {"trial-0/ticket"}
    assert before.items() <= results(tmp_path / "trial-0").items()
    described = json.loads((tmp_path / "grid.json").read_text())
    assert (described["trials"], described["controls"], described["rounds"]) == (2, ["reinit", "one-shot"], None)
    list(run(small, tmp_path, "here"))
    assert json.loads((tmp_path / "grid.json").read_text()) == described
    monkeypatch.setattr(grid, "compare", None)
    grid.work(small, tmp_path, small.jobs[-1], None)  # as Ray may


def test_a_folder_of_another_grid(tmp_path, here):
    list(run(Grid(replace(QUICK, rounds=1)), tmp_path, "here"))
    for other in (Grid(QUICK), Grid(replace(QUICK, rounds=1), threads=2)):
        with pytest.raises(ValueError, match=r"grid\.json is of a grid with other settings or threads"):
            list(run(other, tmp_path, "here"))


def test_a_ladder_that_fails(tmp_path, here):
    """Of two, the second: its controls cannot begin, all else is done."""
    (tmp_path / "trial-1/ticket").mkdir(parents=True)
    (tmp_path / "trial-1/ticket/theta.safetensors").write_bytes(b"damaged")
    events = list(run(Grid(QUICK, trials=2, controls=("reinit",)), tmp_path, "here"))
    failures = {event.job.name: event.payload for event in events if event.kind == "failed"}
    assert failures.keys() == {
        f"trial-1/{job}" for job in ("ticket", "reinit/draw-0/round-01", "reinit/draw-0/round-02")
    }
    assert "theta.safetensors" in failures["trial-1/ticket"]
    assert failures["trial-1/reinit/draw-0/round-02"] == "trial-1/ticket has not finished round 2"
    assert len(names(events)) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="looks for living processes in /proc")
def test_killed_at_any_moment_it_goes_on_to_the_same_end(tmp_path, here, monkeypatch):
    """Against one process that does the jobs in another order, two that are killed with -9, again and again."""
    monkeypatch.setitem(EXECUTORS, "processes", EXECUTORS["here"])
    assert cli.main(["lab", "lenet", *OPTIONS, "--out", str(tmp_path / "whole")]) == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cut = tmp_path / "cut"
    for count in FILES:
        assert killed(cut, lambda count=count: len(list(cut.rglob("[!.]*.*"))) >= count)
    finish(cut)
    expected, found = results(tmp_path / "whole"), results(cut)
    assert found.keys() == expected.keys()
    assert found == expected
    ladder, reinit, order = 3 + 2 * 3, 2, 2 * 3
    assert len(found) == 1 + 2 * (ladder + reinit + order)


def test_it_stops_in_time_and_goes_on(tmp_path, here, monkeypatch):
    """Killed by nothing: told when to stop, at the first look that a training takes at the clock, the third, ..."""
    asked = Grid(replace(QUICK, scope="global"), controls=("reinit",), rounds=(2,))
    monkeypatch.setattr(training, "native_trainer", lambda *_: None)  # whose steps run to the end
    list(run(asked, tmp_path / "whole", "here"))
    assert list(run(asked, tmp_path / "cut", "here", until=0.0)) == []  # nothing is reported as failed
    paused = []
    for looks in range(3, 12):
        clock = iter([0.0] * looks + [1.0] * 100)
        with monkeypatch.context() as patch:
            patch.setattr(grid.time, "time", clock.__next__)
            events = list(run(asked, tmp_path / "cut", "here", until=1.0))
        assert not [event for event in events if event.kind == "failed"]
        paused += [event.payload for event in events if event.kind == "paused"]
    list(run(asked, tmp_path / "cut", "here"))
    assert paused
    assert results(tmp_path / "cut") == results(tmp_path / "whole")

from __future__ import annotations

import csv
import itertools
import json
import shlex
import signal
import sys
from dataclasses import asdict

import pytest

from sparselottery import cli
from sparselottery.cli import tables
from sparselottery.lab import experiment
from sparselottery.lab.controls import CONTROLS
from sparselottery.lab.executors import EXECUTORS, Event
from sparselottery.lab.settings import PRESETS, preset

LAB = ["lab", "lenet", "--data", "digits", "--rounds", "2", "--iterations", "20", "--trials", "2"]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Jobs run in this process."""

    def executor(work, take, place):
        assert place.workers in (None, 3)
        for job in iter(take, None):
            reports: list[Event] = []
            try:
                work(job, lambda payload, job=job, reports=reports: reports.append(Event(job, "progress", payload)))
                yield from (*reports, Event(job, "done"))
            except ValueError as error:
                yield Event(job, "failed", str(error))

    monkeypatch.setitem(EXECUTORS, "processes", executor)
    monkeypatch.setattr(experiment, "step_ms", lambda *_: {"sparse_ms": 1.0, "dense_ms": 2.0})


def fails(capsys, *argv: object) -> str:
    assert cli.main([str(arg) for arg in argv]) == 2
    return capsys.readouterr().err


def printed(capsys, *argv: str) -> dict:
    assert cli.main(["lab", *argv, "--print"]) == 0
    return json.loads(capsys.readouterr().out)


def test_lab_prints_a_row_per_training_and_what_is_next(tmp_path, capsys):
    options = ["--controls", "reinit,one-shot", "--draws", "2", "--workers", "3"]
    assert cli.main([*LAB, *options, "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    head, note, columns, *rows, _, following = capsys.readouterr().out.splitlines()
    assert head == f"digits: lenet-300-100, 2 trials, 18 trainings of 20 iterations, 0 of them done, into {folder}"
    assert note == "note: scale 0.00667: 20 of the preset's 3,000 iterations"
    assert columns.split() == ["trial", "round", "trained", "weights", "%", "test", "%", "stops", "at"]
    assert {len(row) for row in rows} == {len(columns)}
    assert [row.split()[:4] for row in rows[:3]] == [
        ["0", str(number), "ticket", weights] for number, weights in enumerate(("100.0", "80.2", "64.3"))
    ]
    assert len(rows) == 18
    assert sum(" reinit 1 " in row for row in rows) == 4
    assert following == f"next:   sparselottery report {folder}"
    assert cli.main([*LAB, *options, "--workers", "3", "--out", str(tmp_path)]) == 0
    assert "18 of them done" in capsys.readouterr().out


def test_lab_draws_bars_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(tables, "perf_counter", itertools.count().__next__)  # time enough to draw every change
    assert cli.main([*LAB, "--controls", "reinit", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "trainings" in out
    assert "trial-1/reinit" in out


def test_a_job_that_fails_is_named(tmp_path, capsys, monkeypatch):
    def compare(*_):
        raise ValueError("diverged")

    monkeypatch.setattr("sparselottery.lab.grid.compare", compare)
    error = fails(capsys, *LAB, "--trials", "1", "--controls", "reinit", "--control-rounds", "2", "--out", tmp_path)
    assert error.startswith("sparselottery: 1 jobs failed")
    assert "trial-0/reinit/draw-0/round-02: diverged" in error
    (folder,) = tmp_path.iterdir()
    assert (folder / "trial-0/ticket/ticket.safetensors").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_lab_prints_the_papers_settings(capsys, name):
    found = printed(capsys, name)
    expected = json.loads(json.dumps(asdict(PRESETS[name])))
    assert found == found | expected
    assert found == found | {"trials": 3, "controls": ["reinit", "rearranged", "one-shot"], "draws": 1, "scale": ""}


def test_lab_passes_every_option_on(capsys):
    options = {
        **{"data": "digits", "rounds": 3, "iterations": 1000, "eval_every": 7, "fraction": 0.5, "batch": 30, "lr": 0.1},
        **{"seed": 4, "rewind_step": 10, "one_shot": True, "retrain": "continue", "optimizer": "sgd", "momentum": 0.5},
        **{"weight_decay": 0.01, "dropout": 0.5, "drops": "1/2,0.75", "warmup": 40, "augment": True},
        **{"scope": "global", "prune_layers": "fc", "conv_share": 0.3, "fc_share": 0.4, "output_share": 0.6},
        **{"granularity": "4x2", "device": "cpu", "execution": "measured", "method": "imp", "permute": True},
    }
    given = [f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in options.items()]
    found = printed(capsys, "lenet", *given, "--control-rounds", "1", "--threads", "2")
    lists = {"drops": [0.5, 0.75], "granularity": [4, 2]}
    assert found == found | options | lists | {"control_rounds": [1], "threads": 2}
    assert options.keys() | {"model"} == asdict(preset()).keys()
    short = printed(capsys, "lenet", *given, "--scale", "0.1")
    assert (short["iterations"], short["warmup"], short["rewind_step"]) == (100, 4, 1)
    assert short["folder"] != found["folder"]
    assert printed(capsys, "resnet-18", "--no-augment")["augment"] is False
    assert printed(capsys, "lenet", "--method=single-cycle", "--controls=")["method"] == "single-cycle"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--scale=0", "scale"),
        ("--control-rounds=3", "rounds"),
        ("--prune-layers=conv", "prune_layers"),
        ("--data=cifar10", "lenet-300-100: expected data among"),
    ],
)
def test_lab_with_a_value_that_makes_no_sense(tmp_path, capsys, option, message):
    assert message in fails(capsys, *LAB, option, "--out", tmp_path)


@pytest.mark.parametrize("argv", ["lab", "lab x", "lab lenet --controls=x", "lab lenet --drops=x", "report"])
def test_usage(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(argv.split())
    assert exit_info.value.code == 2
    assert "usage: sparselottery" in capsys.readouterr().err


def test_help_names_every_control_and_the_presets_values(capsys):
    with pytest.raises(SystemExit):
        cli.main(["lab", "resnet-18", "--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in CONTROLS)
    assert "0.666667,0.833333" in out


def test_lab_interrupted(tmp_path, capsys, monkeypatch):
    train, calls = experiment.train, []

    def interrupted(*args, **kwargs):
        calls.append(kwargs)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return train(*args, **kwargs)

    monkeypatch.setattr(experiment, "train", interrupted)
    argv = [*LAB, "--controls", "", "--out", str(tmp_path)]
    assert cli.main(argv) == 143
    (folder,) = tmp_path.iterdir()
    said = capsys.readouterr().err
    assert said.startswith(f"\nsparselottery: interrupted; 2 of 6 trainings are kept in {folder}; goes on with: ")
    assert said.endswith(f"sparselottery {shlex.join(argv)}\n")
    assert cli.main(argv) == 0
    assert len(calls) == 7
    assert "nothing was trained" not in capsys.readouterr().out
    assert cli.main(argv) == 0
    assert "nothing was trained: the run was finished before\n" in capsys.readouterr().out


def test_without_ray(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    error = fails(capsys, *LAB, "--executor", "ray", "--out", tmp_path)
    assert error == "sparselottery: ray is not installed: pip install 'sparselottery[ray]'\n"


def test_report(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert cli.main([*LAB, "--trials", "1", "--controls", "reinit", "--out", str(tmp_path / "runs")]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    capsys.readouterr()
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "page")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page' / 'report.html'}\n"
    assert "scale 0.00667" in (tmp_path / "page/report.html").read_text().lower()


def test_xor(tmp_path, capsys):
    options = ["--trials", "20", "--iterations", "100", "--hidden", "4,2", "--csv", str(tmp_path / "xor.csv")]
    assert cli.main(["lab", "xor", *options]) == 0
    head, columns, *rows, _, _, written = capsys.readouterr().out.splitlines()
    assert head == "xor: 20 nets of each size, at most 100 iterations"
    assert columns.split("  ")[-1].strip() == "ticket zero loss %"
    assert [row.split()[0] for row in rows] == ["4", "2"]
    assert str(tmp_path / "xor.csv") in written
    with (tmp_path / "xor.csv").open() as file:
        assert [row["hidden"] for row in csv.DictReader(file)] == ["4", "2"]
    assert printed(capsys, "xor", "--lr", "0.5")["lr"] == 0.5
    assert "hidden: expected sizes" in fails(capsys, "lab", "xor", "--hidden", "2,4")

"""How benchmarks/gpu goes on: within its seconds, past failures, to rows and to tables that come from the CSV alone."""

from __future__ import annotations

import csv
import os
import time
from dataclasses import asdict

import pytest
import torch

from benchmarks import results
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import bars, rows, runner, summary
from benchmarks.gpu.cases import Linear, Step
from benchmarks.gpu.measure import Outcome

HEAD = {"machine": "NVIDIA H200, 132 multiprocessors", "date": "2026-01-01"}
LAYER = Linear("forward+backward", 4096, 4096, 4096, "1x1", 0.1, "fp32")


def row(case, impl, ms, chosen="", roofline=0.5):
    measured = {"impl": impl, "chosen": chosen, "ms": ms, "speedup": 1, "roofline": roofline}
    return {**asdict(case), **measured, "graph": "yes", "rounds": 5, "rejected": 0}


def fake_measure(case, seconds, device, eager):
    if case.density == 0.5:
        return Outcome(missing={"": "RuntimeError: nothing goes"})
    return Outcome([row(case, bars.OURS, 1.0)], {"torch_bsr": "ValueError: no"})


LINEARS = [Linear("forward", 1, 2, 3, "1x1", density, "fp32") for density in (0.1, 0.2, 0.5)]


def test_a_case_is_tried_again_without_the_graph(tmp_path):
    tried = []

    def measure_once(case, seconds, device, eager):
        tried.append(eager)
        if "torch_csr" not in eager:
            return Outcome(missing={"": "torch_csr cannot be captured"}, lost=True, retry="torch_csr")
        return Outcome([row(case, bars.OURS, 1.0)])

    files = rows.Files(tmp_path, "linear", HEAD)
    assert runner.run(LINEARS[:2], 60.0, measure_once, "cpu", files, [].append)
    assert [len(eager) for eager in tried] == [0, 1, 1]
    assert files.missing == []


def test_the_budget_lists_what_it_skips(tmp_path):
    told, files = [], rows.Files(tmp_path, "linear", HEAD)

    def slow_measure(*args):
        time.sleep(0.02)
        return fake_measure(*args)

    assert runner.run(LINEARS, 0.01, slow_measure, "cpu", files, told.append)
    assert len(results.read(tmp_path / "gpu-linear.csv")[1]) == 1
    _, missing = results.read(tmp_path / "gpu-linear-missing.csv")
    left = [each["density"] for each in missing if each["why"] == runner.NOT_REACHED]
    assert left == [0.2, 0.5]
    assert "2 of 3 cases not reached" in told[-1]


def test_no_seconds_reach_nothing(tmp_path):
    runner.run(LINEARS, 0.0, fake_measure, "cpu", rows.Files(tmp_path, "linear", HEAD), [].append)
    assert results.read(tmp_path / "gpu-linear.csv")[1] == []
    assert len(results.read(tmp_path / "gpu-linear-missing.csv")[1]) == 3


def test_a_failure_stops_nothing_and_baselines_are_noted_once(tmp_path):
    files = rows.Files(tmp_path, "linear", HEAD)
    assert not runner.run(LINEARS[::-1], 60.0, fake_measure, "cpu", files, [].append)
    head, found = results.read(tmp_path / "gpu-linear.csv")
    assert head == HEAD
    assert [each["density"] for each in found] == [0.2, 0.1]
    assert list(found[0]) == [*asdict(LAYER), *bars.MEASURED]
    missing = results.read(tmp_path / "gpu-linear-missing.csv")[1]
    assert [(each["impl"], each["density"]) for each in missing] == [("", 0.5), ("torch_bsr", 0.2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-linear-missing.csv", "gpu-linear.csv"]


def test_a_worker_survives_death_and_hanging(monkeypatch):
    worker = runner.Worker()
    try:
        with pytest.raises(runner.BrokenProcessPool):
            worker.run(os._exit, 1)
        with pytest.raises(runner.TimeoutError):
            worker.run(time.sleep, 60, limit=0.01)
        assert worker.run(os.getpid) != os.getpid()
        monkeypatch.setattr(runner, "CASE_LIMIT", 0)
        for error, why in ((runner.TimeoutError, "did not finish"), (runner.BrokenProcessPool, "died")):
            monkeypatch.setattr(worker, "run", lambda *args, error=error: (_ for _ in ()).throw(error()))
            assert why in worker.measure(LAYER, 0.0, "cpu", frozenset()).missing[""]
        monkeypatch.setattr(worker, "run", lambda *args: Outcome(lost=True))
        assert worker.measure(LAYER, 0.0, "cpu", frozenset()).lost
        assert worker._pool is None
    finally:
        worker.stop()


def test_the_summary_reads_the_csv_alone(tmp_path, capsys):
    files = rows.Files(tmp_path, "linear", HEAD)
    half = Linear(**asdict(LAYER) | {"density": 0.05})
    blocks = Linear(**asdict(LAYER) | {"pattern": "32x32", "dtype": "bf16"})
    found = [row(LAYER, bars.OURS, 1.0), row(LAYER, "nn_linear", 3.0), row(LAYER, "masked_dense", 4.0)]
    found += [row(half, bars.OURS, 2.0, "dense"), row(half, "nn_linear", 2.0), row(blocks, "nn_linear", 2.0)]
    files.add(found, [{**asdict(half), "impl": "", "why": runner.NOT_REACHED}])
    files.add([], [{**asdict(LAYER), "impl": "torch_csr", "why": "RuntimeError: no"}])
    summary.main(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("forward+backward 4096 4096 4096 1x1 fp32"))
    assert line.split()[-6:] == ["3.00x", "50", "%", "~1.00x", "50", "%"]
    assert any("no ours" in line for line in lines if "32x32 bf16" in line)
    verdicts = {line[:60].strip(): line.split()[-1] for line in lines if line[60:67].strip().endswith("x")}
    assert verdicts["linear fp32, weights, forward + backward, 90 % pruned"] == "met"
    assert verdicts["linear fp32, weights, forward + backward, 95 % pruned"] == "SHORT"
    assert verdicts["linear as chosen, worst case"] == "met"
    assert verdicts["conv as chosen, worst case"] == "measured"  # not yet
    assert "not reached: linear forward+backward 4096 4096 4096 1x1 fp32, 1 densities" in lines
    assert any(line.startswith("no row: linear forward+backward") and "torch_csr" in line for line in lines)


@pytest.mark.parametrize("tests_pass", [True, False])
def test_the_command_goes_on_after_failed_tests(tests_pass, tmp_path, monkeypatch, capsys):
    class Worker:
        def run(self, function, *args):
            return HEAD

        def measure(self, case, seconds, device, eager):
            return Outcome([row(case, bars.OURS, 1.0), row(case, "nn_linear", 2.0)])

        def stop(self):
            pass

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "run_tests", lambda seconds: tests_pass)
    monkeypatch.setattr(runner, "Worker", Worker)
    monkeypatch.setattr(runner, "prepare", lambda *args: None)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert command.main(["--cases", "tests", "linear", "--smoke", "--results", str(tmp_path)]) == (not tests_pass)
    with open(tmp_path / "gpu-linear.csv") as file:
        assert sum(1 for _ in csv.reader(file)) > len(HEAD) + 1
    assert "2.00x" in capsys.readouterr().out
    assert rows.folder(HEAD["machine"]) == "nvidia-h200"


def test_the_command_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main([])
    assert "torch sees none" in capsys.readouterr().err


def test_seconds_are_spread_over_the_parts():
    end = time.perf_counter() + 65
    found = {part: seconds for seconds, part in command.spread(["linear", "conv", "step"], end)}
    assert found["linear"] == pytest.approx(30, abs=1)
    assert found["step"] == pytest.approx(65, abs=1)  # nothing was used


def test_tests_have_a_limit(monkeypatch, capsys):
    monkeypatch.setattr(command, "TESTS", ("no such test",))
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    monkeypatch.setattr(command.sys, "executable", "/bin/true")
    assert command.run_tests(20.0)
    monkeypatch.setattr(command.sys, "executable", "/bin/yes")
    assert not command.run_tests(0.0)
    assert "did not finish" in capsys.readouterr().out


def test_prepare_stops_in_time(monkeypatch):
    started = time.perf_counter()
    runner.prepare([LAYER, Step("lenet-300-100", 60, "1x1", 0.1, "fp32")], 0.0, "cpu", jobs=1)
    assert time.perf_counter() - started < 30

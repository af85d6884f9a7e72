"""How benchmarks/gpu goes on: within its seconds, past failures, to rows and tables that come from files alone."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, replace
from multiprocessing import Pipe
from types import SimpleNamespace

import pytest
import torch

from benchmarks import results
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import bars, prepare, rows, runner, summary, tests
from benchmarks.gpu.cases import Conv, Linear, label, planned
from benchmarks.gpu.measure import Outcome
from benchmarks.gpu.timing import CaptureError
from benchmarks.gpu.worker import LIMIT, FailedError, LateError, Worker, _attempt
from sparselottery.graphs import BrokenCaptureError

HEAD = {"machine": "NVIDIA H200, 132 multiprocessors", "date": "2026-01-01"}
LAYER = Linear("forward+backward", 4096, 4096, 4096, "1x1", 0.1, "fp32")
LINEARS = [Linear("forward", 1, 2, 3, "1x1", density, "fp32") for density in (0.1, 0.2, 0.5)]


def row(case, impl, ms, chosen="", roofline=0.5):
    measured = {"impl": impl, "chosen": chosen, "ms": ms, "speedup": 1, "roofline": roofline}
    return {**asdict(case), **measured, "graph": "yes", "rounds": 5, "rejected": 0}


def fake_measure(case, seconds, eager, limit):
    if case.density == 0.5:
        return Outcome(missing={"": "RuntimeError: nothing goes"})
    return Outcome([row(case, bars.OURS, 1.0)], {"torch_bsr": "ValueError: no"})


@pytest.fixture
def folder(tmp_path):
    return rows.opened(tmp_path / "run", dict(HEAD))


def read(folder, table):
    return results.read(folder.path / f"gpu-{table}.csv")[1]


def test_a_case_is_tried_again_without_the_graph(folder):
    tried = []

    def measure_once(case, seconds, eager, limit):
        tried.append(eager - runner.UNCAPTURED)
        if "nn_linear" not in eager:
            return Outcome(missing={"": "nn_linear cannot be captured"}, lost=True, retry="nn_linear")
        return Outcome([row(case, bars.OURS, 1.0)])

    assert runner.run_cases("bars", LINEARS[:2], 60.0, measure_once, folder)
    assert [len(eager) for eager in tried] == [0, 1, 1]
    assert read(folder, "missing") == []


def test_the_budget_lists_what_it_skips(folder):
    def slow_measure(*args):
        time.sleep(0.02)
        return fake_measure(*args)

    assert runner.run_cases("bars", LINEARS, 0.01, slow_measure, folder)
    assert len(read(folder, "linear")) == 1
    missing = read(folder, "missing")
    assert [each["case"] for each in missing if each["why"] == runner.NOT_REACHED] == list(map(label, LINEARS[1:]))
    assert missing[-1]["why"] == "2 of 3 not reached: out of time"
    assert "bars: 2 of 3 not reached" in (folder.path / "log.txt").read_text()


def test_no_seconds_reach_nothing(folder):
    runner.run_cases("bars", LINEARS, 0.0, fake_measure, folder)
    assert not (folder.path / "gpu-linear.csv").exists()
    assert len(read(folder, "missing")) == 4


def test_a_failure_stops_nothing_and_baselines_are_noted_once(folder):
    assert not runner.run_cases("bars", LINEARS[::-1], 60.0, fake_measure, folder)
    head, found = results.read(folder.path / "gpu-linear.csv")
    assert head == HEAD
    assert [each["density"] for each in found] == [0.2, 0.1]
    assert list(found[0]) == [*asdict(LAYER), *bars.MEASURED]
    missing = [(each["impl"], each["case"].split()[-2]) for each in read(folder, "missing")]
    assert missing == [("", "0.5"), ("torch_bsr", "0.2")]


class Jobs:
    """A part of jobs: each does what its name says, in the worker's process."""

    @staticmethod
    def jobs(smoke):
        return ["fine", "hangs", "raises", "dies", "fine"]

    @staticmethod
    def measure(job, device, smoke):
        if job == "dies":
            os._exit(1)
        if job == "hangs":
            time.sleep(60)
        if job == "raises":
            raise ValueError("no\nmore")
        os.write(1, b"said in a worker\n")
        return [{"part": "tune", "kernel": "k", "case": "c", "config": "x", "us": 1.0, "detail": str(device)}]


@pytest.fixture
def worker(folder):
    worker = Worker("cpu", lambda line: folder.tell(line, aloud=False))
    yield worker
    worker.stop()


def test_a_job_that_dies_or_hangs_leaves_the_others_their_turn(folder, worker, monkeypatch):
    monkeypatch.setattr(runner, "LIMIT", 1)
    limits = iter([60, 1, 60, 60, 60])  # the one that hangs starts no process
    monkeypatch.setattr(runner, "_limit", lambda end: next(limits))
    assert not runner.run_jobs("tune", Jobs, True, 90.0, worker, folder)
    worker.stop()
    assert [each["detail"] for each in read(folder, "kernels")] == ["cpu", "cpu"]
    reasons = {each["case"]: each["why"] for each in read(folder, "missing")}
    assert reasons == {
        "dies": "the process ended with 1",
        "hangs": "did not finish in 1 s",
        "raises": "ValueError: no",
    }
    log = (folder.path / "log.txt").read_text()
    assert "said in a worker" in log
    assert "more\n" in log  # all of the error


def captures():
    raise CaptureError("step", "no")


def breaks():
    raise BrokenCaptureError("no")


def raises():
    raise ValueError("no")


@pytest.mark.parametrize(
    ("function", "works", "lost"), [(captures, True, True), (breaks, True, True), (raises, True, False),
                                    (raises, False, True), (time.monotonic, True, False)]
)  # fmt: skip
def test_a_process_is_of_no_more_use_after_a_failed_capture_or_without_the_gpu(function, works, lost, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.worker.works", lambda device: works)
    assert _attempt("cpu", function, ())[2] == lost


class Pretend:
    """A process that answers, and that ends when it is killed."""

    def __init__(self, worker, lost, monkeypatch):
        self.answer, self.killed = (None, "step cannot be captured", lost), False
        self.send = self.poll = self.join = lambda *args: True
        self.recv, self.close = lambda: self.answer, lambda: None
        monkeypatch.setattr(worker, "_start", lambda: None)
        worker._process = worker._calls = worker._follower = self

    def kill(self):
        self.killed = True


@pytest.mark.parametrize("lost", [True, False])
def test_a_worker_that_is_of_no_more_use_is_replaced(worker, lost, monkeypatch):
    process = Pretend(worker, lost, monkeypatch)
    with pytest.raises(FailedError, match="step cannot be captured"):
        worker.run(captures)
    assert (process.killed, worker._process is None) == (lost, lost)


@pytest.mark.parametrize(("limit", "fine"), [(LIMIT, False), (LIMIT - 1, True)])
def test_a_case_that_its_part_cuts_off_is_no_failure(folder, monkeypatch, limit, fine):
    class Late:
        device = "cpu"

        def run(self, *args, limit):
            raise LateError(f"did not finish in {limit} s")

    monkeypatch.setattr(runner, "_limit", lambda end: limit)
    late = SimpleNamespace(jobs=lambda smoke: ["any"], measure=None)
    assert runner.run_jobs("tune", late, True, 60.0, Late(), folder) == fine
    assert runner.run_cases("bars", LINEARS[:1], 60.0, runner.Runner(Late()).measure, folder) == fine
    whys = [each["why"] for each in read(folder, "missing")]
    assert whys == 2 * [runner.NOT_REACHED if fine else "did not finish in 60 s"]


def test_the_summary_reads_the_files_alone(folder):
    half = Linear(**asdict(LAYER) | {"density": 0.05})
    blocks = Linear(**asdict(LAYER) | {"pattern": "64x64", "dtype": "bf16"})
    found = [row(LAYER, bars.OURS, 1.0), row(LAYER, "nn_linear", 3.0), row(LAYER, "masked_dense", 4.0)]
    found += [row(half, bars.OURS, 2.0, "dense"), row(half, "nn_linear", 2.0), row(blocks, "nn_linear", 2.0)]
    found += [row(blocks, bars.OURS, 1.0)]
    folder.add("linear", found)
    folder.miss("rest", "all", "", "3 of 9 not reached: out of time")
    folder.miss("bars", label(LAYER), "torch_csr", "RuntimeError: no")
    folder.miss("bars", label(LAYER), "", "the process died")
    lines = summary.whole(folder.texts).splitlines()
    (line,) = (line for line in lines if line.startswith("forward+backward 4096 4096 4096 1x1 fp32"))
    assert line.split()[-6:] == ["3.00x", "50", "%", "~1.00x", "50", "%"]
    verdicts = {line[:70].strip(): line.split()[-1] for line in lines if line[70:77].strip().endswith("x")}
    assert verdicts["linear fp32 1x1, batch 4096 and 8192, forward+backward, 90 % pruned"] == "met"
    assert verdicts["linear bf16 64x64, batch 4096 and 8192, forward+backward, 90 % pruned"] == "SHORT"
    assert verdicts["linear as chosen, worst case"] == "met"
    assert verdicts["conv as chosen, worst case"] == "measured"  # not yet
    assert "rest: 3 of 9 not reached: out of time" in lines
    assert "no row: torch_csr in 1 cases (gpu-missing.csv)" in lines
    assert f"no row: bars {label(LAYER)} any: the process died" in lines
    assert "tests: none has run" in lines


def test_the_tail_is_short_whatever_there_is_and_ends_with_the_bars(folder):
    for batch in range(100):
        case = Linear(**asdict(LAYER) | {"batch": batch})
        folder.add("linear", [row(case, bars.OURS, 1.0), row(case, "nn_linear", 3.0)])
        folder.miss("rest", label(case), "", "x" * 200)
    failed = [tests.Result(f"tests/test_a.py::test_{n}", "failed", 1.0, "E   " + "y" * 300) for n in range(50)]
    folder.save("junit.xml", tests.junit(failed))
    told = summary.tail(folder.texts)
    assert len(told) <= summary.TAIL
    lines = told.splitlines()
    names = [bar.what for bar in bars.BARS]
    assert [line[:70].strip() for line in lines[-len(names) :]] == names
    assert "0 passed, 0 skipped, 50 failed" in told
    assert "FAILED tests/test_a.py::test_0: yyy" in told
    assert "more lines in summary.txt" in told
    assert any(line.startswith("forward+backward") for line in lines)


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/proc"), reason="needs a folder that refuses root")
def test_a_folder_that_refuses_is_replaced(tmp_path, capsys):
    wanted = tmp_path / "file"
    wanted.write_text("in the way")
    for refusing in (wanted, wanted / "below", "/proc/gpu-results"):
        found = rows.opened(type(tmp_path)(refusing), dict(HEAD))
        assert str(refusing) in capsys.readouterr().out
        assert (found.path / "gpu-missing.csv").exists()


def test_a_disk_that_fills_up_is_told_once_and_stops_nothing(folder, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "replace", full)
    for impl in (bars.OURS, "masked_dense", "nn_linear"):
        folder.add("linear", [row(LAYER, impl, 3.0)])
    assert capsys.readouterr().out.count("cannot be written") == 1
    assert not (folder.path / "gpu-linear.csv").exists()
    assert "1.00x" in summary.tail(folder.texts)  # the output has it all


def test_a_summary_that_raises_is_one_line(folder, monkeypatch):
    folder.add("kernels", [dict.fromkeys(rows.KERNEL_COLUMNS, "") | {"part": "tune"}])
    monkeypatch.setattr("benchmarks.gpu.tune.summary", lambda rows: 1 / 0)
    lines = summary.whole(folder.texts).splitlines()
    assert "no summary: ZeroDivisionError: division by zero" in lines
    assert lines[-1].startswith(bars.BARS[-1].what)


def test_launches_are_recorded_without_a_run(monkeypatch):
    monkeypatch.setattr("sparselottery.kernels.gpu.DEVICES", ("cpu",))
    for case in (Linear("", 32, 32, 64, "1x1", 0.2, "fp32"), Conv("", 1, 16, 4, "16x16", 0.2, "fp32")):
        names = {launch.kernel.__name__ for launch in prepare.launches(case, "cpu")}
        assert any("spmm" in name or "conv" in name for name in names)
        assert any("sddmm" in name for name in names)


def test_a_run_replaces_the_files_of_its_parts_alone(tmp_path, monkeypatch):
    """Others may be those of a whole run, committed."""
    monkeypatch.setattr(command.signal, "signal", lambda *args: None)
    old = {name: f"{name} of an older run\n" for name in ("gpu-linear.csv", "gpu-kernels.csv", "junit.xml", "log.txt")}
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    assert command.main(["--dry-run", "--results", str(tmp_path), "--parts", "tune", "--seconds", "0"]) == 0
    new = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert new.keys() == {*old, "summary.txt", "gpu-missing.csv"}
    kept = {name for name, text in old.items() if new[name] == text}
    assert kept == {"gpu-linear.csv", "junit.xml"}
    assert "older" not in new["log.txt"] + new["gpu-kernels.csv"]
    assert f"# machine: {rows.facts('cpu')['machine']}\n" in new["gpu-kernels.csv"]


def test_the_folder_is_there_before_the_gpu_is_opened(tmp_path, monkeypatch):
    seen = []

    def opens(index):
        seen.extend(path.name for path in tmp_path.iterdir())
        seen.append((tmp_path / "log.txt").read_text())
        raise RuntimeError("CUDA unknown error\nand more")

    monkeypatch.setattr(torch.cuda, "get_device_properties", opens)
    folder = command._opened(tmp_path, "cuda", smoke=False)
    assert {"gpu-missing.csv", "log.txt"} <= set(seen)
    assert seen[-1].endswith("opening the device cuda\n")
    assert folder.head["machine"] == "unknown, RuntimeError: CUDA unknown error"
    assert "# machine: unknown, Runtime" in (tmp_path / "gpu-missing.csv").read_text()
    monkeypatch.setattr(results, "RESULTS", tmp_path / "all")
    assert command._opened(None, "cuda", smoke=False).path == tmp_path / "all" / "unknown"


def test_tests_are_saved_as_they_end(folder, monkeypatch):
    def interrupted(*args):
        args[-1]([tests.Result("tests/test_a.py::test_1", "passed", 1.0)])
        raise KeyboardInterrupt

    run = command.Run(folder, "cpu", True, folder.path, 1.0)
    run.results = [tests.Result("tests/test_a.py::test_0", "passed", 1.0)]
    monkeypatch.setattr(tests, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.part("other tests", 1.0)
    names = [each.test for each in tests.read_junit((folder.path / "junit.xml").read_text())]
    assert names == ["tests/test_a.py::test_0", "tests/test_a.py::test_1"]


def test_kernels_that_cannot_be_compiled_are_named(folder, monkeypatch):
    monkeypatch.setattr("sparselottery.kernels.gpu.DEVICES", ("cpu",))
    monkeypatch.setattr(prepare, "_compile", lambda launch: "RuntimeError: PTX" * ("sddmm" in launch.kernel.__name__))
    wrong = Linear("", 32, 32, 64, "1x1", 0.2, "fp99")
    found = list(prepare.compiled([wrong, LINEARS[0], Linear("", 32, 32, 64, "1x1", 0.2, "fp32")], "cpu"))
    assert found[0] == (label(wrong), "", "KeyError: 'fp99'")
    assert {kernel for _, kernel, _ in found[1:]} == {"_sddmm_kernel"}
    assert {why for _, _, why in found[1:]} == {"RuntimeError: PTX"}


def test_what_is_not_prepared_has_a_row(folder, monkeypatch):
    case = label(LINEARS[0])
    run = command.Run(folder, "cpu", True, folder.path, 1.0)
    for kernel, fine in (("_sddmm_kernel", False), ("", True)):
        monkeypatch.setattr(
            command, "prepare", lambda *args, kernel=kernel: iter([(case, kernel, "RuntimeError: PTX")])
        )
        assert run.part("prepare", 1.0) == fine
    assert [(each["part"], each["case"], each["impl"]) for each in read(folder, "missing")] == [
        ("prepare", case, "_sddmm_kernel"), ("prepare", case, "")
    ]  # fmt: skip
    assert f"no row: prepare {case} _sddmm_kernel: RuntimeError: PTX" in summary.whole(folder.texts)


def test_failures_come_out_of_the_processes_that_prepare():
    wrong = [Linear("", 32, 32, 64, "1x1", density, "fp99") for density in (0.1, 0.2)]
    wrong.append(replace(wrong[0], batch=16))
    assert list(prepare.prepare(wrong, 60.0, "cpu", 1)) == [(label(wrong[0]), "", "KeyError: 'fp99'")]


def test_a_process_that_ends_while_it_prepares_is_told():
    reader, writer = Pipe(duplex=False)
    writer.close()
    ended = SimpleNamespace(exitcode=-11, join=lambda seconds: None, kill=lambda: None)
    assert prepare._received(reader, {reader: ended}) == ("all", "", "a process ended with -11")


def test_every_case_has_one_part():
    plan = planned()
    for parts in (plan, planned(smoke=True)):
        cases = [case for part in parts.values() for case in part]
        assert len(cases) == len(set(cases))
    assert plan["bars"]
    assert plan.keys() | set(rows.PARTS_OF_KERNELS) <= command.PLAN.keys()


def test_the_command_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main([])
    assert "torch sees none" in capsys.readouterr().err


def test_a_part_that_breaks_leaves_the_others_their_turn(folder):
    run = SimpleNamespace(folder=folder, part=lambda name, seconds: 1 / 0)
    assert not command._attempt(run, "tune", 1.0)
    assert read(folder, "missing")[0]["why"] == "ZeroDivisionError: division by zero"

"""The machinery of benchmarks/gpu: what is wrong or not reached is said and has no row; tables come from the CSV."""

from __future__ import annotations

import csv
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from blocks import is_blocky
from gpus import DEVICE
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed

from benchmarks import results
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import bars, cases, measure, nets, problems, roofline, rows, runner, summary, timing
from benchmarks.gpu.cases import Conv, Linear, Step
from benchmarks.gpu.measure import Outcome
from benchmarks.gpu.timing import Entry
from benchmarks.timing import Candidate
from sparselottery.kernels import gpu

TRUTH = [torch.tensor([3.0, 4.0], dtype=torch.float64)]
HEAD = {"machine": "NVIDIA H200, 132 multiprocessors", "date": "2026-01-01"}
LAYER = Linear("forward+backward", 4096, 4096, 4096, "1x1", 0.1, "fp32")


@pytest.fixture(autouse=True)
def _on_gpu(monkeypatch):
    """CPU tensors take the GPU's kernels where there is no GPU; a few calls are enough for a time."""
    monkeypatch.setattr(gpu, "DEVICES", (DEVICE,))
    monkeypatch.setattr(timing, "MIN_SAMPLE", 0.0)
    monkeypatch.setattr("sparselottery.execution.BURST_MS", 0.0)
    problems._problem.cache_clear()


class StubClock(timing.CpuClock):
    """Seconds by name of the run's result; captures where it is told to."""

    def __init__(self, captures=True, lost=False):
        self.captures, self.lost, self.waited = captures, lost, 0

    def capture(self, run):
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        return run

    def wait(self):
        if self.lost:
            raise RuntimeError("an illegal memory access was encountered")

    def seconds(self, run, calls):
        return run()


def entry(seconds=1.0, result=TRUTH[0].float(), dense=False):
    return Entry(lambda: Candidate(lambda: seconds, lambda: [result]), dense)


def failing(error):
    def run():
        raise error

    return Entry(lambda: Candidate(run, list), False)


@pytest.mark.parametrize("shape", [(64, 96), (40, 70), (32, 48, 3, 3)])
@pytest.mark.parametrize("block", [(1, 1), (16, 16), (32, 1)])
def test_masks_have_an_exact_number_of_blocks(shape, block):
    mask = cases.random_mask(shape, block, 0.3, torch.Generator().manual_seed(0))
    corners = mask[:: block[0], :: block[1]]
    assert corners.sum() == round(0.3 * corners.numel())
    assert mask.shape == shape
    assert is_blocky(mask, block)
    other = cases.random_mask(shape, block, 0.3, torch.Generator().manual_seed(1))
    assert not torch.equal(mask, other)


@pytest.mark.parametrize("part", cases.PARTS)
def test_cases_come_in_the_order_of_the_bars(part):
    found = cases.cases(part)
    assert len(set(found)) == len(found)
    promised = [any(bar.matches(part, asdict(case)) and bar.where for bar in bars.BARS) for case in found]
    assert promised == sorted(promised, reverse=True)
    assert all(isinstance(case, cases.PARTS[part]) for case in found)
    assert set(cases.cases(part, smoke=True)).isdisjoint(found) or part == "step"


@pytest.mark.parametrize("bar", bars.BARS, ids=lambda bar: bar.what)
def test_every_bar_has_cases(bar):
    assert any(bar.matches(bar.part, asdict(case)) for case in cases.cases(bar.part))


def test_cases_have_enough_blocks():
    small = [case for case in cases.cases("conv") if case.channels == 64 and case.pattern == "64x64"]
    assert {case.density for case in small} == {0.1, 0.2, 0.5}  # of nine blocks
    assert not [case for case in cases.cases("conv") if case.pattern == "64x1"]


LAYERS = [
    Linear("", 20, 32, 48, "1x1", 0.2, "fp32"),
    Linear("", 3, 32, 48, "16x16", 0.5, "tf32"),
    Linear("", 20, 32, 64, "64x1", 0.2, "fp32"),
    Linear("", 3, 32, 48, "1x1", 0.2, "bf16"),
    Conv("", 2, 16, 4, "1x1", 0.2, "fp32"),
    Conv("", 2, 32, 4, "16x16", 0.2, "tf32"),
]


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("layer", LAYERS, ids=cases.label)
def test_a_layer_is_measured(layer, op):
    case = type(layer)(**asdict(layer) | {"op": op})
    outcome = measure.measure(case, 0.0, DEVICE)
    assert not outcome.lost
    assert outcome.missing.keys() <= {"torch_csr", "torch_bsr"}  # which do not exist everywhere
    impls = {row["impl"]: row for row in outcome.rows}
    kernels = "sparse" if case.pattern == "1x1" else "block"
    assert {bars.OURS, f"{bars.OURS}_{kernels}", f"{bars.OURS}_dense"} <= impls.keys()
    assert set(bars.DENSE[case.part]) <= impls.keys()
    for row in outcome.rows:
        assert tuple(row) == (*asdict(case), *bars.MEASURED)
        assert float(row["ms"]) > 0 and float(row["roofline"]) > 0 and row["rounds"] > 0
    assert impls[bars.OURS]["speedup"] == "1"
    assert impls[bars.OURS]["chosen"] in ("sparse", "block", "dense", "compact")
    assert impls[f"{bars.OURS}_dense"]["chosen"] == "dense"


def test_a_wrong_layer_has_no_row(monkeypatch):
    right = nn.functional.linear
    monkeypatch.setattr(
        nn.functional, "linear", lambda *args: right(*args) * (1.01 if args[0].dtype == torch.float32 else 1)
    )
    outcome = measure.measure(Linear("forward", 3, 32, 48, "1x1", 0.2, "fp32"), 0.0, DEVICE)
    assert {"nn_linear", "masked_dense"} <= outcome.missing.keys()
    assert "is wrong by" in outcome.missing["nn_linear"]
    assert not {"nn_linear", "masked_dense"} & {row["impl"] for row in outcome.rows}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_is_measured(dtype, monkeypatch):
    tiny = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5))
    monkeypatch.setattr(nets, "net", lambda name: (tiny, (12,), 5))
    outcome = measure.measure(Step("mlp", 6, "1x1", 0.3, dtype), 0.0, DEVICE)
    assert outcome.missing == {}
    assert [row["impl"] for row in outcome.rows] == [bars.OURS, f"{bars.OURS}_native", "dense", "masked_dense"]
    assert outcome.rows[1]["chosen"] == "sparse 2"
    assert {row["roofline"] for row in outcome.rows} == {""}


def test_steps_of_images_run_in_both_formats(monkeypatch):
    tiny = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    monkeypatch.setattr(nets, "net", lambda name: (tiny, (3, 4, 4), 5))
    outcome = measure.measure(Step("conv-6", 2, "1x1", 0.3, "fp32"), 0.0, DEVICE)
    assert outcome.missing == {}
    assert {"dense_channels_last", "masked_dense_channels_last"} < {row["impl"] for row in outcome.rows}


def test_small_layers_of_a_net_have_no_blocks():
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Linear(64, 10))
    masks = nets.masks(net, "32x32", 0.5, "cpu")
    assert [is_blocky(mask, (32, 32)) for mask in masks.values()] == [False, True, False]


def test_the_transformer_is_one():
    model = nets.ViT(image=8, patch=4, dim=8, heads=2, depth=2, classes=3)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 3)


def test_who_raises_or_is_wrong_has_no_time():
    wrong = entry(result=torch.tensor([3.0, 4.1]))
    entries = {"right": entry(), "wrong": wrong, "nan": entry(result=torch.full((2,), math.nan))}
    entries |= {"raises": failing(NotImplementedError("not for this\ndtype")), "slow": entry(100.0)}
    result = timing.race(entries, TRUTH, [1e-5], 0.0, StubClock())
    assert result.seconds == {"right": 1.0, "slow": 100.0}
    assert result.rounds == {"right": timing.MIN_ROUNDS, "slow": timing.FEW}
    assert result.failures.keys() == {"wrong", "nan", "raises"}
    assert result.failures["raises"] == "NotImplementedError: not for this"
    assert result.graphed == {"right", "slow"}


def test_what_cannot_be_captured_runs_without_a_graph():
    result = timing.race({"right": entry()}, TRUTH, [1e-5], 0.0, StubClock(captures=False))
    assert result.seconds == {"right": 1.0}
    assert result.graphed == set()


def test_a_lost_gpu_ends_the_race():
    with pytest.raises(timing.DeviceLostError, match="out of bounds"):
        timing.race({"bad": failing(RuntimeError("out of bounds"))}, TRUTH, [1e-5], 0.0, StubClock(lost=True))


def test_copies_share_the_time():
    made = []

    def make():
        made.append(1)
        return Candidate(lambda: None, lambda: TRUTH)

    class Clock(StubClock):
        def seconds(self, run, calls):
            return 3.0

    result = timing.race({"right": Entry(make, False)}, TRUTH, [0.0], 0.0, Clock(), copies=3)
    assert result.seconds == {"right": 1.0}
    assert len(made) == 3


def test_precision_is_restored():
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    with problems.precision("tf32"):
        assert all(backend.allow_tf32 for backend in backends)
    with problems.precision("fp32"):
        assert not any(backend.allow_tf32 for backend in backends)
    assert [backend.allow_tf32 for backend in backends] == before


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H100 PCIe", 2.0e12),
        ("NVIDIA H200", 4.8e12),
        ("NVIDIA A100-SXM4-80GB", 2.039e12),
        ("NVIDIA A100-PCIE-40GB", 1.555e12),
        ("NVIDIA B200", 8.0e12),
    ],
)
def test_peaks_by_name(name, bandwidth):
    assert roofline.known(name).bandwidth == bandwidth


def test_unknown_peaks_are_measured():
    assert roofline.known("Some GPU 9000") is None
    found = asdict(roofline.measured("cpu", 16))
    assert all(0 < rate < math.inf for rate in found.values())


def test_the_roofline_is_of_arithmetic_or_of_memory():
    peaks = roofline.Peaks(bandwidth=1e12, fp32=1e12, tf32=1e12, bf16=1e14)
    assert roofline.least_seconds(LAYER, 1000, peaks) == pytest.approx(3 * 2 * 4096 * 1000 / 1e12)
    single = Linear("forward", 1, 64, 128, "16x16", 0.5, "bf16")
    assert roofline.least_seconds(single, 4096, peaks) == pytest.approx(((64 + 128 + 4096) * 2 + 16 * 4) / 1e12)
    conv = Conv("step", 2, 16, 8, "1x1", 0.5, "fp32")
    assert roofline.least_seconds(conv, 100, peaks) == pytest.approx((2 * 2 * 2048 + 8 * 100) * 4 / 1e12 + 400 / 1e12)
    assert roofline.least_seconds(Step("lenet-300-100", 60, "1x1", 0.1, "fp32"), 0, peaks) is None


def row(case, impl, ms, chosen="", roofline=0.5):
    measured = {"impl": impl, "chosen": chosen, "ms": ms, "speedup": 1, "roofline": roofline}
    return {**asdict(case), **measured, "graph": "yes", "rounds": 5, "rejected": 0}


def fake_measure(case, seconds, device):
    if case.density == 0.5:
        return Outcome(missing={"": "RuntimeError: nothing goes"})
    return Outcome([row(case, bars.OURS, 1.0)], {"torch_bsr": "ValueError: no"})


LINEARS = [Linear("forward", 1, 2, 3, "1x1", density, "fp32") for density in (0.1, 0.2, 0.5)]


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
            assert why in worker.measure(LAYER, 0.0, "cpu").missing[""]
        monkeypatch.setattr(worker, "run", lambda *args: Outcome(lost=True))
        assert worker.measure(LAYER, 0.0, "cpu").lost
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
    assert verdicts["linear fp32, weights, 90 % pruned"] == "met"
    assert verdicts["linear fp32, weights, 95 % pruned"] == "SHORT"
    assert verdicts["linear as chosen, worst case"] == "met"
    assert verdicts["conv as chosen, worst case"] == "measured"  # not yet
    assert "not reached: linear forward+backward 4096 4096 4096 1x1 fp32, 1 densities" in lines
    assert any(line.startswith("no row: linear forward+backward") and "torch_csr" in line for line in lines)


@pytest.mark.parametrize("tests_pass", [True, False])
def test_the_command_goes_on_after_failed_tests(tests_pass, tmp_path, monkeypatch, capsys):
    class Worker:
        def run(self, function, *args):
            return HEAD

        def measure(self, case, seconds, device):
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

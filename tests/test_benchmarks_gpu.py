"""What benchmarks/gpu measures and how: who is wrong, or raises, has no row and a reason."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from blocks import is_blocky
from gpus import DEVICE
from torch import nn

from benchmarks.gpu import bars, cases, measure, nets, problems, roofline, timing
from benchmarks.gpu.cases import Conv, Linear, Step
from benchmarks.gpu.timing import Entry
from benchmarks.timing import Candidate
from sparselottery.graphs import BrokenCaptureError
from sparselottery.kernels import gpu

TRUTH = [torch.tensor([3.0, 4.0], dtype=torch.float64)]
LAYER = Linear("forward+backward", 4096, 4096, 4096, "1x1", 0.1, "fp32")
SMALL = Linear("forward", 1, 32, 16, "1x1", 0.2, "fp32")


@pytest.fixture(autouse=True)
def _on_gpu(monkeypatch):
    """CPU tensors take the GPU's kernels where there is no GPU; a few calls are enough for a time."""
    monkeypatch.setattr(gpu, "DEVICES", (DEVICE,))
    monkeypatch.setattr(timing, "MIN_SAMPLE", 0.0)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 3)
    monkeypatch.setattr("sparselottery.execution.BURST_MS", 1e-3)
    monkeypatch.setattr("sparselottery.execution.BURSTS", 1)
    problems._problem.cache_clear()


class StubClock(timing.CpuClock):
    """Seconds by name of the run's result; captures where it is told to."""

    def __init__(self, captures=True):
        self.captures = captures

    def capture(self, run):
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        return run

    def seconds(self, run, calls):
        return run()


def entry(seconds=1.0, result=(3.0, 4.0)):
    return Entry(lambda: Candidate(lambda: seconds, lambda: [torch.tensor(result)]), False)


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
    Linear("step", 5, 32, 16, "1x1", 0.2, "fp32"),
    Linear("forward", 3, 32, 48, "16x16", 0.5, "tf32"),
    Linear("forward+backward", 2, 8, 64, "64x1", 0.2, "fp32"),
    Linear("forward", 1, 32, 16, "1x1", 0.2, "bf16"),
    Conv("forward+backward", 1, 3, 2, "1x1", 0.2, "fp32"),
    Conv("forward", 1, 16, 2, "16x16", 0.2, "tf32"),
    Linear("forward", 16, 32, 64, "2:4", 0.5, "bf16"),
]


def test_two_of_four_weights_survive():
    found = [case for case in cases.cases("linear") if case.pattern == "2:4"]
    assert {(case.op, case.dtype, case.density) for case in found} == {("forward", "bf16", 0.5)}
    mask = cases.mask_of(found[0], torch.Generator().manual_seed(0))
    assert mask.shape == found[0].weight_shape
    assert (mask.unflatten(1, (-1, 4)).sum(2) == 2).all()


@pytest.mark.parametrize("case", LAYERS, ids=cases.label)
def test_a_layer_is_measured(case):
    outcome = measure.measure(case, 0.0, DEVICE)
    assert not outcome.lost
    assert outcome.missing.keys() <= {"torch_csr", "torch_bsr", "torch_semi_structured"}  # which are not everywhere
    impls = {row["impl"]: row for row in outcome.rows}
    kernels = "sparse" if case.pattern in ("1x1", "2:4") else "block"
    assert {bars.OURS, f"{bars.OURS}_{kernels}", f"{bars.OURS}_dense"} <= impls.keys()
    assert set(bars.DENSE[case.part]) <= impls.keys()
    for row in outcome.rows:
        assert tuple(row) == (*asdict(case), *bars.MEASURED)
        assert min(float(row["ms"]), float(row["roofline"]), row["rounds"]) > 0
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


def test_a_choice_that_fails_leaves_the_others(monkeypatch):
    def choose(*args):
        raise RuntimeError("out of resources")

    monkeypatch.setattr("benchmarks.gpu.baselines.choose_execution", choose)
    outcome = measure.measure(Linear("forward", 1, 32, 16, "1x1", 0.2, "fp32"), 0.0, DEVICE)
    assert outcome.missing[bars.OURS] == "RuntimeError: out of resources"
    speedups = {row["impl"]: row["speedup"] for row in outcome.rows}
    assert speedups["nn_linear"] == speedups[f"{bars.OURS}_sparse"] == ""


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
    wrong = entry(result=(3.0, 4.1))
    entries = {"right": entry(), "wrong": wrong, "nan": entry(result=(3.0, math.nan))}
    entries |= {"raises": failing(NotImplementedError("not for this\ndtype")), "slow": entry(100.0)}
    result = timing.race(entries, TRUTH, [1e-5], 0.0, StubClock())
    assert result.seconds == {"right": 1.0, "slow": 100.0}
    assert result.rounds == {"right": timing.MIN_ROUNDS, "slow": timing.FEW}
    assert result.failures.keys() == {"wrong", "nan", "raises"}
    assert result.failures["raises"] == "NotImplementedError: not for this"
    assert result.graphed == {"right", "slow"}


def test_what_cannot_be_captured_says_so_and_runs_without_a_graph():
    arguments = {"right": entry()}, TRUTH, [1e-5], 0.0, StubClock(captures=False)
    with pytest.raises(timing.CaptureError, match="right cannot be captured: RuntimeError: operation not permitted"):
        timing.race(*arguments)
    result = timing.race(*arguments, eager={"right"})
    assert result.seconds == {"right": 1.0}
    assert result.graphed == set()
    captured = timing.race({"step": entry()._replace(captured=True)}, *arguments[1:])
    assert captured.graphed == {"step"}


@pytest.fixture
def _broken(monkeypatch):
    """Waiting for the device raises nothing, but it draws no numbers: as after a capture that failed."""

    def rand(*args, **kwargs):
        raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    monkeypatch.setattr(torch, "rand", rand)


@pytest.mark.usefixtures("_broken")
def test_a_lost_gpu_ends_the_race():
    with pytest.raises(timing.DeviceLostError, match="out of bounds"):
        timing.race({"bad": failing(RuntimeError("out of bounds"))}, TRUTH, [1e-5], 0.0, StubClock())


def test_a_candidate_whose_own_capture_breaks_the_device_ends_the_race():
    step = failing(BrokenCaptureError("cuda does no further work"))._replace(captured=True)
    with pytest.raises(BrokenCaptureError, match="step: cuda does no further work"):
        timing.race({"step": step, "right": entry()}, TRUTH, [1e-5], 0.0, StubClock())


def test_a_choice_whose_capture_breaks_the_device_loses_the_case_and_the_process(monkeypatch):
    def choose(*args):
        raise BrokenCaptureError("cuda does no further work")

    monkeypatch.setattr("benchmarks.gpu.baselines.choose_execution", choose)
    outcome = measure.measure(SMALL, 0.0, DEVICE)
    assert outcome == measure.Outcome(missing={"": "CaptureError: cuda does no further work"}, lost=True)


@pytest.mark.usefixtures("_broken")
def test_a_case_that_fails_on_a_broken_device_loses_the_process(monkeypatch):
    monkeypatch.setattr(measure, "_measure", lambda *args: 1 / 0)
    assert measure.measure(SMALL, 0.0, DEVICE).lost


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


def test_peaks_are_measured():
    found = asdict(roofline.measured("cpu", 16))
    assert all(0 < rate < math.inf for rate in found.values())


def test_the_roofline_is_of_arithmetic_or_of_memory():
    peaks = roofline.Peaks(bandwidth=1e12, fp32=1e13, tf32=1e12, bf16=1e14)
    assert roofline.least_seconds(LAYER, 10**6, peaks) == pytest.approx(3 * 2 * 4096 * 10**6 / 1e13)
    single = Linear("forward", 1, 64, 128, "16x16", 0.5, "bf16")
    assert roofline.least_seconds(single, 4096, peaks) == pytest.approx(((64 + 128 + 4096) * 2 + 16 * 4) / 1e12)
    conv = Conv("step", 2, 16, 8, "1x1", 0.5, "fp32")
    assert roofline.least_seconds(conv, 100, peaks) == pytest.approx((2 * 2 * 2048 + 8 * 100) * 4 / 1e12 + 400 / 1e12)
    assert roofline.least_seconds(Step("lenet-300-100", 60, "1x1", 0.1, "fp32"), 0, peaks) is None

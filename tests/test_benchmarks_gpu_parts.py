"""The parts of `make gpu` that explain: what they do without a GPU, on tiny layers in Triton's interpreter."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from gpus import DEVICE
from programs import install

from benchmarks.gpu import calls, probe, profile, timing, tune
from benchmarks.gpu.cases import Linear
from sparselottery.kernels.gpu import launch

COLUMNS = ["part", "kernel", "case", "config", "us", "detail"]
GPU_KERNELS = Path(__file__).parents[1] / "kernels" / "gpu"
SHAPED = {
    "spmm", "sddmm", "sddmm_tiles", "spmm_narrow", "block_spmm", "block_sddmm", "block_conv", "block_conv_sddmm",
    "layout",
}  # fmt: skip
SMOKE = calls.cases(smoke=True)


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr(timing, "MIN_SAMPLE", 0.0)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 3)


@pytest.mark.parametrize("part", [tune, profile, probe])
def test_jobs_travel_to_another_process(part):
    for smoke in (False, True):
        jobs = part.jobs(smoke)
        assert len(set(jobs)) == len(jobs) > 1
        assert pickle.loads(pickle.dumps(jobs)) == jobs


def test_the_layers_of_the_bars_come_first():
    found = calls.cases(smoke=False)
    assert [case.op for case in found[:3]] == list(calls.OPS)
    assert (found[0].pattern, found[0].dtype, found[0].batch) == ("1x1", "fp32", 4096)
    narrow = [case for case in found if case.part == "linear" and case.batch <= 64]
    assert [(case.batch, case.op) for case in narrow] == [(1, "forward"), (16, "forward"), (64, "forward")]
    assert calls.name(found[0]) == "forward linear 4096x4096x4096 1x1 fp32"
    assert calls.name(narrow[1]) == "forward linear 16x4096x11008 1x1 bf16"
    assert calls.name(found[-1]) == "gw conv 256x256x14 1x1 fp32"
    assert calls.name(replace(found[0], density=0.2)).endswith("fp32 0.2")


@pytest.mark.parametrize("case", SMOKE, ids=calls.name)
def test_a_call_gives_the_truth(case):
    with calls.measuring(case, DEVICE):
        given, layer = calls.masked(case, DEVICE)
        got = calls.Call(layer, given, case.op)()
    expected = given.truth[calls.OPS.index(case.op)]
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def reached(cases):
    """The kernels whose launch shape these calls ask for."""
    found = set()
    for case in cases:
        with calls.measuring(case, DEVICE), launch.recorded(), launch.shapes() as shapes:
            call = calls.Call(*reversed(calls.masked(case, DEVICE)), case.op)
            call()
        found |= shapes.keys()
    return found


def test_every_kernel_with_a_launch_shape_is_tuned():
    sources = [path for path in GPU_KERNELS.rglob("*.py") if path.name != "launch.py" and path.parent.name != "audit"]
    named = {word for path in sources for word in re.findall(r'"(\w+)"', path.read_text())} & SHAPED
    large = Linear("gw", 1024, 256, 256, "1x1", 0.1, "fp32")  # some kernels are for large batches alone
    found = reached([*SMOKE, large])
    assert named <= found <= SHAPED


class Toy(NamedTuple):
    rows: int
    warps: int
    stages: int


def toy(wrong=None, broken=None):
    """A call whose one kernel has a shape; what it does with some of the shapes."""

    def call():
        shape = launch.tuned("toy", Toy(8, 4, 3))
        if broken and broken(shape):
            raise RuntimeError("out of resource: shared memory\nmore")
        return torch.ones(4) * (1.1 if wrong and wrong(shape) else 1.0)

    return call


def rows_of_toy(monkeypatch, seconds=lambda shape: 1.0, **behaviour):
    class Clock(timing.CpuClock):
        def seconds(self, run, times):
            with launch.shapes() as found:
                run()
            return 1e-6 * seconds(found["toy"])

    monkeypatch.setattr(tune, "clock", lambda device: Clock())
    return tune.vary([toy(**behaviour)] * 2, 1e-4, "cpu", "toy", 20)


def test_launch_shapes_are_varied_around_the_default():
    fields = tune.neighbours(Toy(8, 4, 3))
    assert fields[:6] == [{"rows": 16}, {"rows": 4}, {"warps": 8}, {"warps": 2}, {"stages": 4}, {"stages": 2}]
    assert {"rows": 16, "warps": 8} in fields
    assert {"rows": 4, "stages": 2} in fields
    assert len(fields) == 12
    assert {"warps": 0} not in tune.neighbours(Toy(8, 1, 1))
    assert len(tune.vary([toy()], 1e-4, "cpu", "toy", 2)) == 3


class Sized(NamedTuple):
    rows: int
    split: int


@pytest.mark.parametrize(("shape", "warps"), [
    (Toy(8, 32, 1), lambda shape: shape.warps), (Sized(4, 8), lambda shape: shape.rows * shape.split),
])  # fmt: skip
def test_no_launch_shape_has_more_warps_than_a_gpu_starts(shape, warps):
    started = []

    def call():
        of = launch.tuned("toy", shape)
        launch.launch({(1,): lambda **_: started.append(warps(of))}, (1,), x=torch.ones(1), num_warps=warps(of))
        return torch.ones(4)

    rows = tune.vary([call], 1e-4, "cpu", "toy", 20)
    assert max(started) == 32
    assert len(rows) > 2
    assert all(row["us"] for row in rows)


def test_the_fastest_launch_shape_wins(monkeypatch):
    rows = rows_of_toy(monkeypatch, seconds=lambda shape: 80 / shape.rows + shape.warps)
    assert all(list(row) == COLUMNS for row in rows)
    assert [rows[0][key] for key in ("part", "kernel", "config", "detail")] == [
        "tune", "toy", "rows=8 warps=4 stages=3", "default",
    ]  # fmt: skip
    assert rows[0]["us"] == 7.0  # a call; there are two of them in what is timed
    assert tune.summary(rows) == [
        "toy, toy: rows=16 warps=4 stages=3: 4.5 us, 1.56x of rows=8 warps=4 stages=3", "the default stays: 0 of 1",
    ]  # fmt: skip


def test_a_default_that_is_best_stays(monkeypatch):
    rows = rows_of_toy(monkeypatch, seconds=lambda shape: 100.0 - (shape.rows == 16))
    assert tune.summary(rows) == ["the default stays: 1 of 1"]


def test_wrong_and_failing_launch_shapes_have_no_time(monkeypatch):
    rows = rows_of_toy(monkeypatch, wrong=lambda shape: shape.rows == 16, broken=lambda shape: shape.warps == 8)
    why = {row["config"]: row["detail"] for row in rows if row["us"] == ""}
    assert "is wrong by" in why["rows=16 warps=4 stages=3"]
    assert why["rows=8 warps=8 stages=3"] == "RuntimeError: out of resource: shared memory"
    assert len(rows) - len(why) > 5
    assert "rows=16" not in tune.summary(rows)[0]


def test_a_launch_shape_that_is_not_used_has_no_time(monkeypatch):
    def call():
        with launch.overridden("toy"):  # as in a thread that knows nothing of it
            return toy()()

    found = tune.vary([call], 1e-4, "cpu", "toy", 2)
    assert ["expected a launch of" in row["detail"] for row in found] == [False, True, True]


def test_a_default_without_a_time_is_told():
    row = dict(zip(COLUMNS, ("tune", "spmm", "forward", "rows=8", "", "RuntimeError: no"), strict=True))
    assert tune.summary([row])[0] == "spmm, forward: the default has no time: RuntimeError: no"
    assert tune.summary([]) == []


def test_the_largest_gain_is_told_first():
    def rows(kernel, us):
        given = (("default", 10.0, "default"), ("other", us, "1x"))
        return [dict(zip(COLUMNS, ("tune", kernel, "gx", *each), strict=True)) for each in given]

    lines = tune.summary([*rows("spmm", 8.0), *rows("sddmm", 5.0), *rows("layout", 9.9)])
    assert [line.partition(",")[0] for line in lines] == ["sddmm", "spmm", "the default stays: 1 of 3"]


def test_tune_measures_real_kernels():
    for job in tune.jobs(smoke=True)[:1]:
        rows = tune.measure(job, DEVICE, smoke=True)
        assert {row["kernel"] for row in rows} == reached([job.case])
        assert all(row["us"] > 0 for row in rows)


def test_the_kernels_of_a_call_are_listed():
    job = profile.jobs(smoke=True)[1]
    rows = profile.measure(job, DEVICE, smoke=True)
    assert all(list(row) == COLUMNS for row in rows)
    assert {row["config"] for row in rows} == {profile.OURS, profile.DENSE}
    ours = [row["us"] for row in rows if row["config"] == profile.OURS]
    assert ours == sorted(ours, reverse=True)
    assert len(ours) <= profile.MOST
    (line,) = profile.summary(rows)
    assert line.startswith(f"{calls.name(job.case)}: {sum(ours):.4g} us = {rows[0]['kernel'][:24]} {ours[0]:g} + ")


def test_a_profile_without_kernels_is_told(monkeypatch):
    monkeypatch.setattr(profile.profile, "key_averages", lambda profiler: [])
    with pytest.raises(RuntimeError, match="got none"):
        profile.measure(profile.jobs(smoke=True)[0], DEVICE, smoke=True)


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """Makes a shell script the Nsight Compute on PATH."""
    return partial(install, tmp_path, monkeypatch, "ncu")


NCU = """case "$*" in *lts__t_bytes*) echo "==ERROR== Failed to find metric lts__t_bytes.sum"; exit 1;; esac
cat <<'END'
==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Grid Size","gpu__time_duration.sum","dram__bytes.sum","launch__registers_per_thread"
"","","","","nsecond","byte","register/thread"
"0","7","_spmm_kernel","(512, 1, 1)","1,500,000","2000000","32"
"1","7","_sddmm_kernel","(64, 1, 1)","2500","n/a","40"
==PROF== Disconnected from process 7
END
"""


def test_counters_are_read_and_unknown_ones_left_out(ncu):
    ncu(NCU)
    rows = profile.measure(profile.Job(None), DEVICE, smoke=True)
    assert [(row["kernel"], row["us"]) for row in rows] == [("_spmm_kernel", 1500.0), ("_sddmm_kernel", 2.5)]
    assert rows[0]["detail"] == "2 MB of memory, 32 registers"
    assert profile.summary(rows)[1] == "ncu, _sddmm_kernel, launch 1, grid (64, 1, 1): 2.5 us: 40 registers"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo '==ERROR== ERR_NVGPUCTRPERM'; exit 1", "exit status 1: ==ERROR== ERR_NVGPUCTRPERM"),
        ("sleep 60", "did not finish in 1 s: "),
        (None, "not on PATH"),
    ],
)
def test_without_counters_there_is_a_reason(script, why, ncu, monkeypatch):
    monkeypatch.setattr(profile, "COUNT_LIMIT", 1)
    if script:
        ncu(script)
    else:
        monkeypatch.setenv("PATH", "")
    rows = profile.measure(profile.Job(None), DEVICE, smoke=True)
    assert [(row["us"], row["detail"]) for row in rows] == [("", why)]
    assert profile.summary(rows) == [f"ncu: {why}"]


def test_nsight_counts_one_call_each(monkeypatch):
    counted = []
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: counted.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: counted.append("stop"))
    monkeypatch.setattr(profile, "COUNTED", 2)
    profile.main(smoke=True, device=DEVICE)
    assert counted == ["start", "stop"] * 2

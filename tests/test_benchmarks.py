"""The machinery of benchmarks/: wrong results and stalls do not count; rows survive the trip through CSV."""

from __future__ import annotations

import math
import time
from itertools import groupby
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import conv_peers, inference_peers, memory, peers, plot, report, results, steps, timing
from benchmarks.conv_peers import ConvProblem
from benchmarks.report import MASKED, MLP, Bar
from benchmarks.timing import Candidate
from sparselottery import convert, to_dense
from sparselottery.lab.masked_dense import masked_dense
from sparselottery.lab.models import CIFAR10, build, conv_net, lenet_300_100
from sparselottery.pruning import prune

TRUTH = [torch.tensor([3.0, 4.0], dtype=torch.float64)]
CONVS = [conv_peers.sparselottery, conv_peers.nn_conv2d]
CONVS += [conv_peers.sparseprop] if peers.SPARSEPROP_MISSING is None else []
BACKWARD = [peers.sparselottery, peers.nn_linear, *peers.sparse_peers()]


@pytest.mark.parametrize(
    "wrong",
    [
        torch.tensor([3.0, 4.1]),
        torch.tensor([3.0, math.nan]),
        torch.tensor([3.0]),
        torch.tensor([[3.0, 0.0], [4.0, 0.0]])[:, 0],
    ],
    ids=["value", "nan", "shape", "strides"],
)
def test_wrong_results_are_not_timed(wrong):
    timing.check("right", [torch.tensor([3.0, 4.0])], TRUTH, 1e-5)
    with pytest.raises(AssertionError, match="slow"):
        timing.race({"slow": Candidate(lambda: None, lambda: [wrong])}, TRUTH, 1e-5, budget=0)


def test_missing_results_are_not_timed():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        timing.check("empty", [], TRUTH, 1e-5)


def test_stalled_samples_are_dropped():
    calm = [{"ours": 1.0 + 0.01 * i, "theirs": 5.0} for i in range(6)]
    clean = timing.clean_samples([*calm, {"ours": 9.0, "theirs": 5.0}, {"ours": 1.0, "theirs": 13.0}])
    assert clean == {"ours": [1.0 + 0.01 * i for i in range(6)] + [1.0], "theirs": [5.0] * 7}


def test_race_takes_turns_and_counts():
    log: list[str] = []
    both = {name: Candidate(lambda name=name: log.append(name), lambda: TRUTH) for name in "ab"}
    timed = timing.race(both, TRUTH, 0.0, budget=0.01)
    assert timed.seconds.keys() == timed.calls.keys() == {"a", "b"}
    assert timed.rounds >= timing.MIN_ROUNDS
    assert log[:2] == ["a", "b"]
    turns = [name for i, name in enumerate(log) if i == 0 or log[i - 1] != name]
    assert turns.count("a") > timing.MIN_ROUNDS / 2


def test_nobody_is_timed_beside_threads_of_the_last_one(monkeypatch):
    monkeypatch.setattr(timing, "LINGER", 0.02)
    monkeypatch.setattr(timing, "MIN_SAMPLE", 0.0)
    log: list[tuple[str, float]] = []

    def candidate(name: str) -> Candidate:
        return Candidate(lambda: log.append((name, time.perf_counter())), lambda: TRUTH)

    timing.race({name: candidate(name) for name in "ab"}, TRUTH, 0.0, budget=0)
    turns = [[at for _, at in turn] for _, turn in groupby(log, key=lambda each: each[0])][4:]  # of the rounds
    assert len(turns) >= timing.MIN_ROUNDS
    assert all(turn[-1] - turn[0] > 0.9 * timing.LINGER for turn in turns)


def test_long_calls_are_not_run_untimed(monkeypatch):
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 1e-3)
    monkeypatch.setattr(timing, "LINGER", 0.0)
    log: list[float] = []
    timed = timing.race({"a": Candidate(lambda: log.append(time.sleep(4e-3)), lambda: TRUTH)}, TRUTH, 0.0, budget=0)
    assert len(log) == 1 + 1 + 1 + timed.rounds  # checked, counted, run before the first sample


@pytest.mark.parametrize("make", BACKWARD, ids=lambda make: make.__name__)
@pytest.mark.parametrize("shape", [(48, 20, 10), (1, 16, 16), (5, 3, 7)], ids=str)
def test_candidates_compute_the_same(make, shape):
    problem = peers.Problem.random(*shape, 0.3)
    candidate = make(problem, True)
    for _ in range(2):
        candidate.run()
    timing.check(make.__name__, candidate.read(), problem.truth(True), 1e-5)
    forward = make(problem, False)
    forward.run()
    timing.check(make.__name__, forward.read(), problem.truth(False), 1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_onednn_computes_the_same():
    problem = peers.Problem.random(48, 20, 10, 0.3)
    timing.check("onednn", peers.onednn(problem, False).read(), problem.truth(False), 1e-5)
    with pytest.raises(ValueError, match="backward"):
        peers.onednn(problem, True)


@pytest.mark.filterwarnings("ignore")  # of exporters
@pytest.mark.parametrize("name", ["mnn", "mnn_sparse", "onnxruntime", "openvino"])
@pytest.mark.parametrize("net", ["lenet-300-100", "conv-2"])
def test_runtimes_compute_the_same(name, net):
    x = torch.randn(2, 784) if net == "lenet-300-100" else torch.randn(2, 3, 32, 32)
    model = lenet_300_100() if net == "lenet-300-100" else build(net, CIFAR10, 10)
    ways = inference_peers.peers(x)
    if name not in ways:
        pytest.skip(f"{name} is not installed")
    sparse = convert(model, prune(model, 0.9, method="random")).eval()
    dense = to_dense(sparse).requires_grad_(False)
    timing.check(name, [torch.as_tensor(ways[name](dense, x)())], [dense.double()(x.double())], 1e-5)


# SparseProp goes wrong at stride 1 where it vectorises over a batch that is no multiple of 8.
@pytest.mark.parametrize("make", CONVS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("shape", [(8, 3, 4, 3, 1, 8), (2, 3, 2, 3, 1, 32), (16, 4, 6, 3, 2, 6), (8, 5, 7, 1, 1, 4)])
def test_convolutions_compute_the_same(make, shape):
    problem = ConvProblem.random(*shape, 0.3)
    truth = problem.truth()
    problems = [problem] if make is getattr(conv_peers, "sparseprop", None) else [problem, problem.channels_last()]
    for each in problems:
        candidate = make(each, True)
        for _ in range(2):
            candidate.run()
        timing.check(make.__name__, candidate.read(), truth, 1e-5)
        forward = make(each, False)
        forward.run()
        timing.check(make.__name__, forward.read(), truth[:1], 1e-5)


def test_channels_last_is_timed_in_channels_last():
    problem = ConvProblem.random(2, 3, 4, 3, 1, 5, 0.5).channels_last()
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (problem.x, problem.gy))
    seen = []

    class Layer(nn.Conv2d):
        def forward(self, x):
            seen.append(x.stride())
            return super().forward(x)

    peers.module(problem, Layer(3, 4, 3, padding=1), list, False, problem.memory_format).run()
    assert seen == [problem.x.stride()]


def test_steps_leave_true_gradients():
    model, images = conv_net((8,), shape=(3, 8, 8)), torch.randn(6, 3, 8, 8)
    labels = torch.randint(10, (6,))
    masks = prune(model, 0.7, method="random")
    sparse = convert(model, masks)
    truth = steps.true_gradients(to_dense(sparse), images, labels, masks)
    assert [t.dim() for t in truth] == [1] * len(truth)
    for net in (sparse, masked_dense(model, masks)):
        candidate = steps.step(net, images, labels, masks)
        candidate.run()
        timing.check(type(net).__name__, candidate.read(), truth, 1e-4)


def test_memory_counts_each_piece_once():
    x = torch.zeros(4, 8)
    assert memory.storage_bytes([x, x[1:], x.t(), torch.zeros(2)]) == 4 * 8 * 4 + 2 * 4


def test_memory_of_activations():
    """Kept for the backward pass: the ReLU's output and what cross-entropy makes of the logits, not the input."""
    model, x, labels = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 10)), torch.randn(3, 5), torch.zeros(3)
    saved = memory.saved_bytes(model, x, labels.long())
    assert 3 * (7 + 10) * 4 <= saved <= 3 * (7 + 10) * 4 + 8


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_of_a_step(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    torch.save(model, tmp_path / "net")
    measured = memory.measure(tmp_path / "net", (3, 2, 2), batch=4)
    weights = 4 * (12 * 10 + 10)
    assert measured["parameters"] == measured["gradients"] == weights
    assert measured["optimiser"] == 2 * weights + 2 * 4  # two moments, and a step count for each parameter
    assert measured["buffers"] == 0
    assert measured["peak_rss"] > 0


EPYC = {"vendor_id": "AuthenticAMD", "model name": "AMD EPYC 9B14 96-Core Processor"}


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({**EPYC, "cpu family": "26", "model": "2"}, "epyc-zen5"),
        ({**EPYC, "cpu family": "25", "model": "17"}, "epyc-zen4"),
        ({**EPYC, "cpu family": "25", "model": "1"}, "amd-epyc-9b14-96-core-processor-family-25-model-1"),
        (
            {"vendor_id": "GenuineIntel", "model name": "Intel(R) Xeon(R) CPU", "cpu family": "6", "model": "143"},
            "intel-r-xeon-r-cpu-family-6-model-143",
        ),
    ],
    ids=["zen5", "zen4", "zen3", "intel"],
)
def test_a_machine_has_a_folder(facts, name):
    assert results.machine(facts) == name
    assert "(family" in results.cpu_model(facts)


def test_machines_are_reported_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for name, speedup in (("slow", 2), ("fast", 50)):
        row = {"op": "forward+backward", "density": 0.1, "impl": "nn_linear", "ms": 1, "speedup": speedup}
        results.write(tmp_path / name / "linear.csv", [row])
    assert results.folders(["here"]) == [Path("here")]
    assert results.folders([]) == [tmp_path / "fast", tmp_path / "slow"]
    for folder in results.folders([]):
        report.main(folder)
    lines = [line for line in capsys.readouterr().out.splitlines() if "nn.Linear, 90 %" in line and "fwd+bwd" in line]
    assert [line.split()[-1] for line in lines] == ["aim", "short"]


def test_rows_survive_the_csv(tmp_path):
    rows = [{"net": "a, b", "ms": 1.5, "speedup": 2.0}, {"net": "c", "ms": 3.0, "speedup": 0.5}]
    path = tmp_path / "new" / "rows.csv"
    results.write(path, rows)
    head, read = results.read(path)
    assert read == rows
    assert f"torch {torch.__version__}" in head["versions"]
    assert f"{torch.get_num_threads()} threads" in head["machine"]
    assert [p.name for p in path.parent.iterdir()] == ["rows.csv"]


def test_bar_takes_the_fastest_peer_of_each_case():
    case = {"net": "mlp-2048", "rounds": 5}
    rows = [
        {**case, "density": 0.1, "impl": "masked_dense", "ms": 8, "speedup": 8},
        {**case, "density": 0.1, "impl": "dense", "ms": 2, "speedup": 2},
        {**case, "density": 0.1, "impl": "sparselottery", "ms": 1, "speedup": 1},
        {**case, "density": 0.05, "impl": "masked_dense", "ms": 9, "speedup": 9},
    ]
    assert Bar("", None, None, "", (*MASKED, "dense"), MLP).speedups(rows) == [2, 9]
    assert Bar("", None, None, "", MASKED, {**MLP, "density": 0.1}).speedups(rows) == [8]


def test_crossover_is_where_the_line_falls_through_one():
    assert plot.crossover([(0.01, 9.0), (0.25, 2.0), (1.0, 0.5)]) == pytest.approx(0.5)
    assert plot.crossover([(0.01, 9.0), (1.0, 1.2)]) is None


def test_plots_come_from_the_csv_alone(tmp_path):
    case = {"net": "mlp-2048", "batch": 4}
    rows = [{**case, "density": d, "impl": "masked_dense", "ms": 1, "speedup": s} for d, s in [(0.1, 4), (1.0, 0.8)]]
    results.write(tmp_path / "mlp_step.csv", rows)
    drawn = []
    for name in ("once.svg", "again.svg"):
        plot.draw(tmp_path / "mlp_step.csv", plot.PANELS["mlp_step"], tmp_path / name)
        drawn.append((tmp_path / name).read_text())
    assert "w * mask" in drawn[0]
    assert drawn[0] == drawn[1]


def test_a_shape_is_a_panel(tmp_path):
    case = {"op": "forward", "layout": "nchw", "batch": 2, "channels": 3, "filters": 4, "kernel": 3, "stride": 1}
    rows = [
        {**case, "size": size, "density": 0.1, "impl": impl, "ms": 1, "speedup": 2}
        for size in (8, 16)
        for impl in ("nn_conv2d", "nn_conv2d_channels_last")
    ]
    results.write(tmp_path / "conv.csv", rows)
    plot.main(tmp_path)
    drawn = (tmp_path / "conv.svg").read_text()
    assert [f"2 x 3 -&gt; 4, 3x3/1, {size}x{size}" in drawn for size in (8, 16, 32)] == [True, True, False]
    assert "nn.Conv2d channels_last" in drawn


def test_accuracy_stands_against_milliseconds(tmp_path):
    trained = [
        {"granularity": grain, "trial": trial, "round": at, "density": density, "accuracy": 90 + trial}
        for grain in ("1x1", "8x8", "8x8-permuted")
        for trial in (0, 1)
        for at, density in enumerate((1.0, 0.26, 0.07))
    ]
    timed = [
        {"op": op, "granularity": grain, "density": density, "impl": impl, "ms": 2 * density}
        for op in ("step", "frozen")
        for grain in ("1x1", "8x8-permuted")
        for density in (0.25, 0.07, 0.036)
        for impl in (results.OURS, "dense")
    ]
    results.write(tmp_path / "granularity.csv", trained)
    results.write(tmp_path / "grains.csv", timed)
    assert plot._by_grain(trained, [0.25, 0.07])["8x8", 0.25] == 90.5
    plot.main(tmp_path)
    drawn = (tmp_path / "grains.svg").read_text()
    assert [f">{label}<" in drawn for label in ("1x1", "8x8", "8x8-permuted")] == [False] * 3  # letters are paths
    assert [f"<!-- {label} -->" in drawn for label in ("1x1", "8x8", "8x8-permuted")] == [True, False, True]

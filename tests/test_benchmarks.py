"""The machinery of benchmarks/: wrong results and stalls do not count; rows survive the trip through CSV."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed

from benchmarks import peers, plot, results, timing
from benchmarks.report import MASKED, MLP, Bar
from benchmarks.timing import Candidate

TRUTH = [torch.tensor([3.0, 4.0], dtype=torch.float64)]
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

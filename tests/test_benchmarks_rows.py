"""The commands that write rows of the lab and of loading, on small runs."""

from __future__ import annotations

import json
import multiprocessing
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from benchmarks import busy, find_overhead, granularity, imp_mnist, lab, loading, moves, results
from sparselottery import convert, ops
from sparselottery.lab import data, experiment, grid, xor
from sparselottery.lab.models import conv_net
from sparselottery.lab.settings import preset


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "interleaved_ms", partial(experiment.interleaved_ms, bursts=1, burst_ms=0.1))
    settings = preset("digits", "lenet-300-100", rounds=1, iterations=20, eval_every=10)
    wanted = grid.Grid(settings, controls=("reinit",))
    for _ in grid.run(wanted, tmp_path / "run", workers=1, note="a note on the data"):
        pass
    return tmp_path / "run"


def test_a_grid_has_a_row_for_each_training(run, tmp_path):
    lab.grid_rows(run, "small", tmp_path)
    head, rows = results.read(tmp_path / "lab-small.csv")
    assert [(row["control"], row["round"]) for row in rows] == [("ticket", 0), ("ticket", 1), ("reinit", 1)]
    record = json.loads((run / "trial-0/ticket/round-01.json").read_text())
    assert rows[1]["early_stop_test_accuracy"] == record["early_stop_test_accuracy"]
    assert "20 of" in head["length"]
    assert head["settings"] == "rounds 1 in place of 12, iterations 20 in place of 3000, eval_every 10 in place of 20"
    assert head["data"] == "a note on the data"
    assert {path.name for path in tmp_path.glob("*.svg")} == {"lab-small-accuracy.svg", "lab-small-early-stop.svg"}


def test_xor_has_a_row_for_each_size(tmp_path, monkeypatch):
    small = xor.Settings(hidden=(4, 2), trials=3, iterations=5)
    monkeypatch.setattr(xor, "Settings", lambda: small)
    lab.xor_rows(tmp_path)
    head, rows = results.read(tmp_path / "lab-xor.csv")
    assert [row["hidden"] for row in rows] == [4, 2]
    assert "trials 3" in head["settings"]


def test_ways_to_load_are_measured_on_the_same_net(monkeypatch):
    monkeypatch.setattr(loading, "PROCESSES", 1)
    rows = list(loading.rows("lenet-300-100"))
    assert [row["impl"] for row in rows] == [results.OURS, "dense", "dense_built"]
    assert rows[0]["file_bytes"] < 0.1 * rows[1]["file_bytes"]
    assert all(float(row["load_ms"]) <= float(row["first_ms"]) for row in rows)


def test_overhead_rows(monkeypatch):
    monkeypatch.setattr(ops, "compile_plan", ops.compile_plan)  # `measure` replaces it, in a process of its own
    for what, planned in (("prune", False), ("find_ticket", True)):
        row = find_overhead.measure(what, 200)
        assert (row["what"], row["weights"]) == (what, 80_000)
        assert (float(row["plan_s"]) > 0) is planned
        assert float(row["cpu_s"]) > float(row["plan_s"])
        assert float(row["seconds"]) > 0
        assert row["peak_rss"] >= 0
        assert (row["trained"] > 8 * 0.8 * 80_000) is planned  # values, indices and more of round 1


def test_moves_rows(monkeypatch):
    monkeypatch.setitem(moves.CASES, "small", moves.Case((40, 30, 10), 4, 0.2))
    before = torch.rand(40, 30) < 0.2
    after = moves.changed(before)
    assert int((before & ~after).sum()) == int((after & ~before).sum()) == round(0.1 * int(before.sum()))
    rows = list(moves.rows("small", 0.01))
    assert [row["masks"] for row in rows] == ["bool", "pattern"]
    assert all(float(row["step_ms"]) > 0 and float(row["move_ms"]) > 0 for row in rows)


def test_busy_rows(monkeypatch):
    monkeypatch.setattr(busy, "busy_machine", nullcontext)
    measured = {row["impl"]: row for row in busy.rows(turn=0.01, turns=1)}
    assert {results.OURS, "dense", "masked_dense"} <= set(measured)
    for row in measured.values():
        assert float(row["times"]) == pytest.approx(float(row["busy_ms"]) / float(row["quiet_ms"]), rel=0.01)


def test_a_step_that_trains_otherwise_is_not_timed(monkeypatch):
    monkeypatch.setattr(busy, "native_trainer", lambda net, x: lambda *_: net[0].values.detach().add_(1))
    with pytest.raises(AssertionError, match="native"):
        busy.candidates(torch.randn(busy.BATCH, 784), torch.randint(10, (busy.BATCH,)))


def test_others_multiply_until_the_end(monkeypatch):
    monkeypatch.setattr(busy, "SIDE", 8)
    started = []
    with busy.busy_machine():
        started += multiprocessing.active_children()
        assert len(started) == busy.OTHERS
    assert not any(other.is_alive() for other in started)


def test_a_ladder_has_a_row_for_each_round():
    settings = preset("digits", rounds=1, iterations=4, eval_every=2)
    rows = list(imp_mnist.trial(settings, ["sparse", "dense"], evaluated=60, reinits=False))
    assert [row["round"] for row in rows] == [0, 1]
    assert {(row["model"], row["evaluated"], row["iterations"]) for row in rows} == {("lenet-300-100", 60, 4)}
    sizes = 64 * 300 + 300 * 100, 100 * 10
    assert rows[1]["density"] == pytest.approx((0.8 * sizes[0] + 0.9 * sizes[1]) / sum(sizes), abs=1e-4)
    assert "reinit_final_test_accuracy" not in rows[0]
    assert imp_mnist.median_seconds(rows, "sparse") > 0


def test_a_granularity_has_a_row_for_each_round_that_is_shown(tmp_path, monkeypatch):
    short = granularity.Net("digits", rounds=(0, 2), fraction=0.2, iterations=4, eval_every=2)
    monkeypatch.setitem(granularity.NETS, "lenet-300-100", short)
    trial = granularity.Trial("lenet-300-100", data.load("digits"), seed=0)
    rows = {grain: trial.rows(grain, tmp_path) for grain in ("1x1", "16x16", "16x16-permuted", "16x16-regrouped")}
    assert {grain: [row["round"] for row in found] for grain, found in rows.items()} == {
        "1x1": [0, 2], "16x16": [0, 2], "16x16-permuted": [0, 2], "16x16-regrouped": [2],
    }  # fmt: skip
    dense, single = rows["1x1"]
    assert (dense["density"], rows["16x16"][0]) == (1, dense | {"granularity": "16x16"})
    assert all(abs(found[-1]["density"] - single["density"]) < 0.05 for found in rows.values())
    assert len({found[-1]["accuracy"] for found in rows.values()}) > 1
    assert rows["16x16-regrouped"] == trial.rows("16x16-regrouped", tmp_path)


def test_magnitude_held_has_rows_of_each_layer(tmp_path, monkeypatch):
    short = granularity.Net("digits", rounds=(0,), fraction=0.2, iterations=2, eval_every=2)
    monkeypatch.setitem(granularity.NETS, "lenet-300-100", short)
    monkeypatch.setattr(granularity, "held", lambda name, weight: [{"weights": name, "rows": len(weight)}])
    monkeypatch.setattr("sys.argv", ["granularity", "--held", "--out", str(tmp_path / "held.csv")])
    granularity.main()
    rows = results.read(tmp_path / "held.csv")[1]
    assert [row["rows"] for row in rows] == [300, 100, 1024]


def test_permuted_blocks_hold_more():
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(64, 1, generator=generator) * torch.rand(64, generator=generator)
    rows = granularity.held("a", weight)
    assert len(rows) == 20
    assert all(row["plain"] <= row["permuted"] <= 1 for row in rows)
    assert rows[2]["permuted"] > 1.2 * rows[2]["plain"]


def test_convolutions_are_pruned_by_their_share():
    settings = preset("cifar10", "conv-2")
    ladder = imp_mnist.imp(convert, partial(conv_net, (4,), shape=(3, 8, 8)), lambda model: {}, settings)
    assert all(mask.all() for mask in next(ladder).masks.values())
    masks = next(ladder).masks
    kept = [round(float(mask.float().mean()), 1) for mask in masks.values()]
    assert kept == [0.9, 0.9, 0.8, 0.8, 0.9]

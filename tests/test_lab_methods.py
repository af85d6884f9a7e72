"""Methods in place of a ladder: one training each, that ends with the ladder's counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparselottery.lab import experiment, methods
from sparselottery.lab.data import load
from sparselottery.lab.grid import Grid
from sparselottery.lab.settings import preset
from sparselottery.ticket import Ticket

QUICK = preset("digits", rounds=5, fraction=0.4, iterations=60, eval_every=30)
COUNTS = [round(0.6**5 * 64 * 300), round(0.6**5 * 300 * 100), round(0.8**5 * 100 * 10)]


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    monkeypatch.setattr(experiment, "step_ms", lambda *_: {})


def run(settings, out):
    records = []
    return experiment.run(settings, load("digits"), out, on_round=records.append), records


@pytest.mark.parametrize("method", methods.METHODS)
def test_one_training_ends_with_the_counts_of_the_ladder(method, tmp_path):
    ticket, (record,) = run(replace(QUICK, method=method), tmp_path)
    trained = Ticket.load(tmp_path / "round-00.safetensors")
    counts = [int(mask.sum()) for mask in ticket.masks.values()]
    assert counts == [int(mask.sum()) for mask in trained.masks.values()]
    assert counts == ([64 * 300, 300 * 100, 1000] if method == "dsd" else COUNTS)
    assert record["nnz"] == sum(counts)
    assert record["density"] == ticket.density
    assert record["final_test_accuracy"] > 0.3
    theta = Ticket.load(tmp_path / "theta.safetensors")
    for name, mask in ticket.masks.items():
        assert torch.equal(ticket.weights[name], theta.weights[name] * mask)
    again, (same,) = run(replace(QUICK, method=method), tmp_path)
    assert same == record
    assert all(map(torch.equal, again.masks.values(), ticket.masks.values()))


def test_methods_find_other_masks_and_repeat_them(tmp_path):
    masks = {}
    for name, settings in {
        "rigl": replace(QUICK, method="rigl"),
        "again": replace(QUICK, method="rigl"),
        "seed": replace(QUICK, method="rigl", seed=1),
        "set": replace(QUICK, method="set"),
        "gmp": replace(QUICK, method="gmp"),
    }.items():
        masks[name] = run(settings, tmp_path / name)[0].masks["fc1.weight"]
    assert torch.equal(masks["rigl"], masks["again"])
    assert not any(torch.equal(masks["rigl"], masks[name]) for name in ("seed", "set", "gmp"))


def test_a_grid_of_a_method_is_one_training_a_trial():
    grid = Grid(replace(QUICK, method="gmp"), trials=2, controls=("reinit", "one-shot"))
    assert [grid.trainings(job) for job in grid.jobs] == [1, 1]
    assert QUICK.name == replace(QUICK, method="imp").name != replace(QUICK, method="gmp").name


@pytest.mark.parametrize(
    "changes", [{"scope": "global"}, {"one_shot": True}, {"rewind_step": 3}, {"retrain": "continue"}]
)
def test_what_only_a_ladder_does_is_refused(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name}: expected .* with the method rigl"):
        replace(QUICK, method="rigl", **changes)
    with pytest.raises(ValueError, match=r"method: expected one of imp, gmp, .*, got 'lottery'"):
        replace(QUICK, method="lottery")

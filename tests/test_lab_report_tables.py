from __future__ import annotations

import pytest

from sparselottery.lab.report import tables


def test_a_stalled_trial_does_not_move_the_time_of_a_step():
    keys = ("first_iteration", "iterations", *tables.AVERAGED)
    trials = [dict.fromkeys(keys, 1.0) | {"control": "ticket", "round": 0, "sparse_ms": ms} for ms in (1.0, 1.2, 9.0)]
    (row,) = tables.rounds(trials)
    assert (row["sparse_ms"], row["sparse_ms_min"], row["sparse_ms_max"], row["trainings"]) == (1.2, 1.0, 9.0, 3)


def test_the_whole_net_is_round_0_of_the_ticket():
    keys = ("first_iteration", "iterations", *tables.AVERAGED)
    steps = [("ticket", 0, 4.0), ("ticket", 1, 3.0), ("reinit", 1, 2.0), ("reinit", 0, 9.0)]
    trials = [dict.fromkeys(keys, 1.0) | {"control": name, "round": i, "sparse_ms": ms} for name, i, ms in steps]
    assert [row["whole_ms"] for row in tables.rounds(trials)] == [4.0] * 4
    assert [row["whole_ms"] for row in tables.rounds(trials[1:])] == [None] * 3


def test_seconds_add_up():
    steps = [(1.0, 3.0), (2.0, 1.0), (None, 1.0)]
    shared = {"control": "ticket", "iterations": 1000, "whole_ms": 2.5}
    rows = [
        {"round": i, "density": 0.5**i, "sparse_ms": sparse, "dense_ms": dense, **shared}
        for i, (sparse, dense) in enumerate(steps)
    ]
    found = tables.seconds([*rows, rows[0] | {"control": "reinit"}])
    assert [row["sparse_seconds"] for row in found] == pytest.approx([1, 3])
    assert [row["whole_seconds"] for row in found] == pytest.approx([2.5, 5])
    assert [row["dense_seconds"] for row in found] == pytest.approx([3, 4])
    assert [row["saved_seconds"] for row in found] == pytest.approx([1.5, 1])


@pytest.mark.parametrize("count", range(30))
def test_spread(count):
    chosen = tables.spread(range(count))
    assert len(chosen) <= 6
    assert chosen[:1] == list(range(count))[:1]
    assert chosen[-1:] == list(range(count))[-1:]
    assert sorted(set(chosen)) == chosen


def test_rows_come_back_from_csv(tmp_path):
    rows = [{"control": 'a,b\n"c"', "round": 3, "x": 1e-9, "y": None}, {"control": "1", "round": 0, "x": 0.5, "y": -2}]
    tables.write(tmp_path / "a" / "b.csv", rows)
    assert tables.read(tmp_path / "a" / "b.csv") == rows

from __future__ import annotations

from sparselottery.lab.report import draw, summary, tables


def rounds(ticket, reinit=()):
    """Rows as `tables.rounds` gives: (density, accuracy, iteration, sparse ms, dense ms) of each round."""
    keys = ("density", "early_stop_test_accuracy", "early_stop_iteration", "sparse_ms", "dense_ms")
    both = (("ticket", ticket, 0), ("reinit", reinit, 1))
    shared = {"iterations": 1000, "whole_ms": ticket[0][3]}
    return [
        {"control": name, "round": first + i, **shared, **dict(zip(keys, values, strict=True))}
        for name, found, first in both
        for i, values in enumerate(found)
    ]


def test_headline():
    found = rounds(
        [(1, 0.95, 800, 2.0, 1.0), (0.5, 0.97, 600, 1.0, 1.0), (0.25, 0.95, 700, 0.5, 2.0), (0.1, 0.9, 900, 0.5, 1.5)],
        [(0.5, 0.9, 900, None, None)],
    )
    tiles = {tile.what: tile for tile in summary.tiles(found, tables.seconds(found))}
    assert tiles["Matching ticket"].number == "25 %"
    assert tiles["Most accurate ticket"].number == "+2.00 pp"
    assert tiles["Iterations to early stop"].number == "25 % fewer"
    assert tiles["Iterations to early stop"].detail.endswith("50 % left; its reinit 900")
    assert tiles["Time per training step"].number == f"4.0{draw.TIMES} faster"
    assert tiles["Seconds of all rounds"].number == "27 % less"
    seconds = "4 s of training steps against 8 s of the whole net in each round and 5.5 s as w * mask"
    assert tiles["Seconds of all rounds"].detail == seconds


def test_headline_is_over_the_faster_of_the_two():
    found = rounds([(1, 0.95, 800, 1.0, 4.0), (0.5, 0.95, 600, 0.5, 4.0)])
    tiles = {tile.what: tile for tile in summary.tiles(found, tables.seconds(found))}
    assert tiles["Time per training step"].number == f"2.0{draw.TIMES} faster"
    steps = "0.5 ms against 1 ms of the whole net by the same steps and 4 ms as w * mask, with 50 % left"
    assert tiles["Time per training step"].detail == steps
    assert tiles["Seconds of all rounds"].number == "25 % less"


def test_headline_of_a_loss():
    found = rounds([(1, 0.95, 800, 2.0, 1.0), (0.5, 0.9, 1000, 2.0, 1.0)])
    tiles = {tile.what: tile.number for tile in summary.tiles(found, tables.seconds(found))}
    assert "Matching ticket" not in tiles
    assert tiles["Most accurate ticket"] == f"{draw.MINUS}5.00 pp"
    assert tiles["Iterations to early stop"] == "25 % more"
    assert tiles["Time per training step"] == f"2.0{draw.TIMES} slower"
    assert tiles["Seconds of all rounds"] == "100 % more"

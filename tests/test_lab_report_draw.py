from __future__ import annotations

from itertools import pairwise

import pytest

from sparselottery.lab import grid
from sparselottery.lab.report import draw, figures


def test_nothing_from_files_becomes_svg():
    evil = "</text><script>alert(1)</script>$x_$"
    rows = [
        {"control": control, "round": number, "density": 1 / (1 + number), "iterations": 10, "first_iteration": 0}
        | {f"early_stop_iteration{end}": 5 + number for end in ("", "_min", "_max")}
        for control in ("ticket", evil)
        for number in (0, 1)
    ]
    drawn = draw.svg(figures.against_weights(rows, "early_stop_iteration", "y"), "name")
    assert "<script" not in drawn
    assert "&lt;script" in drawn


def test_labels_do_not_overlap():
    with draw.canvas() as axes:
        axes.plot([0, 1], [0, 1])
        draw.label_ends(axes, [(0.98 + 0.001 * i, f"label {i}", "#000000") for i in range(12)])
        figure = axes.figure
        figure.draw_without_rendering()
        boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
        assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(boxes))
        assert boxes[-1].y1 <= figure.bbox.y1


def test_every_control_has_its_look():
    looks = [draw.style(name)[1:] for name in ("ticket", *grid.CONTROLS)]
    assert len(set(looks)) == len(looks)
    assert {name: draw.style(name).label for name in grid.CONTROLS if draw.style(name).label == name} == {
        "one-shot": "one-shot"
    }
    assert {draw.style(name).color for name in grid.CONTROLS} <= set(draw.DARK)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1314.3, "1,314 s"), (999.9, "1,000 s"), (462.2, "462 s"), (5.5, "5.5 s"), (0.01234, "0.0123 s")],
)
def test_seconds(value, expected):
    assert draw.seconds(value) == expected

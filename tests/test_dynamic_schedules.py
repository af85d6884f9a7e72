"""Laws of schedules and of distributions over layers."""

from __future__ import annotations

import math
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sparselottery.dynamic import (
    alternating,
    constant,
    cosine,
    cubic,
    erk,
    exponential,
    linear,
    phases,
    toward,
    uniform,
)

SHAPES = {"conv": (8, 3, 3, 3), "fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100), "none": (0, 5)}
DENSITY = st.floats(0.001, 1.0)
STEPS = st.integers(1, 10**6)


@pytest.mark.parametrize("kind", [linear, cubic, exponential])
@given(DENSITY, DENSITY, st.integers(0, 1000), STEPS, st.lists(st.integers(0, 2 * 10**6), min_size=2))
def test_a_schedule_is_monotone_and_has_its_ends(kind, initial, final, begin, length, steps):
    schedule = kind(final, begin + length, begin, initial)
    assert schedule(0) == schedule(begin) == initial
    assert schedule(begin + length) == schedule(begin + length + 7) == final
    values = [schedule(step) for step in sorted(steps)]
    slack = 1e-12  # of rounding
    falls = all(a >= b - slack for a, b in pairwise(values))
    rises = all(a <= b + slack for a, b in pairwise(values))
    assert falls if initial >= final else rises
    assert min(initial, final) <= min(values) <= max(values) <= max(initial, final)


@given(st.floats(0.0, 1.0), STEPS)
def test_the_exchanged_share_falls_to_nothing(initial, end):
    schedule = cosine(initial, end)
    assert (schedule(0), schedule(end), schedule(end + 1)) == (initial, 0.0, 0.0)
    assert schedule(end // 2) >= schedule(end) >= 0


def test_the_papers_values():
    assert cubic(0.05, 100)(50) == pytest.approx(0.05 + 0.95 / 8)
    assert linear(0.1, 100)(50) == pytest.approx(0.55)
    assert exponential(0.01, 100)(50) == pytest.approx(0.1)
    assert cosine(0.3, 100)(50) == pytest.approx(0.15)
    assert cosine(0.3, 100)(25) == pytest.approx(0.15 * (1 + math.sqrt(0.5)))
    assert constant(0.3)(7) == 0.3


def test_phases_and_turns():
    assert [phases({0: 1.0, 3: 0.1, 5: 0.5})(step) for step in range(7)] == [1, 1, 1, 0.1, 0.1, 0.5, 0.5]
    assert [alternating(0.1, 2, 1, 7)(step) for step in range(9)] == [0.1, 0.1, 1, 0.1, 0.1, 1, 0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: cubic(0.1, end=5, begin=5), "0 <= begin < end, got 5 and 5"),
        (lambda: linear(0.1, end=5, begin=-1), "got -1 and 5"),
        (lambda: exponential(0.0, end=5), "positive ends, got 1.0 and 0.0"),
        (lambda: exponential(-0.5, end=5), "positive ends, got 1.0 and -0.5"),
        (lambda: phases({1: 0.5}), r"a value for step 0, got those for \[1\]"),
        (lambda: alternating(0.1, 0, 3, 5), "at least a step of each, got 0 and 3"),
    ],
)
def test_what_schedules_refuse(call, told):
    with pytest.raises(ValueError, match=told):
        call()


@pytest.mark.parametrize("schedule", [linear, cubic, exponential])
def test_ends_that_are_no_numbers(schedule):
    with pytest.raises(TypeError, match="schedule: expected numbers, got None"):
        schedule(None, end=5)
    with pytest.raises(TypeError, match="schedule: expected numbers, got 'x'"):
        schedule(0.1, end="x")


def overall(densities):
    sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
    return sum(densities[name] * size for name, size in sizes.items()) / sum(sizes.values())


@pytest.mark.parametrize("kind", [uniform, erk, toward({**dict.fromkeys(SHAPES, 0.0), "fc3": 0.5})])
@given(density=DENSITY)
def test_a_distribution_has_the_density_of_all(kind, density):
    found = kind(SHAPES, density)
    assert found.keys() == SHAPES.keys()
    assert all(0 <= each <= 1 for each in found.values())
    least = 0.5 * 1000 / 266416 if kind not in (uniform, erk) else 0.0
    assert overall(found) == pytest.approx(max(density, least))


def test_erk_follows_the_sums_of_sides():
    found = erk(SHAPES, 0.02)
    assert found["fc1"] / found["fc2"] == pytest.approx((1084 / (300 * 784)) / (400 / (100 * 300)))
    assert erk(SHAPES, 0.5)["conv"] == erk(SHAPES, 0.5)["fc3"] == 1.0


def test_toward_is_in_step():
    final = {"a": 0.1, "b": 0.5}
    shapes = {"a": (10, 10), "b": (10, 10)}
    assert toward(final)(shapes, 1.0) == {"a": 1.0, "b": 1.0}
    assert toward(final)(shapes, 0.3) == pytest.approx(final)
    assert toward(final)(shapes, 0.65) == pytest.approx({"a": 0.55, "b": 0.75})

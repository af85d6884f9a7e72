"""How a number changes while a net trains: functions of the optimiser's step that know nothing else.

    density = cubic(0.05, end=10_000)        # 1.0 at step 0, 0.05 from step 10,000 on
    density(5_000)                           # 0.16875

A density is the share of the weights that survive. Before `begin` and after `end` a schedule has its two ends exactly,
and between them it is monotone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real

Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    """The same at every step.

    Examples:
        >>> constant(0.3)(500)
        0.3

    Raises TypeError if it is no number.
    """
    _check_numbers(value)
    return lambda step: value


def linear(final: float, end: int, begin: int = 0, initial: float = 1.0) -> Schedule:
    """As many weights go at every step: progressive pruning in one cycle (Qureshi et al. 2026).

    Examples:
        >>> linear(0.1, end=1_000)(500)
        0.55
    """
    return _between(initial, final, begin, end, lambda passed: final + (initial - final) * (1 - passed))


def cubic(final: float, end: int, begin: int = 0, initial: float = 1.0) -> Schedule:
    """Most weights go while there are many, few at the end (Zhu & Gupta 2017, eq. 1).

    Examples:
        >>> cubic(0.05, end=10_000)(5_000)
        0.16875
    """
    return _between(initial, final, begin, end, lambda passed: final + (initial - final) * (1 - passed) ** 3)


def exponential(final: float, end: int, begin: int = 0, initial: float = 1.0) -> Schedule:
    """The same share of those that are left goes at every step, as over the rounds of iterative pruning.

    Examples:
        >>> exponential(0.01, end=1_000)(500)
        0.1

    Raises ValueError unless both ends are positive.
    """
    _check_numbers(initial, final)
    if min(initial, final) <= 0:
        raise ValueError(f"exponential: expected positive ends, got {initial} and {final}")
    return _between(initial, final, begin, end, lambda passed: initial * (final / initial) ** passed)


def cosine(initial: float, end: int, begin: int = 0) -> Schedule:
    """From `initial` to 0: the share of the weights that RigL exchanges (Evci et al. 2020, section 3).

    Examples:
        >>> cosine(0.3, end=1_000)(500)
        0.15
    """
    return _between(initial, 0.0, begin, end, lambda passed: initial / 2 * (1 + math.cos(math.pi * passed)))


def phases(values: Mapping[int, float]) -> Schedule:
    """The value of the last key that is not after the step: {0: 1.0, 1000: 0.05} prunes once, at step 1000.

    Examples:
        >>> phases({0: 1.0, 1_000: 0.05})(1_000)
        0.05

    Raises ValueError without a value for step 0.
    """
    if 0 not in values:
        raise ValueError(f"phases: expected a value for step 0, got those for {list(values)}")
    return lambda step: values[max(start for start in values if start <= step)]


def alternating(sparse: float, sparse_steps: int, dense_steps: int, end: int) -> Schedule:
    """`sparse` for some steps and 1.0 for others, by turns, and `sparse` from `end` on (Jin et al. 2016).

    Examples:
        >>> alternating(0.1, sparse_steps=100, dense_steps=50, end=1_000)(120)
        1.0
    """
    if min(sparse_steps, dense_steps) < 1:
        raise ValueError(f"alternating: expected at least a step of each, got {sparse_steps} and {dense_steps}")
    return lambda step: sparse if step >= end or step % (sparse_steps + dense_steps) < sparse_steps else 1.0


def _check_numbers(*given: float) -> None:
    if strange := [each for each in given if not isinstance(each, Real)]:
        raise TypeError(f"schedule: expected numbers, got {strange[0]!r}")


def _between(initial: float, final: float, begin: int, end: int, at: Callable[[float], float]) -> Schedule:
    """`initial` until `begin`, `final` from `end` on; at(share of the way) between them, and never beyond them."""
    _check_numbers(initial, final, begin, end)
    if not 0 <= begin < end:
        raise ValueError(f"schedule: expected 0 <= begin < end, got {begin} and {end}")
    low, high = min(initial, final), max(initial, final)

    def schedule(step: int) -> float:
        if step <= begin:
            return initial
        if step >= end:
            return final
        return min(max(at((step - begin) / (end - begin)), low), high)

    return schedule

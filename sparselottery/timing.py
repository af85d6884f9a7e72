"""Timing that survives a shared machine: short bursts of every candidate in turn, then the medians."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from time import perf_counter

LEAST_BURSTS = 3


def interleaved_ms(
    *calls: Callable[[], object],
    bursts: int = 15,
    burst_ms: float = 3.0,
    limit_ms: float = math.inf,
    synchronize: Callable[[], object] = lambda: None,
) -> list[float]:
    """Median milliseconds of one call of each of ``calls``, over ``bursts`` bursts of about ``burst_ms`` each.

    The bursts alternate between the calls, so whatever slows the machine down for a while slows all of them. Where they
    would take more than ``limit_ms`` in all there are fewer, but at least 3. A burst is at least one call; it ends with
    ``synchronize()``, which waits for what the calls have begun on another device.
    """

    def ms(call: Callable[[], object], repeat: int) -> float:
        began = perf_counter()
        for _ in range(repeat):
            call()
        synchronize()
        return (perf_counter() - began) * 1e3 / repeat

    repeats, round_ms = [], 0.0
    for call in calls:
        call()
        synchronize()
        once = ms(call, 1)
        if once < burst_ms:  # short enough for threads that have yet to wake up to count
            once = ms(call, 3)
        repeats.append(max(1, round(burst_ms / once)))
        round_ms += repeats[-1] * once
    columns: list[list[float]] = [[] for _ in calls]
    for _ in range(int(min(bursts, max(LEAST_BURSTS, limit_ms / round_ms)))):
        for call, repeat, column in zip(calls, repeats, columns, strict=True):
            column.append(ms(call, repeat))
    return [median(column) for column in columns]

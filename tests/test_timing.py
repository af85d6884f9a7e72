from __future__ import annotations

import pytest

from sparselottery import timing


def test_bursts_alternate():
    calls = []
    timing.interleaved_ms(lambda: calls.append("a"), lambda: calls.append("b"), bursts=4, burst_ms=0.01)
    changes = [call for previous, call in zip([None, *calls], calls, strict=False) if call != previous]
    assert changes == ["a", "b"] * 5  # once to warm up, then four bursts of each


def test_every_burst_ends_with_a_wait():
    log = []
    timing.interleaved_ms(
        lambda: log.append("a"), lambda: log.append("b"), bursts=3, burst_ms=1e-9, synchronize=lambda: log.append("|")
    )
    assert "".join(log) == "a|a|b|b|" + "a|b|" * 3  # to warm up, to see how long it takes, then the bursts


@pytest.fixture
def clock(monkeypatch):
    """A second passes whenever somebody looks."""
    ticks = iter(range(1000))
    monkeypatch.setattr(timing, "perf_counter", lambda: next(ticks))


@pytest.mark.usefixtures("clock")
def test_gives_the_median_of_one_call():
    assert timing.interleaved_ms(lambda: None, bursts=3, burst_ms=1000) == [1000]
    assert timing.interleaved_ms(lambda: None, bursts=3, burst_ms=2000) == [pytest.approx(1000 / 6)]  # 3 calls, then 6


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("bursts", "limit_ms", "expected"), [(7, 10_000, 5), (7, 1, 3), (7, 1e9, 7), (2, 1, 2)])
def test_a_limit_leaves_fewer_bursts(bursts, limit_ms, expected):
    calls = []
    timing.interleaved_ms(lambda: calls.append("a"), lambda: None, bursts=bursts, burst_ms=1, limit_ms=limit_ms)
    assert len(calls) == 2 + expected

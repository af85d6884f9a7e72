from __future__ import annotations

import pytest

from sparselottery.lab import timing


def test_bursts_alternate():
    calls = []
    timing.interleaved_ms(lambda: calls.append("a"), lambda: calls.append("b"), bursts=4, burst_ms=0.01)
    changes = [call for previous, call in zip([None, *calls], calls, strict=False) if call != previous]
    assert changes == ["a", "b"] * 5  # once to warm up, then four bursts of each


def test_gives_the_median_of_one_call(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(timing, "perf_counter", lambda: next(clock))  # every burst lasts a second
    assert timing.interleaved_ms(lambda: None, bursts=3, burst_ms=4000) == [250]  # 4 calls in each


def test_linear_ms():
    row = timing.linear_ms(4, 8, 6, 0.5)
    assert list(row) == ["forward_sparse_ms", "forward_dense_ms", "both_sparse_ms", "both_dense_ms"]
    assert min(row.values()) > 0


def test_linear_ms_without_a_weight():
    assert min(timing.linear_ms(4, 8, 6, 0).values()) > 0


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan")])
def test_linear_ms_of_no_density(density):
    with pytest.raises(ValueError, match="density"):
        timing.linear_ms(4, 8, 6, density)
